"""Multilayer perceptrons for samples of any shape: three hidden layers on both sides.

The lectures' point of comparison for images is a ReLU generator of 4 layers and 512 units (Arjovsky et al. 2017,
arXiv:1701.07875, figure 7); for points in the plane Gulrajani et al. (2017, arXiv:1704.00028) take the same with the
critic.

Weights start as He et al. (2015, arXiv:1502.01852) have it. With PyTorch's smaller ones the first samples all but
coincide, and many a system stays there: on the ring of eight modes SN-GAN then reaches 1 of them in 2,000 steps, in
place of 6 to 8.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from lipgan.models.base import Critic, Generator, Layers, Norm
from lipgan.nn.conditional_batch_norm import ConditionalBatchNorm1d

__all__ = ["MLPCritic", "MLPGenerator"]

_HIDDEN = 3


def _default_width(shape: tuple[int, ...]) -> int:
    return 128 if len(shape) == 1 else 512


class MLPGenerator(Generator):
    """Noise ``[B, latent_dim]`` -> samples ``[B, *shape]``: ReLU layers, then tanh for images.

    With conditioning "projection" a class-conditional batch norm stands before each ReLU, with batch_norm "virtual" a
    virtual one; otherwise there is none.

    Args:
        shape: of a sample.
        latent_dim: length of one noise vector.
        width: of the hidden layers; by default 128 for vectors, 512 for images.
        **options: conditioning, classes and batch_norm, as for `Generator`.

    Raises:
        ValueError: as `Generator`.
    """

    def __init__(
        self, shape: tuple[int, ...] = (2,), latent_dim: int = 64, width: int | None = None, **options: Any
    ) -> None:
        units = _default_width(shape) if width is None else width

        def body(entries: int, norm: Norm) -> Layers:
            layers: list[nn.Module] = []
            for _ in range(_HIDDEN):
                layers.append(nn.Linear(entries, units))
                if options.get("conditioning") == "projection":
                    layers.append(ConditionalBatchNorm1d(units, options["classes"]))
                elif options.get("batch_norm") == "virtual":
                    layers.append(norm(units))
                layers.append(nn.ReLU())
                entries = units
            layers.append(nn.Linear(units, math.prod(shape)))
            if len(shape) > 1:
                layers += [nn.Tanh(), nn.Unflatten(1, shape)]
            return Layers(*layers)

        super().__init__(shape, body, latent_dim, **options)
        _initialize(self.body)


class MLPCritic(Critic):
    """Samples ``[B, *shape]`` -> scores ``[B]``, by LeakyReLU layers.

    Args:
        shape: of a sample.
        width: of the hidden layers; by default 128 for vectors, 512 for images.
        **options: conditioning, classes and minibatch, as for `Critic`.

    Raises:
        ValueError: as `Critic`.
    """

    def __init__(self, shape: tuple[int, ...] = (2,), width: int | None = None, **options: Any) -> None:
        units = _default_width(shape) if width is None else width

        def body(shape: tuple[int, ...]) -> nn.Module:
            layers: list[nn.Module] = [] if len(shape) == 1 else [nn.Flatten()]
            entries = math.prod(shape)
            for _ in range(_HIDDEN):
                layers += [nn.Linear(entries, units), nn.LeakyReLU(0.2)]
                entries = units
            return nn.Sequential(*layers)

        super().__init__(shape, body, units, **options)
        _initialize(self.body, self.head)


def _initialize(*modules: nn.Module) -> None:
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
