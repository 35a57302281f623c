"""The kernels of the power iteration."""

import triton
import triton.language as tl

from ..common import divide
from .forward_fields import (
    FWD_ADDRESSES,
    FWD_BLOCK_MAX,
    FWD_BLOCK_SUM,
    FWD_BLOCK_UNIT,
    FWD_BLOCKS,
    FWD_CHANNELS,
    FWD_COLUMN_TILES,
    FWD_FIELDS,
    FWD_H,
    FWD_INNER,
    FWD_PADDED_W,
    FWD_PARTIAL,
    FWD_PARTIAL_UNIT,
    FWD_S,
    FWD_T,
    FWD_TILE_MAX,
    FWD_TILE_SUM,
    FWD_TILE_UNIT,
    FWD_V_IN,
    FWD_W,
    FWD_WEIGHT,
)
from .norms import load_norm, load_unit, store_scaled_squares
from .rows import BY_COLUMNS, IN_SLABS, ROW_BY_ROW, rows_in_range, tile_of, too_large
from .tables import as_pointer, is_aligned, width


@triton.jit
def _store_column_sums(
    weight,  # T [h, w]
    factors,  # A [BLOCK_H]
    partial,  # A [padded_w]
    row,
    h,
    w,
    padded_w,
    inner,
    LIES: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """partial_j = sum over the rows of a block of factor_i W_ij; returns the largest of them in each lane."""
    largest = tl.zeros([BLOCK_W], ACC)
    for col in range(0, padded_w, BLOCK_W):
        pointers, mask = tile_of(weight, row, col, h, w, inner, LIES, BLOCK_H, BLOCK_W)
        tile = tl.load(pointers, mask=mask, other=0.0).to(ACC)
        # Masked by the padded width: the padding gets zeros, and the reduction needs no narrower mask.
        cols = col + tl.arange(0, BLOCK_W)
        sums = tl.sum(tile * factors[:, None], axis=0)
        tl.store(partial + cols, sums, mask=cols < padded_w)
        largest = tl.maximum(largest, tl.where(sums == sums, tl.abs(sums), float("inf")))
    return largest


@triton.jit
def _iterate_rows(
    weight,  # T [h, w]
    v,  # T or A [w]
    v_scale,
    t,  # A [h]
    block_max,  # A []
    block_sum,  # A []
    block_unit,  # A []: of t
    partial_unit,  # A []
    partial,  # A [padded_w]
    row,
    h,
    w,
    padded_w,
    inner,
    channels,
    LIES: tl.constexpr,
    REORDERS: tl.constexpr,
    SCALE_V: tl.constexpr,
    TINY: tl.constexpr,
    LARGE: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Both matrix-vector products of one block of rows; the second one finds the rows in the cache."""
    t_block, unit = rows_in_range(
        weight, v, v_scale, row, h, w, inner, channels, LIES, REORDERS, SCALE_V, LARGE, UNIT, ACC, BLOCK_H, BLOCK_W
    )  # fmt: skip
    rows = row + tl.arange(0, BLOCK_H)
    tl.store(t + rows, t_block, mask=rows < h)
    tl.store(block_unit, unit)
    ratio = store_scaled_squares(t_block, block_max, block_sum, TINY)
    largest = _store_column_sums(weight, ratio, partial, row, h, w, padded_w, inner, LIES, ACC, BLOCK_H, BLOCK_W)
    unit = tl.full([], 1.0, ACC)
    if too_large(largest, LARGE):
        unit *= UNIT
        _store_column_sums(weight, ratio * unit, partial, row, h, w, padded_w, inner, LIES, ACC, BLOCK_H, BLOCK_W)
    tl.store(partial_unit, unit)


@triton.jit
def _iterate_contiguous_rows(
    weight_address,
    v_address,
    s,  # A [w]
    v_scale,
    t,
    block_max,
    block_sum,
    block_unit,
    partial_unit,
    partial,
    block,
    h,
    w,
    padded_w,
    channels,
    FIRST: tl.constexpr,
    REORDERS: tl.constexpr,
    TINY: tl.constexpr,
    LARGE: tl.constexpr,
    UNIT: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    aligned = is_aligned(weight_address, w)
    if FIRST:
        aligned &= v_address % 16 == 0
    # Two copies of the code, because the compiler fixes the width of a load: one layer of odd width must not
    # slow down the rest of its group.
    if aligned:
        _iterate_rows(
            as_pointer(weight_address, DTYPE, True),
            as_pointer(v_address, DTYPE, True) if FIRST else s,
            v_scale, t, block_max, block_sum, block_unit, partial_unit, partial, block * BLOCK_H, h, width(w, True),
            padded_w, w, channels, ROW_BY_ROW, REORDERS, not FIRST, TINY, LARGE, UNIT, ACC, BLOCK_H, BLOCK_W,
        )  # fmt: skip
    else:
        _iterate_rows(
            as_pointer(weight_address, DTYPE, False),
            as_pointer(v_address, DTYPE, False) if FIRST else s,
            v_scale, t, block_max, block_sum, block_unit, partial_unit, partial, block * BLOCK_H, h, w,
            padded_w, w, channels, ROW_BY_ROW, REORDERS, not FIRST, TINY, LARGE, UNIT, ACC, BLOCK_H, BLOCK_W,
        )  # fmt: skip


@triton.jit
def spectral_norm_iterate_kernel(
    addresses,  # int64 [num_layers, addresses]
    geometry,  # int64 [num_layers, fields]
    work,  # int32 [blocks of rows, 2]
    scratch,  # A [...]
    FIRST: tl.constexpr,
    ORDERED: tl.constexpr,  # some matrix does not lie as it is
    EPS: tl.constexpr,
    TINY: tl.constexpr,
    LARGE: tl.constexpr,
    UNIT: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STRIDED_H: tl.constexpr,  # of the tiles of matrices whose rows are not one piece of memory
    STRIDED_W: tl.constexpr,
    STEP: tl.constexpr,
):
    """One power iteration, up to the sum over blocks of rows: one pass over W for both products.

      t = W v    with v the given one (FIRST) or s / max(|s|, EPS) of the iteration before
      s = W^T u = sum_b c_b sum_{i in b} (t_i / m_b) W_i
      m_b = max_{i in b} |t_i|    c_b = m_b / max(|t|, EPS)

    |t| is known only after all blocks b of rows, so each one stores its inner sum relative to its own m_b, of
    the size of W, together with m_b; spectral_norm_reduce_kernel applies c_b. A program takes BLOCK_H rows
    and walks over them twice, in tiles of BLOCK_W memory columns. s and the inner sums are in their order.

    Where a block's t_i or inner sums are beyond LARGE, it stores them times UNIT, a power of two, and says so: no
    number leaves its range, whatever finite W.

    Source: Miyato et al. 2018, "Spectral Normalization for Generative Adversarial Networks", Algorithm 1 and
    eq. 20-21, in the order of torch.nn.utils.parametrizations.spectral_norm (u before v).
    """
    ACC: tl.constexpr = scratch.dtype.element_ty
    layer = tl.load(work + tl.program_id(0) * 2).to(tl.int64)
    block = tl.load(work + tl.program_id(0) * 2 + 1).to(tl.int64)
    weight_address = tl.load(addresses + layer * FWD_ADDRESSES + FWD_WEIGHT)
    v_address = tl.load(addresses + layer * FWD_ADDRESSES + FWD_V_IN)
    geometry += layer * FWD_FIELDS
    h = tl.load(geometry + FWD_H)
    w = tl.load(geometry + FWD_W)
    padded_w = tl.multiple_of(tl.load(geometry + FWD_PADDED_W), 16)
    column_tiles = tl.load(geometry + FWD_COLUMN_TILES)
    t = scratch + tl.multiple_of(tl.load(geometry + FWD_T), 16)
    s = scratch + tl.multiple_of(tl.load(geometry + FWD_S), 16)
    block_max = scratch + tl.load(geometry + FWD_BLOCK_MAX) + block
    block_sum = scratch + tl.load(geometry + FWD_BLOCK_SUM) + block
    block_unit = scratch + tl.load(geometry + FWD_BLOCK_UNIT) + block
    partial_unit = scratch + tl.load(geometry + FWD_PARTIAL_UNIT) + block
    tile_max = scratch + tl.load(geometry + FWD_TILE_MAX)
    tile_sum = scratch + tl.load(geometry + FWD_TILE_SUM)
    tile_unit = scratch + tl.load(geometry + FWD_TILE_UNIT)
    partial = scratch + tl.multiple_of(tl.load(geometry + FWD_PARTIAL), 16) + block * padded_w
    if FIRST:
        v_scale = 1.0
    else:
        _, v_scale, _ = load_norm(tile_max, tile_sum, tile_unit, column_tiles, EPS, TINY, STEP)
    if ORDERED:
        inner = tl.load(geometry + FWD_INNER)
        channels = tl.load(geometry + FWD_CHANNELS)
        if inner < w:
            weight = as_pointer(weight_address, DTYPE, False)
            v = as_pointer(v_address, DTYPE, False) if FIRST else s
            row = block * STRIDED_H
            # Their columns are in the order of v.
            if inner == 1:
                _iterate_rows(
                    weight, v, v_scale, t, block_max, block_sum, block_unit, partial_unit, partial, row, h, w,
                    padded_w, 1, w, BY_COLUMNS, False, not FIRST, TINY, LARGE, UNIT, ACC, STRIDED_H, STRIDED_W,
                )  # fmt: skip
            else:
                _iterate_rows(
                    weight, v, v_scale, t, block_max, block_sum, block_unit, partial_unit, partial, row, h, w,
                    padded_w, inner, w, IN_SLABS, False, not FIRST, TINY, LARGE, UNIT, ACC, STRIDED_H, STRIDED_W,
                )  # fmt: skip
        else:
            _iterate_contiguous_rows(
                weight_address, v_address, s, v_scale, t, block_max, block_sum, block_unit, partial_unit, partial,
                block, h, w, padded_w, channels, FIRST, FIRST, TINY, LARGE, UNIT, DTYPE, ACC, BLOCK_H, BLOCK_W,
            )  # fmt: skip
    else:
        _iterate_contiguous_rows(
            weight_address, v_address, s, v_scale, t, block_max, block_sum, block_unit, partial_unit, partial,
            block, h, w, padded_w, w, FIRST, False, TINY, LARGE, UNIT, DTYPE, ACC, BLOCK_H, BLOCK_W,
        )  # fmt: skip


@triton.jit
def spectral_norm_reduce_kernel(
    geometry,  # int64 [num_layers, fields]
    work,  # int32 [column tiles, 2]
    scratch,  # A [...]
    EPS: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STEP: tl.constexpr,
):
    """The rest of one power iteration: s = sum_b c_b partial_b with c_b = m_b / max(|t|, EPS).

    A program takes BLOCK_W columns of partial [blocks, padded_w] and adds BLOCK_H of its rows per step. It
    stores s, not v = s / max(|s|, EPS), since |s| needs all column tiles; readers of s divide.

    Source: Miyato et al. 2018, eq. 20.
    """
    ACC: tl.constexpr = scratch.dtype.element_ty
    layer = tl.load(work + tl.program_id(0) * 2).to(tl.int64)
    tile = tl.load(work + tl.program_id(0) * 2 + 1).to(tl.int64)
    geometry += layer * FWD_FIELDS
    padded_w = tl.multiple_of(tl.load(geometry + FWD_PADDED_W), 16)
    blocks = tl.load(geometry + FWD_BLOCKS)
    s = scratch + tl.multiple_of(tl.load(geometry + FWD_S), 16)
    block_max = scratch + tl.load(geometry + FWD_BLOCK_MAX)
    block_sum = scratch + tl.load(geometry + FWD_BLOCK_SUM)
    block_unit = scratch + tl.load(geometry + FWD_BLOCK_UNIT)
    partial_unit = scratch + tl.load(geometry + FWD_PARTIAL_UNIT)
    tile_max = scratch + tl.load(geometry + FWD_TILE_MAX) + tile
    tile_sum = scratch + tl.load(geometry + FWD_TILE_SUM) + tile
    tile_unit = scratch + tl.load(geometry + FWD_TILE_UNIT) + tile
    partial = scratch + tl.multiple_of(tl.load(geometry + FWD_PARTIAL), 16)
    _, t_scale, t_unit = load_norm(block_max, block_sum, block_unit, blocks, EPS, TINY, STEP)
    unit = load_unit(partial_unit, blocks, STEP)
    cols = tile * BLOCK_W + tl.arange(0, BLOCK_W)
    acc = tl.zeros([BLOCK_H, BLOCK_W], ACC)
    for first in range(0, blocks, BLOCK_H):
        rows = first + tl.arange(0, BLOCK_H)
        c = tl.load(block_max + rows, mask=rows < blocks, other=0.0) * t_scale
        c *= divide(t_unit, tl.load(block_unit + rows, mask=rows < blocks, other=1.0))
        c *= divide(unit, tl.load(partial_unit + rows, mask=rows < blocks, other=1.0))
        mask = (rows < blocks)[:, None] & (cols < padded_w)[None, :]
        values = tl.load(partial + rows[:, None] * padded_w + cols[None, :], mask=mask, other=0.0)
        acc = tl.fma(values, tl.broadcast_to(c[:, None], [BLOCK_H, BLOCK_W]), acc)
    total = tl.sum(acc, axis=0)
    tl.store(s + cols, total, mask=cols < padded_w)
    tl.store(tile_unit, unit)
    store_scaled_squares(total, tile_max, tile_sum, TINY)
