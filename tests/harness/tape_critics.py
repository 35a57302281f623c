"""Critics that the tests of the tape share, and the comparison of two engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lipgan
from lipgan.penalties.conditions import EagerMathAttention
from lipgan.penalties.coupling import Watched


@dataclass
class Outcome:
    """What one engine leaves behind."""

    value: Tensor
    grads: list[Tensor | None]
    buffers: dict[str, Tensor]
    random_state: Tensor
    result: Tensor = field(repr=False)


Build = Callable[[], Any]


def samples(shape: Sequence[int], dtype: torch.dtype = torch.float64, seed: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    real, fake = torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    return real.to(dtype), fake.to(dtype)


def run(
    build: Build,
    real: Tensor,
    fake: Tensor | None,
    engine: str,
    parameters: Sequence[Tensor] = (),
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Outcome:
    """Build a critic, and take one penalty and its gradients with an engine."""
    torch.manual_seed(3)
    critic = build()
    leaves = list(parameters)
    buffers: dict[str, Tensor] = {}
    if isinstance(critic, nn.Module):
        critic.to(dtype)
        leaves += [parameter for parameter in critic.parameters() if parameter.requires_grad]
        buffers = dict(critic.named_buffers())
    torch.manual_seed(4)
    penalty = lipgan.gradient_penalty(critic, real, fake, engine=engine, **options)
    grads = torch.autograd.grad(penalty, leaves, allow_unused=True) if penalty.requires_grad else [None] * len(leaves)
    after = {name: buffer.detach().clone() for name, buffer in buffers.items()}
    return Outcome(penalty.detach(), list(grads), after, torch.get_rng_state(), penalty)


def assert_same(ours: Outcome, theirs: Outcome, tolerance: float = 1e-10) -> None:
    """Assert that value, gradients, buffers and random state agree; a missing gradient counts as zeros."""
    assert not theirs.value.isnan()
    scale = max(float(theirs.value.abs()), 1e-300)
    assert float((ours.value - theirs.value).abs()) <= tolerance * scale, (ours.value, theirs.value)
    largest = max([float(grad.abs().max()) for grad in theirs.grads if grad is not None and grad.numel()], default=0.0)
    for k, (mine, other) in enumerate(zip(ours.grads, theirs.grads, strict=True)):
        if mine is None and other is None:
            continue
        mine = torch.zeros_like(other) if mine is None else mine
        other = torch.zeros_like(mine) if other is None else other
        assert mine.shape == other.shape
        error = float((mine - other).abs().max()) if mine.numel() else 0.0
        assert error <= tolerance * largest, f"gradient {k} is off by {error:.1e}, the largest is {largest:.1e}"
    assert_same_state(ours, theirs)


def assert_same_state(ours: Outcome, theirs: Outcome) -> None:
    assert ours.buffers.keys() == theirs.buffers.keys()
    for name, buffer in theirs.buffers.items():
        torch.testing.assert_close(ours.buffers[name], buffer, rtol=1e-12, atol=1e-13, equal_nan=True, msg=name)
    assert torch.equal(ours.random_state, theirs.random_state)


def compare(build: Build, shape: Sequence[int], tolerance: float = 1e-10, **options: Any) -> Outcome:
    """Assert that both engines agree on samples of a shape."""
    real, fake = options.pop("real", None), options.pop("fake", None)
    if real is None:
        real, fake = samples(shape)
    ours = run(build, real, fake, "fused", **options)
    assert_same(ours, run(build, real, fake, "autograd", **options), tolerance)
    return ours


class Score(nn.Module):
    """A body, then a weighted mean of its output over all but the batch, of which every entry counts."""

    def __init__(self, body: Callable[..., Tensor] | nn.Module, width: int = 1) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        h = self.body(x, *args)
        h = h.flatten(1) if h.ndim > 1 else h[:, None]
        weights = torch.linspace(0.5, 1.5, h.shape[1], dtype=h.dtype)
        return (torch.tanh(h) * weights).sum(1) + (h * h * weights).sum(1) / h.shape[1]


class Function(nn.Module):
    """A function of the samples and of a few parameters, named after their shapes."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.tensors = nn.ParameterList([nn.Parameter(torch.randn(shape) * 0.7) for shape in shapes])

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.tensors)


def after_linear(function: Callable[[Tensor], Tensor], width: int = 6) -> Build:
    """A linear layer, the function, a linear readout of whatever comes out."""
    return lambda: Score(nn.Sequential(nn.Linear(4, width), Function(function)))


def after_conv(*modules: Callable[[], nn.Module], dim: int = 2, channels: int = 4) -> Build:
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dim]
    return lambda: Score(nn.Sequential(conv(2, channels, 3, padding=1), *[module() for module in modules]))


VECTORS, SERIES, IMAGES, VOLUMES = (3, 4), (3, 2, 9), (3, 2, 6, 6), (2, 2, 4, 4, 4)


SHAPES = {1: SERIES, 2: IMAGES, 3: VOLUMES}


def stack(*modules: nn.Module) -> Score:
    return Score(nn.Sequential(*modules))


def running_over(h: Tensor) -> Tensor:
    return torch.exp(-(h[None] - h[:, None]).abs().sum(-1)).sum(1)


class ImageAttention(nn.Module):
    """As in SAGAN."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 4, 1)
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x).flatten(2)
        key, value = (F.max_pool2d(h, 2).flatten(2) for h in (self.key(x), self.value(x)))
        attention = torch.softmax(query.mT @ key, -1)
        return x + self.gain * (value @ attention.mT).view(x.shape)


class Running(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.register_buffer("largest", torch.zeros(6))
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        self.largest.copy_(torch.maximum(self.largest, h.detach().amax(0)))
        with torch.no_grad():
            self.mean.mul_(0.9).add_(h.mean(0), alpha=0.1)
        return h / (1 + self.largest.clone()) * self.mean.exp()


def coupling(build: Build, shape: Sequence[int]) -> tuple[bool, bool]:
    """Whether a critic is known to keep samples apart, and whether other samples do change the score of one."""
    torch.manual_seed(3)
    critic = build().double()
    x, others = samples(shape)
    state = {key: value.clone() for key, value in critic.state_dict().items()}

    def scores(x: Tensor) -> Tensor:
        critic.load_state_dict(state)
        torch.manual_seed(4)
        return critic(x)  # type: ignore[no-any-return]

    expected, error = scores(x).detach(), 0.0
    for k in range(len(x)):
        changed = others.clone()
        changed[k] = x[k]
        error = max(error, float((scores(changed)[k].detach() - expected[k]).abs()))
    leaf = x.clone().requires_grad_()
    watched = Watched(leaf)
    with EagerMathAttention(), watched:
        result = scores(leaf.view_as(leaf))
    return watched.samples.apart(result), error > 1e-12
