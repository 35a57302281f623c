"""The launches of a call: bounds and what they decide, by blocks of rows, then the exact kernel for the rest."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import config
from ..common import materialized
from .bounds import (
    _counts_by_bounds_kernel,
    _nearest_by_bounds_kernel,
    _neighbour_bounds_kernel,
    _neighbour_shift_kernel,
)
from .exact import _ball_counts_kernel, _nearest_neighbours_kernel


def _check(x: Tensor, y: Tensor, tile: config.DistanceTile) -> None:
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or x.dtype != y.dtype or x.device != y.device:
        raise ValueError(
            f"expected x [m, d] and y [n, d] of one dtype and device, got {x.dtype} {list(x.shape)} on {x.device} "
            f"and {y.dtype} {list(y.shape)} on {y.device}"
        )
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x must be float32 or float64, got {x.dtype}")
    if max(len(x), len(y)) + max(tile.block_m, tile.block_n) >= 1 << 31:
        raise ValueError(f"{max(len(x), len(y))} points are too many: their indices are 32-bit")
    if max(tile.block_m, tile.block_n) * x.shape[1] >= 1 << 31:
        raise ValueError(f"points of {x.shape[1]} features are too long: offsets within a tile are 32-bit")


@dataclass(frozen=True)
class _Shifted:
    """Both sets as the product takes them, and the rows that the bounds on their pairs leave to the exact kernel."""

    x: Tensor  # float32 [m, d]
    y: Tensor  # float32 [n, d]
    x_norms: Tensor  # float64 [m]
    y_norms: Tensor  # float64 [n]
    extremes: tuple[Tensor, Tensor]
    pending: Tensor  # int32 [m]


def _shift(x: Tensor, y: Tensor) -> _Shifted:
    """x and y moved by the mean of y, scaled and rounded."""
    offset = y.mean(0, dtype=torch.float64)
    extremes = [torch.linalg.vector_norm(points, torch.inf) for points in ((x,) if y is x else (x, y))]
    both = extremes[0], extremes[-1]
    sides = []
    for points in (x,) if y is x else (x, y):
        shifted = torch.empty(points.shape, dtype=torch.float32, device=x.device)
        norms = torch.empty(len(points), dtype=torch.float64, device=x.device)
        _neighbour_shift_kernel[(len(points),)](
            points, offset, *both, shifted, norms, points.shape[1],
            BLOCK=config.FEATURES_PER_STEP, **config.launch_options(4),
        )  # fmt: skip
        sides.append((shifted, norms))
    (x_shifted, x_norms), (y_shifted, y_norms) = sides[0], sides[-1]
    pending = torch.empty(len(x), dtype=torch.int32, device=x.device)
    return _Shifted(x_shifted, y_shifted, x_norms, y_norms, both, pending)


def _blocks_of_bounds(shifted: _Shifted) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, number of rows, bounds [rows, width]) of one block of rows of x after the other, in one workspace."""
    (m, d), n = shifted.x.shape, len(shifted.y)
    plan = config.bounds_plan(m, n)
    bounds = torch.empty(plan.rows, plan.width, dtype=torch.float32, device=shifted.x.device)
    for first in range(0, m, plan.rows):
        rows = min(plan.rows, m - first)
        row_tiles = config.ceil_div(rows, plan.tile.block)
        _neighbour_bounds_kernel[(row_tiles * (plan.width // plan.tile.block),)](
            shifted.x, shifted.y, shifted.y_norms, bounds, first, m, n, d, plan.width, row_tiles,
            PRECISION="ieee", **plan.tile.blocks, **plan.tile.options,
        )  # fmt: skip
        yield first, rows, bounds


def _by_bounds(chunk: int) -> dict[str, Any]:
    """Constants and options of the kernels that read bounds."""
    constants = {"PAIRS": config.NEIGHBOUR_PAIRS, "BLOCK": config.BOUNDS_PER_STEP, "CHUNK": chunk}
    return {**constants, **config.launch_options(4, registers=128)}


def nearest_neighbours(x: Tensor, y: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest points of y to each x; without y, of the other points of x.

    Where that pays, and for at most config.NEIGHBOURS_BY_BOUNDS of them, bounds on the distances leave few pairs to
    compute. A pass of the exact kernel over all pairs finds config.NEIGHBOUR_SLOTS of them; more take more passes.

    Args:
        x: [m, d], float32 or float64; finite, and squares of differences too.
        y: [n, d], same dtype and device, or None.
        k: from 1 to the number of points to choose from.

    Returns:
        (squared [m, k] float64, ascending, indices [m, k] int64), the lower index first among equal distances.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, k out of range, or sizes beyond 32-bit indices.
        TypeError: another dtype.
    """
    others, tile = y is None, config.distance_tile()
    x = materialized(x.contiguous())
    y = x if y is None else materialized(y.contiguous())
    _check(x, y, tile)
    (m, d), n = x.shape, len(y)
    if not 1 <= k <= n - others:
        raise ValueError(f"k must be from 1 to the number of points to choose from, {max(n - others, 0)}, got {k}")
    squared = torch.empty(m, k, dtype=torch.float64, device=x.device)
    indices = torch.empty(m, k, dtype=torch.int64, device=x.device)
    if not m:
        return squared, indices
    with torch.cuda.device_of(x):
        pending = None
        if k <= config.NEIGHBOURS_BY_BOUNDS and config.bounds_serve(m, n, d):
            shifted = _shift(x, y)
            pending = shifted.pending
            for start, rows, bounds in _blocks_of_bounds(shifted):
                _nearest_by_bounds_kernel[(rows,)](
                    x, y, shifted.x_norms, shifted.y_norms, bounds, squared, indices, pending, start, n, d, k,
                    bounds.shape[1], OTHERS=others, **_by_bounds(tile.chunk),
                )  # fmt: skip
        for first in range(0, k, config.NEIGHBOUR_SLOTS):
            _nearest_neighbours_kernel[(config.ceil_div(m, tile.block_m),)](
                x, y, pending, squared, indices, m, n, d, k, first,
                OTHERS=others, SLOTS=config.NEIGHBOUR_SLOTS, **tile.blocks, **tile.options,
            )  # fmt: skip
    return squared, indices


def ball_counts(
    x: Tensor, y: Tensor, x_squared_radii: Tensor, y_squared_radii: Tensor, closed: bool
) -> tuple[Tensor, Tensor]:
    """How many points of one set lie in the balls around those of the other.

    Args:
        x: [m, d], float32 or float64; finite, and squares of differences too.
        y: [n, d], same dtype and device.
        x_squared_radii: [m], float64.
        y_squared_radii: [n], float64.
        closed: whether a ball holds its border.

    Returns:
        (x_counts [2, m], y_counts [2, n]), int64: the points in the ball of each point, and the balls that it is in.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or sizes beyond 32-bit indices.
        TypeError: another dtype.
    """
    tile = config.distance_tile()
    x, y = materialized(x.contiguous()), materialized(y.contiguous())
    _check(x, y, tile)
    for radii, points in ((x_squared_radii, x), (y_squared_radii, y)):
        if radii.shape != points.shape[:1] or radii.dtype != torch.float64 or radii.device != x.device:
            raise ValueError(
                f"expected squared radii float64 [{len(points)}] on {x.device}, "
                f"got {radii.dtype} {list(radii.shape)} on {radii.device}"
            )
    x_radii, y_radii = (materialized(radii.contiguous()) for radii in (x_squared_radii, y_squared_radii))
    (m, d), n = x.shape, len(y)
    x_counts = torch.empty(2, m, dtype=torch.int64, device=x.device)
    y_counts = torch.zeros(2, n, dtype=torch.int32, device=x.device)
    if m and n:
        with torch.cuda.device_of(x):
            pending = None
            if config.bounds_serve(m, n, d):
                shifted = _shift(x, y)
                pending = shifted.pending
                for first, rows, bounds in _blocks_of_bounds(shifted):
                    _counts_by_bounds_kernel[(rows,)](
                        x, y, shifted.x_norms, shifted.y_norms, bounds, *shifted.extremes, x_radii, y_radii, pending,
                        x_counts, y_counts, first, m, n, d, bounds.shape[1], CLOSED=closed, **_by_bounds(tile.chunk),
                    )  # fmt: skip
            _ball_counts_kernel[(config.ceil_div(m, tile.block_m),)](
                x, y, x_radii, y_radii, pending, x_counts, y_counts, m, n, d,
                CLOSED=closed, **tile.blocks, **tile.options,
            )  # fmt: skip
    return x_counts if n else x_counts.zero_(), y_counts.long()
