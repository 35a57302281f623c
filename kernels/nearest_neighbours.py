"""Nearest neighbours, and counts of points in balls, without a matrix of all distances.

    D(x, y) = sum over the features of (x - y)^2, in float64

A program takes BLOCK_M points, walks over all points of the other set in steps of BLOCK_N, and adds up a tile of D from
differences, CHUNK features a step. The order of the sum hangs on CHUNK alone: D is 0 for equal points, D(x, y) is
D(y, x) bit by bit, and both ops find the same D wherever the same two points occur, so that a copy of a neighbour lies
on the border of its ball. |x|^2 + |y|^2 - 2 <x, y>, which is a matrix product, has none of that.

The price is two float64 operations a pair and feature (a difference and a fused multiply-add). Data-center GPUs do them
at half the rate of float32 or a little below, consumer cards at 1/32 or 1/64 of it: there, expect float64 to be all of
the time. The kernels are made to be right first; no figure of their speed is known.

No kernel uses atomics: what is counted of y is a launch of its own, with the roles of the sets changed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .common import materialized, matrix_tile


@triton.jit
def _add_squares(acc, x, y, M: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr):
    """acc [M, N] + the squared differences of the features in x [M, WIDTH] and y [N, WIDTH], one after the other.

    A tile is halved until single columns are left, those of even places first. tl.sum over a third dimension would
    leave the order to the layout that the compiler chooses for a kernel, and need WIDTH times the registers. Columns
    are widened last, since they wait in registers.
    """
    if WIDTH == 1:
        difference = tl.reshape(x, [M]).to(tl.float64)[:, None] - tl.reshape(y, [N]).to(tl.float64)[None, :]
        acc = tl.fma(difference, difference, acc)
    else:
        x_even, x_odd = tl.split(tl.reshape(x, [M, WIDTH // 2, 2]))
        y_even, y_odd = tl.split(tl.reshape(y, [N, WIDTH // 2, 2]))
        acc = _add_squares(acc, x_even, y_even, M, N, WIDTH // 2)
        acc = _add_squares(acc, x_odd, y_odd, M, N, WIDTH // 2)
    return acc


@triton.jit
def _distance_tile(
    x,  # T [m, d]
    y,  # T [n, d]
    row,
    col,
    m,
    n,
    d,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """D [BLOCK_M, BLOCK_N] of the points from `row` on in x and from `col` on in y; points outside count as 0."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float64)
    for feature in range(0, d, CHUNK):
        pointers, mask = matrix_tile(x, row, feature, m, d, BLOCK_M, CHUNK)
        x_tile = tl.load(pointers, mask=mask, other=0.0)
        pointers, mask = matrix_tile(y, col, feature, n, d, BLOCK_N, CHUNK)
        y_tile = tl.load(pointers, mask=mask, other=0.0)
        acc = _add_squares(acc, x_tile, y_tile, BLOCK_M, BLOCK_N, CHUNK)
    return acc


