"""A critic that is an autoencoder: samples that it restores well are real.

Zhao et al. 2017, "Energy-based Generative Adversarial Network" (arXiv:1609.03126); Berthelot et al. 2017, "BEGAN"
(arXiv:1703.10717), from which the code of 64 numbers between two linear layers is.
"""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor, nn

from lipgan.models.base import Critic, Output
from lipgan.models.conv import downsampled_widths, downsampling
from lipgan.models.sizes import sides, square

__all__ = ["AutoencoderCritic"]

_SLOPE = 0.1


class AutoencoderCritic(Critic):
    """Samples ``[B, *shape]`` -> scores ``[B]``: minus the mean squared error of the reconstruction, so at most 0.

    The energy of EBGAN is minus the score. The features of the `Output` are the code ``[B, code]``. With
    ``reconstruct=True`` the critic returns the reconstruction, ``[B, *shape]``.

    Args:
        shape: ``(channels, size, size)`` or ``(d,)``.
        width: of the layers: for vectors all have as many units, by default 128; for images the first convolution has
            as many channels, by default 64, and each halving of the resolution doubles them, up to 512.
        code: numbers in the code.
        conditioning: "none", "concat" (the encoder sees the labels) or "auxiliary" (a classifier reads the code).
        classes: as for `Critic`.
        minibatch: "none".

    Raises:
        ValueError: an option that needs scores made of features, size or channels out of range, or as `Critic`.
    """

    def __init__(
        self,
        shape: tuple[int, ...] = (1, 16, 16),
        width: int | None = None,
        code: int = 64,
        *,
        conditioning: str = "none",
        classes: int = 0,
        minibatch: str = "none",
    ) -> None:
        reason = "of the autoencoder architecture, whose scores are reconstruction errors"
        if conditioning == "projection":
            raise ValueError(f"conditioning {reason}, must not be 'projection'")
        if minibatch != "none":
            raise ValueError(f"minibatch {reason}, must be 'none', got {minibatch!r}")
        if len(shape) == 1:
            units = 128 if width is None else width
            decoder = _perceptron(code, units, math.prod(shape))
        else:
            size, channels = square("autoencoder", shape)
            levels = sides(size, channels)
            first = 64 if width is None else width

        def body(seen: tuple[int, ...]) -> nn.Module:
            if len(seen) == 1:
                return _perceptron(seen[0], units, code)
            layers, last = downsampling(levels, seen[0], first)
            return nn.Sequential(*layers, nn.Flatten(), nn.Linear(last * levels[0] ** 2, code))

        super().__init__(shape, body, code, conditioning=conditioning, classes=classes)
        self.head = nn.Identity()  # the error is the score
        self.decoder = decoder if len(shape) == 1 else _upsampling(levels, channels, first, code)

    def forward(
        self, x: Tensor, labels: Tensor | None = None, *, full: bool = False, reconstruct: bool = False
    ) -> Tensor | Output:
        """As `Critic`; with ``reconstruct`` the reconstruction of ``x``."""
        seen, _ = self._seen(x, labels)
        code: Tensor = self.body(seen)
        restored: Tensor = self.decoder(code)
        if reconstruct:
            return restored
        error = x - restored
        scores = -(error * error).flatten(1).mean(1)
        return self._output(scores, code) if full else scores


def _perceptron(entries: int, units: int, results: int) -> nn.Sequential:
    layers = [nn.Linear(entries, units), nn.LeakyReLU(_SLOPE), nn.Linear(units, units), nn.LeakyReLU(_SLOPE)]
    return nn.Sequential(*layers, nn.Linear(units, results))


def _upsampling(levels: list[int], channels: int, width: int, code: int) -> nn.Sequential:
    """The way back of `downsampling`; linear at its end, so that no pixel's error is cut off."""
    widths = [*reversed(downsampled_widths(levels, width)), channels]
    layers: list[nn.Module] = [
        nn.Linear(code, widths[0] * levels[0] ** 2),
        nn.Unflatten(1, (widths[0], levels[0], levels[0])),
    ]
    for (before, after), (side, following) in zip(pairwise(widths), pairwise(levels), strict=True):
        odd = following - 2 * side
        layers += [
            nn.LeakyReLU(_SLOPE),
            nn.ConvTranspose2d(before, after, 4, stride=2, padding=1, output_padding=odd),
        ]
    return nn.Sequential(*layers)
