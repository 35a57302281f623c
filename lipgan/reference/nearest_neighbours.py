"""Nearest neighbours, and counts of points in balls, as they are defined: every distance from its differences.

    D(x, y) = sum over the features of (x - y)^2, in float64

D is 0 for equal points, and the same number wherever the same two points occur: a duplicate lies on the border of a
ball, never by rounding on either side of it. The formula |x|^2 + |y|^2 - 2 <x, y>, which costs less, has neither.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Differences that are held at a time: 32 MiB.
_BLOCK_ENTRIES = 1 << 22


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """``D [m, n]`` of ``x [m, d]`` and ``y [n, d]``, by an array of all differences."""
    return (x.double()[:, None] - y.double()).square_().sum(-1)


def _blocks(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of x, and their distances to all of y."""
    rows = max(1, _BLOCK_ENTRIES // max(1, y.numel()))
    for first in range(0, len(x), rows):
        part = slice(first, min(first + rows, len(x)))
        yield part, squared_distances(x[part], y)


def nearest_neighbours(x: Tensor, y: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """``(squared [m, k], indices [m, k])``: the smallest D of each x to a y, ascending, the lower index first.

    Without ``y`` the neighbours are the other points of ``x``: no point is its own, a duplicate of it is.
    """
    squared = x.new_empty(len(x), k, dtype=torch.float64)
    indices = torch.empty_like(squared, dtype=torch.int64)
    for part, distances in _blocks(x, x if y is None else y):
        if y is None:
            distances[:, part].fill_diagonal_(torch.inf)
        ordered, order = distances.sort(dim=1, stable=True)
        squared[part], indices[part] = ordered[:, :k], order[:, :k]
    return squared, indices


def ball_counts(
    x: Tensor, y: Tensor, x_squared_radii: Tensor, y_squared_radii: Tensor, closed: bool
) -> tuple[Tensor, Tensor]:
    """``(x_counts [2, m], y_counts [2, n])``, int64.

    The first row counts the other points in the ball of a point, the second the balls of other points that it is in.
    ``closed``: a ball holds its border.
    """
    x_counts = x.new_empty(2, len(x), dtype=torch.int64)
    y_counts = x.new_zeros(2, len(y), dtype=torch.int64)
    inside = torch.le if closed else torch.lt
    for part, distances in _blocks(x, y):
        of_x, of_y = inside(distances, x_squared_radii[part, None]), inside(distances, y_squared_radii)
        x_counts[0, part], x_counts[1, part] = of_x.sum(1), of_y.sum(1)
        y_counts[0] += of_y.sum(0)
        y_counts[1] += of_x.sum(0)
    return x_counts, y_counts
