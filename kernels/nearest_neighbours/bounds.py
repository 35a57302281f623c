"""Bounds on the distances from a product in float32, and D itself only for the pairs that they leave open.

All points are moved by a common offset, divided by a power of 2 so that no coordinate exceeds 1, and rounded to
float32: x', y'. With X = |x'|^2 and Y = |y'|^2, in float64 before the rounding, and

    q = fl(Y (1 - s)) - 2 <x', y'>      in float32, the product in IEEE float32
    s = (d + 32) 2^-24 (1 + (d + 32) 2^-23),      t = (d + 1) 2^-119

D in units of the scaled points lies between q + X (1 - s) - t and q + X (1 + s) + 2 s Y + t; derived in
docs/numerics/nearest_neighbours.md. _neighbour_bounds_kernel writes q for a block of rows, at the speed of a matrix
product; one program a row then reads its bounds twice, collects the pairs that they do not decide, and computes D of
those in float64, as exact.py does it and to the same bits. A row with more such pairs than a program takes is
`pending`: the exact kernel, launched last, serves those rows and no others, so that the host need not know which.
"""

import triton
import triton.language as tl

from ..common import product_tile
from .exact import add_columns, pair_distances

_NO_COLUMN = tl.constexpr(2147483647)


@triton.jit
def _slack(d):
    """s of the bounds: the rounding of the product, of its operands and of what is added to it."""
    first = (tl.cast(d, tl.float64) + 32.0) * 5.9604644775390625e-08  # 2^-24
    return first * (1.0 + 2.0 * first)


@triton.jit
def _tiny(d):
    """t of the bounds: operands and products below the range of float32."""
    return (tl.cast(d, tl.float64) + 1.0) * 1.504632769052528e-36  # 2^-119


@triton.jit
def _scale(x_extreme, y_extreme):
    """The power of 2 that takes points, moved by a mean of them, to coordinates of at most 1.

    It is kept where its square is a number of float64 as well.
    """
    extreme = 2.0 * tl.maximum(tl.load(x_extreme).to(tl.float64), tl.load(y_extreme).to(tl.float64))
    exponent = ((extreme.to(tl.int64, bitcast=True) >> 52) & 2047) - 1022  # extreme < 2^exponent
    exponent = tl.minimum(tl.maximum(exponent, -480), 480)
    return ((1023 - exponent) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _neighbour_shift_kernel(
    points,  # T [n, d]
    offset,  # float64 [d]
    x_extreme,  # T []: the largest coordinates of both sets, in size
    y_extreme,  # T []
    shifted,  # float32 [n, d]
    norms,  # float64 [n]
    d,
    BLOCK: tl.constexpr,
):
    """shifted = scale (points - offset), and the squares of lengths before the rounding; a point a program."""
    row = tl.program_id(0)
    first = row.to(tl.int64) * d
    scale = _scale(x_extreme, y_extreme)
    features = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float64)
    for feature in range(0, d, BLOCK):
        inside = features < d - feature
        point = tl.load(points + first + feature + features, mask=inside, other=0.0).to(tl.float64)
        moved = (point - tl.load(offset + feature + features, mask=inside, other=0.0)) * scale
        squares += moved * moved
        tl.store(shifted + first + feature + features, moved.to(tl.float32), mask=inside)
    tl.store(norms + row, tl.sum(squares, axis=0))


