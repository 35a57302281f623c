"""Forward: power iteration, sigma and ``W / sigma`` of a group of weights, in launches of `forward_kernels`."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import config
from ..common import accumulation_dtype
from .forward_kernels import (
    FWD_FIELDS,
    spectral_norm_iterate_kernel,
    spectral_norm_reduce_kernel,
    spectral_norm_scale_kernel,
    spectral_norm_sigma_kernel,
)
from .tables import (
    TRITON_DTYPES,
    address_table,
    check_shapes,
    check_width,
    shapes,
    work_table,
)


@dataclass(frozen=True)
class _ForwardPlan:
    """What a forward call needs to know of its shapes; the tensors lie on the device."""

    geometry: Tensor
    blocks_of_rows: Tensor
    column_tiles: Tensor
    chunks: Tensor
    scratch_size: int
    tile: config.Tile
    columns: config.Tile


@functools.lru_cache(maxsize=64)
def _forward_plan(shapes: tuple[config.Shape, ...], itemsize: int, device: torch.device) -> _ForwardPlan:
    tile, columns = config.matrix_tile(shapes, itemsize), config.column_tile(shapes)
    check_width(shapes, tile)
    geometry, blocks, column_tiles, chunks, end = [], [], [], [], 0
    for h, w in shapes:
        padded_w = config.ceil_div(w, 16) * 16
        blocks.append(config.ceil_div(h, tile.block_h))
        column_tiles.append(config.ceil_div(w, columns.block_w))
        # u, v and sigma are written by the same programs, so they count too where W is empty.
        chunks.append(config.ceil_div(max(h * w, h, w, 1), config.flat_block(itemsize)))
        row = [h, w, padded_w, blocks[-1], column_tiles[-1]]
        # In the order of the fields; each starts at a multiple of 16 elements.
        stats = [blocks[-1], blocks[-1], column_tiles[-1], column_tiles[-1], blocks[-1], blocks[-1], column_tiles[-1]]
        for size in (h, padded_w, *stats, blocks[-1] * padded_w):
            row.append(end)
            end += config.ceil_div(size, 16) * 16
        geometry.append(row)
    assert all(len(row) == FWD_FIELDS.value for row in geometry)
    return _ForwardPlan(
        geometry=torch.tensor(geometry, dtype=torch.int64, device=device),
        blocks_of_rows=work_table(blocks, device),
        column_tiles=work_table(column_tiles, device),
        chunks=work_table(chunks, device),
        scratch_size=end,
        tile=tile,
        columns=columns,
    )


def spectral_norm_fwd(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    n_power_iterations: int,
    eps: float,
) -> tuple[list[Tensor], Tensor, list[Tensor], list[Tensor]]:
    """Normalize a group of weights by their largest singular values.

    Args:
        weights: matrices [h, w], contiguous, at least one, all of one dtype and on one device.
        us: [h] each, same dtype; not changed.
        vs: [w] each, same dtype; not changed.
        n_power_iterations: 0 takes u and v as they are.
        eps: lower bound of the norms that u and v are divided by.

    Returns:
        (ys, sigma, us, vs): Y = W / sigma [h, w] each, sigma [num_layers] in the accumulation dtype, and the
        new u and v. All of them are fresh tensors.

    Raises:
        ValueError: for shapes that do not fit, mixed dtypes or devices, or tensors that are not contiguous.
    """
    check_shapes(weights, us, vs)
    like = weights[0]
    acc_dtype = accumulation_dtype(like.dtype)
    tiny = torch.finfo(acc_dtype).tiny
    plan = _forward_plan(shapes(weights), like.element_size(), like.device)
    ys, us_out, vs_out = ([torch.empty_like(x) for x in xs] for xs in (weights, us, vs))
    sigma = torch.empty(len(weights), dtype=acc_dtype, device=like.device)
    scratch = torch.empty(plan.scratch_size, dtype=acc_dtype, device=like.device)
    addresses = address_table([weights, us, vs, ys, us_out, vs_out], like)
    tile, columns, launch = plan.tile, plan.columns, config.launch_options
    numbers = {
        # A compile-time constant, because a float argument of a kernel is a float32.
        "EPS": max(float(eps), tiny),
        "TINY": tiny,
        "STEP": config.PARTIALS_PER_STEP,
    }
    # Below LARGE the sum of 2^31 squares is in the range; any sum of 2^31 numbers of the range is, times UNIT.
    narrow = acc_dtype == torch.float32
    limits = {"LARGE": 2.0 ** (64 if narrow else 450), "UNIT": 2.0 ** (-40 if narrow else -700)}
    dtype = TRITON_DTYPES[like.dtype]
    with torch.cuda.device_of(like):
        for iteration in range(n_power_iterations):
            spectral_norm_iterate_kernel[(len(plan.blocks_of_rows),)](
                addresses, plan.geometry, plan.blocks_of_rows, scratch,
                FIRST=iteration == 0, DTYPE=dtype, **numbers, **limits, **tile.blocks,
                # Two programs of 8 warps on a multiprocessor; on sm_80 ptxas would make it four, and spill 32 bytes.
                **launch(tile.num_warps, registers=128 if tile.num_warps == 8 else None),
            )  # fmt: skip
            spectral_norm_reduce_kernel[(len(plan.column_tiles),)](
                plan.geometry, plan.column_tiles, scratch,
                **numbers, **columns.blocks, **launch(columns.num_warps),
            )  # fmt: skip
        if n_power_iterations == 0:
            spectral_norm_sigma_kernel[(len(plan.blocks_of_rows),)](
                addresses, plan.geometry, plan.blocks_of_rows, scratch,
                DTYPE=dtype, **limits, **tile.blocks, **launch(tile.num_warps),
            )  # fmt: skip
        spectral_norm_scale_kernel[(len(plan.chunks),)](
            addresses, plan.geometry, plan.chunks, scratch, sigma,
            ITERATED=n_power_iterations > 0, DTYPE=dtype, BLOCK=config.flat_block(like.element_size()),
            BLOCK_H=tile.block_h, **numbers, **launch(config.FLAT_WARPS),
        )  # fmt: skip
    return ys, sigma, us_out, vs_out
