"""Smooth activations phi(z), with phi'(z) and phi''(z): formulas and constants are those of csrc/cpu/activations.h.

Everything is made of e^x for x <= 0, so nothing overflows, and derivatives are written without differences of nearly
equal numbers. The exponential of the hardware would be off by as many units in the last place as its argument is large;
this one is a Taylor polynomial after an exact reduction, of csrc/cpu/elementary.h. NaN stays NaN.
"""

import triton
import triton.language as tl

from .common import divide

#: What a launch may name, besides "" for a leaky ReLU.
CURVES = ("tanh", "sigmoid", "softplus", "silu", "gelu", "gelu-tanh", "elu")

_EXPONENTIAL_32 = tl.constexpr((1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 720, 1 / 5040))
_EXPONENTIAL_64 = tl.constexpr((
    1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 720, 1 / 5040, 1 / 40320, 1 / 362880, 1 / 3628800, 1 / 39916800,
    1 / 479001600, 1 / 6227020800,
))  # fmt: skip
_LOGARITHM_32 = tl.constexpr((1 / 3, 1 / 5, 1 / 7, 1 / 9, 1 / 11))
_LOGARITHM_64 = tl.constexpr((1 / 3, 1 / 5, 1 / 7, 1 / 9, 1 / 11, 1 / 13, 1 / 15, 1 / 17, 1 / 19, 1 / 21))
_TAIL_32 = tl.constexpr((
    0.212360592934572829, 0.153098728011863399, 0.0854468918318088019, 0.0362555430851146671, 0.0110024599581367749,
    0.00195796208254388903, -1.41484591983505381e-5, -9.96303108111037518e-5, -1.32818924374150348e-5,
    3.93407251751478426e-6, 9.49049070544732768e-7,
))  # fmt: skip
_TAIL_64 = tl.constexpr((
    0.185853930625506086, 0.147800646038525251, 0.0950033788044301054, 0.0483211885552978696, 0.0184553589615136196,
    0.00458197498373080088, 0.000299946718059925885, -0.000255050573419050669, -7.85266771458399018e-5,
    9.58755856329211489e-6, 8.65484910133667451e-6, -2.56648422402034878e-7, -9.43292687184780154e-7,
    1.62068114265607425e-8, 1.11441153544383506e-7, -7.00158299439667547e-9, -1.37626209583681985e-8,
    2.1131698491284744e-9, 1.6154446644091869e-9, -4.11510226539573914e-10, -1.54166944442620193e-10,
    4.16474098487542859e-11, 8.60042114964860216e-12,
))  # fmt: skip


@triton.jit
def _polynomial(x, coefficients: tl.constexpr, DEGREE: tl.constexpr):
    """The sum of coefficients[k] x^k."""
    total = tl.full(x.shape, coefficients[DEGREE], x.dtype)
    for k in tl.static_range(DEGREE):
        total = total * x + coefficients[DEGREE - 1 - k]
    return total


@triton.jit
def _exponential(x):
    """For x <= 0, (power, rest) with e^x = power (1 + rest): a power of two, and |rest| < 0.42.

    x = k ln 2 + r with |r| <= ln 2 / 2. The first part of ln 2 has so few bits that k times it is exact; adding 1.5
    times 2^52 (2^23) rounds to an integer k, and leaves it in the lowest bits.
    """
    if x.dtype == tl.float64:
        bounded = tl.where(x < -708.0, tl.full(x.shape, -708.0, x.dtype), x)
        shifted = bounded * 1.4426950408889634 + 6755399441055744.0
        k = shifted - 6755399441055744.0
        r = (bounded - k * 0.6931471803691238) - k * 1.9082149292705877e-10
        series = _polynomial(r, _EXPONENTIAL_64, 11)
        power = ((shifted.to(tl.int64, bitcast=True) << 52) + (1023 << 52)).to(x.dtype, bitcast=True)
        power = tl.where(x < -708.0, 0.0, power)
    else:
        bounded = tl.where(x < -87.0, tl.full(x.shape, -87.0, x.dtype), x)
        shifted = bounded * 1.4426950408889634 + 12582912.0
        k = shifted - 12582912.0
        r = (bounded - k * 0.693359375) - k * -0.00021219444170128554
        series = _polynomial(r, _EXPONENTIAL_32, 5)
        power = ((shifted.to(tl.int32, bitcast=True) << 23) + (127 << 23)).to(x.dtype, bitcast=True)
        power = tl.where(x < -87.0, 0.0, power)
    return power, r + r * r * series


