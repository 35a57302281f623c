"""The backward of the backward: what a gradient penalty through spectral normalization pays."""

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

# Columns of the geometry.
_ROWS = tl.constexpr(0)  # of the memory, as Matrix.in_memory has them
_COLUMNS = tl.constexpr(1)
_COLUMN_TILES = tl.constexpr(2)
_TILES = tl.constexpr(3)
_FIRST_TILE = tl.constexpr(4)
_UV = tl.constexpr(5)  # the offset of u, and of v behind it, in `uv`
_H = tl.constexpr(6)
_W = tl.constexpr(7)
_INNER = tl.constexpr(8)
_CHANNELS = tl.constexpr(9)
_FIELDS = tl.constexpr(10)

# Columns of the addresses.
_GRAD = tl.constexpr(0)
_GRAD_Y = tl.constexpr(1)
_Y = tl.constexpr(2)
_TO_GRAD_Y = tl.constexpr(3)
_TO_Y = tl.constexpr(4)
_ADDRESSES = tl.constexpr(5)


@triton.jit
def _load_tile(matrix, row, col, h, w, ACC: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    pointers, mask = matrix_tile(matrix, row, col, h, w, BLOCK_H, BLOCK_W)
    return tl.load(pointers, mask=mask, other=0.0).to(ACC)


@triton.jit
def _store_tile(matrix, value, row, col, h, w, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    pointers, mask = matrix_tile(matrix, row, col, h, w, BLOCK_H, BLOCK_W)
    tl.store(pointers, value.to(matrix.dtype.element_ty), mask=mask)


@triton.jit
def _tile_sums(
    grad,  # T [h, w]
    grad_y,  # T [h, w]
    y,  # T [h, w]
    u,  # A [BLOCK_H]
    v,  # A [BLOCK_W]
    row,
    col,
    h,
    w,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    g = _load_tile(grad, row, col, h, w, ACC, BLOCK_H, BLOCK_W)
    dy = _load_tile(grad_y, row, col, h, w, ACC, BLOCK_H, BLOCK_W)
    along = tl.sum(tl.sum(g * v[None, :], axis=1) * u, axis=0)
    grads = tl.sum(tl.sum(g * dy, axis=1), axis=0)
    dot = tl.sum(tl.sum(dy * _load_tile(y, row, col, h, w, ACC, BLOCK_H, BLOCK_W), axis=1), axis=0)
    return along, grads, dot


@triton.jit
def _slab_sums(
    grad,  # T [w / inner, h * inner]
    grad_y,  # T [w / inner, h * inner]
    y,  # T [w / inner, h * inner]
    u,  # T [h]
    v,  # T [w]
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
    g = _load_tile(grad, row, col, rows, columns, ACC, BLOCK_H, BLOCK_W)
    dy = _load_tile(grad_y, row, col, rows, columns, ACC, BLOCK_H, BLOCK_W)
    along = tl.sum(tl.sum(g * v_tile, axis=0) * u_tile, axis=0)
    grads = tl.sum(tl.sum(g * dy, axis=1), axis=0)
    dot = tl.sum(tl.sum(dy * _load_tile(y, row, col, rows, columns, ACC, BLOCK_H, BLOCK_W), axis=1), axis=0)
    return along, grads, dot


@triton.jit
def _sums_of_slabs(
    grad_address, grad_y_address, y_address, u, v, row, col, rows, columns, inner,
    DTYPE: tl.constexpr, ACC: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    if is_aligned(grad_address, columns) & (grad_y_address % 16 == 0) & (y_address % 16 == 0):
        along, grads, dot = _slab_sums(
            as_pointer(grad_address, DTYPE, True), as_pointer(grad_y_address, DTYPE, True),
            as_pointer(y_address, DTYPE, True), u, v, row, col, rows, width(columns, True), inner, ACC, BLOCK_H,
            BLOCK_W,
        )  # fmt: skip
    else:
        along, grads, dot = _slab_sums(
            as_pointer(grad_address, DTYPE, False), as_pointer(grad_y_address, DTYPE, False),
            as_pointer(y_address, DTYPE, False), u, v, row, col, rows, columns, inner, ACC, BLOCK_H, BLOCK_W,
        )  # fmt: skip
    return along, grads, dot


@triton.jit
def _sums_of_rows(
    grad_address, grad_y_address, y_address, u, v, row, col, h, w, channels,
    REORDERS: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    rows = row + tl.arange(0, BLOCK_H)
    cols = col + tl.arange(0, BLOCK_W)
    entries = reordered(cols, channels, w) if REORDERS else cols
    u_tile = tl.load(u + rows, mask=rows < h, other=0.0).to(ACC)
    v_tile = tl.load(v + entries, mask=cols < w, other=0.0).to(ACC)
    if is_aligned(grad_address, w) & (grad_y_address % 16 == 0) & (y_address % 16 == 0):
        along, grads, dot = _tile_sums(
            as_pointer(grad_address, DTYPE, True), as_pointer(grad_y_address, DTYPE, True),
            as_pointer(y_address, DTYPE, True), u_tile, v_tile, row, col, h, width(w, True), ACC, BLOCK_H, BLOCK_W,
        )  # fmt: skip
    else:
        along, grads, dot = _tile_sums(
            as_pointer(grad_address, DTYPE, False), as_pointer(grad_y_address, DTYPE, False),
            as_pointer(y_address, DTYPE, False), u_tile, v_tile, row, col, h, w, ACC, BLOCK_H, BLOCK_W,
        )  # fmt: skip
    return along, grads, dot


@triton.jit
def _spectral_norm_double_dot_kernel(
    addresses,  # int64 [num_layers, addresses]
    geometry,  # int64 [num_layers, fields]
    work,  # int32 [tiles, 2]
    uv,  # T [...]: u and v of each layer
    partials,  # A [3, tiles]
    ORDERED: tl.constexpr,  # some matrix does not lie as it is
    DTYPE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """u^T G v, <G, dY> and <dY, Y> over one tile [BLOCK_H, BLOCK_W] of the memory a program.

    Source: the derivative of Miyato et al. 2018, section 2.1 (docs/numerics/spectral_norm.md).
    """
    ACC: tl.constexpr = partials.dtype.element_ty
    layer = tl.load(work + tl.program_id(0) * 2).to(tl.int64)
    tile = tl.load(work + tl.program_id(0) * 2 + 1).to(tl.int64)
    addresses += layer * _ADDRESSES
    grad_address = tl.load(addresses + _GRAD)
    grad_y_address = tl.load(addresses + _GRAD_Y)
    y_address = tl.load(addresses + _Y)
    geometry += layer * _FIELDS
    rows = tl.load(geometry + _ROWS)
    columns = tl.load(geometry + _COLUMNS)
    column_tiles = tl.load(geometry + _COLUMN_TILES)
    row = tile // column_tiles * BLOCK_H
    col = tile % column_tiles * BLOCK_W
    u = uv + tl.load(geometry + _UV)
    if ORDERED:
        inner = tl.load(geometry + _INNER)
        if inner < tl.load(geometry + _W):
            along, grads, dot = _sums_of_slabs(
                grad_address, grad_y_address, y_address, u, u + tl.load(geometry + _H), row, col, rows, columns, inner,
                DTYPE, ACC, BLOCK_H, BLOCK_W,
            )  # fmt: skip
        else:
            along, grads, dot = _sums_of_rows(
                grad_address, grad_y_address, y_address, u, u + rows, row, col, rows, columns,
                tl.load(geometry + _CHANNELS), True, DTYPE, ACC, BLOCK_H, BLOCK_W,
            )  # fmt: skip
    else:
        along, grads, dot = _sums_of_rows(
            grad_address, grad_y_address, y_address, u, u + rows, row, col, rows, columns, columns, False,
            DTYPE, ACC, BLOCK_H, BLOCK_W,
        )  # fmt: skip
    partials += tl.program_id(0)
    tl.store(partials, along)
    tl.store(partials + tl.num_programs(0), grads)
    tl.store(partials + 2 * tl.num_programs(0), dot)


@triton.jit
def _store_double_tiles(
    grad,  # T [h, w]
    grad_y,  # T [h, w]
    y,  # T [h, w]
    to_grad_y,  # T [h, w]
    to_y,  # T [h, w]
    along,
    inverse,
    row,
    col,
    h,
    w,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    g = _load_tile(grad, row, col, h, w, ACC, BLOCK_H, BLOCK_W)
    value = inverse * (g - along * _load_tile(y, row, col, h, w, ACC, BLOCK_H, BLOCK_W))
    _store_tile(to_grad_y, value, row, col, h, w, BLOCK_H, BLOCK_W)
    value = -inverse * along * _load_tile(grad_y, row, col, h, w, ACC, BLOCK_H, BLOCK_W)
    _store_tile(to_y, value, row, col, h, w, BLOCK_H, BLOCK_W)


@triton.jit
def _spectral_norm_double_grads_kernel(
    addresses,  # int64 [num_layers, addresses]
    geometry,  # int64 [num_layers, fields]
    work,  # int32 [tiles, 2]
    partials,  # A [3, tiles]
    sigma_ptr,  # A [num_layers]
    to_sigma,  # A [num_layers]
    to_grad_sigma,  # A [num_layers]
    TINY: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STEP: tl.constexpr,
):
    """r (G - q Y) and -r q dY, one tile of the memory a program; by the first of a layer two numbers.

    They are -r^2 (<G, dY> - <dY, Y> q) and q = u^T G v.
    The factor r = 1 / sigma is the constant 1 where sigma counts as 0, as in the forward.

    Source: as of the sums.
    """
    ACC: tl.constexpr = partials.dtype.element_ty
    layer = tl.load(work + tl.program_id(0) * 2).to(tl.int64)
    tile = tl.load(work + tl.program_id(0) * 2 + 1).to(tl.int64)
    addresses += layer * _ADDRESSES
    grad_address = tl.load(addresses + _GRAD)
    grad_y_address = tl.load(addresses + _GRAD_Y)
    y_address = tl.load(addresses + _Y)
    to_grad_y_address = tl.load(addresses + _TO_GRAD_Y)
    to_y_address = tl.load(addresses + _TO_Y)
    geometry += layer * _FIELDS
    h = tl.load(geometry + _ROWS)
    w = tl.load(geometry + _COLUMNS)
    column_tiles = tl.load(geometry + _COLUMN_TILES)
    tiles = tl.load(geometry + _TILES)
    partials += tl.load(geometry + _FIRST_TILE)

    sigma = tl.load(sigma_ptr + layer)
    inverse = inverse_scale(sigma, TINY)
    along = load_sum(partials, tiles, STEP)
    if tile == 0:
        grads = load_sum(partials + tl.num_programs(0), tiles, STEP)
        dot = load_sum(partials + 2 * tl.num_programs(0), tiles, STEP)
        towards = -inverse * (inverse * (grads - dot * along))
        tl.store(to_sigma + layer, tl.where(tl.abs(sigma) < TINY, 0.0, towards))
        tl.store(to_grad_sigma + layer, along)

    row = tile // column_tiles * BLOCK_H
    col = tile % column_tiles * BLOCK_W
    others = (grad_y_address | y_address | to_grad_y_address | to_y_address) % 16 == 0
    if is_aligned(grad_address, w) & others:
        _store_double_tiles(
            as_pointer(grad_address, DTYPE, True), as_pointer(grad_y_address, DTYPE, True),
            as_pointer(y_address, DTYPE, True), as_pointer(to_grad_y_address, DTYPE, True),
            as_pointer(to_y_address, DTYPE, True), along, inverse, row, col, h, width(w, True), ACC, BLOCK_H, BLOCK_W,
        )  # fmt: skip
    else:
        _store_double_tiles(
            as_pointer(grad_address, DTYPE, False), as_pointer(grad_y_address, DTYPE, False),
            as_pointer(y_address, DTYPE, False), as_pointer(to_grad_y_address, DTYPE, False),
            as_pointer(to_y_address, DTYPE, False), along, inverse, row, col, h, w, ACC, BLOCK_H, BLOCK_W,
        )  # fmt: skip


@dataclass(frozen=True)
class _DoubleBackwardPlan:
    """What a call needs to know of its shapes: tables on the device, and launches that lack their arrays."""

    geometry: Tensor
    work: Tensor
    tiles: int
    vectors_size: int
    itemsize: int
    acc_dtype: torch.dtype
    dot: Callable[..., Any]
    grads: Callable[..., Any]


def _double_backward_plan(
    shapes: tuple[torch.Size, ...], layouts: tuple[Layout, ...] | None, dtype: torch.dtype, device: torch.device
) -> _DoubleBackwardPlan:
    itemsize, acc_dtype, matrices = dtype.itemsize, accumulation_dtype(dtype), matrices_of(shapes, layouts)
    sizes = [matrix.in_memory for matrix in matrices]
    tile = config.double_backward_tile(sizes)
    check_width(sizes, tile.block_h)
    geometry, tiles, vectors = [], [], 0
    for matrix, (rows, columns) in zip(matrices, sizes, strict=True):
        column_tiles = config.ceil_div(columns, tile.block_w)
        count = config.ceil_div(rows, tile.block_h) * column_tiles
        geometry.append([rows, columns, column_tiles, count, sum(tiles), vectors])
        geometry[-1] += [matrix.h, matrix.w, matrix.inner, matrix.channels]
        tiles.append(count)
        vectors += matrix.h + matrix.w
    assert all(len(row) == _FIELDS.value for row in geometry)
    options = {"DTYPE": TRITON_DTYPES[dtype], **tile.blocks, **config.launch_options(tile.num_warps)}
    return _DoubleBackwardPlan(
        geometry=torch.tensor(geometry, dtype=torch.int64, device=device),
        work=work_table(tiles, device),
        tiles=sum(tiles),
        vectors_size=vectors,
        itemsize=itemsize,
        acc_dtype=acc_dtype,
        dot=partial(_spectral_norm_double_dot_kernel[(sum(tiles),)], ORDERED=are_ordered(matrices), **options),
        grads=partial(
            _spectral_norm_double_grads_kernel[(sum(tiles),)],
            TINY=torch.finfo(acc_dtype).tiny, STEP=config.PARTIALS_PER_STEP, **options,
        ),
    )  # fmt: skip


double_backward_plans = Plans(_double_backward_plan)


def spectral_norm_double_bwd(
    grads: Sequence[Tensor],
    grad_ys: Sequence[Tensor],
    ys: Sequence[Tensor],
    sigma: Tensor,
    uv: Tensor,
    layouts: tuple[Layout, ...] | None = None,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """The gradients of a number of which `grads` are the gradients by the results of spectral_norm_bwd.

    Args:
        grads, grad_ys: like Y each, and lying like it, none of them empty.
        ys, sigma, uv: what spectral_norm_fwd returned.
        layouts: as there.

    Returns:
        (to_grad_ys, to_ys, to_sigma, to_grad_sigma): like Y each, and lying like it; [num_layers] in the
            accumulation dtype.

    Raises:
        ValueError: as spectral_norm_fwd.
    """
    like, count = ys[0], len(ys)
    dtype, device = like.dtype, like.device
    shapes = tuple([y.shape for y in ys])
    plan = double_backward_plans.of((shapes, layouts, dtype, device), like)
    uv, sigma = materialized(uv), materialized(sigma.contiguous())
    for name, values, kind, size in (
        ("sigma", sigma, plan.acc_dtype, count),
        ("u and v of all layers", uv, dtype, plan.vectors_size),
    ):
        if values.dtype != kind or values.device != device or values.shape != (size,) or not values.is_contiguous():
            raise ValueError(
                f"expected {size} contiguous {kind} on {device} for {name}, "
                f"got {values.dtype} {list(values.shape)} on {values.device}"
            )
    to_grad_ys, to_ys, addresses, copies = [], [], [], []
    for grad, grad_y, y, shape in zip(grads, grad_ys, ys, shapes, strict=True):
        if grad.shape != shape or grad_y.shape != shape:
            raise ValueError(
                f"expected gradients of shape {tuple(shape)}, got {tuple(grad.shape)} and {tuple(grad_y.shape)}"
            )
        to_grad_ys.append(torch.empty_like(y))
        to_ys.append(torch.empty_like(y))
        addresses += [address(x, dtype, device, plan.itemsize, copies, layouts is None) for x in (grad, grad_y, y)]
        addresses += to_grad_ys[-1].data_ptr(), to_ys[-1].data_ptr()
    partials = torch.empty((3, plan.tiles), dtype=plan.acc_dtype, device=device)
    scalars = torch.empty((2, count), dtype=plan.acc_dtype, device=device)
    to_sigma, to_grad_sigma = scalars.unbind()
    with torch.cuda.device_of(like):
        table = address_table(addresses, like)
        plan.dot(table, plan.geometry, plan.work, uv, partials)
        plan.grads(table, plan.geometry, plan.work, partials, sigma, to_sigma, to_grad_sigma)
    return to_grad_ys, to_ys, to_sigma, to_grad_sigma
