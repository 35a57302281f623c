"""Arithmetic of PTX on NumPy arrays: one rounding of fused operations, conversions, tensor-core formats.

Source: NVIDIA, "Parallel Thread Execution ISA", sections "Floating Point Instructions" and "Warp Level Matrix
Multiply-Accumulate Instructions".
"""

import ctypes
import ctypes.util

import numpy as np

U16, U32, U64, S32, S64, F32, F64 = (
    np.uint16, np.uint32, np.uint64, np.int32, np.int64, np.float32, np.float64
)  # fmt: skip

_libm = ctypes.CDLL(ctypes.util.find_library("m") or "libm.so.6")
_libm.fma.restype = ctypes.c_double
_libm.fma.argtypes = [ctypes.c_double] * 3


def two_sum(a, b):
    """(s, e) with s = RN(a + b) and s + e = a + b exactly (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def add_to_odd(a, b):
    """a + b in float64, rounded to odd: a later rounding to fewer digits is then the rounding of the exact sum."""
    s, e = two_sum(a, b)
    s, e = np.broadcast_arrays(s, e)
    inexact = (e != 0) & np.isfinite(s) & ((s.view(U64) & U64(1)) == 0)
    if inexact.any():
        s = np.where(inexact, np.nextafter(s, np.where(e > 0, np.inf, -np.inf)), s)
    return s


def fma32(a, b, c):
    """a b + c in float32, rounded once: the product is exact in float64, the sum is rounded to odd."""
    return add_to_odd(a.astype(F64) * b.astype(F64), c.astype(F64)).astype(F32)


def _split(a):
    t = a * 134217729.0
    high = t - (t - a)
    return high, a - high


def fma64(a, b, c):
    """a b + c in float64, rounded once.

    Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd";
    elements whose exponents are too far out for it are done one by one, by libm.
    """
    a, b, c = np.broadcast_arrays(a, b, c)
    p = a * b
    (ah, al), (bh, bl) = _split(a), _split(b)
    e = ((ah * bh - p) + ah * bl + al * bh) + al * bl
    th, tl = two_sum(c, e)
    vh, vl = two_sum(p, th)
    result = vh + add_to_odd(tl, vl)
    size, other = np.abs(p), np.abs(c)
    safe = (
        ((size > 1e-240) & (size < 1e290) & (np.abs(a) < 1e150) & (np.abs(b) < 1e150) & (other < 1e290))
        | (a == 0) | (b == 0)
    )  # fmt: skip
    # Zero factors: p and e are exact zeros unless the other factor is not finite, which libm does as well.
    safe &= np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    zero = (a == 0) | (b == 0)
    result = np.where(zero & safe, p + c, result)
    if not safe.all():
        result = np.array(result)
        for i in np.flatnonzero(~safe):
            result[i] = _libm.fma(a[i], b[i], c[i])
    return result


def to_bf16(x):
    """float32 to the bits of bfloat16, to nearest even; a NaN becomes 0x7fff."""
    bits = x.view(U32)
    rounded = (bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)
    return np.where(np.isnan(x), U32(0x7FFF), rounded).astype(U16)


def from_bf16(bits):
    return (bits.astype(U32) << U32(16)).view(F32)


def to_f16(x):
    half = x.astype(np.float16)
    return np.where(np.isnan(x), U16(0x7FFF), half.view(U16)).astype(U16)


def to_tf32_rna(x):
    """float32 to TF32, to nearest, ties away from zero; what is left of the mantissa are 10 bits."""
    bits = x.view(U32)
    rounded = (bits + U32(0x1000)) & U32(0xFFFFE000)
    return np.where(np.isfinite(x), rounded, np.where(np.isnan(x), U32(0x7FFFFFFF), bits)).astype(U32)


def tf32(bits):
    """What a tensor core sees of a 32-bit register: the lower 13 bits are ignored."""
    return (bits & U32(0xFFFFE000)).view(F32).astype(F64)


def toward_zero32(x):
    """float64 to float32, rounded toward zero, as tensor cores truncate their sums."""
    y = x.astype(F32)
    away = np.abs(y.astype(F64)) > np.abs(x)
    return np.where(away & np.isfinite(x), np.nextafter(y, F32(0)), y).astype(F32)


def flush32(x):
    """Subnormal numbers to zero of their sign: .ftz."""
    return np.where(np.abs(x) < np.finfo(F32).tiny, np.copysign(F32(0), x), x).astype(F32)


def maximum(a, b):
    """IEEE 754-2008 maxNum, as max.f32 without .NaN: a NaN is passed over; +0 is above -0."""
    result = np.fmax(a, b)
    zeros = (a == 0) & (b == 0)
    return np.where(zeros, np.where(np.signbit(a), b, a), result)


def minimum(a, b):
    result = np.fmin(a, b)
    zeros = (a == 0) & (b == 0)
    return np.where(zeros, np.where(np.signbit(a), a, b), result)


def divide_integers(a, b):
    """Quotient toward zero; of a division by zero all bits are 1, as on devices."""
    zero = b == 0
    safe = np.where(zero, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        return np.where(zero, ~a.dtype.type(0), a // safe)
    q = a // safe
    q = q + ((a % safe != 0) & ((a < 0) != (safe < 0)))
    return np.where(zero, a.dtype.type(-1), q).astype(a.dtype)


def shift_left(a, b):
    bits = a.dtype.itemsize * 8
    amount = b.view(U32)
    return np.where(amount >= bits, a.dtype.type(0), a << np.minimum(amount, bits - 1).astype(a.dtype))


def shift_right(a, b):
    """Arithmetic for signed, logical for unsigned; amounts above the width count as the width."""
    bits = a.dtype.itemsize * 8
    amount = b.view(U32)
    shifted = a >> np.minimum(amount, bits - 1).astype(a.dtype)
    if a.dtype.kind == "u":
        return np.where(amount >= bits, a.dtype.type(0), shifted)
    return shifted


def leading_zeros(a):
    """Zeros above the highest bit that is set; of 0 all bits."""
    bits = a.dtype.itemsize * 8
    count = np.full(a.shape, bits, U32)
    for i in range(bits):
        count = np.where((a >> a.dtype.type(i)) & a.dtype.type(1) != 0, U32(bits - 1 - i), count)
    return count


def set_bits(a):
    """popc: how many bits are set."""
    bits = a.dtype.itemsize * 8
    return sum(((a >> a.dtype.type(i)) & a.dtype.type(1)).astype(U32) for i in range(bits))


def extract_bits(a, position, length):
    """bfe: the field of `length` bits at `position`, zero- or sign-extended."""
    bits = a.dtype.itemsize * 8
    position, length = position.view(U32) & U32(255), length.view(U32) & U32(255)
    wide = a.astype(S64 if a.dtype.kind == "i" else U64)
    kind = wide.dtype.type
    available = np.minimum(length, np.where(position < bits, bits - position.astype(S64), 0)).astype(S64)
    field_ = shift_right(wide, np.minimum(position, U32(bits - 1)).astype(U32))
    keep = np.where(
        available >= 64, U64(0xFFFFFFFFFFFFFFFF), (U64(1) << np.minimum(available, 63).astype(U64)) - U64(1)
    )
    value = (field_.view(U64) & keep).view(wide.dtype)
    if a.dtype.kind == "i":
        last = np.minimum(position.astype(S64) + length.astype(S64) - 1, bits - 1)
        negative = (shift_right(wide, np.maximum(last, 0).astype(U32)) & kind(1)) == 1
        value = np.where(negative & (length > 0), (value.view(U64) | ~keep).view(wide.dtype), value)
    return np.where(length == 0, kind(0), value).astype(a.dtype)


def insert_bits(a, b, position, length):
    """bfi: the low `length` bits of a put into b at `position`."""
    bits = a.dtype.itemsize * 8
    position, length = position.view(U32) & U32(255), length.view(U32) & U32(255)
    ones = np.where(length >= 64, U64(0xFFFFFFFFFFFFFFFF), (U64(1) << np.minimum(length, 63).astype(U64)) - U64(1))
    mask = np.where(position >= bits, U64(0), ones << np.minimum(position, 63).astype(U64))
    moved = shift_left(a.astype(U64), position)
    return ((moved & mask) | (b.astype(U64) & ~mask)).astype(a.dtype)


def permute_bytes(a, b, selector):
    """prmt: each nibble of the selector takes one of the 8 bytes of b and a, or (bit 3) its sign eight times."""
    both = a.astype(U64) | (b.astype(U64) << U64(32))
    result = U32(0)
    for i in range(4):
        nibble = selector >> U32(4 * i)
        byte = (both >> ((nibble & U32(7)) * U32(8)).astype(U64)).astype(U32) & U32(0xFF)
        byte = np.where((nibble & U32(8)) != 0, np.where(byte >= 128, U32(0xFF), U32(0)), byte)
        result = result | (byte << U32(8 * i))
    return result