@triton.jit
def _neighbour_bounds_kernel(
    x,  # float32 [m, d], shifted
    y,  # float32 [n, d], shifted
    y_norms,  # float64 [n]
    bounds,  # float32 [rows, width], of the rows of x from `first` on
    first,
    m,
    n,
    d,
    width,
    row_tiles,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """q of a tile of pairs. Tiles of one column come one after the other: their rows of x stay in the cache."""
    tile = tl.program_id(0) % row_tiles
    row, col = first + tile * BLOCK, tl.program_id(0) // row_tiles * BLOCK
    product = product_tile(x, y, row, col, m, n, d, d, 1, 1, d, PRECISION, BLOCK, BLOCK_K)
    index = tl.arange(0, BLOCK)
    cols = col + index
    norms = tl.load(y_norms + cols, mask=cols < n, other=0.0)
    low = (norms * (1.0 - _slack(d))).to(tl.float32)
    corner = bounds + tile.to(tl.int64) * BLOCK * width + col
    # Whole tiles: the workspace has room for them, and nothing reads what lies outside of the pairs.
    tl.store(corner + (index[:, None] * width + index[None, :]), low[None, :] - 2.0 * product)


@triton.jit
def _collect(hits, cols, chosen, count, PAIRS: tl.constexpr):
    """Appends the columns with a hit to the first `count` of `chosen` [PAIRS], ascending, until there are too many."""
    column = tl.min(tl.where(hits, cols, _NO_COLUMN), axis=0)
    while (column < _NO_COLUMN) & (count <= PAIRS):
        chosen = tl.where(tl.arange(0, PAIRS) == count, column, chosen)
        hits = hits & (cols > column)
        count += 1
        column = tl.min(tl.where(hits, cols, _NO_COLUMN), axis=0)
    return chosen, count


@triton.jit
def _nearest_by_bounds_kernel(
    x,  # T [m, d]
    y,  # T [n, d]
    x_norms,  # float64 [m]
    y_norms,  # float64 [n]
    bounds,  # float32 [rows, width], of the rows of x from `first` on
    squared,  # float64 [m, k]
    indices,  # int64 [m, k]
    pending,  # int32 [m]: 1 where the row is left to the exact kernel
    first,
    n,
    d,
    k,
    width,
    OTHERS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The k nearest of one point: of the pairs whose lower bound does not exceed the k-th smallest upper bound.

    That k-th smallest one is taken among the smallest of each of BLOCK classes of columns, without those that repeat: k
    different points are as near at least. All nearer points, and those as near, are among the pairs.

    Source: lipgan/reference/nearest_neighbours.py; the classes are those of Chern et al. 2022, "TPU-KNN: K Nearest
    Neighbor Search at Peak FLOP/s", where they make the answer approximate.
    """
    row = first + tl.program_id(0)
    bounds += tl.program_id(0).to(tl.int64) * width
    index = tl.arange(0, BLOCK)
    # Rounded up, by more than a rounding to float32.
    twice = 2.000002 * _slack(d)
    smallest = tl.full([BLOCK], float("inf"), tl.float32)
    for col in range(0, n, BLOCK):
        cols = col + index
        low = tl.load(bounds + cols, mask=cols < width, other=float("inf"))
        norms = tl.load(y_norms + cols, mask=cols < n, other=float("inf"))
        high = low + (twice * norms).to(tl.float32)
        if OTHERS:
            high = tl.where(cols == row, float("inf"), high)
        smallest = tl.where(high < smallest, high, smallest)
    reach = tl.full([], float("-inf"), tl.float32)
    for _ in range(0, k):
        reach = tl.min(tl.where(smallest > reach, smallest, float("inf")), axis=0)
    rest = (twice * tl.load(x_norms + row) + 2.000002 * _tiny(d)).to(tl.float32)
    limit = reach + rest
    limit += (tl.abs(reach) + rest) * 2.384185791015625e-07  # 2^-22

    chosen = tl.zeros([PAIRS], tl.int32)
    count = tl.full([], 0, tl.int32)
    for col in range(0, n, BLOCK):
        cols = col + index
        hits = (tl.load(bounds + cols, mask=cols < width, other=float("inf")) <= limit) & (cols < n)
        if OTHERS:
            hits = hits & (cols != row)
        chosen, count = _collect(hits, cols, chosen, count, PAIRS)

    # Numbers that are not finite end here too.
    found = (count >= k) & (count <= PAIRS) & (limit < float("inf"))
    tl.store(pending + row, 1 - found.to(tl.int32))
    slots = tl.arange(0, PAIRS)
    asked = slots < tl.where(found, count, 0)
    distances = pair_distances(x, y, row, chosen, asked, d, PAIRS, CHUNK)
    # The place of each among them; the order of the slots is that of the columns.
    precedes = (distances[None, :] < distances[:, None]) | (
        (distances[None, :] == distances[:, None]) & (slots[None, :] < slots[:, None])
    )
    place = tl.sum(precedes.to(tl.int32), axis=1)
    out = row.to(tl.int64) * k + place
    tl.store(squared + out, distances, mask=asked & (place < k))
    tl.store(indices + out, chosen.to(tl.int64), mask=asked & (place < k))


@triton.jit
def _decisions(low, high, radii):
    """Whether a pair is in a ball for sure, and whether the bounds leave it open; D has roundings of its own."""
    inside = high < radii * 0.9999999999990905  # 1 - 2^-40
    return inside, (low <= radii * 1.0000000000009095) & (inside == 0)


@triton.jit
def _counts_by_bounds_kernel(
    x,  # T [m, d]
    y,  # T [n, d]
    x_norms,  # float64 [m]
    y_norms,  # float64 [n]
    bounds,  # float32 [rows, width], of the rows of x from `first` on
    x_extreme,  # T []
    y_extreme,  # T []
    x_squared_radii,  # float64 [m]
    y_squared_radii,  # float64 [n]
    pending,  # int32 [m]: 1 where the row is left to the exact kernel
    x_counts,  # int64 [2, m]
    y_counts,  # int32 [2, n], added to
    first,
    m,
    n,
    d,
    width,
    CLOSED: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Counts of one x: the pairs that the bounds leave open are found first, so that a row left open adds nothing.

    Source: lipgan/reference/nearest_neighbours.py.
    """
    row = first + tl.program_id(0)
    bounds += tl.program_id(0).to(tl.int64) * width
    index = tl.arange(0, BLOCK)
    scale = _scale(x_extreme, y_extreme)
    squares = scale * scale
    slack = _slack(d)
    norm, radius = tl.load(x_norms + row), tl.load(x_squared_radii + row)
    row_low, row_high = norm * (1.0 - slack) - _tiny(d), norm * (1.0 + slack) + _tiny(d)

    chosen = tl.zeros([PAIRS], tl.int32)
    count = tl.full([], 0, tl.int32)
    for col in range(0, n, BLOCK):
        cols = col + index
        q = tl.load(bounds + cols, mask=cols < width, other=0.0).to(tl.float64)
        low, high = q + row_low, q + row_high + 2.0 * slack * tl.load(y_norms + cols, mask=cols < n, other=0.0)
        radii = tl.load(y_squared_radii + cols, mask=cols < n, other=0.0)
        _, open_x = _decisions(low, high, radius * squares)
        _, open_y = _decisions(low, high, radii * squares)
        chosen, count = _collect((open_x | open_y) & (cols < n), cols, chosen, count, PAIRS)
    # Where q is not a number nothing above says so; then neither is its row's norm finite.
    found = (count <= PAIRS) & (norm < float("inf"))
    tl.store(pending + row, 1 - found.to(tl.int32))

    of_x, of_y = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for col in range(0, n * found.to(tl.int32), BLOCK):
        cols = col + index
        q = tl.load(bounds + cols, mask=cols < width, other=0.0).to(tl.float64)
        low, high = q + row_low, q + row_high + 2.0 * slack * tl.load(y_norms + cols, mask=cols < n, other=0.0)
        radii = tl.load(y_squared_radii + cols, mask=cols < n, other=0.0)
        in_x, open_x = _decisions(low, high, radius * squares)
        in_y, open_y = _decisions(low, high, radii * squares)
        decided = ((open_x | open_y) == 0) & (cols < n)
        in_x, in_y = (in_x & decided).to(tl.int32), (in_y & decided).to(tl.int32)
        of_x += in_x
        of_y += in_y
        add_columns(y_counts, cols, n, in_x, in_y)

    asked = tl.arange(0, PAIRS) < tl.where(found, count, 0)
    distances = pair_distances(x, y, row, chosen, asked, d, PAIRS, CHUNK)
    radii = tl.load(y_squared_radii + chosen, mask=asked, other=0.0)
    if CLOSED:
        in_x, in_y = distances <= radius, distances <= radii
    else:
        in_x, in_y = distances < radius, distances < radii
    in_x, in_y = (in_x & asked).to(tl.int32), (in_y & asked).to(tl.int32)
    add_columns(y_counts, chosen, n, in_x, in_y)
    total_x, total_y = tl.sum(of_x, axis=0) + tl.sum(in_x, axis=0), tl.sum(of_y, axis=0) + tl.sum(in_y, axis=0)
    tl.store(x_counts + row, total_x.to(tl.int64), mask=found)
    tl.store(x_counts + tl.cast(m, tl.int64) + row, total_y.to(tl.int64), mask=found)
