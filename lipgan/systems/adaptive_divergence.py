"""Adaptive divergence (Borisyak, Gaintseva and Ustyuzhanin 2020, PeerJ Computer Science 6:e274, arXiv:1912.00520)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from lipgan.objectives import losses
from lipgan.systems._unused import refuse
from lipgan.systems.base import Batch, LossOutput
from lipgan.systems.gan import GAN

__all__ = ["AdaptiveDivergence", "strength"]


class AdaptiveDivergence(GAN):
    """A critic that is only as strong as it has to be to tell the two distributions apart.

    Distributions that are far apart are told apart by a weak critic, whose gradients reach far; a strong one is needed
    when they are near. The adaptive divergence of the paper (its definition 2 and, for neural networks, its regularized
    form) is that of the weakest critic which still tells them apart so well::

        minimize  H(D) + c(1 - h / log 2) R(D),    H = -1/2 E log D(x) - 1/2 E log(1 - D(G(z)))

    where h follows H, ``h <- rho h + (1 - rho) H`` from ``log 2`` on, R is the sum of the squares of the weights, and c
    rises, while h falls, from 0 at ``h = log 2``, where the critic tells nothing yet and is free. As in the authors'
    code c is ``-weight log(h / log 2)``, their logarithmic capacity, with h no less than a hundredth of log 2.

    "capacity_penalty" and "strength" are ``c R`` and c. The estimate is log 4 minus twice H, that of an ordinary
    critic, which bounds twice the Jensen-Shannon divergence. What is simplified: the paper trains a critic from new to
    the end for each step of the generator, here it takes ``n_critic`` updates, and h goes on from step to step. In the
    trained loss H is doubled, as is everybody's, and so is ``c R``.

    Options:
        weight: of c; 0.1 in the authors' code, for networks of one hidden layer.
        memory: rho.
    """

    OPTIONS: ClassVar[Mapping[str, float]] = MappingProxyType({"weight": 1e-3, "memory": 0.99})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse(self.recipe, "label_smoothing")
        if not isinstance(self.loss, losses.Minimax):
            raise ValueError(
                f"loss must be 'minimax' or 'non-saturating' for the system 'adaptive-divergence', "
                f"got {self.recipe.loss!r}"
            )
        if self.option("weight") < 0:
            raise ValueError(f"weight must be at least 0, got {self.option('weight')!r}")
        if not 0 <= self.option("memory") < 1:
            raise ValueError(f"memory must lie in [0, 1), got {self.option('memory')!r}")
        device = next(self.critic.parameters()).device
        self.entropy = torch.full((), math.log(2), dtype=torch.float64, device=device)
        self._measured: list[Tensor] = []

    def critic_loss(self, batch: Batch) -> LossOutput:
        """The ordinary loss, and the penalty of the critic's strength."""
        outcome = super().critic_loss(batch)
        self._measured.append(outcome.terms["critic_loss"].detach().double() / 2)
        now = strength(self.entropy, self.option("weight")).to(outcome.loss)
        weights = [p.square().sum() for p in self.critic.parameters() if p.ndim > 1]
        penalty = 2 * now * torch.stack(weights).sum()
        return LossOutput(outcome.loss + penalty, {**outcome.terms, "capacity_penalty": penalty, "strength": now})

    def after_critic_update(self) -> None:
        """Moves h on."""
        super().after_critic_update()
        measured = self.average(torch.stack(self._measured).mean())
        self._measured.clear()
        rho = self.option("memory")
        self.entropy = rho * self.entropy + (1 - rho) * measured

    def state_dict(self) -> dict[str, Any]:
        """h, beside what `GAN` keeps."""
        return {**super().state_dict(), "entropy": self.entropy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        super().load_state_dict(state)
        self.entropy = state["entropy"].to(self.entropy.device)


def strength(entropy: Tensor, weight: float) -> Tensor:
    """The factor c of the regularizer for a cross entropy: 0 for ``log 2`` and more."""
    return -weight * (entropy / math.log(2)).clamp(0.01, 1).log()
