"""Networks whose depth, width, nonlinearity and normalization the studies choose; digits of 8 x 8 pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from lipgan.models import Critic, Generator
from lipgan.models.base import Layers, Residual

__all__ = ["NONLINEARITIES", "NORMS", "SHAPE", "critic", "generator", "replaced"]

M = TypeVar("M", bound=nn.Module)

#: Of the samples.
SHAPE = (1, 8, 8)


class _ShiftedSoftplus(nn.Module):
    """``softplus(2 x + 2) / 2 - 1``, the smooth rectifier of Gulrajani et al. (2017), table 1."""

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(2 * x + 2) / 2 - 1


#: By name, what makes a layer of it.
NONLINEARITIES: Mapping[str, Callable[[], nn.Module]] = MappingProxyType(
    {"ReLU": nn.ReLU, "LeakyReLU": lambda: nn.LeakyReLU(0.2), "softplus": _ShiftedSoftplus, "tanh": nn.Tanh}
)
#: By name, what makes a normalization of so many channels; "layer" is over all of a sample.
NORMS: Mapping[str, Callable[[int], nn.Module]] = MappingProxyType(
    {
        "none": lambda channels: nn.Identity(),
        "batch": nn.BatchNorm2d,
        "layer": lambda channels: nn.GroupNorm(1, channels),
    }
)


def _stage(depth: int, width: int, nonlinearity: str, norm: str, residual: bool) -> list[nn.Module]:
    """Convolutions of 3 x 3 that change neither side nor channels; residual blocks of two each."""

    def convolution() -> nn.Module:
        return nn.Conv2d(width, width, 3, padding=1)

    def before() -> list[nn.Module]:
        return [NORMS[norm](width), NONLINEARITIES[nonlinearity]()]

    if residual:
        return [
            Residual(Layers(*before(), convolution(), *before(), convolution()), nn.Identity())
            for _ in range(depth // 2)
        ]
    return [layer for _ in range(depth) for layer in (convolution(), *before())]


def generator(
    depth: int, width: int, nonlinearity: str = "ReLU", norm: str = "batch", *, residual: bool = False
) -> Generator:
    """Noise ``[B, 64]`` to samples: a linear layer, ``depth`` convolutions at 4 and 8 pixels a side, and the last."""

    def body(entries: int, _: object) -> nn.Module:
        half = depth // 2
        return nn.Sequential(
            nn.Linear(entries, width * 16),
            nn.Unflatten(1, (width, 4, 4)),
            NORMS[norm](width),
            NONLINEARITIES[nonlinearity](),
            *_stage(half, width, nonlinearity, norm, residual),
            nn.Upsample(scale_factor=2),
            *_stage(depth - half, width, nonlinearity, norm, residual),
            NONLINEARITIES[nonlinearity]() if residual else nn.Identity(),
            nn.Conv2d(width, 1, 3, padding=1),
            nn.Tanh(),
        )

    return _initialized(Generator(SHAPE, body))


def critic(
    depth: int, width: int, nonlinearity: str = "LeakyReLU", norm: str = "none", *, residual: bool = False
) -> Critic:
    """Samples to scores ``[B]``: ``depth`` convolutions at 8 and 4 pixels a side after the first."""

    def body(shape: tuple[int, ...]) -> nn.Module:
        half = depth // 2
        return nn.Sequential(
            nn.Conv2d(shape[0], width, 3, padding=1),
            NONLINEARITIES[nonlinearity](),
            *_stage(depth - half, width, nonlinearity, norm, residual),
            nn.AvgPool2d(2),
            *_stage(half, width, nonlinearity, norm, residual),
            NONLINEARITIES[nonlinearity]() if residual else nn.Identity(),
        )

    return _initialized(Critic(SHAPE, body, width * 16))


def replaced(
    module: nn.Module, kinds: type[nn.Module] | tuple[type[nn.Module], ...], make: Callable[[nn.Module], nn.Module]
) -> None:
    """Put ``make(layer)`` in the place of every layer of these kinds."""
    for name, layer in list(module.named_children()):
        if isinstance(layer, kinds):
            setattr(module, name, make(layer))
        else:
            replaced(layer, kinds, make)


def _initialized(module: M) -> M:
    """With the weights of He et al. (2015), as Gulrajani et al. (2017) start."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return module
