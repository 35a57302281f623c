"""The kernels of the forward: what runs on the device, and the tables that tell it where its arrays lie."""

import triton
import triton.language as tl

from ..common import divide, matrix_tile
from .norms import load_norm, load_sum_in, load_unit, store_scaled_squares
from .tables import as_pointer, is_aligned, reordered, width

# Columns of the forward geometry: sizes, then the offsets of the sections of `scratch`.
_H = tl.constexpr(0)
_W = tl.constexpr(1)
_PADDED_W = tl.constexpr(2)  # w up to the next multiple of 16
_BLOCKS = tl.constexpr(3)  # blocks of rows
_COLUMN_TILES = tl.constexpr(4)
_T = tl.constexpr(5)  # [h]
_S = tl.constexpr(6)  # [padded_w]
_BLOCK_MAX = tl.constexpr(7)  # [blocks]
_BLOCK_SUM = tl.constexpr(8)  # [blocks]
_TILE_MAX = tl.constexpr(9)  # [column tiles]
_TILE_SUM = tl.constexpr(10)  # [column tiles]
_BLOCK_UNIT = tl.constexpr(11)  # [blocks]
_PARTIAL_UNIT = tl.constexpr(12)  # [blocks]
_TILE_UNIT = tl.constexpr(13)  # [column tiles]
_PARTIAL = tl.constexpr(14)  # [blocks, padded_w]
_UV = tl.constexpr(15)  # the offset of u, and of v behind it, in `uv`
_INNER = tl.constexpr(16)
_CHANNELS = tl.constexpr(17)
FWD_FIELDS = tl.constexpr(18)

# Columns of the forward addresses.
_WEIGHT = tl.constexpr(0)
_U_IN = tl.constexpr(1)
_V_IN = tl.constexpr(2)
_Y = tl.constexpr(3)
FWD_ADDRESSES = tl.constexpr(4)


# How a matrix [h, w] lies in memory, as `inner` says: row by row; as [w / inner, h, inner]; as [w, h].
_ROWS = tl.constexpr(0)
_SLABS = tl.constexpr(1)
_COLUMNS = tl.constexpr(2)


