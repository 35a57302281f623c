"""Ways to a whole critic step, loss with penalty: `lipgan.critic_loss` and the textbook."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lipgan

Step = Callable[[nn.Module, Tensor, Tensor, str, int], Tensor]


def loss_of(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """The non-saturating loss of a critic."""
    return F.softplus(-real_scores).mean() + F.softplus(fake_scores).mean()


def by_textbook(critic: nn.Module, real: Tensor, fake: Tensor, kind: str, seed: int) -> Tensor:
    """Loss and penalty of weight 10 by double backward, from one forward pass where both are taken at the samples."""
    if kind == "r1":
        real = real.detach().requires_grad_()
        real_scores = critic(real)
        (gradient,) = torch.autograd.grad(real_scores.sum(), real, create_graph=True)
        return loss_of(real_scores, critic(fake)) + 5 * gradient.flatten(1).square().sum(1).mean()
    both = torch.cat([real, fake])
    if kind == "r1+r2":
        both.requires_grad_()
        scores = critic(both)
        (gradient,) = torch.autograd.grad(scores.sum(), both, create_graph=True)
        return loss_of(*scores.chunk(2)) + 10 * gradient.flatten(1).square().sum(1).mean()
    scores = critic(both)
    eps = torch.rand(len(real), *[1] * (real.ndim - 1), generator=torch.Generator().manual_seed(seed))
    mixed = (eps * real + (1 - eps) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
    norms: Tensor = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    return loss_of(*scores.chunk(2)) + 10 * (norms - 1).square().mean()


def by_gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor, kind: str, seed: int) -> Tensor:
    """The loss beside `lipgan.gradient_penalty`, which runs a forward pass of its own."""
    generator = torch.Generator().manual_seed(seed)
    penalty = lipgan.gradient_penalty(critic, real, fake, kind=kind, generator=generator)
    return loss_of(critic(real), critic(fake)) + penalty


def by_critic_loss(critic: nn.Module, real: Tensor, fake: Tensor, kind: str, seed: int) -> Tensor:
    """`lipgan.critic_loss` of that loss by its name."""
    generator = torch.Generator().manual_seed(seed)
    return lipgan.critic_loss(critic, real, fake, "non-saturating", kind=kind, generator=generator).total


def of_a_function(critic: nn.Module, real: Tensor, fake: Tensor, kind: str, seed: int) -> Tensor:
    """`lipgan.critic_loss` of the function that the textbook takes."""
    generator = torch.Generator().manual_seed(seed)
    return lipgan.critic_loss(critic, real, fake, loss_of, kind=kind, generator=generator).total


STEPS: dict[str, Step] = {
    "textbook": by_textbook,
    "gradient_penalty": by_gradient_penalty,
    "of a function": of_a_function,
    "critic_loss": by_critic_loss,
}
