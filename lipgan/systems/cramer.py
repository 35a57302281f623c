"""Cramer GAN (Bellemare, Danihelka, Dabney et al. 2017, arXiv:1705.10743)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lipgan._checks import as_whole
from lipgan.models import Output
from lipgan.objectives.divergences import widen
from lipgan.recipe import Recipe
from lipgan.systems._readout import Readout
from lipgan.systems._unused import refuse
from lipgan.systems.base import Batch, LossOutput
from lipgan.systems.gan import GAN

__all__ = ["Cramer", "CramerCritic"]


class Cramer(GAN):
    """The energy distance of features h that the critic learns.

    With two independent samples ``x_g`` and ``x_g'`` of the generator (the paper's algorithm 1)::

        L_g         = |h(x) - h(x_g)| + |h(x) - h(x_g')| - |h(x_g) - h(x_g')|
        f(y)        = |h(y) - h(x_g')| - |h(y)|
        L_surrogate = f(x) - f(x_g)
        L_critic    = -L_surrogate + lambda (|grad f(x_hat)| - 1)^2,    x_hat between x and x_g

    The generator's loss is the energy distance but for ``-|h(x) - h(x')|``, which does not depend on it; its gradient
    is unbiased, which that of the Wasserstein distance of two batches is not. The surrogate, which needs one real
    sample only, is logged as "estimate". The recipe's penalty is lambda's, its objective ("loss") is not used.

    Options:
        features: how many numbers h has; 256 in the paper.
    """

    OPTIONS: ClassVar[Mapping[str, float]] = MappingProxyType({"features": 256})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse(self.recipe, "loss", "label_smoothing", "generator_objective", "conditioning", "minibatch")

    @classmethod
    def build(cls, recipe: Recipe, shape: tuple[int, ...], classes: int) -> tuple[nn.Module, nn.Module]:
        """The generator, and the features h."""
        count = recipe.options.get("features", cls.OPTIONS["features"])
        count = as_whole("features", count)
        generator, critic = super().build(recipe, shape, classes)
        return generator, CramerCritic(critic, int(count))

    def critic_loss(self, batch: Batch) -> LossOutput:
        """Minus the surrogate, and the penalty of f."""
        real, fake = self.seen(batch.real, batch), self.seen(self.fake(batch), batch)
        other = self.seen(self.generator(batch.randn(batch.z)), batch)
        surrogate = (self.critic(real, other) - self.critic(fake, other)).mean()
        terms = {"critic_loss": -surrogate, "estimate": surrogate.detach()}
        loss = -surrogate
        if self.recipe.penalty != "none":
            terms["penalty"] = self.penalty(real, fake, batch, critic_args=(other,))
            loss = loss + terms["penalty"]
        return LossOutput(self.averaged(loss, "critic"), terms)

    def generator_loss(self, batch: Batch) -> LossOutput:
        """The energy distance of the features, but for its constant."""
        samples = [self.fake(batch), self.generator(batch.randn(batch.z))]
        x, g, other = (self.critic(self.seen(s, batch), full=True).features for s in (batch.real, *samples))
        loss = (norm(x - g) + norm(x - other) - norm(g - other)).mean()
        return LossOutput(self.averaged(loss, "generator"), {"generator_loss": loss})


class CramerCritic(nn.Module):
    """f of samples, from their features h.

    Args:
        critic: whose layers make the features.
        features: how many.
    """

    def __init__(self, critic: nn.Module, features: int) -> None:
        super().__init__()
        self.features = Readout(critic, features)

    def forward(self, x: Tensor, other: Tensor | None = None, *, full: bool = False) -> Tensor | Output:
        """``f(x) = |h(x) - h(other)| - |h(x)|``, ``[B]``, for as many samples of the generator ``other``.

        Without ``other`` the score is ``-|h(x)|``, the part that does not depend on it; with ``full`` an `Output`.
        """
        h: Tensor = self.features(x)
        scores = -norm(h)
        if other is not None:
            scores = scores + norm(h - self.features(other))
        return Output(scores, h, None) if full else scores


def norm(x: Tensor) -> Tensor:
    """Of the rows of ``x [B, d]``, with all its gradients 0 where it is 0."""
    squares = widen(x).square().sum(1)
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1).sqrt(), 0)