@triton.jit
def _tile(weight, row, col, h, w, inner, LIES: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Pointers to the tile at (row, memory column col), and the mask of its elements inside the matrix.

    Neighbouring threads take what is side by side in memory: elements of a row, or of a column where those are h apart.
    """
    if LIES == _ROWS:
        pointers, mask = matrix_tile(weight, row, col, h, w, BLOCK_H, BLOCK_W)
    else:
        i, columns = tl.arange(0, BLOCK_H), col + tl.arange(0, BLOCK_W)
        if LIES == _COLUMNS:
            pointers = weight + row + (columns * h)[None, :] + i[:, None]
        else:
            narrow = tl.cast(inner, tl.int32)
            slabs = columns.to(tl.int32) // narrow
            offsets = slabs.to(tl.int64) * (h * inner) + (columns.to(tl.int32) - slabs * narrow)
            pointers = weight + row * inner + offsets[None, :] + i[:, None] * narrow
        mask = (row + i < h)[:, None] & (columns < w)[None, :]
    return pointers, mask


@triton.jit
def _too_large(x, LARGE: tl.constexpr):
    """Whether an element of x is beyond LARGE, infinite or NaN."""
    return tl.max(tl.where(tl.abs(x) <= LARGE, 0, 1), axis=0) != 0


@triton.jit
def _rows_times_v(
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
        pointers, mask = _tile(weight, row, col, h, w, inner, LIES, BLOCK_H, BLOCK_W)
        tile = tl.load(pointers, mask=mask, other=0.0).to(ACC)
        cols = col + tl.arange(0, BLOCK_W)
        entries = reordered(cols, channels, w) if REORDERS else cols
        x = tl.load(v + entries, mask=cols < w, other=0.0).to(ACC)
        if SCALE_V:
            x *= v_scale
        acc = tl.fma(tile, tl.broadcast_to(x[None, :], [BLOCK_H, BLOCK_W]), acc)
    return tl.sum(acc, axis=1)


@triton.jit
def _rows_in_range(
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
    """_rows_times_v times a unit, and the unit: 1, or UNIT where the numbers would come near the end of their range."""
    unit = tl.full([], 1.0, ACC)
    t = _rows_times_v(
        weight, v, v_scale, row, h, w, inner, channels, LIES, REORDERS, SCALE_V, ACC, BLOCK_H, BLOCK_W
    )  # fmt: skip
    if _too_large(t, LARGE):
        unit *= UNIT
        t = _rows_times_v(
            weight, v, unit * v_scale, row, h, w, inner, channels, LIES, REORDERS, True, ACC, BLOCK_H, BLOCK_W
        )  # fmt: skip
    return t, unit


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
        pointers, mask = _tile(weight, row, col, h, w, inner, LIES, BLOCK_H, BLOCK_W)
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
    t_block, unit = _rows_in_range(
        weight, v, v_scale, row, h, w, inner, channels, LIES, REORDERS, SCALE_V, LARGE, UNIT, ACC, BLOCK_H, BLOCK_W
    )  # fmt: skip
    rows = row + tl.arange(0, BLOCK_H)
    tl.store(t + rows, t_block, mask=rows < h)
    tl.store(block_unit, unit)
    ratio = store_scaled_squares(t_block, block_max, block_sum, TINY)
    largest = _store_column_sums(weight, ratio, partial, row, h, w, padded_w, inner, LIES, ACC, BLOCK_H, BLOCK_W)
    unit = tl.full([], 1.0, ACC)
    if _too_large(largest, LARGE):
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
            padded_w, w, channels, _ROWS, REORDERS, not FIRST, TINY, LARGE, UNIT, ACC, BLOCK_H, BLOCK_W,
        )  # fmt: skip
    else:
        _iterate_rows(
            as_pointer(weight_address, DTYPE, False),
            as_pointer(v_address, DTYPE, False) if FIRST else s,
            v_scale, t, block_max, block_sum, block_unit, partial_unit, partial, block * BLOCK_H, h, w,
            padded_w, w, channels, _ROWS, REORDERS, not FIRST, TINY, LARGE, UNIT, ACC, BLOCK_H, BLOCK_W,
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
    weight_address = tl.load(addresses + layer * FWD_ADDRESSES + _WEIGHT)
    v_address = tl.load(addresses + layer * FWD_ADDRESSES + _V_IN)
    geometry += layer * FWD_FIELDS
    h = tl.load(geometry + _H)
    w = tl.load(geometry + _W)
    padded_w = tl.multiple_of(tl.load(geometry + _PADDED_W), 16)
    column_tiles = tl.load(geometry + _COLUMN_TILES)
    t = scratch + tl.multiple_of(tl.load(geometry + _T), 16)
    s = scratch + tl.multiple_of(tl.load(geometry + _S), 16)
    block_max = scratch + tl.load(geometry + _BLOCK_MAX) + block
    block_sum = scratch + tl.load(geometry + _BLOCK_SUM) + block
    block_unit = scratch + tl.load(geometry + _BLOCK_UNIT) + block
    partial_unit = scratch + tl.load(geometry + _PARTIAL_UNIT) + block
    tile_max = scratch + tl.load(geometry + _TILE_MAX)
    tile_sum = scratch + tl.load(geometry + _TILE_SUM)
    tile_unit = scratch + tl.load(geometry + _TILE_UNIT)
    partial = scratch + tl.multiple_of(tl.load(geometry + _PARTIAL), 16) + block * padded_w
    if FIRST:
        v_scale = 1.0
    else:
        _, v_scale, _ = load_norm(tile_max, tile_sum, tile_unit, column_tiles, EPS, TINY, STEP)
    if ORDERED:
        inner = tl.load(geometry + _INNER)
        channels = tl.load(geometry + _CHANNELS)
        if inner < w:
            weight = as_pointer(weight_address, DTYPE, False)
            v = as_pointer(v_address, DTYPE, False) if FIRST else s
            row = block * STRIDED_H
            # Their columns are in the order of v.
            if inner == 1:
                _iterate_rows(
                    weight, v, v_scale, t, block_max, block_sum, block_unit, partial_unit, partial, row, h, w,
                    padded_w, 1, w, _COLUMNS, False, not FIRST, TINY, LARGE, UNIT, ACC, STRIDED_H, STRIDED_W,
                )  # fmt: skip
            else:
                _iterate_rows(
                    weight, v, v_scale, t, block_max, block_sum, block_unit, partial_unit, partial, row, h, w,
                    padded_w, inner, w, _SLABS, False, not FIRST, TINY, LARGE, UNIT, ACC, STRIDED_H, STRIDED_W,
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
    padded_w = tl.multiple_of(tl.load(geometry + _PADDED_W), 16)
    blocks = tl.load(geometry + _BLOCKS)
    s = scratch + tl.multiple_of(tl.load(geometry + _S), 16)
    block_max = scratch + tl.load(geometry + _BLOCK_MAX)
    block_sum = scratch + tl.load(geometry + _BLOCK_SUM)
    block_unit = scratch + tl.load(geometry + _BLOCK_UNIT)
    partial_unit = scratch + tl.load(geometry + _PARTIAL_UNIT)
    tile_max = scratch + tl.load(geometry + _TILE_MAX) + tile
    tile_sum = scratch + tl.load(geometry + _TILE_SUM) + tile
    tile_unit = scratch + tl.load(geometry + _TILE_UNIT) + tile
    partial = scratch + tl.multiple_of(tl.load(geometry + _PARTIAL), 16)
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


@triton.jit
def _sigma_of_rows(
    weight,  # T [h, w]
    u,  # T [h]
    v,  # T [w]
    block_sum,  # A []
    block_unit,  # A []
    row,
    h,
    w,
    inner,
    channels,
    LIES: tl.constexpr,
    REORDERS: tl.constexpr,
    LARGE: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    t, unit = _rows_in_range(
        weight, v, 1.0, row, h, w, inner, channels, LIES, REORDERS, False, LARGE, UNIT, ACC, BLOCK_H, BLOCK_W
    )  # fmt: skip
    rows = row + tl.arange(0, BLOCK_H)
    u_block = tl.load(u + rows, mask=rows < h, other=0.0).to(ACC)
    # Rows past the end have t = <0, v>, which is NaN for an infinite v.
    tl.store(block_sum, tl.sum(tl.where(rows < h, u_block * t, 0.0), axis=0))
    tl.store(block_unit, unit)


@triton.jit
def _sigma_of_contiguous_rows(
    weight_address,
    u,  # T [h]
    v_address,
    block_sum,  # A []
    block_unit,  # A []
    block,
    h,
    w,
    channels,
    REORDERS: tl.constexpr,
    LARGE: tl.constexpr,
    UNIT: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    if is_aligned(weight_address, w) & (v_address % 16 == 0):
        _sigma_of_rows(
            as_pointer(weight_address, DTYPE, True), u, as_pointer(v_address, DTYPE, True), block_sum, block_unit,
            block * BLOCK_H, h, width(w, True), w, channels, _ROWS, REORDERS, LARGE, UNIT, ACC, BLOCK_H, BLOCK_W,
        )  # fmt: skip
    else:
        _sigma_of_rows(
            as_pointer(weight_address, DTYPE, False), u, as_pointer(v_address, DTYPE, False), block_sum, block_unit,
            block * BLOCK_H, h, w, w, channels, _ROWS, REORDERS, LARGE, UNIT, ACC, BLOCK_H, BLOCK_W,
        )  # fmt: skip


@triton.jit
def spectral_norm_sigma_kernel(
    addresses,  # int64 [num_layers, addresses]
    geometry,  # int64 [num_layers, fields]
    work,  # int32 [blocks of rows, 2]
    scratch,  # A [...]
    ORDERED: tl.constexpr,
    LARGE: tl.constexpr,
    UNIT: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STRIDED_H: tl.constexpr,
    STRIDED_W: tl.constexpr,
):
    """sigma = u^T W v of the u [h] and v [w] given, up to the sum over blocks of rows, which it stores.

    Source: Miyato et al. 2018, eq. 21.
    """
    ACC: tl.constexpr = scratch.dtype.element_ty
    layer = tl.load(work + tl.program_id(0) * 2).to(tl.int64)
    block = tl.load(work + tl.program_id(0) * 2 + 1).to(tl.int64)
    weight_address = tl.load(addresses + layer * FWD_ADDRESSES + _WEIGHT)
    u = tl.load(addresses + layer * FWD_ADDRESSES + _U_IN).to(tl.pointer_type(DTYPE))
    v_address = tl.load(addresses + layer * FWD_ADDRESSES + _V_IN)
    geometry += layer * FWD_FIELDS
    h = tl.load(geometry + _H)
    w = tl.load(geometry + _W)
    block_sum = scratch + tl.load(geometry + _BLOCK_SUM) + block
    block_unit = scratch + tl.load(geometry + _BLOCK_UNIT) + block
    if ORDERED:
        inner = tl.load(geometry + _INNER)
        channels = tl.load(geometry + _CHANNELS)
        if inner < w:
            weight = as_pointer(weight_address, DTYPE, False)
            v = as_pointer(v_address, DTYPE, False)
            row = block * STRIDED_H
            if inner == 1:
                _sigma_of_rows(
                    weight, u, v, block_sum, block_unit, row, h, w, 1, w, _COLUMNS, False, LARGE, UNIT, ACC,
                    STRIDED_H, STRIDED_W,
                )  # fmt: skip
            else:
                _sigma_of_rows(
                    weight, u, v, block_sum, block_unit, row, h, w, inner, w, _SLABS, False, LARGE, UNIT, ACC,
                    STRIDED_H, STRIDED_W,
                )  # fmt: skip
        else:
            _sigma_of_contiguous_rows(
                weight_address, u, v_address, block_sum, block_unit, block, h, w, channels, True, LARGE, UNIT, DTYPE,
                ACC, BLOCK_H, BLOCK_W,
            )  # fmt: skip
    else:
        _sigma_of_contiguous_rows(
            weight_address, u, v_address, block_sum, block_unit, block, h, w, w, False, LARGE, UNIT, DTYPE,
            ACC, BLOCK_H, BLOCK_W,
        )  # fmt: skip


@triton.jit
def _store_vector(source, target, factor, first, end, SCALE: tl.constexpr, STEP: tl.constexpr):
    """target[first:end] = source[first:end], times `factor` if SCALE."""
    for start in range(first, end, STEP):
        index = start + tl.arange(0, STEP)
        value = tl.load(source + index, mask=index < end, other=0.0)
        if SCALE:
            value *= factor
        tl.store(target + index, value.to(target.dtype.element_ty), mask=index < end)


@triton.jit
def spectral_norm_scale_kernel(
    addresses,  # int64 [num_layers, addresses]
    geometry,  # int64 [num_layers, fields]
    work,  # int32 [chunks, 2]
    scratch,  # A [...]
    sigma_ptr,  # A [num_layers]
    uv,  # T [...]: u and v of each layer
    ITERATED: tl.constexpr,
    ORDERED: tl.constexpr,
    EPS: tl.constexpr,
    TINY: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,  # rows of a block of the kernels before
    STRIDED_H: tl.constexpr,
    STEP: tl.constexpr,
):
    """Y = W / sigma and the outputs u, v, sigma.

      after iterations:  u = t / max(|t|, EPS), v = s / max(|s|, EPS), sigma = <s, v> = |s|^2 / max(|s|, EPS)
      without any:       u, v as given, sigma = u^T W v

    A program takes BLOCK elements of W as a contiguous array [h * w], however the matrix lies, and the same indices of
    u and v.

    Source: Miyato et al. 2018, eq. 20-22.
    """
    ACC: tl.constexpr = scratch.dtype.element_ty
    layer = tl.load(work + tl.program_id(0) * 2).to(tl.int64)
    chunk = tl.load(work + tl.program_id(0) * 2 + 1).to(tl.int64)
    addresses += layer * FWD_ADDRESSES
    weight_address = tl.load(addresses + _WEIGHT)
    y_address = tl.load(addresses + _Y)
    geometry += layer * FWD_FIELDS
    # sigma is that of W times the unit, which may have no number of its own.
    if ITERATED:
        column_tiles = tl.load(geometry + _COLUMN_TILES)
        tile_max = scratch + tl.load(geometry + _TILE_MAX)
        tile_sum = scratch + tl.load(geometry + _TILE_SUM)
        tile_unit = scratch + tl.load(geometry + _TILE_UNIT)
        s_norm, v_scale, unit = load_norm(tile_max, tile_sum, tile_unit, column_tiles, EPS, TINY, STEP)
        sigma = tl.where(s_norm < tl.maximum(unit * EPS, TINY), s_norm * (s_norm * v_scale), s_norm)
    else:
        blocks = tl.load(geometry + _BLOCKS)
        block_sum = scratch + tl.load(geometry + _BLOCK_SUM)
        block_unit = scratch + tl.load(geometry + _BLOCK_UNIT)
        unit = load_unit(block_unit, blocks, STEP)
        sigma = load_sum_in(block_sum, block_unit, unit, blocks, STEP)
    sigma_out = divide(sigma, unit)
    is_zero = tl.abs(sigma_out) < TINY
    inverse = divide(1.0, tl.where(is_zero, 1.0, sigma))
    unit = tl.where(is_zero, 1.0, unit)

    h = tl.load(geometry + _H)
    w = tl.load(geometry + _W)
    inner = tl.load(geometry + _INNER) if ORDERED else w
    first = chunk * BLOCK
    index = tl.arange(0, BLOCK)
    if (first + BLOCK <= h * w) & (weight_address % 16 == 0) & (y_address % 16 == 0):
        source = tl.multiple_of(as_pointer(weight_address, DTYPE, True) + first, 16)
        target = tl.multiple_of(as_pointer(y_address, DTYPE, True) + first, 16)
        tl.store(target + index, (tl.load(source + index).to(ACC) * unit * inverse).to(DTYPE))
    else:
        source = as_pointer(weight_address, DTYPE, False) + first
        target = as_pointer(y_address, DTYPE, False) + first
        mask = first + index < h * w
        tl.store(target + index, (tl.load(source + index, mask=mask).to(ACC) * unit * inverse).to(DTYPE), mask=mask)

    end = first + BLOCK
    if chunk == 0:
        tl.store(sigma_ptr + layer, sigma_out)
    uv += tl.load(geometry + _UV)
    if first < h:
        if ITERATED:
            blocks = tl.load(geometry + _BLOCKS)
            block_max = scratch + tl.load(geometry + _BLOCK_MAX)
            block_sum = scratch + tl.load(geometry + _BLOCK_SUM)
            block_unit = scratch + tl.load(geometry + _BLOCK_UNIT)
            _, u_scale, t_unit = load_norm(block_max, block_sum, block_unit, blocks, EPS, TINY, STEP)
            t = scratch + tl.load(geometry + _T)
            for start in range(first, tl.minimum(end, h), STEP):
                rows = start + tl.arange(0, STEP)
                inside = rows < tl.minimum(end, h)
                value = tl.load(t + rows, mask=inside, other=0.0) * u_scale
                of_block = rows // BLOCK_H
                if ORDERED:
                    of_block = tl.where(inner < w, rows // STRIDED_H, of_block)
                value *= divide(t_unit, tl.load(block_unit + of_block, mask=inside, other=1.0))
                tl.store(uv + rows, value.to(DTYPE), mask=inside)
        else:
            u_in = tl.load(addresses + _U_IN).to(tl.pointer_type(DTYPE))
            _store_vector(u_in, uv, 1.0, first, tl.minimum(end, h), False, STEP)
    if first < w:
        v = uv + h
        if ITERATED:
            s = scratch + tl.load(geometry + _S)
            if ORDERED:
                # s is in the order of the memory columns.
                channels = tl.load(geometry + _CHANNELS)
                for start in range(first, tl.minimum(end, w), STEP):
                    entries = start + tl.arange(0, STEP)
                    inside = entries < tl.minimum(end, w)
                    value = tl.load(s + reordered(entries, w // channels, w), mask=inside, other=0.0) * v_scale
                    tl.store(v + entries, value.to(DTYPE), mask=inside)
            else:
                _store_vector(s, v, v_scale, first, tl.minimum(end, w), True, STEP)
        else:
            v_in = tl.load(addresses + _V_IN).to(tl.pointer_type(DTYPE))
            _store_vector(v_in, v, 1.0, first, tl.minimum(end, w), False, STEP)
