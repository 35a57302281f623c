"""Arithmetic of norms whose squares leave the range, and of what a norm gives to the penalty and to its gradient."""

import triton
import triton.language as tl

from ..common import divide


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
