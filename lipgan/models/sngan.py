"""The residual networks of SNGAN (Miyato et al. 2018, arXiv:1802.05957, appendix B), on request with attention.

The paper's networks for 32 pixels have one number of channels throughout, and two blocks at the end of the critic that
keep the resolution (its table 3). Those for larger images double the channels with each halving of the resolution, up
to 16 times, and have one such block (its tables 4 and 5). Here the first serve up to 32 pixels, the second all above.

The widths default to 64 up to 32 pixels, where the paper has 256 in the generator and 128 in the critic, and to 16
above, where it has 64.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lipgan.models.base import Critic, Generator, Layers, Norm, Residual
from lipgan.models.sizes import sides
from lipgan.nn.attention import SelfAttention2d

__all__ = ["ResNetCritic", "ResNetGenerator"]

# Up to this side the channels are constant.
_SMALL = 32
# Above it they grow up to this multiple of the width.
_GROWTH = 16


class _Upsample(nn.Module):
    """To a given side, by nearest neighbours."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, size=(self.side, self.side), mode="nearest")

    def extra_repr(self) -> str:
        return f"{self.side}"


class _SumPool(nn.Module):
    """The sum over all pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum((2, 3))


def _up(channels: int, out_channels: int, side: int, norm: Norm) -> Residual:
    main = Layers(
        norm(channels),
        nn.ReLU(),
        _Upsample(side),
        nn.Conv2d(channels, out_channels, 3, padding=1),
        norm(out_channels),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, 3, padding=1),
    )
    # A convolution of single pixels and the upsampling commute: in this order it has fewer pixels.
    return Residual(main, nn.Sequential(nn.Conv2d(channels, out_channels, 1), _Upsample(side)))


def _down(channels: int, out_channels: int, *, first: bool = False, pool: bool = True) -> Residual:
    activation = [] if first else [nn.ReLU()]  # nothing to rectify in an image
    main: list[nn.Module] = [
        *activation,
        nn.Conv2d(channels, out_channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, 3, padding=1),
    ]
    shortcut: list[nn.Module] = []
    if pool:
        # The last row of an odd number of rows counts, too.
        main.append(nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False))
        shortcut.append(nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False))
    if pool or channels != out_channels:
        shortcut.append(nn.Conv2d(channels, out_channels, 1))
    return Residual(Layers(*main), nn.Sequential(*shortcut))


def _initialize(*modules: nn.Module) -> None:
    """Xavier's uniform weights; on the main paths of the blocks sqrt(2) times as large, as in the authors' code."""
    for module in modules:
        blocks = [block for block in module.modules() if isinstance(block, Residual)]
        main = {id(layer) for block in blocks for layer in block.main}
        for layer in module.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight, math.sqrt(2) if id(layer) in main else 1.0)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)


def _width(size: int, width: int | None) -> int:
    return (64 if size <= _SMALL else 16) if width is None else width


def _attended(levels: list[int]) -> int:
    """The side of the map, in the middle, that attention looks at: 32 of 128, as in SAGAN."""
    return levels[len(levels) // 2]


class ResNetGenerator(Generator):
    """Noise ``[B, latent_dim]`` -> images ``[B, channels, size, size]`` in [-1, 1].

    Args:
        size: pixels a side, a multiple of 4 from 8 to 128.
        channels: 1 or 3.
        latent_dim: length of one noise vector.
        width: channels at full resolution; None for 64 up to 32 pixels and 16 above.
        attention: whether self-attention follows a block in the middle (Zhang et al. 2018, arXiv:1805.08318).
        **options: conditioning, classes and batch_norm, as for `Generator`.

    Raises:
        ValueError: size or channels out of range, or as `Generator`.
    """

    def __init__(
        self,
        size: int = 32,
        channels: int = 3,
        latent_dim: int = 64,
        width: int | None = None,
        attention: bool = False,
        **options: Any,
    ) -> None:
        levels = sides(size, channels)
        full = _width(size, width)

        def body(entries: int, norm: Norm) -> Layers:
            # Channels at the start and after each block.
            factors = [min(1 << k, _GROWTH) for k in reversed(range(len(levels) - 1))]
            factors.insert(0, min(1 << (len(levels) - 1), _GROWTH))
            widths = [full * (1 if size <= _SMALL else factor) for factor in factors]
            layers: list[nn.Module] = [
                nn.Linear(entries, widths[0] * levels[0] ** 2),
                nn.Unflatten(1, (widths[0], levels[0], levels[0])),
            ]
            for (before, after), side in zip(pairwise(widths), levels[1:], strict=True):
                layers.append(_up(before, after, side, norm))
                if attention and side == _attended(levels):
                    layers.append(SelfAttention2d(after))
            return Layers(
                *layers, norm(widths[-1]), nn.ReLU(), nn.Conv2d(widths[-1], channels, 3, padding=1), nn.Tanh()
            )

        super().__init__((channels, size, size), body, latent_dim, **options)
        _initialize(self.body)


class ResNetCritic(Critic):
    """Images ``[B, channels, size, size]`` -> scores ``[B]``, unbounded; the features are sums over pixels.

    Args:
        size: pixels a side, a multiple of 4 from 8 to 128.
        channels: 1 or 3.
        width: channels after the first block; None for 64 up to 32 pixels and 16 above.
        attention: as for `ResNetGenerator`.
        **options: conditioning, classes and minibatch, as for `Critic`.

    Raises:
        ValueError: size or channels out of range, or as `Critic`.
    """

    def __init__(
        self, size: int = 32, channels: int = 3, width: int | None = None, attention: bool = False, **options: Any
    ) -> None:
        levels = sides(size, channels)
        first = _width(size, width)
        if size <= _SMALL:
            pooling = min(len(levels) - 1, 2)
            widths = [first] * (pooling + 2)
        else:
            pooling = len(levels) - 1
            widths = [first * min(1 << k, _GROWTH) for k in range(pooling + 1)]

        def body(shape: tuple[int, ...]) -> nn.Module:
            layers: list[nn.Module] = []
            side = size
            attends = attention
            for k, (before, after) in enumerate(pairwise([shape[0], *widths])):
                layers.append(_down(before, after, first=k == 0, pool=k < pooling))
                side = (side + 1) // 2 if k < pooling else side
                if attends and side <= _attended(levels):
                    layers.append(SelfAttention2d(after))
                    attends = False
            return nn.Sequential(*layers, nn.ReLU(), _SumPool())

        super().__init__((channels, size, size), body, widths[-1], **options)
        _initialize(self.body, self.head)
