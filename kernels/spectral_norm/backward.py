"""Backward: the gradients of a group of weights, with u and v constant."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import config
from ..common import accumulation_dtype, materialized, matrix_tile
from .tables import (
    TRITON_DTYPES,
    Layout,
    Plans,
    address,
    address_table,
    are_ordered,
    as_pointer,
    check_width,
    inverse_scale,
    is_aligned,
    load_slab_factors,
    load_sum,
    matrices_of,
    reordered,
    width,
    work_table,
)

# Columns of the backward geometry.
_BWD_ROWS = tl.constexpr(0)  # of the memory, as Matrix.in_memory has them
_BWD_COLUMNS = tl.constexpr(1)
_BWD_COLUMN_TILES = tl.constexpr(2)
_BWD_PER_PART = tl.constexpr(3)  # elements of one partial <dY, Y>
_BWD_PARTS = tl.constexpr(4)
_BWD_OFFSET = tl.constexpr(5)  # of the layer's first partial
_BWD_UV = tl.constexpr(6)  # the offset of u, and of v behind it, in `uv`
_BWD_H = tl.constexpr(7)
_BWD_W = tl.constexpr(8)
_BWD_INNER = tl.constexpr(9)
_BWD_CHANNELS = tl.constexpr(10)
_BWD_FIELDS = tl.constexpr(11)

# Columns of the backward addresses.
_BWD_GRAD_Y = tl.constexpr(0)
_BWD_Y = tl.constexpr(1)
_BWD_GRAD_WEIGHT = tl.constexpr(2)
_BWD_ADDRESSES = tl.constexpr(3)


@triton.jit
def _spectral_norm_grad_dot_kernel(
    addresses,  # int64 [num_layers, addresses]
    geometry,  # int64 [num_layers, fields]
    work,  # int32 [partials, 2]
    partials,  # A [...]
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """<dY, Y> over a contiguous part of both arrays [h * w], which lie alike, BLOCK elements per step.

    Source: Miyato et al. 2018, section 2.1.
    """
    ACC: tl.constexpr = partials.dtype.element_ty
    layer = tl.load(work + tl.program_id(0) * 2).to(tl.int64)
    part = tl.load(work + tl.program_id(0) * 2 + 1).to(tl.int64)
    grad_y_address = tl.load(addresses + layer * _BWD_ADDRESSES + _BWD_GRAD_Y)
    y_address = tl.load(addresses + layer * _BWD_ADDRESSES + _BWD_Y)
    geometry += layer * _BWD_FIELDS
    numel = tl.load(geometry + _BWD_ROWS) * tl.load(geometry + _BWD_COLUMNS)
    per_part = tl.load(geometry + _BWD_PER_PART)
    offset = tl.load(geometry + _BWD_OFFSET)
    first = part * per_part
    end = tl.minimum(first + per_part, numel)
    acc = tl.zeros([BLOCK], ACC)
    masked_from = first
    if (grad_y_address % 16 == 0) & (y_address % 16 == 0):
        masked_from = first + (end - first) // BLOCK * BLOCK
        for start in range(first, masked_from, BLOCK):
            # Steps are multiples of 16 elements.
            grad_y = tl.multiple_of(as_pointer(grad_y_address, DTYPE, True) + start, 16)
            y = tl.multiple_of(as_pointer(y_address, DTYPE, True) + start, 16)
            index = tl.arange(0, BLOCK)
            acc = tl.fma(tl.load(grad_y + index).to(ACC), tl.load(y + index).to(ACC), acc)
    for start in range(masked_from, end, BLOCK):
        grad_y = as_pointer(grad_y_address, DTYPE, False) + start
        y = as_pointer(y_address, DTYPE, False) + start
        index = tl.arange(0, BLOCK)
        mask = start + index < end
        dy_block = tl.load(grad_y + index, mask=mask, other=0.0).to(ACC)
        y_block = tl.load(y + index, mask=mask, other=0.0).to(ACC)
        acc = tl.fma(dy_block, y_block, acc)
    tl.store(partials + offset + part, tl.sum(acc, axis=0))


@triton.jit
def _store_grad_weight_tile(
    grad_y,  # T [h, w]
    grad_weight,  # T [h, w]
    u_scaled,  # A [BLOCK_H]
    v,  # A [BLOCK_W]
    inverse,
    row,
    col,
    h,
    w,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    pointers, mask = matrix_tile(grad_y, row, col, h, w, BLOCK_H, BLOCK_W)
    value = tl.load(pointers, mask=mask, other=0.0).to(ACC) * inverse - u_scaled[:, None] * v[None, :]
    pointers, mask = matrix_tile(grad_weight, row, col, h, w, BLOCK_H, BLOCK_W)
    tl.store(pointers, value.to(grad_weight.dtype.element_ty), mask=mask)


@triton.jit
def _store_grad_weight_of_slabs(
    grad_y,  # T [w / inner, h * inner]
    grad_weight,  # T [w / inner, h * inner]
    u,  # T [h]
    v,  # T [w]
    factor,
    inverse,
    row,
    col,
    rows,
    columns,
    inner,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    u_tile, v_tile = load_slab_factors(u, v, row, col, rows, columns, inner, ACC, BLOCK_H, BLOCK_W)
    pointers, mask = matrix_tile(grad_y, row, col, rows, columns, BLOCK_H, BLOCK_W)
    value = tl.load(pointers, mask=mask, other=0.0).to(ACC) * inverse - (u_tile * factor)[None, :] * v_tile
    pointers, mask = matrix_tile(grad_weight, row, col, rows, columns, BLOCK_H, BLOCK_W)
    tl.store(pointers, value.to(grad_weight.dtype.element_ty), mask=mask)


@triton.jit
def _store_grad_weight_of_rows(
    grad_y_address,
    grad_weight_address,
    u,  # T [h]
    v,  # T [w]
    factor,
    inverse,
    row,
    col,
    h,
    w,
    channels,
    REORDERS: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    rows = row + tl.arange(0, BLOCK_H)
    cols = col + tl.arange(0, BLOCK_W)
    u_scaled = tl.load(u + rows, mask=rows < h, other=0.0).to(ACC) * factor
    entries = reordered(cols, channels, w) if REORDERS else cols
    v_tile = tl.load(v + entries, mask=cols < w, other=0.0).to(ACC)
    if is_aligned(grad_y_address, w) & (grad_weight_address % 16 == 0):
        _store_grad_weight_tile(
            as_pointer(grad_y_address, DTYPE, True), as_pointer(grad_weight_address, DTYPE, True),
            u_scaled, v_tile, inverse, row, col, h, width(w, True), ACC, BLOCK_H, BLOCK_W,
        )  # fmt: skip
    else:
        _store_grad_weight_tile(
            as_pointer(grad_y_address, DTYPE, False), as_pointer(grad_weight_address, DTYPE, False),
            u_scaled, v_tile, inverse, row, col, h, w, ACC, BLOCK_H, BLOCK_W,
        )  # fmt: skip


@triton.jit
def _spectral_norm_grad_weight_kernel(
    addresses,  # int64 [num_layers, addresses]
    geometry,  # int64 [num_layers, fields]
    work,  # int32 [tiles, 2]
    partials,  # A [...]
    sigma_ptr,  # A [num_layers]
    grad_sigma_ptr,  # A [num_layers]
    uv,  # T [...]: u and v of each layer
    HAS_GRAD_SIGMA: tl.constexpr,
    ORDERED: tl.constexpr,  # some matrix does not lie as it is
    TINY: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STEP: tl.constexpr,
):
    """dW = (dY - (<dY, Y> - sigma * dsigma) u v^T) / sigma, one tile [BLOCK_H, BLOCK_W] of the memory a program.

    u and v are constants. The factors 1 / sigma are 1 where sigma counts as 0, as in the forward.

    Source: Miyato et al. 2018, section 2.1; the term of dsigma from d(u^T W v) = u v^T.
    """
    ACC: tl.constexpr = partials.dtype.element_ty
    layer = tl.load(work + tl.program_id(0) * 2).to(tl.int64)
    tile = tl.load(work + tl.program_id(0) * 2 + 1).to(tl.int64)
    addresses += layer * _BWD_ADDRESSES
    grad_y_address = tl.load(addresses + _BWD_GRAD_Y)
    grad_weight_address = tl.load(addresses + _BWD_GRAD_WEIGHT)
    geometry += layer * _BWD_FIELDS
    rows = tl.load(geometry + _BWD_ROWS)
    columns = tl.load(geometry + _BWD_COLUMNS)
    column_tiles = tl.load(geometry + _BWD_COLUMN_TILES)
    parts = tl.load(geometry + _BWD_PARTS)
    offset = tl.load(geometry + _BWD_OFFSET)
    u = uv + tl.load(geometry + _BWD_UV)

    sigma = tl.load(sigma_ptr + layer)
    inverse = inverse_scale(sigma, TINY)
    factor = load_sum(partials + offset, parts, STEP) * inverse
    if HAS_GRAD_SIGMA:
        factor -= tl.load(grad_sigma_ptr + layer)

    row = tile // column_tiles * BLOCK_H
    col = tile % column_tiles * BLOCK_W
    if ORDERED:
        inner = tl.load(geometry + _BWD_INNER)
        if inner < tl.load(geometry + _BWD_W):
            v = u + tl.load(geometry + _BWD_H)
            if is_aligned(grad_y_address, columns) & (grad_weight_address % 16 == 0):
                _store_grad_weight_of_slabs(
                    as_pointer(grad_y_address, DTYPE, True), as_pointer(grad_weight_address, DTYPE, True), u, v,
                    factor, inverse, row, col, rows, width(columns, True), inner, ACC, BLOCK_H, BLOCK_W,
                )  # fmt: skip
            else:
                _store_grad_weight_of_slabs(
                    as_pointer(grad_y_address, DTYPE, False), as_pointer(grad_weight_address, DTYPE, False), u, v,
                    factor, inverse, row, col, rows, columns, inner, ACC, BLOCK_H, BLOCK_W,
                )  # fmt: skip
        else:
            _store_grad_weight_of_rows(
                grad_y_address, grad_weight_address, u, u + rows, factor, inverse, row, col, rows, columns,
                tl.load(geometry + _BWD_CHANNELS), True, DTYPE, ACC, BLOCK_H, BLOCK_W,
            )  # fmt: skip
    else:
        _store_grad_weight_of_rows(
            grad_y_address, grad_weight_address, u, u + rows, factor, inverse, row, col, rows, columns,
            columns, False, DTYPE, ACC, BLOCK_H, BLOCK_W,
        )  # fmt: skip


@dataclass(frozen=True)
class _BackwardPlan:
    """What a backward call needs to know of its shapes: tables on the device, and launches that lack their arrays."""

    geometry: Tensor
    partials: Tensor
    tiles: Tensor
    partials_size: int
    vectors_size: int
    itemsize: int
    acc_dtype: torch.dtype
    grad_dot: Callable[..., Any]
    grad_weight: Callable[..., Any]
    grad_weight_and_sigma: Callable[..., Any]


def _backward_plan(
    shapes: tuple[torch.Size, ...], layouts: tuple[Layout, ...] | None, dtype: torch.dtype, device: torch.device
) -> _BackwardPlan:
    itemsize, acc_dtype, matrices = dtype.itemsize, accumulation_dtype(dtype), matrices_of(shapes, layouts)
    sizes = [matrix.in_memory for matrix in matrices]
    tile = config.matrix_tile(sizes, itemsize)
    check_width(sizes, tile.block_h)
    geometry, partials, tiles, vectors = [], [], [], 0
    for matrix, (rows, columns) in zip(matrices, sizes, strict=True):
        column_tiles = config.ceil_div(columns, tile.block_w)
        per_part = config.elements_per_partial(rows * columns, itemsize)
        parts = config.ceil_div(rows * columns, per_part)
        geometry.append([rows, columns, column_tiles, per_part, parts, sum(partials), vectors])
        geometry[-1] += [matrix.h, matrix.w, matrix.inner, matrix.channels]
        partials.append(parts)
        tiles.append(config.ceil_div(rows, tile.block_h) * column_tiles)
        vectors += matrix.h + matrix.w
    assert all(len(row) == _BWD_FIELDS.value for row in geometry)
    grad_weight = partial(
        _spectral_norm_grad_weight_kernel[(sum(tiles),)], TINY=torch.finfo(acc_dtype).tiny,
        DTYPE=TRITON_DTYPES[dtype], ORDERED=are_ordered(matrices), STEP=config.PARTIALS_PER_STEP, **tile.blocks,
        **config.launch_options(tile.num_warps),
    )  # fmt: skip
    return _BackwardPlan(
        geometry=torch.tensor(geometry, dtype=torch.int64, device=device),
        partials=work_table(partials, device),
        tiles=work_table(tiles, device),
        partials_size=sum(partials),
        vectors_size=vectors,
        itemsize=itemsize,
        acc_dtype=acc_dtype,
        grad_dot=partial(
            _spectral_norm_grad_dot_kernel[(sum(partials),)],
            DTYPE=TRITON_DTYPES[dtype], BLOCK=config.flat_block(itemsize), **config.launch_options(config.FLAT_WARPS),
        ),
        grad_weight=partial(grad_weight, HAS_GRAD_SIGMA=False),
        grad_weight_and_sigma=partial(grad_weight, HAS_GRAD_SIGMA=True),
    )  # fmt: skip


backward_plans = Plans(_backward_plan)


def spectral_norm_bwd(
    grad_ys: Sequence[Tensor],
    grad_sigma: Tensor | None,
    ys: Sequence[Tensor],
    sigma: Tensor,
    uv: Tensor,
    layouts: tuple[Layout, ...] | None = None,
) -> list[Tensor]:
    """Gradients of the weights, with u and v constant.

    Args:
        grad_ys: like Y each, and lying like it.
        grad_sigma: [num_layers] in the accumulation dtype, or None for zeros.
        ys, sigma, uv: what spectral_norm_fwd returned.
        layouts: as there.

    Returns:
        dW like Y each, and lying like it.

    Raises:
        ValueError: as spectral_norm_fwd.
    """
    like = ys[0]
    dtype, device = like.dtype, like.device
    shapes = tuple([y.shape for y in ys])
    plan = backward_plans.of((shapes, layouts, dtype, device), like)
    itemsize, acc_dtype, is_plain = plan.itemsize, plan.acc_dtype, layouts is None
    for values in (sigma,) if grad_sigma is None else (sigma, grad_sigma):
        if values.shape != (len(ys),) or values.dtype != acc_dtype or values.device != device:
            raise ValueError(
                f"expected {acc_dtype} [{len(ys)}] on {device} for sigma and its gradient, "
                f"got {values.dtype} {list(values.shape)} on {values.device}"
            )
    uv, sigma = materialized(uv), materialized(sigma.contiguous())
    if uv.dtype != dtype or uv.device != device or not uv.is_contiguous():
        raise ValueError(f"expected u and v as contiguous {dtype} on {device}, got {uv.dtype} on {uv.device}")
    if uv.numel() != plan.vectors_size:
        raise ValueError(f"expected u and v of all layers, {plan.vectors_size} numbers, got {uv.numel()}")
    grad_weights, addresses, copies = [], [], []
    for grad_y, y, shape in zip(grad_ys, ys, shapes, strict=True):
        if grad_y.shape != shape:
            raise ValueError(
                f"shapes of the gradients {[tuple(x.shape) for x in grad_ys]} differ from those of Y "
                f"{[tuple(x) for x in shapes]}"
            )
        grad_weight = torch.empty_like(y)
        grad_weights.append(grad_weight)
        addresses += (
            address(grad_y, dtype, device, itemsize, copies, is_plain),
            address(y, dtype, device, itemsize, copies, is_plain), grad_weight.data_ptr(),
        )  # fmt: skip
    partials = torch.empty(plan.partials_size, dtype=acc_dtype, device=device)
    sigma = sigma.contiguous()
    with torch.cuda.device_of(like):
        table = address_table(addresses, like)
        plan.grad_dot(table, plan.geometry, plan.partials, partials)
        if grad_sigma is None:
            plan.grad_weight(table, plan.geometry, plan.tiles, partials, sigma, sigma, uv)
        else:
            plan.grad_weight_and_sigma(
                table, plan.geometry, plan.tiles, partials, sigma, materialized(grad_sigma.contiguous()), uv
            )
    return grad_weights
