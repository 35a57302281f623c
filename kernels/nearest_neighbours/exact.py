"""Every distance in float64: what both ops are by definition, and what serves where bounds do not decide.

A program takes BLOCK_M points, walks over all points of the other set in steps of BLOCK_N, and adds up a tile of D from
differences, CHUNK features a step. The order of the sum hangs on CHUNK alone: D is 0 for equal points, D(x, y) is
D(y, x) bit by bit, and all kernels find the same D wherever the same two points occur, so that a copy of a neighbour
lies on the border of its ball. |x|^2 + |y|^2 - 2 <x, y>, which is a matrix product, has none of that.

The price is two float64 operations a pair and feature (a difference and a fused multiply-add), and the conversions
before them. Data-center GPUs do them at half the rate of float32 or a little below, consumer cards at 1/32 or 1/64.
"""

import triton
import triton.language as tl

from ..common import matrix_tile


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
def pair_distances(x, y, row, cols, asked, d, PAIRS: tl.constexpr, CHUNK: tl.constexpr):
    """D [PAIRS] of the point `row` of x [m, d] and the points `cols` [PAIRS] of y [n, d], added up as in a tile.

    Those that are not asked for are infinity, and nothing is read where none is.
    """
    acc = tl.zeros([1, PAIRS], tl.float64)
    features = tl.arange(0, CHUNK)
    x += row.to(tl.int64) * d
    y_rows = (cols.to(tl.int64) * d)[:, None] + features[None, :]
    for feature in range(0, d * tl.max(asked.to(tl.int32), axis=0), CHUNK):
        inside = features < d - feature
        x_tile = tl.load(x + feature + features, mask=inside, other=0.0)
        y_tile = tl.load(y + feature + y_rows, mask=asked[:, None] & inside[None, :], other=0.0)
        acc = _add_squares(acc, x_tile[None, :], y_tile, 1, PAIRS, CHUNK)
    return tl.where(asked, tl.reshape(acc, [PAIRS]), float("inf"))


@triton.jit
def _pending_rows(pending, row, m, BLOCK_M: tl.constexpr):
    """Which of BLOCK_M rows from `row` on are to be served: all, or those that `pending` [m] says."""
    rows = row + tl.arange(0, BLOCK_M)
    inside = rows < m
    if pending is not None:
        inside = inside & (tl.load(pending + rows, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _nearest_neighbours_kernel(
    x,  # T [m, d]
    y,  # T [n, d]
    pending,  # int32 [m]: the rows to serve, if not 0; or None: all
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
    inside = _pending_rows(pending, row, m, BLOCK_M)
    if pending is not None:  # noqa: SIM102 -- what the compiler knows stands apart
        if tl.max(inside.to(tl.int32), axis=0) == 0:
            return
    out = rows.to(tl.int64) * k
    previous = inside & (rows < tl.minimum(first, 1) * m)
    bound = tl.load(squared + out + first - 1, mask=previous, other=-1.0)[:, None]
    bound_index = tl.load(indices + out + first - 1, mask=previous, other=-1).to(tl.int32)[:, None]

    wanted = tl.minimum(k - first, SLOTS)
    slots = tl.arange(0, SLOTS)[None, :]
    # Empty slots are farther than any point, in an order of their own; those not wanted are never the farthest. A row
    # that is not served wants none, and no point is near enough for it.
    best = tl.where((slots < wanted) & inside[:, None], float("inf"), float("-inf")).to(tl.float64)
    best_index = tl.zeros([BLOCK_M, SLOTS], tl.int32) + tl.where(slots < wanted, n + slots, -1)
    worst = tl.max(best, axis=1)

    for col in range(0, n, BLOCK_N):
        distances = _distance_tile(x, y, row, col, m, n, d, BLOCK_M, BLOCK_N, CHUNK)
        cols = (col + tl.arange(0, BLOCK_N))[None, :]
        asked = (cols < n) & ((distances > bound) | ((distances == bound) & (cols > bound_index)))
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

    inside = worst > float("-inf")  # as above, without a mask that waits in registers
    best = tl.where(slots < wanted, best, float("inf"))
    for place in range(0, wanted):
        nearest = tl.min(best, axis=1)
        index = tl.min(tl.where(best == nearest[:, None], best_index, 2147483647), axis=1)
        best = tl.where(best_index == index[:, None], float("inf"), best)
        tl.store(squared + out + first + place, nearest, mask=inside)
        tl.store(indices + out + first + place, index.to(tl.int64), mask=inside)


@triton.jit
def add_columns(y_counts, cols, n, in_x, in_y):
    """Adds to y_counts [2, n] at `cols`: points of x in balls around y, and balls around x that points of y are in.

    Whole numbers are the same in whatever order they are added.
    """
    tl.atomic_add(y_counts + cols, in_y.to(tl.int32), mask=in_y > 0, sem="relaxed")
    tl.atomic_add(y_counts + tl.cast(n, tl.int64) + cols, in_x.to(tl.int32), mask=in_x > 0, sem="relaxed")


@triton.jit
def _ball_counts_kernel(
    x,  # T [m, d]
    y,  # T [n, d]
    x_squared_radii,  # float64 [m]
    y_squared_radii,  # float64 [n]
    pending,  # int32 [m]: the rows to serve, if not 0; or None: all
    x_counts,  # int64 [2, m]
    y_counts,  # int32 [2, n], added to
    m,
    n,
    d,
    CLOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """How many points of one set are in the balls of the other. CLOSED: a ball holds its border.

    Source: lipgan/reference/nearest_neighbours.py.
    """
    row = tl.program_id(0) * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    inside = _pending_rows(pending, row, m, BLOCK_M)
    if pending is not None:  # noqa: SIM102 -- what the compiler knows stands apart
        if tl.max(inside.to(tl.int32), axis=0) == 0:
            return
    of_x, of_y = tl.zeros([BLOCK_M], tl.int32), tl.zeros([BLOCK_M], tl.int32)
    for col in range(0, n, BLOCK_N):
        distances = _distance_tile(x, y, row, col, m, n, d, BLOCK_M, BLOCK_N, CHUNK)
        cols = col + tl.arange(0, BLOCK_N)
        # Those that are not asked for are in no ball.
        distances = tl.where(inside[:, None] & (cols < n)[None, :], distances, float("nan"))
        # Loaded again for each tile: in registers throughout they would not leave enough for it.
        x_radii = tl.load(x_squared_radii + rows, mask=inside, other=0.0)[:, None]
        y_radii = tl.load(y_squared_radii + cols, mask=cols < n, other=0.0)[None, :]
        if CLOSED:
            in_x, in_y = distances <= x_radii, distances <= y_radii
        else:
            in_x, in_y = distances < x_radii, distances < y_radii
        of_x += tl.sum(in_x.to(tl.int32), axis=1)
        of_y += tl.sum(in_y.to(tl.int32), axis=1)
        add_columns(y_counts, cols, n, tl.sum(in_x.to(tl.int32), axis=0), tl.sum(in_y.to(tl.int32), axis=0))
    tl.store(x_counts + rows, of_x.to(tl.int64), mask=inside)
    tl.store(x_counts + tl.cast(m, tl.int64) + rows, of_y.to(tl.int64), mask=inside)
