"""A small residual pair without normalization, after R3GAN (Huang et al. 2024, arXiv:2501.05441).

Bottleneck blocks of three convolutions with LeakyReLU, resampling by bilinear interpolation and averages, a learned
4x4 (here 3x3 to 7x7) basis at the small end of both networks. What normalization does elsewhere is done by the start:
the last convolution of every block is zero, and the first two are scaled down with the number of blocks (Zhang et al.
2019, "Fixup Initialization", arXiv:1901.09321). The paper trains it with the penalties R1 and R2.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipgan.models.base import Critic, Generator, Layers, Norm, Residual
from lipgan.models.sizes import sides

__all__ = ["ModernCritic", "ModernGenerator"]

_SLOPE = 0.2
_GROWTH = 8  # widths, at most


class _Upsample(nn.Module):
    """To a given side, by bilinear interpolation."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, size=(self.side, self.side), mode="bilinear", align_corners=False)

    def extra_repr(self) -> str:
        return f"{self.side}"


class _Basis(nn.Module):
    """Learned maps, each by an amount that is linear in the noise: ``[B, entries]`` -> ``[B, c, side, side]``."""

    def __init__(self, entries: int, channels: int, side: int) -> None:
        super().__init__()
        self.maps = nn.Parameter(torch.randn(channels, side, side))
        self.amounts = nn.Linear(entries, channels, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        amounts: Tensor = self.amounts(z)
        return self.maps * amounts[:, :, None, None]


def _block(channels: int, groups: int) -> Residual:
    main = Layers(
        nn.Conv2d(channels, channels, 1),
        nn.LeakyReLU(_SLOPE),
        nn.Conv2d(channels, channels, 3, padding=1, groups=groups),
        nn.LeakyReLU(_SLOPE),
        nn.Conv2d(channels, channels, 1, bias=False),
    )
    return Residual(main, nn.Identity())


def _initialize(body: nn.Module) -> None:
    """Normal weights that keep the variance, in the blocks as said above."""
    for layer in body.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.normal_(layer.weight, 0.0, 1 / math.sqrt(layer.weight[0].numel()))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    blocks = [module for module in body.modules() if isinstance(module, Residual)]
    gain = nn.init.calculate_gain("leaky_relu", _SLOPE) * len(blocks) ** -0.25
    for block in blocks:
        first, _, second, _, last = block.main
        with torch.no_grad():
            first.weight.mul_(gain)  # type: ignore[operator]
            second.weight.mul_(gain)  # type: ignore[operator]
            last.weight.zero_()  # type: ignore[operator]


class ModernGenerator(Generator):
    """Noise ``[B, latent_dim]`` -> images ``[B, channels, size, size]`` in [-1, 1].

    Labels come in with the noise for conditioning "projection", too: as in the paper, the critic alone projects.

    Args:
        size: pixels a side, a multiple of 4 from 8 to 128.
        channels: 1 or 3.
        latent_dim: length of one noise vector.
        width: channels at full resolution; each halving of the resolution doubles them, up to 8 times.
        groups: of the 3x3 convolutions.
        **options: conditioning, classes and batch_norm, as for `Generator`; there is no batch norm to be virtual.

    Raises:
        ValueError: size or channels out of range, or as `Generator`.
    """

    def __init__(
        self,
        size: int = 16,
        channels: int = 1,
        latent_dim: int = 64,
        width: int = 16,
        groups: int = 1,
        *,
        conditioning: str = "none",
        **options: Any,
    ) -> None:
        levels = sides(size, channels)

        def body(entries: int, norm: Norm) -> nn.Module:
            widths = [width * min(1 << k, _GROWTH) for k in reversed(range(len(levels)))]
            layers: list[nn.Module] = [_Basis(entries, widths[0], levels[0]), _block(widths[0], groups)]
            for (before, after), side in zip(pairwise(widths), levels[1:], strict=True):
                if before != after:  # before the upsampling, which it commutes with, there are fewer pixels
                    layers.append(nn.Conv2d(before, after, 1, bias=False))
                layers += [_Upsample(side), _block(after, groups)]
            return Layers(*layers, nn.Conv2d(widths[-1], channels, 1), nn.Tanh())

        conditioning = "concat" if conditioning == "projection" else conditioning
        super().__init__((channels, size, size), body, latent_dim, conditioning=conditioning, **options)
        _initialize(self.body)


class ModernCritic(Critic):
    """Images ``[B, channels, size, size]`` -> scores ``[B]``, unbounded.

    Args:
        size: pixels a side, a multiple of 4 from 8 to 128.
        channels: 1 or 3.
        width: channels at full resolution; each halving of the resolution doubles them, up to 8 times.
        groups: of the 3x3 convolutions.
        **options: conditioning, classes and minibatch, as for `Critic`.

    Raises:
        ValueError: size or channels out of range, or as `Critic`.
    """

    def __init__(self, size: int = 16, channels: int = 1, width: int = 16, groups: int = 1, **options: Any) -> None:
        levels = sides(size, channels)
        widths = [width * min(1 << k, _GROWTH) for k in range(len(levels))]

        def body(shape: tuple[int, ...]) -> nn.Module:
            layers: list[nn.Module] = [nn.Conv2d(shape[0], widths[0], 1), _block(widths[0], groups)]
            side = size
            for before, after in pairwise(widths):
                layers.append(nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False))
                if before != after:
                    layers.append(nn.Conv2d(before, after, 1, bias=False))
                layers.append(_block(after, groups))
                side = (side + 1) // 2
            return nn.Sequential(*layers, nn.Conv2d(widths[-1], widths[-1], side, groups=widths[-1], bias=False))

        super().__init__((channels, size, size), body, widths[-1], **options)
        _initialize(self.body)
