"""How the studies train their critics: Adam, a learning rate that falls to 0, the losses and penalties of lipgan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lipgan.models.lipschitz import LipschitzCritic
from lipgan.models.mlp import MLPCritic
from lipgan.nn.spectral_norm_group import group_spectral_norm
from lipgan.objectives.regularizers import clip_weights
from lipgan.penalties.critic_loss import critic_loss

__all__ = ["CONSTRAINTS", "Constraint", "build", "slopes", "train"]


class Constraint(NamedTuple):
    """What keeps a critic from being too steep: a penalty, a clip value, or its layers."""

    kind: str | None = None
    clip: float | None = None
    spectral: bool = False
    orthogonal: bool = False


#: By the names that the studies give them.
CONSTRAINTS: Mapping[str, Constraint] = MappingProxyType(
    {
        "none": Constraint(),
        "clipping 0.01": Constraint(clip=0.01),
        "clipping 0.1": Constraint(clip=0.1),
        "penalty": Constraint(kind="wgan-gp"),
        "spectral norm": Constraint(spectral=True),
        "GroupSort": Constraint(orthogonal=True),
    }
)


def build(constraint: Constraint, dim: int, width: int) -> nn.Module:
    """A critic of points ``[B, dim]`` with three hidden layers, weights drawn from the global random numbers."""
    if constraint.orthogonal:
        return LipschitzCritic((dim,), width)
    critic: nn.Module = MLPCritic((dim,), width)
    if constraint.spectral:
        group_spectral_norm(critic)
    return critic


def train(
    critic: nn.Module,
    draw: Callable[[], tuple[Tensor, Tensor]],
    loss: str,
    constraint: Constraint,
    *,
    steps: int,
    lr: float,
    generator: torch.Generator,
    watch: Callable[[int], None] = lambda step: None,
) -> None:
    """Minimize the critic's loss.

    Args:
        critic: changed in place; in eval mode at the end.
        draw: gives real and fake samples of a step.
        loss: a name of `lipgan.losses`.
        constraint: that `build` made the critic with.
        steps: of Adam with betas (0.5, 0.9); the learning rate falls from ``lr`` to 0 on a line.
        generator: draws the points of the penalty.
        watch: is told the number of each step when it is done, from 1.
    """
    optimizer = torch.optim.Adam(critic.parameters(), lr=lr, betas=(0.5, 0.9))
    critic.train()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - (step - 1) / steps)
        real, fake = draw()
        optimizer.zero_grad()
        # Real and fake samples meet the same orthogonal weights, whose factorization is most of a step.
        with parametrize.cached() if constraint.orthogonal else nullcontext():
            result = critic_loss(critic, real, fake, loss, kind=constraint.kind, generator=generator)
        result.total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if constraint.clip is not None:
            clip_weights(critic, constraint.clip)
        watch(step)
    critic.eval()


def slopes(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient ``[B, d]`` of a function of each sample ``[B, d]``."""
    points = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(function(points).sum(), points)
    return gradient
