"""DCGAN, by its five guidelines (Radford et al. 2015, arXiv:1511.06434).

Strided convolutions in place of pooling, transposed ones in place of upsampling; batch norm in both networks, but at
the output of the generator and the input of the critic; no fully connected hidden layers; ReLU in the generator, and
tanh at its end; LeakyReLU in the critic. The paper's widths are 64 for images of 64 pixels and noise of 100 numbers.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import nn

from lipgan.models.base import Critic, Generator, Layers, Norm
from lipgan.models.sizes import sides

__all__ = ["DCGANCritic", "DCGANGenerator"]


def _levels(size: int, channels: int) -> list[int]:
    """As `sides`, with at least two halvings, so that the critic has a layer with batch norm."""
    levels = sides(size, channels)
    return levels if len(levels) > 2 else [levels[0] // 2, *levels]


def _initialize(model: nn.Module) -> None:
    """All weights from N(0, 0.02^2); the gains of batch norms around 1, as in the authors' code."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight, 1.0, 0.02)


class DCGANGenerator(Generator):
    """Noise ``[B, latent_dim]`` -> images ``[B, channels, size, size]`` in [-1, 1].

    Args:
        size: pixels a side, a multiple of 4 from 8 to 128.
        channels: 1 or 3.
        latent_dim: length of one noise vector.
        width: channels before the last layer; each halving of the resolution doubles them.
        **options: conditioning, classes and batch_norm, as for `Generator`.

    Raises:
        ValueError: size or channels out of range, or as `Generator`.
    """

    def __init__(
        self, size: int = 16, channels: int = 1, latent_dim: int = 64, width: int = 32, **options: Any
    ) -> None:
        levels = _levels(size, channels)

        def body(entries: int, norm: Norm) -> Layers:
            c = width << (len(levels) - 2)
            layers: list[nn.Module] = [
                nn.Unflatten(1, (entries, 1, 1)),
                nn.ConvTranspose2d(entries, c, levels[0], bias=False),
            ]
            for k, (side, following) in enumerate(pairwise(levels)):
                last = k == len(levels) - 2
                after = channels if last else c // 2
                odd = following - 2 * side
                layers += [
                    norm(c),
                    nn.ReLU(),
                    nn.ConvTranspose2d(c, after, 4, stride=2, padding=1, output_padding=odd, bias=last),
                ]
                c = after
            return Layers(*layers, nn.Tanh())

        super().__init__((channels, size, size), body, latent_dim, **options)
        _initialize(self)


class DCGANCritic(Critic):
    """Images ``[B, channels, size, size]`` -> scores ``[B]``, unbounded; the loss has the paper's sigmoid.

    Args:
        size: pixels a side, a multiple of 4 from 8 to 128.
        channels: 1 or 3.
        width: channels after the first convolution; each halving of the resolution doubles them.
        **options: conditioning, classes and minibatch, as for `Critic`.

    Raises:
        ValueError: size or channels out of range, or as `Critic`.
    """

    def __init__(self, size: int = 16, channels: int = 1, width: int = 32, **options: Any) -> None:
        levels = _levels(size, channels)

        def body(shape: tuple[int, ...]) -> nn.Module:
            layers: list[nn.Module] = []
            previous, c = shape[0], width
            for k in range(len(levels) - 1):
                layers.append(nn.Conv2d(previous, c, 4, stride=2, padding=1, bias=k == 0))
                if k > 0:
                    layers.append(nn.BatchNorm2d(c))
                layers.append(nn.LeakyReLU(0.2))
                previous, c = c, 2 * c
            return nn.Sequential(*layers)

        last = width << (len(levels) - 2)
        super().__init__((channels, size, size), body, last * levels[0] ** 2, **options)
        _initialize(self)
