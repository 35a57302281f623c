"""The penalty on the norms of a critic's input gradients, its own gradient, and the samples it is taken at.

Gradients are [B, C, S] with a norm over C for each of the N = B * S columns. S = 1 is a matrix [B, C] whose rows have
norms. `scale` is weight / N, or weight for "max"; t is `target`. A norm n contributes phi(n) to the penalty:

  two-sided  scale (n - t)^2          Gulrajani et al. 2017, eq. 3
  one-sided  scale max(0, n - t)^2    Petzka et al. 2018, eq. 8
  squared    scale n^2 / 2            R1 and R2, Mescheder et al. 2018
  max        scale (max n - t)^2

and the cotangent is phi'(n) g / n, with 0 for the gradient of a norm that is 0.

Squares of float32 leave its range where norms do not. So every part x of a column is reduced to (s, q), |x|^2 = s^2 q,
where s is a power of two not above the largest |x_i|: x / s is exact, lies in [0, 4), and one element of it is at least
1. So q does not overflow, and what underflows in it is far below its last digit. Parts are joined by powers of two as
well, and s sqrt(q) overflows only where the norm does. The cotangent is (g / s) (phi'(n) / (n / s)) with s from n,
whose first factor is below 2 and whose second one is of the size of phi'(n); a g below 2^-126 of its norm may get lost.

The norms, the penalty and (except for "max" and long rows) the cotangent are one launch: partial results go to scratch
memory, and the program that takes the last ticket adds them up, in a fixed order, so that equal inputs give equal bits
whichever program that is. The ticket is the only atomic operation. All arithmetic is in the accumulation dtype A
(float64 for float64, float32 otherwise): values are widened right after a load and rounded once on a store.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .common import (
    accumulation_dtype,
    divide,
    is_last_program,
    materialized,
    matrix_tile,
    square_root,
    ticket_of,
)

KINDS = ("two-sided", "one-sided", "squared", "max")


@triton.jit
def _power_of_2(x):
    """For x >= 0 the power of two s with s <= x < 2 s, and 1 / s.

    Both stay normal numbers: s is the smallest one for 0 and subnormal x, and half the largest power of two for x from
    that power on, infinity and NaN.
    """
    if x.dtype == tl.float64:
        exponent = tl.minimum(tl.maximum(x.to(tl.int64, bitcast=True) >> 52, 1), 2045)
        s, inverse = exponent << 52, (2046 - exponent) << 52
    else:
        exponent = tl.minimum(tl.maximum(x.to(tl.int32, bitcast=True) >> 23, 1), 253)
        s, inverse = exponent << 23, (254 - exponent) << 23
    return s.to(x.dtype, bitcast=True), inverse.to(x.dtype, bitcast=True)


@triton.jit
def _scaled_squares(x, AXIS: tl.constexpr):
    """(s, q) with |x|^2 = s^2 q along an axis. The maximum may skip a NaN, the sum never does."""
    s, inverse = _power_of_2(tl.max(tl.abs(x), axis=AXIS))
    ratio = x * tl.expand_dims(inverse, AXIS)
    return s, tl.sum(ratio * ratio, axis=AXIS)


@triton.jit
def _joined(s, q, other_s, other_q):
    """(s, q) of two parts together; (0, 0) stands for no part."""
    larger = tl.maximum(s, other_s)
    _, inverse = _power_of_2(larger)
    a, b = s * inverse, other_s * inverse
    return larger, a * a * q + b * b * other_q


@triton.jit
def _distance(n, target, KIND: tl.constexpr):
    """n - target, or max(0, n - target); a NaN stays one."""
    distance = n - target
    if KIND == "one-sided":
        distance = tl.where(distance <= 0, 0.0, distance)
    return distance


@triton.jit
def _phi(n, scale, target, KIND: tl.constexpr):
    """What a norm contributes to the penalty."""
    if KIND == "squared":
        return (0.5 * scale * n) * n
    else:
        distance = _distance(n, target, KIND)
        return (scale * distance) * distance


@triton.jit
def _slope(n, scale, target, KIND: tl.constexpr):
    """phi'(n); for "squared" phi'(n) / n, which needs no norm."""
    if KIND == "squared":
        return scale
    else:
        return 2.0 * scale * _distance(n, target, KIND)


@triton.jit
def _cotangent(g, n, slope, KIND: tl.constexpr, TINY: tl.constexpr):
    """slope g / n, and 0 where n counts as 0: below the smallest normal number. n and slope have the rank of g."""
    if KIND == "squared":
        return g * slope
    else:
        _, inverse = _power_of_2(n)
        is_zero = n < TINY
        return (g * inverse) * tl.where(is_zero, 0.0, divide(slope, tl.where(is_zero, 1.0, n * inverse)))


@triton.jit
def _largest(n):
    """Maximum of a vector, NaN if it holds one."""
    has_nan = tl.max((n != n).to(tl.int32), axis=0) > 0
    return tl.where(has_nan, float("nan"), tl.max(n, axis=0))


@triton.jit
def _store_partial(partials, n, inside, scale, target, KIND: tl.constexpr):
    """What the norms of a program contribute: the sum of phi; or their maximum, and how many attain it."""
    program = tl.program_id(0)
    if KIND == "max":
        n = tl.where(inside, n, -1.0)
        m = _largest(n)
        tl.store(partials + program, m)
        tl.store(partials + tl.num_programs(0) + program, tl.sum((n == m).to(n.dtype), axis=0))
    else:
        tl.store(partials + program, tl.sum(tl.where(inside, _phi(n, scale, target, KIND), 0.0), axis=0))


@triton.jit
def _finish(
    partials,  # A [count]; [2, count] for "max"; [2, count, parts] if LONG
    norms,  # A [count]; written if LONG
    penalty,  # A []
    top,  # A [2], for "max": the maximum of the norms, and the slope of each norm that attains it
    ticket,  # int32 []: 0 before a launch and after it
    count,
    parts,
    scale,
    target,
    KIND: tl.constexpr,
    LONG: tl.constexpr,
    SUM_H: tl.constexpr,
    SUM_W: tl.constexpr,
):
    """The penalty, from what _store_partial has left; or, if LONG, from the parts of rows, with the norms.

    It is the work of the program that comes here last. Norms that share the maximum share its gradient evenly, as in
    torch.amax.
    """
    ACC: tl.constexpr = penalty.dtype.element_ty
    if is_last_program(ticket):
        # For "max" each lane keeps the largest norm that it has met, and how often it has; no norm is -1.
        total = tl.full([SUM_H], -1.0 if KIND == "max" else 0.0, ACC)
        ties = tl.zeros([SUM_H], ACC)
        for first in range(0, count, SUM_H):
            rows = first + tl.arange(0, SUM_H)
            inside = rows < count
            if LONG:
                s, q = tl.zeros([SUM_H], ACC), tl.zeros([SUM_H], ACC)
                for part in range(0, parts, SUM_W):
                    pointers, mask = matrix_tile(partials, first, part, count, parts, SUM_H, SUM_W)
                    part_s = tl.load(pointers, mask=mask, other=0.0)
                    part_q = tl.load(pointers + tl.cast(count, tl.int64) * parts, mask=mask, other=0.0)
                    step_s = tl.max(part_s, axis=1)
                    _, inverse = _power_of_2(step_s)
                    ratio = part_s * inverse[:, None]
                    s, q = _joined(s, q, step_s, tl.sum(ratio * ratio * part_q, axis=1))
                n = s * square_root(q)
                tl.store(norms + rows, n, mask=inside)
                if KIND == "max":
                    value, tie = tl.where(inside, n, -1.0), inside.to(ACC)
                else:
                    value = tl.where(inside, _phi(n, scale, target, KIND), 0.0)
            elif KIND == "max":
                value = tl.load(partials + rows, mask=inside, other=-1.0)
                tie = tl.load(partials + count + rows, mask=inside, other=0.0)
            else:
                value = tl.load(partials + rows, mask=inside, other=0.0)
            if KIND == "max":
                ties = tl.where(value > total, tie, tl.where(value == total, ties + tie, ties))
                # Neither > nor a maximum lets a NaN in.
                total = tl.where((value > total) | (value != value), value, total)
            else:
                total += value
        if KIND == "max":
            m = _largest(total)
            distance = m - target
            tl.store(penalty, (scale * distance) * distance)
            tl.store(top, m)
            tl.store(top + 1, divide(2.0 * scale * distance, tl.sum(tl.where(total == m, ties, 0.0), axis=0)))
        else:
            tl.store(penalty, tl.sum(total, axis=0))


@triton.jit
def _gradient_penalty_interpolate_kernel(
    real,  # T [h, w]
    fake,  # T [h, w]
    mix_ptr,  # A [h]
    x_hat,  # T [h, w]
    h,
    w,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """x_hat_i = mix_i real_i + (1 - mix_i) fake_i; bit by bit real_i or fake_i where mix_i is 1 or 0.

    A program takes one tile.

    Source: Gulrajani et al. 2017, "Improved Training of Wasserstein GANs", Algorithm 1.
    """
    tiles = tl.cdiv(w, BLOCK_W)
    row, col = tl.program_id(0) // tiles * BLOCK_H, tl.program_id(0) % tiles * BLOCK_W
    rows = row + tl.arange(0, BLOCK_H)
    mix = tl.load(mix_ptr + rows, mask=rows < h, other=0.0)[:, None]
    pointers, mask = matrix_tile(real, row, col, h, w, BLOCK_H, BLOCK_W)
    a = tl.load(pointers, mask=mask).to(mix.dtype)
    pointers, mask = matrix_tile(fake, row, col, h, w, BLOCK_H, BLOCK_W)
    b = tl.load(pointers, mask=mask).to(mix.dtype)
    value = mix * a + (1.0 - mix) * b
    # 0 times infinity is NaN, and 0 times a negative number plus 0 is not -0.
    value = tl.where(mix == 1.0, a, tl.where(mix == 0.0, b, value))
    pointers, mask = matrix_tile(x_hat, row, col, h, w, BLOCK_H, BLOCK_W)
    tl.store(pointers, value.to(x_hat.dtype.element_ty), mask=mask)


@triton.jit
def _gradient_penalty_rows_kernel(
    grads,  # T [h, w]
    norms,  # A [h]
    partials,  # A [programs]; [2, programs] for "max"; if ALONE the penalty
    cotangent,  # T [h, w]
    penalty,  # A []
    top,  # A [2], for "max"
    ticket,  # int32 []
    h,
    w,
    scale: tl.float64,
    target: tl.float64,
    KIND: tl.constexpr,
    ALONE: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SUM_H: tl.constexpr,
):
    """Norms of rows that fit into registers, the penalty, and (except for "max") the cotangent.

    A program takes BLOCK_H whole rows and reads them once.

    Source: Gulrajani et al. 2017, eq. 3.
    """
    ACC: tl.constexpr = norms.dtype.element_ty
    scale, target = tl.full([], scale, ACC), tl.full([], target, ACC)
    row = tl.program_id(0) * BLOCK_H
    pointers, mask = matrix_tile(grads, row, 0, h, w, BLOCK_H, BLOCK_W)
    g = tl.load(pointers, mask=mask, other=0.0).to(ACC)
    s, q = _scaled_squares(g, 1)
    n = s * square_root(q)
    rows = row + tl.arange(0, BLOCK_H)
    tl.store(norms + rows, n, mask=rows < h)
    _store_partial(partials, n, rows < h, scale, target, KIND)
    if KIND != "max":
        n = n[:, None]
        value = _cotangent(g, n, _slope(n, scale, target, KIND), KIND, TINY)
        pointers, mask = matrix_tile(cotangent, row, 0, h, w, BLOCK_H, BLOCK_W)
        tl.store(pointers, value.to(cotangent.dtype.element_ty), mask=mask)
    if not ALONE:
        _finish(
            partials, norms, penalty, top, ticket, tl.num_programs(0), 1, scale, target, KIND, False, SUM_H, 1
        )  # fmt: skip


@triton.jit
def _gradient_penalty_columns_kernel(
    grads,  # T [samples, h, w]
    norms,  # A [samples, w]
    partials,  # A [programs]; [2, programs] for "max"; if ALONE the penalty
    cotangent,  # T [samples, h, w]
    penalty,  # A []
    top,  # A [2], for "max"
    ticket,  # int32 []
    h,
    w,
    scale: tl.float64,
    target: tl.float64,
    KIND: tl.constexpr,
    ALONE: tl.constexpr,
    WHOLE: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SUM_H: tl.constexpr,
):
    """Norms of the columns of matrices, the penalty, and (except for "max") the cotangent.

    A program takes BLOCK_W columns of a matrix and reads them once (WHOLE: BLOCK_H covers h), or walks down them twice,
    in steps of BLOCK_H rows, and finds them in the cache the second time.

    Source: Gulrajani et al. 2017, eq. 3, with the norm over the channels of a pixel.
    """
    ACC: tl.constexpr = norms.dtype.element_ty
    scale, target = tl.full([], scale, ACC), tl.full([], target, ACC)
    tiles = tl.cdiv(w, BLOCK_W)
    sample, col = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * BLOCK_W
    grads += sample * h * w
    cotangent += sample * h * w
    if WHOLE:
        pointers, mask = matrix_tile(grads, 0, col, h, w, BLOCK_H, BLOCK_W)
        g = tl.load(pointers, mask=mask, other=0.0).to(ACC)
        s, q = _scaled_squares(g, 0)
    else:
        s, q = tl.zeros([BLOCK_W], ACC), tl.zeros([BLOCK_W], ACC)
        for row in range(0, h, BLOCK_H):
            pointers, mask = matrix_tile(grads, row, col, h, w, BLOCK_H, BLOCK_W)
            step_s, step_q = _scaled_squares(tl.load(pointers, mask=mask, other=0.0).to(ACC), 0)
            s, q = _joined(s, q, step_s, step_q)
    n = s * square_root(q)
    cols = col + tl.arange(0, BLOCK_W)
    tl.store(norms + sample * w + cols, n, mask=cols < w)
    _store_partial(partials, n, cols < w, scale, target, KIND)
    if KIND != "max":
        n = n[None, :]
        slope = _slope(n, scale, target, KIND)
        if WHOLE:
            pointers, mask = matrix_tile(cotangent, 0, col, h, w, BLOCK_H, BLOCK_W)
            tl.store(pointers, _cotangent(g, n, slope, KIND, TINY).to(cotangent.dtype.element_ty), mask=mask)
        else:
            for row in range(0, h, BLOCK_H):
                pointers, mask = matrix_tile(grads, row, col, h, w, BLOCK_H, BLOCK_W)
                value = _cotangent(tl.load(pointers, mask=mask, other=0.0).to(ACC), n, slope, KIND, TINY)
                pointers, mask = matrix_tile(cotangent, row, col, h, w, BLOCK_H, BLOCK_W)
                tl.store(pointers, value.to(cotangent.dtype.element_ty), mask=mask)
    if not ALONE:
        _finish(
            partials, norms, penalty, top, ticket, tl.num_programs(0), 1, scale, target, KIND, False, SUM_H, 1
        )  # fmt: skip


@triton.jit
def _gradient_penalty_parts_kernel(
    grads,  # T [h, w]
    norms,  # A [h]
    parts,  # A [2, h, number of parts]: s, q
    penalty,  # A []
    top,  # A [2], for "max"
    ticket,  # int32 []
    h,
    w,
    scale: tl.float64,
    target: tl.float64,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    SUM_H: tl.constexpr,
    SUM_W: tl.constexpr,
):
    """(s, q) of the parts of long rows, BLOCK elements a program; from them the norms and the penalty.

    Source: Gulrajani et al. 2017, eq. 3.
    """
    ACC: tl.constexpr = parts.dtype.element_ty
    per_row = tl.cdiv(w, BLOCK)
    row, col = tl.program_id(0) // per_row, tl.program_id(0) % per_row * BLOCK
    pointers, mask = matrix_tile(grads, row, col, h, w, 1, BLOCK)
    s, q = _scaled_squares(tl.load(pointers, mask=mask, other=0.0).to(ACC), 1)
    part = parts + tl.program_id(0) + tl.arange(0, 1)
    tl.store(part, s)
    tl.store(part + tl.num_programs(0), q)
    scale, target = tl.full([], scale, ACC), tl.full([], target, ACC)
    _finish(parts, norms, penalty, top, ticket, h, per_row, scale, target, KIND, True, SUM_H, SUM_W)


@triton.jit
def _gradient_penalty_scale_kernel(
    grads,  # T [samples, h, w]
    norms,  # A [samples, h]; [samples, w] if PER_COLUMN
    top,  # A [2], for "max"
    cotangent,  # T [samples, h, w]
    h,
    w,
    scale: tl.float64,
    target: tl.float64,
    KIND: tl.constexpr,
    PER_COLUMN: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """The cotangent, of norms that are known. A program takes one tile.

    For "max" a tile without the maximum is not read: its cotangent is 0.

    Source: Gulrajani et al. 2017, eq. 3; the derivative of a norm is g / |g|.
    """
    ACC: tl.constexpr = norms.dtype.element_ty
    scale, target = tl.full([], scale, ACC), tl.full([], target, ACC)
    T: tl.constexpr = cotangent.dtype.element_ty
    across = tl.cdiv(w, BLOCK_W)
    tiles = tl.cdiv(h, BLOCK_H) * across
    sample, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    row, col = tile // across * BLOCK_H, tile % across * BLOCK_W
    pointers, mask = matrix_tile(grads + sample * h * w, row, col, h, w, BLOCK_H, BLOCK_W)
    targets, _ = matrix_tile(cotangent + sample * h * w, row, col, h, w, BLOCK_H, BLOCK_W)
    if PER_COLUMN:
        cols = col + tl.arange(0, BLOCK_W)
        n = tl.load(norms + sample * w + cols, mask=cols < w, other=0.0)[None, :]
    else:
        rows = row + tl.arange(0, BLOCK_H)
        n = tl.load(norms + sample * h + rows, mask=rows < h, other=0.0)[:, None]
    if KIND == "max":
        attains = (n == tl.load(top)) | (n != n)
        if tl.max(attains.to(tl.int32)) > 0:
            slope = tl.where(attains, tl.load(top + 1), 0.0)
            g = tl.load(pointers, mask=mask, other=0.0).to(ACC)
            tl.store(targets, _cotangent(g, n, slope, KIND, TINY).to(T), mask=mask)
        else:
            tl.store(targets, tl.zeros([BLOCK_H, BLOCK_W], T), mask=mask)
    else:
        g = tl.load(pointers, mask=mask, other=0.0).to(ACC)
        tl.store(targets, _cotangent(g, n, _slope(n, scale, target, KIND), KIND, TINY).to(T), mask=mask)


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
