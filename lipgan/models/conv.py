"""A small convolutional generator and critic for square images of 8 to 128 pixels.

The generator follows DCGAN (Radford et al. 2015, arXiv:1511.06434): transposed convolutions instead of
upsampling layers, batch norm, ReLU, tanh. The critic keeps DCGAN's strided convolutions and LeakyReLU but no
batch norm, which would undo the Lipschitz bound that spectral normalization gives (Miyato et al. 2018,
arXiv:1802.05957).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import nn

from lipgan.models.base import Critic, Generator, Layers, Norm
from lipgan.models.mlp import MLPGenerator
from lipgan.models.sizes import sides, square

__all__ = ["ConvCritic", "ConvGenerator", "downsampled_widths", "downsampling"]

_WIDEST = 512


class ConvGenerator(Generator):
    """Noise ``[B, latent_dim]`` -> images ``[B, channels, size, size]`` in [-1, 1].

    Args:
        size: pixels a side, a multiple of 4 from 8 to 128.
        channels: 1 or 3.
        latent_dim: length of one noise vector.
        width: channels at full resolution; each halving of the resolution doubles them, up to 512.
        **options: conditioning, classes and batch_norm, as for `Generator`.

    Raises:
        ValueError: size or channels out of range, or as `Generator`.
    """

    def __init__(
        self, size: int = 16, channels: int = 1, latent_dim: int = 64, width: int = 16, **options: Any
    ) -> None:
        levels = sides(size, channels)
        # One more than for the critic: the channels of each side, not of each halving.
        widths = downsampled_widths([0, *levels], width)[::-1]

        def body(entries: int, norm: Norm) -> Layers:
            # Batch norm follows every layer but the last, so biases would be dead weight.
            layers: list[nn.Module] = [
                nn.Linear(entries, widths[0] * levels[0] ** 2, bias=False),
                nn.Unflatten(1, (widths[0], levels[0], levels[0])),
                norm(widths[0]),
                nn.ReLU(),
            ]
            for (before, after), (side, following) in zip(pairwise(widths), pairwise(levels), strict=True):
                odd = following - 2 * side
                layers += [
                    nn.ConvTranspose2d(before, after, 4, stride=2, padding=1, output_padding=odd, bias=False),
                    norm(after),
                    nn.ReLU(),
                ]
            return Layers(*layers, nn.Conv2d(widths[-1], channels, 3, padding=1), nn.Tanh())

        super().__init__((channels, size, size), body, latent_dim, **options)


def downsampled_widths(levels: list[int], width: int) -> list[int]:
    """The channels after each of the strided convolutions: doubled by each, up to 512."""
    return [min(width << k, max(_WIDEST, width)) for k in range(len(levels) - 1)]


def downsampling(levels: list[int], channels: int, width: int) -> tuple[list[nn.Module], int]:
    """The convolutions from images of side ``levels[-1]`` to maps of side ``levels[0]``, and the channels of those."""
    layers: list[nn.Module] = []
    previous = channels
    for c in downsampled_widths(levels, width):
        layers += [nn.Conv2d(previous, c, 4, stride=2, padding=1), nn.LeakyReLU(0.1)]
        previous = c
    # Depth is cheap here, at 3 to 7 pixels a side.
    layers += [nn.Conv2d(previous, previous, 3, padding=1), nn.LeakyReLU(0.1)]
    return layers, previous


class ConvCritic(Critic):
    """Images ``[B, channels, size, size]`` -> scores ``[B]``, unbounded.

    Args:
        size: pixels a side, a multiple of 4 from 8 to 128.
        channels: 1 or 3.
        width: channels after the first convolution; each halving of the resolution doubles them, up to 512.
        **options: conditioning, classes and minibatch, as for `Critic`.

    Raises:
        ValueError: size or channels out of range, or as `Critic`.
    """

    def __init__(self, size: int = 16, channels: int = 1, width: int = 64, **options: Any) -> None:
        levels = sides(size, channels)
        last = downsampled_widths(levels, width)[-1]

        def body(shape: tuple[int, ...]) -> nn.Module:
            return nn.Sequential(*downsampling(levels, shape[0], width)[0])

        super().__init__((channels, size, size), body, last * levels[0] ** 2, **options)


def conv_or_mlp_generator(shape: tuple[int, ...], latent_dim: int = 64, **options: Any) -> Generator:
    """`MLPGenerator` for vectors, `ConvGenerator` for images: for architectures that are about the critic.

    Raises:
        ValueError: as these.
    """
    if len(shape) == 1:
        return MLPGenerator(shape, latent_dim, **options)
    size, channels = square("conv", shape)
    return ConvGenerator(size, channels, latent_dim, **options)
