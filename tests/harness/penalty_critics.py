"""Critics and samples that the tests of the penalties share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor, nn

from lipgan import gradient_penalty

ENGINES = ("fused", "autograd")


KINDS = ("wgan-gp", "lp", "dragan", "r1", "r2", "r1+r2", "max")


CPU = torch.device("cpu")


def image_critic() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(4 * 16, 8),
        nn.SiLU(),
        nn.Linear(8, 1),
    ).double()


class Conditional(nn.Module):
    """A critic with labels, a tensor that is the same for every sample, and one that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 1)
        self.labels = nn.Embedding(3, 6)

    def forward(self, x: Tensor, labels: Tensor, shared: Tensor, scale: float = 1.0) -> Tensor:
        h = torch.tanh(self.first(x) + shared)
        return scale * (self.last(h).squeeze(1) + (h * self.labels(labels)).sum(1))


class Linear(nn.Module):
    """``score = <w, x>``, whose gradient is w for every sample."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.w = nn.Parameter(torch.randn(shape, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.w).flatten(1).sum(1)


class Quadratic(nn.Module):
    """``score = a |x|^2 / 2``, whose gradient is a x."""

    def __init__(self, a: float = 1.5) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * x.square().flatten(1).sum(1) / 2


def samples(*shape: int, seed: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


REAL, FAKE = samples(6, 3, 4, 4), samples(6, 3, 4, 4, seed=6)


def draws(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grads_of(loss: Tensor, module: nn.Module) -> list[Tensor]:
    """The gradients of a loss in a module's parameters, zeros where it does not depend on them."""
    module.zero_grad()
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]


def assert_same(ours: list[Tensor], theirs: list[Tensor], rtol: float = 1e-10) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * (1 + float(b.abs().max())))


def active_modes() -> int:
    return int(torch._C._len_torch_dispatch_stack())


def with_dropout() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(48, 16), nn.SiLU(), nn.Dropout(0.4), nn.Linear(16, 8), nn.Dropout(0.2), nn.Linear(8, 1)
    ).double()


def step(critic: nn.Module, real: Tensor, fake: Tensor, generator: torch.Generator, kind: str = "wgan-gp") -> Tensor:
    scores = critic(fake).mean() - critic(real).mean()
    return scores + gradient_penalty(critic, real, fake, kind=kind, generator=generator)


FLAT = samples(4, 5)


def mlp(x: Tensor) -> Tensor:
    return torch.tanh(x).sum(1)


def refuses(name: str, *args: Any, error: type[Exception] = ValueError, match: str, **kwargs: Any) -> Any:
    return pytest.param(args, kwargs, error, match, id=name)


def outcome(name: str, critic: Callable[..., Any], match: str, **kwargs: Any) -> Any:
    return refuses(f"critic that returns {name}", critic, FLAT, FLAT, match=match, **kwargs)
