"""Rows of a matrix times v, however the matrix lies in memory."""

import triton
import triton.language as tl

from ..common import matrix_tile
from .tables import reordered

# How a matrix [h, w] lies in memory, as `inner` says: row by row; as [w / inner, h, inner]; as [w, h].
ROW_BY_ROW = tl.constexpr(0)
IN_SLABS = tl.constexpr(1)
BY_COLUMNS = tl.constexpr(2)


@triton.jit
def tile_of(weight, row, col, h, w, inner, LIES: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Pointers to the tile at (row, memory column col), and the mask of its elements inside the matrix.

    Neighbouring threads take what is side by side in memory: elements of a row, or of a column where those are h apart.
    """
    if LIES == ROW_BY_ROW:
        pointers, mask = matrix_tile(weight, row, col, h, w, BLOCK_H, BLOCK_W)
    else:
        i, columns = tl.arange(0, BLOCK_H), col + tl.arange(0, BLOCK_W)
        if LIES == BY_COLUMNS:
            pointers = weight + row + (columns * h)[None, :] + i[:, None]
        else:
            narrow = tl.cast(inner, tl.int32)
            slabs = columns.to(tl.int32) // narrow
            offsets = slabs.to(tl.int64) * (h * inner) + (columns.to(tl.int32) - slabs * narrow)
            pointers = weight + row * inner + offsets[None, :] + i[:, None] * narrow
        mask = (row + i < h)[:, None] & (columns < w)[None, :]
    return pointers, mask


@triton.jit
def too_large(x, LARGE: tl.constexpr):
    """Whether an element of x is beyond LARGE, infinite or NaN."""
    return tl.max(tl.where(tl.abs(x) <= LARGE, 0, 1), axis=0) != 0


@triton.jit
def rows_times_v(
    weight,  # T [h, w]
    v,  # T or A [w]
    v_scale,
    row,
    h,
    w,
    inner,
    channels,
    LIES: tl.constexpr,
    REORDERS: tl.constexpr,  # v is in its own order, not in that of the memory columns
    SCALE_V: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """t_i = <W_i, v> of a block of rows, or <W_i, v * v_scale>: v is scaled first, lest <W_i, v> overflow."""
    acc = tl.zeros([BLOCK_H, BLOCK_W], ACC)
    for col in range(0, w, BLOCK_W):
        pointers, mask = tile_of(weight, row, col, h, w, inner, LIES, BLOCK_H, BLOCK_W)
        tile = tl.load(pointers, mask=mask, other=0.0).to(ACC)
        cols = col + tl.arange(0, BLOCK_W)
        entries = reordered(cols, channels, w) if REORDERS else cols
        x = tl.load(v + entries, mask=cols < w, other=0.0).to(ACC)
        if SCALE_V:
            x *= v_scale
        acc = tl.fma(tile, tl.broadcast_to(x[None, :], [BLOCK_H, BLOCK_W]), acc)
    return tl.sum(acc, axis=1)


@triton.jit
def rows_in_range(
    weight,  # T [h, w]
    v,  # T or A [w]
    v_scale,
    row,
    h,
    w,
    inner,
    channels,
    LIES: tl.constexpr,
    REORDERS: tl.constexpr,
    SCALE_V: tl.constexpr,
    LARGE: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """rows_times_v times a unit, and the unit: 1, or UNIT where the numbers would come near the end of their range."""
    unit = tl.full([], 1.0, ACC)
    t = rows_times_v(
        weight, v, v_scale, row, h, w, inner, channels, LIES, REORDERS, SCALE_V, ACC, BLOCK_H, BLOCK_W
    )  # fmt: skip
    if too_large(t, LARGE):
        unit *= UNIT
        t = rows_times_v(
            weight, v, unit * v_scale, row, h, w, inner, channels, LIES, REORDERS, True, ACC, BLOCK_H, BLOCK_W
        )  # fmt: skip
    return t, unit
