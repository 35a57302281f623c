"""Backward: the gradients of a group of weights, with u and v constant."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import config
from ..common import accumulation_dtype, matrix_tile
from .tables import (
    TRITON_DTYPES,
    address_table,
    as_pointer,
    check_shapes,
    check_width,
    inverse_scale,
    is_aligned,
    load_sum,
    shapes,
    width,
    work_table,
)

# Columns of the backward geometry.
_BWD_H = tl.constexpr(0)
_BWD_W = tl.constexpr(1)
_BWD_COLUMN_TILES = tl.constexpr(2)
_BWD_PER_PART = tl.constexpr(3)  # elements of one partial <dY, Y>
_BWD_PARTS = tl.constexpr(4)
_BWD_OFFSET = tl.constexpr(5)  # of the layer's first partial
_BWD_FIELDS = tl.constexpr(6)

# Columns of the backward addresses.
_BWD_GRAD_Y = tl.constexpr(0)
_BWD_Y = tl.constexpr(1)
_BWD_U = tl.constexpr(2)
_BWD_V = tl.constexpr(3)
_BWD_GRAD_WEIGHT = tl.constexpr(4)
_BWD_ADDRESSES = tl.constexpr(5)


@triton.jit
def _spectral_norm_grad_dot_kernel(
    addresses,  # int64 [num_layers, addresses]
    geometry,  # int64 [num_layers, fields]
    work,  # int32 [partials, 2]
    partials,  # A [...]
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """<dY, Y> over a contiguous part of both arrays [h * w], BLOCK elements per step.

    Source: Miyato et al. 2018, section 2.1.
    """
    ACC: tl.constexpr = partials.dtype.element_ty
    layer = tl.load(work + tl.program_id(0) * 2).to(tl.int64)
    part = tl.load(work + tl.program_id(0) * 2 + 1).to(tl.int64)
    grad_y_address = tl.load(addresses + layer * _BWD_ADDRESSES + _BWD_GRAD_Y)
    y_address = tl.load(addresses + layer * _BWD_ADDRESSES + _BWD_Y)
    geometry += layer * _BWD_FIELDS
    numel = tl.load(geometry + _BWD_H) * tl.load(geometry + _BWD_W)
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
def _spectral_norm_grad_weight_kernel(
    addresses,  # int64 [num_layers, addresses]
    geometry,  # int64 [num_layers, fields]
    work,  # int32 [tiles, 2]
    partials,  # A [...]
    sigma_ptr,  # A [num_layers]
    grad_sigma_ptr,  # A [num_layers]
    HAS_GRAD_SIGMA: tl.constexpr,
    TINY: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STEP: tl.constexpr,
):
    """dW = (dY - (<dY, Y> - sigma * dsigma) u v^T) / sigma, one tile [BLOCK_H, BLOCK_W] a program.

    u and v are constants. The factors 1 / sigma are 1 where sigma counts as 0, as in the forward.

    Source: Miyato et al. 2018, section 2.1; the term of dsigma from d(u^T W v) = u v^T.
    """
    ACC: tl.constexpr = partials.dtype.element_ty
    layer = tl.load(work + tl.program_id(0) * 2).to(tl.int64)
    tile = tl.load(work + tl.program_id(0) * 2 + 1).to(tl.int64)
    addresses += layer * _BWD_ADDRESSES
    grad_y_address = tl.load(addresses + _BWD_GRAD_Y)
    u = tl.load(addresses + _BWD_U).to(tl.pointer_type(DTYPE))
    v = tl.load(addresses + _BWD_V).to(tl.pointer_type(DTYPE))
    grad_weight_address = tl.load(addresses + _BWD_GRAD_WEIGHT)
    geometry += layer * _BWD_FIELDS
    h = tl.load(geometry + _BWD_H)
    w = tl.load(geometry + _BWD_W)
    column_tiles = tl.load(geometry + _BWD_COLUMN_TILES)
    parts = tl.load(geometry + _BWD_PARTS)
    offset = tl.load(geometry + _BWD_OFFSET)

    sigma = tl.load(sigma_ptr + layer)
    inverse = inverse_scale(sigma, TINY)
    factor = load_sum(partials + offset, parts, STEP) * inverse
    if HAS_GRAD_SIGMA:
        factor -= tl.load(grad_sigma_ptr + layer)

    row = tile // column_tiles * BLOCK_H
    col = tile % column_tiles * BLOCK_W
    rows = row + tl.arange(0, BLOCK_H)
    cols = col + tl.arange(0, BLOCK_W)
    u_scaled = tl.load(u + rows, mask=rows < h, other=0.0).to(ACC) * factor
    v_tile = tl.load(v + cols, mask=cols < w, other=0.0).to(ACC)
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


@dataclass(frozen=True)
class _BackwardPlan:
    """What a backward call needs to know of its shapes; the tensors lie on the device."""

    geometry: Tensor
    partials: Tensor
    tiles: Tensor
    tile: config.Tile


@functools.lru_cache(maxsize=64)
def _backward_plan(shapes: tuple[config.Shape, ...], itemsize: int, device: torch.device) -> _BackwardPlan:
    tile = config.matrix_tile(shapes, itemsize)
    check_width(shapes, tile)
    geometry, partials, tiles = [], [], []
    for h, w in shapes:
        column_tiles = config.ceil_div(w, tile.block_w)
        per_part = config.elements_per_partial(h * w, itemsize)
        geometry.append([h, w, column_tiles, per_part, config.ceil_div(h * w, per_part), sum(partials)])
        partials.append(config.ceil_div(h * w, per_part))
        tiles.append(config.ceil_div(h, tile.block_h) * column_tiles)
    return _BackwardPlan(
        geometry=torch.tensor(geometry, dtype=torch.int64, device=device),
        partials=work_table(partials, device),
        tiles=work_table(tiles, device),
        tile=tile,
    )


def spectral_norm_bwd(
    grad_ys: Sequence[Tensor],
    grad_sigma: Tensor | None,
    ys: Sequence[Tensor],
    sigma: Tensor,
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
) -> list[Tensor]:
    """Gradients of the weights, with u and v constant.

    Args:
        grad_ys: [h, w] each, contiguous.
        grad_sigma: [num_layers] in the accumulation dtype, or None for zeros.
        ys, sigma, us, vs: what spectral_norm_fwd returned.

    Returns:
        dW [h, w] each, in the dtype of Y.

    Raises:
        ValueError: as spectral_norm_fwd.
    """
    check_shapes(ys, us, vs)
    like = ys[0]
    if shapes(grad_ys) != shapes(ys):
        raise ValueError(f"shapes of the gradients {shapes(grad_ys)} differ from those of Y {shapes(ys)}")
    for values in (sigma,) if grad_sigma is None else (sigma, grad_sigma):
        if values.shape != (len(ys),) or values.dtype != accumulation_dtype(like.dtype):
            raise ValueError(
                f"expected {accumulation_dtype(like.dtype)} [{len(ys)}] for sigma and its gradient, "
                f"got {values.dtype} {list(values.shape)}"
            )
    itemsize, dtype = like.element_size(), TRITON_DTYPES[like.dtype]
    plan = _backward_plan(shapes(ys), itemsize, like.device)
    grad_weights = [torch.empty_like(y) for y in ys]
    partials = torch.empty(len(plan.partials), dtype=sigma.dtype, device=like.device)
    addresses = address_table([grad_ys, ys, us, vs, grad_weights], like)
    tile = plan.tile
    with torch.cuda.device_of(like):
        _spectral_norm_grad_dot_kernel[(len(plan.partials),)](
            addresses, plan.geometry, plan.partials, partials,
            DTYPE=dtype, BLOCK=config.flat_block(itemsize), **config.launch_options(config.FLAT_WARPS),
        )  # fmt: skip
        _spectral_norm_grad_weight_kernel[(len(plan.tiles),)](
            addresses, plan.geometry, plan.tiles, partials, sigma.contiguous(),
            sigma if grad_sigma is None else grad_sigma.contiguous(),
            HAS_GRAD_SIGMA=grad_sigma is not None, TINY=torch.finfo(sigma.dtype).tiny, DTYPE=dtype,
            STEP=config.PARTIALS_PER_STEP, **tile.blocks, **config.launch_options(tile.num_warps),
        )  # fmt: skip
    return grad_weights
