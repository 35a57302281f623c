"""Mode-regularized GAN (Che, Li, Jacob, Bengio and Li 2017, arXiv:1612.02136)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from lipgan.recipe import Recipe
from lipgan.systems._readout import Readout
from lipgan.systems._unused import refuse
from lipgan.systems.base import Batch, LossOutput
from lipgan.systems.gan import GAN

__all__ = ["EncodedGenerator", "ModeRegularized"]


class ModeRegularized(GAN):
    """An encoder E beside the generator, so that every real sample is a target of the generator.

    The generator and the encoder minimize (the paper's section 3.1)::

        -E log D(G(z)) + E[lambda_1 d(x, G(E(x))) - lambda_2 log D(G(E(x)))]

    The first of the new terms has the generator restore each sample, the second has what it restores look real: around
    a mode that no noise reaches yet, the gradient of ``-log D(G(z))`` says nothing, that of the new terms does. The
    encoder has no part in the first term, so both minimize the same sum. The critic's update is the ordinary one.

    d is the mean squared difference. This is the regularized GAN of section 3.2; the manifold-diffusion training of
    section 3.3, in two steps with a critic of their own, is left out. The encoder has the layers of the critic.

    Options:
        reconstruction_weight: lambda_1; 0.2 in the paper's experiments with digits.
        realism_weight: lambda_2; 0.4 there.
    """

    OPTIONS: ClassVar[Mapping[str, float]] = MappingProxyType({"reconstruction_weight": 0.2, "realism_weight": 0.4})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse(self.recipe, "generator_objective", "conditioning")

    @classmethod
    def build(cls, recipe: Recipe, shape: tuple[int, ...], classes: int) -> tuple[nn.Module, nn.Module]:
        """The generator with its encoder, and the critic."""
        generator, critic = super().build(recipe, shape, classes)
        _, encoder = super().build(recipe, shape, classes)
        return EncodedGenerator(generator, Readout(encoder, recipe.latent_dim)), critic

    def generator_loss(self, batch: Batch) -> LossOutput:
        """The objective on samples, the distance of reconstructions, the objective on them."""
        fake, restored = self.generator(batch.z, batch.real)
        real_scores = self.judge(self.seen(batch.real, batch), None).scores if self.loss.paired else None
        loss, realism = (
            self.loss.generator_loss(self.judge(self.seen(samples, batch), None).scores, real_scores)
            for samples in (fake, restored)
        )
        reconstruction = (restored - batch.real).square().mean()
        terms = {"generator_loss": loss, "reconstruction": reconstruction, "realism": realism}
        loss = loss + self.option("reconstruction_weight") * reconstruction + self.option("realism_weight") * realism
        return LossOutput(self.averaged(loss, "generator"), terms)


class EncodedGenerator(nn.Module):
    """A generator and an encoder from samples to its noise.

    Args:
        generator: without labels.
        encoder: ``[B, ...]`` -> ``[B, latent_dim]``.
    """

    def __init__(self, generator: nn.Module, encoder: nn.Module) -> None:
        super().__init__()
        self.generator, self.encoder = generator, encoder
        self.latent_dim = generator.latent_dim

    def forward(self, z: Tensor, real: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """``z [B, latent_dim]`` -> samples ``[B, ...]``; with ``real [B, ...]`` also what is restored of it."""
        samples: Tensor = self.generator(z)
        return samples if real is None else (samples, self.generator(self.encoder(real)))
