"""Norms and sums of an array that several programs hold the parts of, without over- or underflow.

A part comes times a unit of its own, a power of two; the array counts in the smallest of them.
"""

import triton
import triton.language as tl

from ..common import divide, square_root


@triton.jit
def store_scaled_squares(x, max_ptr, sum_ptr, TINY: tl.constexpr):
    """Store m = max|x_i| and sum (x_i / m)^2, which give |x| without over- or underflow; return x / m.

    Numbers below the smallest normal one count as 0. A maximum may skip a NaN, the sum never does.
    """
    m = tl.max(tl.abs(x), axis=0)
    m = tl.where(m < TINY, 0.0, m)
    ratio = x * tl.where(m == 0, 0.0, divide(1.0, tl.where(m == 0, 1.0, m)))
    tl.store(max_ptr, m)
    tl.store(sum_ptr, tl.sum(ratio * ratio, axis=0))
    return ratio


@triton.jit
def load_unit(unit_ptr, count, STEP: tl.constexpr):
    """The smallest unit of the parts of an array: the one that all of it is brought to."""
    least = tl.full([STEP], 1.0, unit_ptr.dtype.element_ty)
    for first in range(0, count, STEP):
        index = first + tl.arange(0, STEP)
        least = tl.minimum(least, tl.load(unit_ptr + index, mask=index < count, other=1.0))
    return tl.min(least, axis=0)


@triton.jit
def load_norm(max_ptr, sum_ptr, unit_ptr, count, EPS: tl.constexpr, TINY: tl.constexpr, STEP: tl.constexpr):
    """|x| and 1 / max(|x|, EPS) of an array whose parts went through store_scaled_squares, and its unit.

    A part holds x times its unit, a power of two; |x| comes times the unit of the array.
    """
    unit = load_unit(unit_ptr, count, STEP)
    largest = tl.zeros([STEP], max_ptr.dtype.element_ty)
    for first in range(0, count, STEP):
        index = first + tl.arange(0, STEP)
        ratio = divide(unit, tl.load(unit_ptr + index, mask=index < count, other=1.0))
        largest = tl.maximum(largest, tl.load(max_ptr + index, mask=index < count, other=0.0) * ratio)
    m = tl.max(largest, axis=0)
    m = tl.where(m == 0, 1.0, m)
    inverse = divide(1.0, m)
    acc = tl.zeros([STEP], max_ptr.dtype.element_ty)
    for first in range(0, count, STEP):
        index = first + tl.arange(0, STEP)
        ratio = divide(unit, tl.load(unit_ptr + index, mask=index < count, other=1.0))
        ratio *= tl.load(max_ptr + index, mask=index < count, other=0.0) * inverse
        acc += ratio * ratio * tl.load(sum_ptr + index, mask=index < count, other=0.0)
    norm = m * square_root(tl.sum(acc, axis=0))
    # A comparison, because a maximum may drop a NaN.
    eps = tl.maximum(unit * EPS, TINY)
    return norm, divide(1.0, tl.where(norm < eps, eps, norm)), unit


@triton.jit
def load_sum_in(ptr, unit_ptr, unit, count, STEP: tl.constexpr):
    """load_sum times the unit, of terms that have units of their own."""
    acc = tl.zeros([STEP], ptr.dtype.element_ty)
    for first in range(0, count, STEP):
        index = first + tl.arange(0, STEP)
        ratio = divide(unit, tl.load(unit_ptr + index, mask=index < count, other=1.0))
        acc += tl.load(ptr + index, mask=index < count, other=0.0) * ratio
    return tl.sum(acc, axis=0)
