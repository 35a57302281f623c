"""The kernels of the forward behind the power iteration: sigma of vectors that are given, and ``W / sigma``."""

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
    FWD_S,
    FWD_T,
    FWD_TILE_MAX,
    FWD_TILE_SUM,
    FWD_TILE_UNIT,
    FWD_U_IN,
    FWD_UV,
    FWD_V_IN,
    FWD_W,
    FWD_WEIGHT,
    FWD_Y,
)
from .norms import load_norm, load_sum_in, load_unit
from .rows import BY_COLUMNS, IN_SLABS, ROW_BY_ROW, rows_in_range
from .tables import as_pointer, is_aligned, reordered, width


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
    t, unit = rows_in_range(
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
            block * BLOCK_H, h, width(w, True), w, channels, ROW_BY_ROW, REORDERS, LARGE, UNIT, ACC, BLOCK_H, BLOCK_W,
        )  # fmt: skip
    else:
        _sigma_of_rows(
            as_pointer(weight_address, DTYPE, False), u, as_pointer(v_address, DTYPE, False), block_sum, block_unit,
            block * BLOCK_H, h, w, w, channels, ROW_BY_ROW, REORDERS, LARGE, UNIT, ACC, BLOCK_H, BLOCK_W,
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
    weight_address = tl.load(addresses + layer * FWD_ADDRESSES + FWD_WEIGHT)
    u = tl.load(addresses + layer * FWD_ADDRESSES + FWD_U_IN).to(tl.pointer_type(DTYPE))
    v_address = tl.load(addresses + layer * FWD_ADDRESSES + FWD_V_IN)
    geometry += layer * FWD_FIELDS
    h = tl.load(geometry + FWD_H)
    w = tl.load(geometry + FWD_W)
    block_sum = scratch + tl.load(geometry + FWD_BLOCK_SUM) + block
    block_unit = scratch + tl.load(geometry + FWD_BLOCK_UNIT) + block
    if ORDERED:
        inner = tl.load(geometry + FWD_INNER)
        channels = tl.load(geometry + FWD_CHANNELS)
        if inner < w:
            weight = as_pointer(weight_address, DTYPE, False)
            v = as_pointer(v_address, DTYPE, False)
            row = block * STRIDED_H
            if inner == 1:
                _sigma_of_rows(
                    weight, u, v, block_sum, block_unit, row, h, w, 1, w, BY_COLUMNS, False, LARGE, UNIT, ACC,
                    STRIDED_H, STRIDED_W,
                )  # fmt: skip
            else:
                _sigma_of_rows(
                    weight, u, v, block_sum, block_unit, row, h, w, inner, w, IN_SLABS, False, LARGE, UNIT, ACC,
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
    weight_address = tl.load(addresses + FWD_WEIGHT)
    y_address = tl.load(addresses + FWD_Y)
    geometry += layer * FWD_FIELDS
    # sigma is that of W times the unit, which may have no number of its own.
    if ITERATED:
        column_tiles = tl.load(geometry + FWD_COLUMN_TILES)
        tile_max = scratch + tl.load(geometry + FWD_TILE_MAX)
        tile_sum = scratch + tl.load(geometry + FWD_TILE_SUM)
        tile_unit = scratch + tl.load(geometry + FWD_TILE_UNIT)
        s_norm, v_scale, unit = load_norm(tile_max, tile_sum, tile_unit, column_tiles, EPS, TINY, STEP)
        sigma = tl.where(s_norm < tl.maximum(unit * EPS, TINY), s_norm * (s_norm * v_scale), s_norm)
    else:
        blocks = tl.load(geometry + FWD_BLOCKS)
        block_sum = scratch + tl.load(geometry + FWD_BLOCK_SUM)
        block_unit = scratch + tl.load(geometry + FWD_BLOCK_UNIT)
        unit = load_unit(block_unit, blocks, STEP)
        sigma = load_sum_in(block_sum, block_unit, unit, blocks, STEP)
    sigma_out = divide(sigma, unit)
    is_zero = tl.abs(sigma_out) < TINY
    inverse = divide(1.0, tl.where(is_zero, 1.0, sigma))
    unit = tl.where(is_zero, 1.0, unit)

    h = tl.load(geometry + FWD_H)
    w = tl.load(geometry + FWD_W)
    inner = tl.load(geometry + FWD_INNER) if ORDERED else w
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
    uv += tl.load(geometry + FWD_UV)
    if first < h:
        if ITERATED:
            blocks = tl.load(geometry + FWD_BLOCKS)
            block_max = scratch + tl.load(geometry + FWD_BLOCK_MAX)
            block_sum = scratch + tl.load(geometry + FWD_BLOCK_SUM)
            block_unit = scratch + tl.load(geometry + FWD_BLOCK_UNIT)
            _, u_scale, t_unit = load_norm(block_max, block_sum, block_unit, blocks, EPS, TINY, STEP)
            t = scratch + tl.load(geometry + FWD_T)
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
            u_in = tl.load(addresses + FWD_U_IN).to(tl.pointer_type(DTYPE))
            _store_vector(u_in, uv, 1.0, first, tl.minimum(end, h), False, STEP)
    if first < w:
        v = uv + h
        if ITERATED:
            s = scratch + tl.load(geometry + FWD_S)
            if ORDERED:
                # s is in the order of the memory columns.
                channels = tl.load(geometry + FWD_CHANNELS)
                for start in range(first, tl.minimum(end, w), STEP):
                    entries = start + tl.arange(0, STEP)
                    inside = entries < tl.minimum(end, w)
                    value = tl.load(s + reordered(entries, w // channels, w), mask=inside, other=0.0) * v_scale
                    tl.store(v + entries, value.to(DTYPE), mask=inside)
            else:
                _store_vector(s, v, v_scale, first, tl.minimum(end, w), True, STEP)
        else:
            v_in = tl.load(addresses + FWD_V_IN).to(tl.pointer_type(DTYPE))
            _store_vector(v_in, v, 1.0, first, tl.minimum(end, w), False, STEP)
