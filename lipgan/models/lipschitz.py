"""A critic that is 1-Lipschitz by its construction: orthogonal weights and GroupSort (Anil et al. 2019).

No penalty and no power iteration stands between its weights and the Wasserstein distance: `lipgan.lipschitz.bounds`
certifies the constant, so minus the loss of WGAN is a lower bound of the distance at every step of training. The
generators are those of other architectures, as the constraint is the critic's alone.
"""

from __future__ import annotations

import math

from torch import nn

from lipgan.models.base import Critic
from lipgan.models.sizes import sides, square
from lipgan.nn.group_sort import MaxMin
from lipgan.nn.orthogonal import OrthogonalConv2d, OrthogonalLinear

__all__ = ["LipschitzCritic"]

# The factorization of a weight costs the cube of its smaller side.
_WIDEST = 128

# Hidden layers for vectors.
_HIDDEN = 3


class LipschitzCritic(Critic):
    """Samples ``[B, *shape]`` -> scores ``[B]``, 1-Lipschitz in the Euclidean norm of a sample.

    Vectors go through three orthogonal layers with MaxMin between. Images are halved by orthogonal convolutions over
    2 x 2 pixels that do not overlap, which keep norms, until a layer over all of the last 4 to 7 pixels a side.

    Args:
        shape: of a sample: ``(d,)``, or ``(channels, size, size)`` with 1 or 3 channels and a size that is a multiple
            of 4 from 8 to 128.
        width: of the hidden layers for vectors; for images, channels after the first convolution, which each halving
            doubles up to 128. Even; by default 64 and 32.
        conditioning: "none", "concat" or "auxiliary", as for `Critic`. Classes appended to the sample are constants,
            and the logits of the auxiliary classifier are not constrained.
        classes: as for `Critic`.
        minibatch: "none", as scores that depend on other samples have no Lipschitz constant of their own.

    Raises:
        ValueError: an odd width, another conditioning or minibatch, or as `Critic`.
    """

    def __init__(
        self,
        shape: tuple[int, ...] = (2,),
        width: int | None = None,
        *,
        conditioning: str = "none",
        classes: int = 0,
        minibatch: str = "none",
    ) -> None:
        if conditioning == "projection":
            raise ValueError(
                "conditioning must not be 'projection' for LipschitzCritic, whose scores would have another slope for "
                "each class"
            )
        if minibatch != "none":
            raise ValueError(f"minibatch must be 'none' for LipschitzCritic, got {minibatch!r}")
        vectors = len(shape) == 1
        units = (64 if vectors else 32) if width is None else width
        if units < 2 or units % 2:
            raise ValueError(f"width must be even and at least 2 for LipschitzCritic, got {units}")
        features = units if vectors else max(units, _WIDEST)

        def body(seen: tuple[int, ...]) -> nn.Module:
            layers: list[nn.Module] = []
            if vectors:
                entries = math.prod(seen)
                for _ in range(_HIDDEN):
                    layers += [OrthogonalLinear(entries, units), MaxMin()]
                    entries = units
                return nn.Sequential(*layers)
            size, channels = square("lipschitz", shape)
            sides(size, channels)  # checks them
            previous, c = seen[0], units
            while size > 7 or (size > 4 and size % 2 == 0):
                # An odd side gets a row and a column of zeros before it and behind it: no pixel is left out.
                layers += [OrthogonalConv2d(previous, c, 2, stride=2, padding=size % 2), MaxMin()]
                size = (size + 1) // 2
                previous, c = c, max(c, min(2 * c, _WIDEST))
            return nn.Sequential(*layers, nn.Flatten(), OrthogonalLinear(previous * size**2, features), MaxMin())

        super().__init__(shape, body, features, conditioning=conditioning, classes=classes)
        self.head = OrthogonalLinear(features, 1)
