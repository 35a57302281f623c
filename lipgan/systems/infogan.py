"""InfoGAN (Chen, Duan, Houthooft, Schulman, Sutskever and Abbeel 2016, arXiv:1606.03657)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
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

__all__ = ["CodedGenerator", "InfoGAN", "ReadingCritic"]

#: Codes between -1 and 1, as many as the paper has for digits.
CONTINUOUS = 2


class InfoGAN(GAN):
    """A part of the noise is a code, and the critic has to read it from the samples.

    The noise is ``(z, c)`` with a categorical code of equally likely values and two codes that are uniform on [-1, 1].
    Both networks add to their objective ``-lambda L_I`` (the paper's eq. 5 and 6), where ::

        L_I = E log Q(c | G(z, c)) + H(c) <= I(c; G(z, c))

    with the posterior ``Q`` that the critic reads from its features: the generator must not lose what the code says,
    and so gives its values a meaning. "mutual_information" is the categorical part of the bound in nats, at most the
    logarithm of the number of values; "code_error" the mean squared error of the two others.

    Q of a continuous code is normal with the variance 1, so that its part of ``-L_I`` is half its squared error, but
    for a constant. What is simplified: Q is one linear layer on the critic's last ones, where the paper has two.

    Options:
        code: values of the categorical code, 10 in the paper.
        categorical_weight, continuous_weight: lambda of either kind; 1 and 0.1 in the paper.
    """

    OPTIONS: ClassVar[Mapping[str, float]] = MappingProxyType(
        {"code": 10, "categorical_weight": 1.0, "continuous_weight": 0.1}
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse(self.recipe, "generator_objective", "conditioning", "minibatch")

    @classmethod
    def build(cls, recipe: Recipe, shape: tuple[int, ...], classes: int) -> tuple[nn.Module, nn.Module]:
        """The generator of noise and codes, and the critic that reads the codes."""
        values = recipe.options.get("code", cls.OPTIONS["code"])
        values = as_whole("code", values, 2)
        entries = dataclasses.replace(recipe, latent_dim=recipe.latent_dim + values + CONTINUOUS)
        generator, critic = super().build(entries, shape, classes)
        return CodedGenerator(generator, values), ReadingCritic(critic, values)

    def critic_loss(self, batch: Batch) -> LossOutput:
        """The critic's objective, and what it misreads."""
        real, fake = self.seen(batch.real, batch), self.seen(self.fake(batch), batch)
        real_output, fake_output = self.judge_both(real, fake, batch, full=True)
        loss = self.loss.critic_loss(real_output.scores, fake_output.scores)
        estimate = self.loss.estimate(real_output.scores.detach(), fake_output.scores.detach(), loss.detach())
        misread, read = self.misread(fake_output, batch)
        terms = {"critic_loss": loss, "estimate": estimate, **read}
        loss = loss + misread
        if self.recipe.penalty != "none":
            terms["penalty"] = self.penalty(real, fake, batch)
            loss = loss + terms["penalty"]
        return LossOutput(self.averaged(loss, "critic"), terms)

    def generator_loss(self, batch: Batch) -> LossOutput:
        """The generator's objective, and what the critic misreads."""
        output = self.judge(self.seen(self.fake(batch), batch), None, full=True)
        real_scores = self.judge(self.seen(batch.real, batch), None).scores if self.loss.paired else None
        loss = self.loss.generator_loss(output.scores, real_scores)
        terms = {"generator_loss": loss}
        return LossOutput(self.averaged(loss + self.misread(output, batch)[0], "generator"), terms)

    def misread(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """``-lambda L_I`` without its constants, and what is logged of it."""
        assert output.logits is not None
        read = widen(output.logits)
        logits, means = read[:, :-CONTINUOUS], read[:, -CONTINUOUS:]
        values = logits.shape[1]
        codes = batch.z[:, -values - CONTINUOUS :]
        crossed = F.cross_entropy(logits, codes[:, :values].argmax(1))
        error = (means - codes[:, values:]).square().mean()
        loss = self.option("categorical_weight") * crossed
        loss = loss + self.option("continuous_weight") * CONTINUOUS * error / 2
        return loss, {"mutual_information": math.log(values) - crossed.detach(), "code_error": error.detach()}


class CodedGenerator(nn.Module):
    """A generator whose noise ends in a code: the one-hot vector of a value, and numbers between -1 and 1.

    Args:
        generator: without labels, of noise and code together.
        values: of the categorical code.

    Attributes:
        latent_dim: numbers of noise and code together.
    """

    def __init__(self, generator: nn.Module, values: int) -> None:
        super().__init__()
        self.generator, self.values = generator, values
        assert isinstance(generator.latent_dim, int)
        self.latent_dim: int = generator.latent_dim

    def latents(self, n: int, random: torch.Generator) -> Tensor:
        """``[n, latent_dim]``: noise, and codes at random."""
        noise = torch.randn(n, self.latent_dim - self.values - CONTINUOUS, generator=random)
        value = F.one_hot(torch.randint(self.values, (n,), generator=random), self.values)
        return torch.cat([noise, value, 2 * torch.rand(n, CONTINUOUS, generator=random) - 1], 1)

    def forward(self, z: Tensor) -> Tensor:
        """``z [B, latent_dim]`` -> samples ``[B, ...]``."""
        samples: Tensor = self.generator(z)
        return samples


class ReadingCritic(nn.Module):
    """Samples ``[B, ...]`` to scores, and to what they say of the code.

    Args:
        critic: whose layers are used.
        values: of the categorical code.
    """

    def __init__(self, critic: nn.Module, values: int) -> None:
        super().__init__()
        self.readout = Readout(critic, 1 + values + CONTINUOUS)

    def forward(self, x: Tensor, labels: None = None, *, full: bool = False) -> Tensor | Output:
        """``x [B, ...]`` -> scores ``[B]``, or with ``full`` an `Output`.

        Its logits are ``[B, values + 2]``, of the categorical code and the means of the others; so are its features.
        """
        numbers: Tensor = self.readout(x)
        scores, logits = numbers[:, 0], numbers[:, 1:]
        return Output(scores, logits, logits) if full else scores
