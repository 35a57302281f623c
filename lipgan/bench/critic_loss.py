"""A whole critic step, loss with penalty and all gradients: `lipgan.critic_loss` against the textbook."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lipgan
from lipgan.bench.harness import interleave

Step = Callable[[nn.Module, Tensor, Tensor, str], Tensor]


def loss_of(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """The non-saturating loss of a critic."""
    return F.softplus(-real_scores).mean() + F.softplus(fake_scores).mean()


def by_textbook(critic: nn.Module, real: Tensor, fake: Tensor, kind: str) -> Tensor:
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
    eps = torch.rand(len(real), *[1] * (real.ndim - 1))
    mixed = (eps * real + (1 - eps) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
    norms: Tensor = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    return loss_of(*scores.chunk(2)) + 10 * (norms - 1).square().mean()


def by_gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor, kind: str) -> Tensor:
    """The loss beside `lipgan.gradient_penalty`, which runs a forward pass of its own."""
    return loss_of(critic(real), critic(fake)) + lipgan.gradient_penalty(critic, real, fake, kind=kind)


def by_critic_loss(critic: nn.Module, real: Tensor, fake: Tensor, kind: str) -> Tensor:
    """`lipgan.critic_loss`."""
    return lipgan.critic_loss(critic, real, fake, loss_of, kind=kind).total


STEPS: dict[str, Step] = {
    "textbook": by_textbook,
    "gradient_penalty": by_gradient_penalty,
    "critic_loss": by_critic_loss,
}


class _Variant:
    """A critic and a way; `step` gives its parameters the gradients of the whole loss."""

    def __init__(
        self, build: Callable[[], nn.Module], shape: tuple[int, ...], kind: str, way: Step, seed: int, *, layout: bool
    ) -> None:
        torch.manual_seed(seed)
        self.critic, self.kind, self.way = build(), kind, way
        self.real, self.fake = torch.randn(shape), torch.randn(shape)
        if layout:
            self.critic.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.real = self.real.contiguous(memory_format=torch.channels_last)
            self.fake = self.fake.contiguous(memory_format=torch.channels_last)

    def step(self) -> Tensor:
        self.critic.zero_grad()
        total = self.way(self.critic, self.real, self.fake, self.kind)
        total.backward()  # type: ignore[no-untyped-call]
        return total.detach()


def times(
    build: Callable[[], nn.Module], shape: tuple[int, ...], kind: str, seed: int, seconds: float
) -> dict[str, float]:
    """Seconds of a step in each way; "textbook" in the faster of PyTorch's two layouts for images.

    Raises:
        AssertionError: the ways disagree in the loss or a gradient.
    """
    variants = {name: _Variant(build, shape, kind, way, seed, layout=False) for name, way in STEPS.items()}
    if len(shape) == 4:
        variants["textbook, channels_last"] = _Variant(build, shape, kind, by_textbook, seed, layout=True)
    _check(variants)
    found = interleave({name: variant.step for name, variant in variants.items()}, seconds=seconds, warmup=3)
    found["textbook"] = min(found["textbook"], found.pop("textbook, channels_last", found["textbook"]))
    return found


def _check(variants: dict[str, _Variant]) -> None:
    results = {}
    for name, variant in variants.items():
        # Dropout draws different numbers where there are different numbers of forward passes.
        variant.critic.eval()
        torch.manual_seed(0)
        total = variant.step()
        variant.critic.train()
        results[name] = (
            total,
            [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in variant.critic.parameters()],
        )
    expected_total, expected = results["textbook"]
    scale = max(float(grad.abs().max()) for grad in expected)
    for name, (total, grads) in results.items():
        error = max(float((a - b).abs().max()) for a, b in zip(grads, expected, strict=True)) / scale
        error = max(error, float((total - expected_total).abs() / expected_total.abs()))
        if not error < 1e-3:
            raise AssertionError(f"{name}: the loss or its gradients are off by {error:.1e}, relative")
