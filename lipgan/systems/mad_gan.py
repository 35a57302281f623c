"""MAD-GAN: several generators (Ghosh, Kulharia, Namboodiri, Torr and Dokania 2018, arXiv:1704.02906)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipgan._checks import as_whole
from lipgan.models import Output
from lipgan.objectives.divergences import widen
from lipgan.recipe import Recipe
from lipgan.systems._readout import Readout
from lipgan.systems._unused import refuse
from lipgan.systems.base import Batch, LossOutput
from lipgan.systems.gan import GAN

__all__ = ["MADGAN", "GeneratorMixture", "OriginCritic"]


class MADGAN(GAN):
    """k generators, and a critic that also has to say which of them made a sample.

    The critic has k + 1 outputs ``D_1 .. D_{k+1}`` that sum to 1, the last for real samples. It maximizes
    ``E log D_{k+1}(x) + mean_i E log D_i(G_i(z))`` and each generator minimizes ``-E log D_{k+1}(G_i(z))`` (the
    paper's eq. 6 and, in its non-saturating form, eq. 5). To tell the generators apart, the critic pushes them to
    different modes; at the optimum the mixture of all is the data (theorem 1), and the critic's loss, where it has
    nothing to tell them apart by, ``2 log(k + 1)``.

    The score is ``log(D_{k+1} / (1 - D_{k+1}))``, so that k = 1 is the ordinary training scheme. A mean over the
    generators stands in place of the paper's sum. What is simplified: the generators share no layers, where the paper's
    for images have the first ones in common.

    Options:
        generators: k. Samples are made by the generators in turn.
    """

    OPTIONS: ClassVar[Mapping[str, float]] = MappingProxyType({"generators": 4})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse(self.recipe, "label_smoothing", "generator_objective", "conditioning", "minibatch")

    @classmethod
    def build(cls, recipe: Recipe, shape: tuple[int, ...], classes: int) -> tuple[nn.Module, nn.Module]:
        """The mixture of generators, and the critic of k + 1 classes."""
        k = recipe.options.get("generators", cls.OPTIONS["generators"])
        k = as_whole("generators", k)
        pairs = [super(MADGAN, cls).build(recipe, shape, classes) for _ in range(k)]
        return GeneratorMixture([generator for generator, _ in pairs]), OriginCritic(pairs[0][1], int(k))

    def critic_loss(self, batch: Batch) -> LossOutput:
        """Cross entropies of the origins of real and of fake samples."""
        real, fake = self.seen(batch.real, batch), self.seen(self.fake(batch), batch)
        real_output, fake_output = self.judge_both(real, fake, batch, full=True)
        assert real_output.logits is not None
        assert fake_output.logits is not None
        origins = batch.z[:, -1].long()
        reality = torch.full_like(origins, fake_output.logits.shape[1] - 1)
        loss = F.cross_entropy(widen(real_output.logits), reality)
        loss = loss + F.cross_entropy(widen(fake_output.logits), origins)
        accuracy = (fake_output.logits[:, :-1].argmax(1) == origins).float().mean()
        estimate = self.loss.estimate(real_output.scores.detach(), fake_output.scores.detach())
        terms = {"critic_loss": loss, "estimate": estimate, "origin_accuracy": accuracy}
        if self.recipe.penalty != "none":
            terms["penalty"] = self.penalty(real, fake, batch)
            loss = loss + terms["penalty"]
        return LossOutput(self.averaged(loss, "critic"), terms)


class GeneratorMixture(nn.Module):
    """Several generators as one: the last number of ``z`` says which.

    Args:
        generators: of noise of one length, without labels.

    Attributes:
        latent_dim: the length of the noise and one.
    """

    def __init__(self, generators: Sequence[nn.Module]) -> None:
        super().__init__()
        self.generators = nn.ModuleList(generators)
        noise = generators[0].latent_dim
        assert isinstance(noise, int)
        self.latent_dim = noise + 1

    def latents(self, n: int, random: torch.Generator) -> Tensor:
        """``[n, latent_dim]``: noise, and the generators in turn."""
        noise = torch.randn(n, self.latent_dim - 1, generator=random)
        turns = torch.arange(n) % len(self.generators)
        return torch.cat([noise, turns[:, None].to(noise)], 1)

    def forward(self, z: Tensor) -> Tensor:
        """``z [B, latent_dim]`` -> samples ``[B, ...]``."""
        noise, which = z[:, :-1], z[:, -1].long()
        rows = [(which == i).nonzero().squeeze(1) for i in range(len(self.generators))]
        parts = [generator(noise[r]) for generator, r in zip(self.generators, rows, strict=True) if len(r)]
        return torch.cat(parts)[torch.cat(rows).argsort()]


class OriginCritic(nn.Module):
    """Samples ``[B, ...]`` to the log odds of being real, by logits of k generators and of the data.

    Args:
        critic: whose layers are used.
        generators: k.
    """

    def __init__(self, critic: nn.Module, generators: int) -> None:
        super().__init__()
        self.logits = Readout(critic, generators + 1)

    def forward(self, x: Tensor, labels: None = None, *, full: bool = False) -> Tensor | Output:
        """``x [B, ...]`` -> scores ``[B]``, or with ``full`` an `Output` with logits ``[B, k + 1]``, the data last.

        The features are the logits of the generators.
        """
        logits = self.logits(x)
        scores = logits[:, -1] - logits[:, :-1].logsumexp(1)
        return Output(scores, logits[:, :-1], logits) if full else scores
