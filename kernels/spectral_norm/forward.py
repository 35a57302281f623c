"""Forward: power iteration, sigma and ``W / sigma`` of a group of weights, in launches of `iterate` and `scale`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import config
from ..common import accumulation_dtype
from .forward_fields import FWD_FIELDS
from .iterate import spectral_norm_iterate_kernel, spectral_norm_reduce_kernel
from .scale import spectral_norm_scale_kernel, spectral_norm_sigma_kernel
from .tables import (
    TRITON_DTYPES,
    Layout,
    Plans,
    address,
    address_table,
    are_ordered,
    check_width,
    matrices_of,
    work_table,
)


@dataclass(frozen=True)
class _ForwardPlan:
    """What a forward call needs to know of its shapes: tables on the device, and launches that lack their arrays."""

    geometry: Tensor
    blocks_of_rows: Tensor
    column_tiles: Tensor
    chunks: Tensor
    scratch_size: int
    vectors_size: int
    us: list[torch.Size]
    vs: list[torch.Size]
    itemsize: int
    acc_dtype: torch.dtype
    first: Callable[..., Any]
    further: Callable[..., Any]
    reduce: Callable[..., Any]
    sigma: Callable[..., Any]
    scale: Callable[..., Any]
    scale_as_given: Callable[..., Any]


def _forward_plan(
    shapes: tuple[torch.Size, ...],
    layouts: tuple[Layout, ...] | None,
    dtype: torch.dtype,
    device: torch.device,
    eps: float,
) -> _ForwardPlan:
    itemsize, acc_dtype, matrices = dtype.itemsize, accumulation_dtype(dtype), matrices_of(shapes, layouts)
    sizes = [(matrix.h, matrix.w) for matrix in matrices]
    tile, columns = config.matrix_tile(sizes, itemsize), config.column_tile(sizes)
    strided = [(matrix.h, matrix.w) for matrix in matrices if matrix.is_strided]
    strided_h, strided_w = config.strided_tile(strided, itemsize) if strided else (tile.block_h, tile.block_w)
    check_width(sizes, max(tile.block_h, strided_h))
    geometry, blocks, column_tiles, chunks, end, vectors = [], [], [], [], 0, 0
    for matrix in matrices:
        h, w = matrix.h, matrix.w
        padded_w = config.ceil_div(w, 16) * 16
        blocks.append(config.ceil_div(h, strided_h if matrix.is_strided else tile.block_h))
        column_tiles.append(config.ceil_div(w, columns.block_w))
        # u, v and sigma are written by the same programs, so they count too where W is empty.
        chunks.append(config.ceil_div(max(h * w, h, w, 1), config.flat_block(itemsize)))
        row = [h, w, padded_w, blocks[-1], column_tiles[-1]]
        # In the order of the fields; each starts at a multiple of 16 elements.
        stats = [blocks[-1], blocks[-1], column_tiles[-1], column_tiles[-1], blocks[-1], blocks[-1], column_tiles[-1]]
        for size in (h, padded_w, *stats, blocks[-1] * padded_w):
            row.append(end)
            end += config.ceil_div(size, 16) * 16
        row += [vectors, matrix.inner, matrix.channels]
        vectors += h + w
        geometry.append(row)
    assert all(len(row) == FWD_FIELDS.value for row in geometry)

    tiny = torch.finfo(acc_dtype).tiny
    numbers = {
        # A compile-time constant, because a float argument of a kernel is a float32.
        "EPS": max(float(eps), tiny),
        "TINY": tiny,
        "STEP": config.PARTIALS_PER_STEP,
    }
    # Below LARGE the sum of 2^31 squares is in the range; any sum of 2^31 numbers of the range is, times UNIT.
    narrow = acc_dtype == torch.float32
    limits = {"LARGE": 2.0 ** (64 if narrow else 450), "UNIT": 2.0 ** (-40 if narrow else -700)}
    common, launch = {"DTYPE": TRITON_DTYPES[dtype], "ORDERED": are_ordered(matrices)}, config.launch_options
    tiles = {**tile.blocks, "STRIDED_H": strided_h, "STRIDED_W": strided_w}
    iterate = partial(
        spectral_norm_iterate_kernel[(sum(blocks),)], **common, **numbers, **limits, **tiles,
        # Two programs of 8 warps on a multiprocessor; on sm_80 ptxas would make it four, and spill 32 bytes.
        **launch(tile.num_warps, registers=128 if tile.num_warps == 8 else None),
    )  # fmt: skip
    scale = partial(
        spectral_norm_scale_kernel[(sum(chunks),)], **common, BLOCK=config.flat_block(itemsize),
        BLOCK_H=tile.block_h, STRIDED_H=strided_h, **numbers,
        # As above, but of what other orders of memory need alone.
        **launch(config.FLAT_WARPS, registers=128 if common["ORDERED"] else None),
    )  # fmt: skip
    return _ForwardPlan(
        geometry=torch.tensor(geometry, dtype=torch.int64, device=device),
        blocks_of_rows=work_table(blocks, device),
        column_tiles=work_table(column_tiles, device),
        chunks=work_table(chunks, device),
        scratch_size=end,
        vectors_size=vectors,
        us=[torch.Size([h]) for h, _ in sizes],
        vs=[torch.Size([w]) for _, w in sizes],
        itemsize=itemsize,
        acc_dtype=acc_dtype,
        first=partial(iterate, FIRST=True),
        further=partial(iterate, FIRST=False),
        reduce=partial(
            spectral_norm_reduce_kernel[(sum(column_tiles),)],
            **numbers, **columns.blocks, **launch(columns.num_warps),
        ),
        sigma=partial(
            spectral_norm_sigma_kernel[(sum(blocks),)], **common, **limits, **tiles, **launch(tile.num_warps)
        ),
        scale=partial(scale, ITERATED=True),
        scale_as_given=partial(scale, ITERATED=False),
    )  # fmt: skip


forward_plans = Plans(_forward_plan)


def spectral_norm_fwd(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    n_power_iterations: int,
    eps: float,
    layouts: tuple[Layout, ...] | None = None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Normalize a group of weights by their largest singular values.

    Args:
        weights: at least one, all of one dtype and on one device. Without layouts [h, ...] each and contiguous, a
            matrix [h, w] in memory.
        us: [h] each, same dtype; not changed.
        vs: [w] each, same dtype; not changed.
        n_power_iterations: 0 takes u and v as they are.
        eps: lower bound of the norms that u and v are divided by.
        layouts: how the weights lie, one of each.

    Returns:
        (ys, sigma, uv): Y = W / sigma, which lies like W, sigma [num_layers] in the accumulation dtype, and the new u
        and v of each layer, one behind the other in one tensor. All of them are fresh tensors.

    Raises:
        ValueError: for shapes that do not fit, mixed dtypes or devices, or tensors that are not contiguous.
    """
    like = weights[0]
    dtype, device = like.dtype, like.device
    plan = forward_plans.of((tuple([weight.shape for weight in weights]), layouts, dtype, device, eps), like)
    itemsize, is_plain = plan.itemsize, layouts is None
    ys, addresses, copies = [], [], []
    for weight, u, v, h, w in zip(weights, us, vs, plan.us, plan.vs, strict=True):
        if u.shape != h or v.shape != w:
            raise ValueError(
                f"expected a matrix [h, w] with u [h] and v [w], got {(*h, *w)}, {tuple(u.shape)} and {tuple(v.shape)}"
            )
        y = torch.empty_like(weight)
        ys.append(y)
        addresses += (
            address(weight, dtype, device, itemsize, copies, is_plain), address(u, dtype, device, itemsize, copies),
            address(v, dtype, device, itemsize, copies), y.data_ptr(),
        )  # fmt: skip
    uv = torch.empty(plan.vectors_size, dtype=dtype, device=device)
    sigma = torch.empty(len(ys), dtype=plan.acc_dtype, device=device)
    scratch = torch.empty(plan.scratch_size, dtype=plan.acc_dtype, device=device)
    geometry = plan.geometry
    with torch.cuda.device_of(like):
        table = address_table(addresses, like)
        iterate = plan.first
        for _ in range(n_power_iterations):
            iterate(table, geometry, plan.blocks_of_rows, scratch)
            plan.reduce(geometry, plan.column_tiles, scratch)
            iterate = plan.further
        if n_power_iterations == 0:
            plan.sigma(table, geometry, plan.blocks_of_rows, scratch)
        scale = plan.scale if n_power_iterations else plan.scale_as_given
        scale(table, geometry, plan.chunks, scratch, sigma, uv)
    return ys, sigma, uv