@triton.jit
def _log_of_one_plus(x):
    """log(1 + x) for 0 <= x <= 1: 2 artanh s of a small s, by its series."""
    large = x > 0.41421356
    f = tl.where(large, (x - 1.0) * 0.5, x)
    s = divide(f, f + 2.0)
    square = s * s
    if x.dtype == tl.float64:  # noqa: SIM108 -- Triton compiles one branch of a statement, both of an expression
        series = _polynomial(square, _LOGARITHM_64, 9)
    else:
        series = _polynomial(square, _LOGARITHM_32, 4)
    half = s + s * square * series
    return tl.where(large, tl.full(x.shape, 0.69314718055994531, x.dtype), 0.0) + (half + half)


@triton.jit
def _logistic(x):
    """(s(x), s'(x), tanh(x / 2)) of s(x) = 1 / (1 + e^-x)."""
    power, rest = _exponential(-tl.abs(x))
    decayed, below = power * rest + power, power * rest + (power - 1.0)
    inverse = divide(tl.full(x.shape, 1.0, x.dtype), decayed + 1.0)
    centred = divide(below, below + 2.0)
    value = tl.where(x > 0, inverse, decayed * inverse)
    return value, decayed * inverse * inverse, tl.where(x > 0, -centred, centred)


@triton.jit
def _within(z, far: tl.constexpr):
    """z within [-far, far]; NaN stays."""
    edge = tl.full(z.shape, far, z.dtype)
    return tl.where(z < -far, -edge, tl.where(z > far, edge, z))


@triton.jit
def _normal_distribution(z):
    """The integral up to z of the density of the standard normal distribution, and that density."""
    power, rest = _exponential(z * z * -0.5)
    bell = power * rest + power
    t = divide(tl.full(z.shape, 1.0, z.dtype), tl.abs(z) * (1 / 4.5) + 1.0)
    if z.dtype == tl.float64:
        tail = bell * t * _polynomial(t * (85.0 / 38) - 47.0 / 38, _TAIL_64, 22)
    else:
        tail = bell * t * _polynomial(t * (8.0 / 3) - 5.0 / 3, _TAIL_32, 10)
    return tl.where(z > 0, 1.0 - tail, tail), bell * 0.39894228040143268


@triton.jit
def activated(z, c0, c1, c2, CURVE: tl.constexpr):
    """(phi(z), phi'(z), phi''(z)) of a smooth activation with its constants, scalars of the dtype of z.

    Args:
        c0, c1, c2: beta and threshold of "softplus"; alpha, scale and input_scale of "elu".
        CURVE: one of `CURVES`.
    """
    if CURVE == "tanh":
        _, steep, centred = _logistic(z + z)
        slope = steep * 4.0
        return centred, slope, -2.0 * centred * slope
    elif CURVE == "sigmoid":
        s, steep, centred = _logistic(z)
        return s, steep, -centred * steep
    elif CURVE == "softplus":
        x = z * c0
        s, steep, _ = _logistic(x)
        power, rest = _exponential(-tl.abs(x))
        value = divide(tl.where(x < 0, 0.0, x) + _log_of_one_plus(power * rest + power), c0 + tl.zeros_like(x))
        linear = x > c1
        return tl.where(linear, z, value), tl.where(linear, 1.0, s), tl.where(linear, 0.0, c0 * steep)
    elif CURVE == "silu":
        s, steep, centred = _logistic(z)
        return z * s, s + z * steep, steep * (2.0 - z * centred)
    elif CURVE == "gelu":
        near = _within(z, 50.0)  # beyond which the density is 0, and z^2 need not be
        below, density = _normal_distribution(near)
        return z * below, below + near * density, density * (2.0 - near * near)
    elif CURVE == "gelu-tanh":
        near = _within(z, 30.0)  # beyond which s' is 0, and x need not be
        square = near * near
        s, steep, centred = _logistic(near * 1.5957691216057308 * (square * 0.044715 + 1.0))
        first, second = (square * (3 * 0.044715) + 1.0) * 1.5957691216057308, near * (6 * 0.044715 * 1.5957691216057308)
        return z * s, s + near * steep * first, steep * (2.0 * first + near * (second - centred * first * first))
    else:
        tl.static_assert(CURVE == "elu")
        factor, x = c0 * c1, z * c2
        power, rest = _exponential(tl.where(x > 0, 0.0, x))
        decayed = factor * c2 * (power * rest + power)
        above = z > 0
        value = tl.where(above, c1 * z, factor * (power * rest + (power - 1.0)))
        return value, tl.where(above, c1 + tl.zeros_like(z), decayed), tl.where(above, 0.0, c2 * decayed)