@triton.jit
def _nearest_neighbours_kernel(
    x,  # T [m, d]
    y,  # T [n, d]
    squared,  # float64 [m, k]
    indices,  # int64 [m, k]
    m,
    n,
    d,
    k,
    first,
    OTHERS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The neighbours of x in y from the `first` nearest on (counted from 0), at most SLOTS of them, ascending.

    Those before `first` are there already; pairs (D, index) not above the last of them are passed over. OTHERS: y is x,
    and no point is its own neighbour.

    The nearest so far of a point are in SLOTS slots, in no order. A tile is asked for its smallest D until no point
    finds one below its farthest slot, which takes that slot: about k (1 + ln(n / k)) times for a point that meets the
    others in no particular order. Among equal D of a tile the lowest index comes first, and those of a later tile,
    whose indices are higher, do not take a slot of their equal.

    Source: lipgan/reference/nearest_neighbours.py.
    """
    row = tl.program_id(0) * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    inside = rows < m
    out = rows.to(tl.int64) * k
    previous = rows < tl.minimum(first, 1) * m
    bound = tl.load(squared + out + first - 1, mask=previous, other=-1.0)[:, None]
    bound_index = tl.load(indices + out + first - 1, mask=previous, other=-1).to(tl.int32)[:, None]

    wanted = tl.minimum(k - first, SLOTS)
    slots = tl.arange(0, SLOTS)[None, :]
    # Empty slots are farther than any point, in an order of their own; those not wanted are never the farthest.
    best = tl.zeros([BLOCK_M, SLOTS], tl.float64) + tl.where(slots < wanted, float("inf"), float("-inf"))
    best_index = tl.zeros([BLOCK_M, SLOTS], tl.int32) + tl.where(slots < wanted, n + slots, -1)
    worst = tl.max(best, axis=1)

    for col in range(0, n, BLOCK_N):
        distances = _distance_tile(x, y, row, col, m, n, d, BLOCK_M, BLOCK_N, CHUNK)
        cols = (col + tl.arange(0, BLOCK_N))[None, :]
        asked = inside[:, None] & (cols < n) & ((distances > bound) | ((distances == bound) & (cols > bound_index)))
        if OTHERS:
            asked = asked & (rows[:, None] != cols)
        distances = tl.where(asked, distances, float("inf"))
        nearest = tl.min(distances, axis=1)
        while tl.max((nearest < worst).to(tl.int32), axis=0) > 0:
            index = tl.min(tl.where(distances == nearest[:, None], cols, 2147483647), axis=1)
            distances = tl.where(cols == index[:, None], float("inf"), distances)
            farthest = tl.max(tl.where(best == worst[:, None], best_index, -1), axis=1)
            replaced = (nearest < worst)[:, None] & (best_index == farthest[:, None])
            best = tl.where(replaced, nearest[:, None], best)
            best_index = tl.where(replaced, index[:, None], best_index)
            worst = tl.max(best, axis=1)
            nearest = tl.min(distances, axis=1)

    best = tl.where(slots < wanted, best, float("inf"))
    for place in range(0, wanted):
        nearest = tl.min(best, axis=1)
        index = tl.min(tl.where(best == nearest[:, None], best_index, 2147483647), axis=1)
        best = tl.where(best_index == index[:, None], float("inf"), best)
        tl.store(squared + out + first + place, nearest, mask=inside)
        tl.store(indices + out + first + place, index.to(tl.int64), mask=inside)


@triton.jit
def _ball_counts_kernel(
    x,  # T [m, d]
    y,  # T [n, d]
    x_squared_radii,  # float64 [m]
    y_squared_radii,  # float64 [n]
    counts,  # int64 [2, m]
    m,
    n,
    d,
    CLOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """How many of y are in the ball of each x, and in how many balls of y each x is. CLOSED: a ball holds its border.

    Source: lipgan/reference/nearest_neighbours.py.
    """
    row = tl.program_id(0) * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    inside = rows < m
    x_radii = tl.load(x_squared_radii + rows, mask=inside, other=0.0)[:, None]
    of_x, of_y = tl.zeros([BLOCK_M], tl.int32), tl.zeros([BLOCK_M], tl.int32)
    for col in range(0, n, BLOCK_N):
        distances = _distance_tile(x, y, row, col, m, n, d, BLOCK_M, BLOCK_N, CHUNK)
        cols = col + tl.arange(0, BLOCK_N)
        y_radii = tl.load(y_squared_radii + cols, mask=cols < n, other=0.0)[None, :]
        if CLOSED:
            in_x, in_y = distances <= x_radii, distances <= y_radii
        else:
            in_x, in_y = distances < x_radii, distances < y_radii
        of_x += tl.sum((in_x & (cols < n)[None, :]).to(tl.int32), axis=1)
        of_y += tl.sum((in_y & (cols < n)[None, :]).to(tl.int32), axis=1)
    tl.store(counts + rows, of_x.to(tl.int64), mask=inside)
    tl.store(counts + tl.cast(m, tl.int64) + rows, of_y.to(tl.int64), mask=inside)


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


def nearest_neighbours(x: Tensor, y: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest points of y to each x; without y, of the other points of x.

    A pass over all pairs finds config.NEIGHBOUR_SLOTS of them; more take more passes.

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
    if m:
        with torch.cuda.device_of(x):
            for first in range(0, k, config.NEIGHBOUR_SLOTS):
                _nearest_neighbours_kernel[(config.ceil_div(m, tile.block_m),)](
                    x, y, squared, indices, m, n, d, k, first,
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
    x_side, y_side = (x, materialized(x_squared_radii.contiguous())), (y, materialized(y_squared_radii.contiguous()))
    counts = []
    with torch.cuda.device_of(x):
        for (points, radii), (others, other_radii) in ((x_side, y_side), (y_side, x_side)):
            (m, d), n = points.shape, len(others)
            counts.append(torch.empty(2, m, dtype=torch.int64, device=x.device))
            if m:
                _ball_counts_kernel[(config.ceil_div(m, tile.block_m),)](
                    points, others, radii, other_radii, counts[-1], m, n, d,
                    CLOSED=closed, **tile.blocks, **tile.options,
                )  # fmt: skip
    return counts[0], counts[1]
