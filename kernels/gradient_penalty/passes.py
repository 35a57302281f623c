"""The kernels: norms with the penalty, of rows, of columns and of parts of rows; the cotangent; the samples."""

import triton
import triton.language as tl

from ..common import divide, is_last_program, matrix_tile, square_root
from .norms import _cotangent, _joined, _largest, _phi, _power_of_2, _scaled_squares, _slope


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
