r"""Kullback-Leibler and Jensen-Shannon divergences of histograms, of densities on a grid, and of samples.

``KL(p | q) = sum p log (p / q)``, infinite where p has mass and q none; ``JS(p, q) = KL(p | m) / 2 + KL(q | m) / 2``
with ``m = (p + q) / 2``, between 0 and ``log 2``, which it reaches where the two do not overlap. In nats. The reverse
divergence of p and q is ``kl_divergence(q, p)``.

Source: Lin, "Divergence Measures Based on the Shannon Entropy" (1991); Cover and Thomas, "Elements of Information
Theory" (2006), ch. 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipgan._checks import check_count, check_finite
from lipgan.metrics._inputs import Array, as_pair, as_real_tensor

__all__ = ["jensen_shannon_divergence", "kl_divergence", "sample_histograms"]

# Entries of the histograms of samples.
_LARGEST_HISTOGRAM = 1 << 24


def _masses(p: Array, q: Array) -> tuple[Tensor, Tensor]:
    """Both in float64 with sum 1."""
    sides = []
    for name, value in (("p", p), ("q", q)):
        mass = as_real_tensor(name, value).detach()
        check_finite(name, mass)
        if bool((mass < 0).any()):
            raise ValueError(f"{name} must not be negative, got {float(mass.min()):.3g}")
        mass = mass.double()
        largest = mass.max() if mass.numel() else torch.zeros(())
        if not float(largest) > 0:
            raise ValueError(f"{name} must have a positive sum, got shape {tuple(mass.shape)} without a positive entry")
        # Before the sum, which may overflow.
        mass = mass / largest
        sides.append(mass / mass.sum())
    a, b = sides
    if a.shape != b.shape:
        raise ValueError(f"q must have the shape of p, {tuple(a.shape)}, got {tuple(b.shape)}")
    if a.device != b.device:
        raise ValueError(f"q must be on the device of p, {a.device}, got {b.device}")
    return a, b


def _kl(p: Tensor, q: Tensor) -> float:
    # Not by a quotient, which may overflow. What is negative is rounding (Gibbs' inequality).
    return max(0.0, float((torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum()))


def kl_divergence(p: Array, q: Array) -> float:
    """``KL(p | q)`` in nats, of histograms or of densities on a grid of equal cells.

    Args:
        p: any shape, not negative, divided by its sum: counts, probabilities or densities; NumPy array or tensor.
        q: of the same shape.

    Returns:
        At least 0; ``math.inf`` where p is positive and q is 0.

    Raises:
        TypeError: an argument is not an array or tensor of real floating-point numbers.
        ValueError: another shape, negative, not finite, or all 0.

    Example::

        >>> kl_divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])) / math.log(2)
        1.0
    """
    return _kl(*_masses(p, q))


def jensen_shannon_divergence(p: Array, q: Array) -> float:
    """``JS(p, q)`` in nats, of histograms or of densities on a grid of equal cells.

    Args:
        p: any shape, not negative, divided by its sum: counts, probabilities or densities; NumPy array or tensor.
        q: of the same shape.

    Returns:
        Between 0 and ``log 2``.

    Raises:
        TypeError: an argument is not an array or tensor of real floating-point numbers.
        ValueError: another shape, negative, not finite, or all 0.
    """
    a, b = _masses(p, q)
    middle = 0.5 * (a + b)
    return min(math.log(2), 0.5 * (_kl(a, middle) + _kl(b, middle)))


def sample_histograms(x: Array, y: Array, bins: int = 50) -> tuple[Tensor, Tensor]:
    """Histograms of two samples on one grid over the box around both, for the divergences here.

    The divergences of histograms depend on the grid: with few samples in a cell they are too large.

    Args:
        x: ``[m]`` or ``[m, d]``, NumPy array or tensor.
        y: ``[n]`` or ``[n, d]``.
        bins: cells along each of the ``d`` axes.

    Returns:
        Two tensors of ``d`` dimensions of size ``bins``: the share of the samples in every cell, float64.

    Raises:
        TypeError: an argument is not an array or tensor of real floating-point numbers; ``bins`` is not an int.
        ValueError: shapes that do not fit, no samples, a NaN or an infinity, or more than 2**24 cells.
    """
    check_count("bins", bins)
    sides = [rows[:, None] if rows.ndim == 1 else rows for rows in (as_real_tensor("x", x), as_real_tensor("y", y))]
    a, b = (rows.double() for rows in as_pair("x", sides[0], "y", sides[1]))
    dim = a.shape[1]
    if bins**dim > _LARGEST_HISTOGRAM:
        raise ValueError(f"bins must leave at most {_LARGEST_HISTOGRAM} cells, got {bins} along each of {dim} axes")
    low = torch.minimum(a.amin(0), b.amin(0))
    # Halves, because the difference of two finite numbers may overflow.
    width = 0.5 * torch.maximum(a.amax(0), b.amax(0)) - 0.5 * low
    width = torch.where(width > 0, width, 1.0)
    strides = bins ** torch.arange(dim - 1, -1, -1, device=a.device)
    histograms = []
    for rows in (a, b):
        # The last cell has its upper end.
        cells = ((0.5 * rows - 0.5 * low) / width * bins).long().clamp(0, bins - 1)
        counts = torch.bincount((cells * strides).sum(1), minlength=bins**dim)
        histograms.append(counts.double().reshape([bins] * dim) / len(rows))
    return histograms[0], histograms[1]
