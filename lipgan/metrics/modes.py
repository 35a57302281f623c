"""Modes of a mixture that samples reach, for toy data whose modes are known.

Source: Srivastava, Valkov, Russell, Gutmann, Sutton, "VEEGAN: Reducing Mode Collapse in GANs using Implicit Variational
Learning" (2017), sec. 4.1: a sample is of high quality within 3 standard deviations of the nearest mode, and a mode is
covered that is the nearest of such a sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lipgan._checks import check_count
from lipgan.metrics._inputs import Array, as_pair

__all__ = ["ModeCoverage", "mode_coverage"]

# Entries of the distances at a time: 32 MiB of float64.
_CHUNK_ENTRIES = 1 << 22


@dataclass(frozen=True)
class ModeCoverage:
    """What samples reach of a mixture."""

    covered: int  # modes with enough samples of high quality
    high_quality: float  # share of the samples that are near a mode
    counts: Tensor  # samples of high quality by mode, [modes], int64


def mode_coverage(
    samples: Array, modes: Array, std: float, *, radius: float = 3.0, min_samples: int = 1
) -> ModeCoverage:
    """Which modes of a mixture of round Gaussians the samples reach, and how many samples are near any.

    Args:
        samples: ``[n, d]``, NumPy array or tensor; float64, float32 or a half type, computed in float64.
        modes: ``[k, d]``, the centres.
        std: standard deviation of every Gaussian.
        radius: a sample is of high quality up to this many standard deviations from the nearest centre. Of the samples
            of the mixture itself the share is that of the chi distribution: 98.9 % for 3 in two dimensions.
        min_samples: a mode is covered that has so many samples of high quality.

    Raises:
        TypeError: an argument is not an array or tensor of real floating-point numbers, ``min_samples`` is not an int.
        ValueError: shapes that do not fit, no samples, a NaN or an infinity, ``std`` or ``radius`` not positive.

    Example::

        >>> ring = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> mode_coverage(torch.tensor([[1.0, 0.1], [5.0, 5.0]]), ring, std=0.1)
        ModeCoverage(covered=1, high_quality=0.5, counts=tensor([1, 0]))
    """
    rows, centres = as_pair("samples", samples, "modes", modes)
    for name, value in (("std", std), ("radius", radius)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    check_count("min_samples", min_samples)
    centres = centres.double()
    counts = torch.zeros(len(centres), dtype=torch.int64, device=rows.device)
    at_a_time = max(1, _CHUNK_ENTRIES // len(centres))
    for begin in range(0, len(rows), at_a_time):
        chunk = rows[begin : begin + at_a_time].double()
        # Not by products: near a centre far from the origin they would lose all digits.
        distances = torch.cdist(chunk, centres, compute_mode="donot_use_mm_for_euclid_dist")
        nearest, mode = distances.min(1)
        counts += torch.bincount(mode[nearest <= radius * std], minlength=len(centres))
    return ModeCoverage(int((counts >= min_samples).sum()), float(counts.sum()) / len(rows), counts)
