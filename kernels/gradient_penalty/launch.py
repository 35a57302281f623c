"""Which launches a penalty takes, by its sizes, and the launches."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import config
from ..common import accumulation_dtype, materialized, ticket_of
from .passes import (
    _gradient_penalty_columns_kernel,
    _gradient_penalty_interpolate_kernel,
    _gradient_penalty_parts_kernel,
    _gradient_penalty_rows_kernel,
    _gradient_penalty_scale_kernel,
)

KINDS = ("two-sided", "one-sided", "squared", "max")


def _check_width(w: int, tile: config.Tile) -> None:
    if max(tile.block_h * w, w + tile.block_w) >= 1 << 31:
        raise ValueError(f"rows of {w} elements are too long: offsets within a tile are 32-bit")


def _programs(h: int, w: int, tile: config.Tile) -> int:
    _check_width(w, tile)
    return config.ceil_div(h, tile.block_h) * config.ceil_div(w, tile.block_w)


def gradient_penalty_interpolate(real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    """Samples on the lines between real and generated ones.

    Args:
        real: [B, M], contiguous.
        fake: [B, M], contiguous, same dtype and device.
        mix: [B] in the accumulation dtype, contiguous.

    Returns:
        mix_i real_i + (1 - mix_i) fake_i [B, M], rounded once; a fresh tensor.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or tensors that are not contiguous.
    """
    if real.dim() != 2 or fake.shape != real.shape or mix.shape != real.shape[:1]:
        raise ValueError(
            f"expected real and fake [B, M] with mix [B], "
            f"got {tuple(real.shape)}, {tuple(fake.shape)} and {tuple(mix.shape)}"
        )
    for tensor, dtype in ((real, real.dtype), (fake, real.dtype), (mix, accumulation_dtype(real.dtype))):
        if tensor.dtype != dtype or tensor.device != real.device or not tensor.is_contiguous():
            raise ValueError(
                f"expected contiguous {dtype} on {real.device}, "
                f"got strides {tensor.stride()}, {tensor.dtype} on {tensor.device}"
            )
    real, fake, mix = (materialized(tensor) for tensor in (real, fake, mix))
    h, w = real.shape
    x_hat = torch.empty_like(real)
    tile = config.flat_tile(h, w, real.element_size())
    programs = _programs(h, w, tile)
    if programs:
        with torch.cuda.device_of(real):
            _gradient_penalty_interpolate_kernel[(programs,)](
                real, fake, mix, x_hat, h, w, **tile.blocks, **config.launch_options(tile.num_warps)
            )
    return x_hat


@dataclass(frozen=True)
class _Plan:
    """What a penalty needs to know of its sizes; the launches lack their arrays, scale and target."""

    scaled: int  # what the weight is divided by
    partials_size: int  # 0: the only partial result is the penalty
    measure: Callable[..., Any]
    sizes: tuple[int, int]
    scale: Callable[..., Any] | None
    scale_sizes: tuple[int, int]
    is_max: bool
    is_long: bool
    acc: torch.dtype


@functools.lru_cache(maxsize=1024)
def _plan(b: int, c: int, s: int, dtype: torch.dtype, kind: str) -> _Plan:
    itemsize, acc = dtype.itemsize, accumulation_dtype(dtype)
    if c == 1:  # columns of one element: side by side
        b, s = 1, b * s
    is_max, by_rows = kind == "max", s == 1
    is_long = by_rows and c > config.longest_row(itemsize)
    tiny = torch.finfo(acc).tiny

    if is_long:
        tile = config.flat_tile(1, c, itemsize)
        parts = _programs(1, c, tile)
        programs = b * parts
    else:
        tile = config.row_tile(b, c, itemsize) if by_rows else config.norm_column_tile(c, s, itemsize)
        _check_width(c if by_rows else s, tile)
        programs = config.ceil_div(b, tile.block_h) if by_rows else b * config.ceil_div(s, tile.block_w)
        parts = 1
    # The sum over the norms of a single program is the penalty.
    is_alone = programs == 1 and not is_max and not is_long
    options = config.launch_options(tile.num_warps)
    sum_h, sum_w = config.partials_tile(parts)
    if is_long:
        measure = partial(
            _gradient_penalty_parts_kernel[(programs,)],
            KIND=kind, BLOCK=tile.block_w, SUM_H=sum_h, SUM_W=sum_w, **options,
        )  # fmt: skip
    elif by_rows:
        measure = partial(
            _gradient_penalty_rows_kernel[(programs,)],
            KIND=kind, ALONE=is_alone, TINY=tiny, SUM_H=sum_h, **tile.blocks, **options,
        )  # fmt: skip
    else:
        measure = partial(
            _gradient_penalty_columns_kernel[(programs,)],
            KIND=kind, ALONE=is_alone, WHOLE=c <= tile.block_h, TINY=tiny, SUM_H=sum_h, **tile.blocks,
            **options,
        )  # fmt: skip
    scale = None
    samples, h, w = (1, b, c) if by_rows else (b, c, s)
    if (is_max or is_long) and c:
        tile = config.flat_tile(h, w, itemsize)
        scale = partial(
            _gradient_penalty_scale_kernel[(samples * _programs(h, w, tile),)],
            KIND=kind, PER_COLUMN=not by_rows, TINY=tiny, **tile.blocks, **config.launch_options(tile.num_warps),
        )  # fmt: skip
    return _Plan(
        scaled=1 if is_max else b * s,
        partials_size=0 if is_alone else programs * (2 if is_max or is_long else 1),
        measure=measure,
        sizes=(b, c) if by_rows else (c, s),
        scale=scale,
        scale_sizes=(h, w),
        is_max=is_max,
        is_long=is_long,
        acc=acc,
    )


def gradient_penalty_fwd(
    grads: Tensor, kind: str, weight: float, target: float, layout: tuple[int, int, int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The penalty on the norms of the columns of gradients, and its gradient.

    Args:
        grads: [B, C, S], contiguous, at least one column.
        kind: "two-sided", "one-sided", "squared" or "max".
        weight: factor of the penalty.
        target: what the norms are compared with.
        layout: (B, C, S) of the memory of gradients of another shape, contiguous or channels_last.

    Returns:
        (penalty, norms, cotangent): 0-dim and [B, S] in the accumulation dtype, and d penalty / d grads, like grads.
        All of them are fresh tensors.

    Raises:
        ValueError: for an unknown kind, or gradients that are not contiguous or have no columns.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    is_contiguous = grads.is_contiguous() or (
        layout is not None and grads.dim() == 4 and grads.is_contiguous(memory_format=torch.channels_last)
    )
    if layout is None:
        fits = grads.dim() == 3
        layout = grads.shape if fits else (0, 0, 0)
    else:
        fits = layout[0] * layout[1] * layout[2] == grads.numel()
    b, c, s = layout
    if not fits or not is_contiguous or b * s == 0:
        raise ValueError(
            f"expected contiguous gradients [B, C, S] with B and S at least 1, "
            f"got shape {tuple(grads.shape)} and strides {grads.stride()}"
        )
    grads = materialized(grads)
    plan = _plan(b, c, s, grads.dtype, kind)
    acc, device = plan.acc, grads.device
    norms = torch.empty((b, s), dtype=acc, device=device)
    penalty = torch.empty((), dtype=acc, device=device)
    cotangent = torch.empty_like(grads)
    partials = torch.empty(plan.partials_size, dtype=acc, device=device) if plan.partials_size else penalty
    top = torch.empty(2, dtype=acc, device=device) if plan.is_max else partials
    # A float argument annotated as float64 arrives as such, and is not a compile-time constant: weights may change.
    numbers = weight / plan.scaled, float(target)
    with torch.cuda.device_of(grads):
        # A launch of one program needs no ticket.
        ticket = ticket_of(grads) if plan.partials_size else penalty
        if plan.is_long:
            plan.measure(grads, norms, partials, penalty, top, ticket, *plan.sizes, *numbers)
        else:
            plan.measure(grads, norms, partials, cotangent, penalty, top, ticket, *plan.sizes, *numbers)
        if plan.scale is not None:
            plan.scale(grads, norms, top, cotangent, *plan.scale_sizes, *numbers)
    return penalty, norms, cotangent
