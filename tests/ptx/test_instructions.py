"""The emulator itself: each instruction against its definition in the PTX ISA, in exact arithmetic or bit by bit."""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from ptx import kit
from ptx.memory import Finding
from ptx.parse import Unsupported, parse

F32, F64 = np.float32, np.float64
rng = np.random.default_rng(0)

FLOATS = {
    "f32": np.concatenate([
        np.array([0.0, -0.0, 1.0, -1.0, 1.5, 3.0, 1e-45, -1e-40, 1.17549435e-38, 3.4e38, -3.4e38, np.inf, -np.inf,
                  np.nan, 0.1, 16777217.0, 1 + 2.0**-23, 1 - 2.0**-24], F32),
        rng.standard_normal(40).astype(F32), (rng.standard_normal(20) * 10.0 ** rng.integers(-38, 38, 20)).astype(F32),
    ]),
    "f64": np.concatenate([
        np.array([0.0, -0.0, 1.0, -1.0, 1.5, 3.0, 5e-324, -1e-310, 2.2250738585072014e-308, 1.7e308, -1.7e308, np.inf,
                  -np.inf, np.nan, 0.1, 1 + 2.0**-52, 1 - 2.0**-53]),
        rng.standard_normal(40), rng.standard_normal(20) * 10.0 ** rng.integers(-300, 300, 20),
    ]),
}  # fmt: skip


def exact(x: float, kind: str) -> float:
    """A Fraction or float rounded once to a type."""
    return x if isinstance(x, float) and not math.isfinite(x) else round_fraction(Fraction(x), kind)


def round_fraction(x: Fraction, kind: str) -> float:
    """To nearest, ties to even, with subnormal numbers and overflow to infinity."""
    digits, smallest, largest = {"f32": (24, -149, 127), "f64": (53, -1074, 1023), "f16": (11, -24, 15),
                                 "bf16": (8, -133, 127)}[kind]  # fmt: skip
    if x == 0:
        return 0.0
    sign, x = (-1 if x < 0 else 1), abs(x)
    exponent = math.floor(math.log2(x.numerator) - math.log2(x.denominator))
    while Fraction(2) ** (exponent + 1) <= x:
        exponent += 1
    while Fraction(2) ** exponent > x:
        exponent -= 1
    unit = max(exponent - digits + 1, smallest)
    scaled = x / Fraction(2) ** unit
    whole = scaled.numerator // scaled.denominator
    rest = scaled - whole
    if rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2):
        whole += 1
    if whole * Fraction(2) ** unit >= Fraction(2) ** (largest + 1):
        return sign * math.inf
    return sign * float(whole * Fraction(2) ** unit)


def pairs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = zip(*itertools.product(values, values), strict=True)
    return np.array(a, values.dtype), np.array(b, values.dtype)


def same(mine: np.ndarray, theirs: np.ndarray) -> None:
    """Bit by bit, but for the bits of a NaN."""
    theirs = np.asarray(theirs, mine.dtype)
    bits = f"u{mine.dtype.itemsize}"
    equal = mine.view(bits) == theirs.view(bits)
    if mine.dtype.kind == "f":
        equal |= np.isnan(mine) & np.isnan(theirs)
    assert equal.all(), f"{mine[~equal][:3]} where {theirs[~equal][:3]} is right, at {np.flatnonzero(~equal)[:3]}"


def of_fractions(function: Callable[..., Fraction], kind: str, *arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(results rounded once, where all arguments are finite and the result is not zero)."""
    out, defined = np.zeros(len(arrays[0])), np.zeros(len(arrays[0]), bool)
    for i, values in enumerate(zip(*(a.tolist() for a in arrays), strict=True)):
        if all(map(math.isfinite, values)):
            try:
                value = function(*map(Fraction, values))
            except ZeroDivisionError:
                continue
            out[i], defined[i] = round_fraction(value, kind), value != 0
    return out, defined


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("opcode", ["add.{}", "add.rn.{}", "sub.rn.{}", "mul.{}", "mul.rn.{}", "div.rn.{}"])
def test_arithmetic_is_rounded_once(opcode: str, kind: str) -> None:
    a, b = pairs(FLOATS[kind])
    mine = kit.apply(opcode.format(kind) + " {d}, {a}, {b};", [(kind, a), (kind, b)], kind)
    function = {"add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y,
                "div": lambda x, y: x / y}[opcode[:3]]  # fmt: skip
    right, defined = of_fractions(function, kind, a, b)
    same(mine[defined], right[defined])
    with np.errstate(all="ignore"):
        ieee = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}[opcode[:3]](a, b)
    same(mine, ieee)  # infinities, NaN, signs of zeros


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_fused_multiply_add_is_rounded_once(kind: str) -> None:
    values = FLOATS[kind]
    n = 3000
    a, b, c = (rng.choice(values, n) for _ in range(3))
    # Sums that cancel the rounded product, and halves of a unit: what two roundings would get wrong.
    x, y = rng.standard_normal(500).astype(a.dtype), rng.standard_normal(500).astype(a.dtype)
    near = -(x * y)
    small = (x * y) * a.dtype.type(2.0 ** (-24 if kind == "f32" else -53))
    a, b, c = np.concatenate([a, x, x, x]), np.concatenate([b, y, y, y]), np.concatenate([c, near, small, -small])
    mine = kit.apply(f"fma.rn.{kind} {{d}}, {{a}}, {{b}}, {{c}};", [(kind, a), (kind, b), (kind, c)], kind)
    right, defined = of_fractions(lambda p, q, r: p * q + r, kind, a, b, c)
    same(mine[defined], right[defined])
    with np.errstate(all="ignore"):
        plain = a.astype(np.longdouble) * b + c
    special = ~(np.isfinite(a) & np.isfinite(b) & np.isfinite(c))
    same(mine[special], plain[special].astype(a.dtype))


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_roots_and_reciprocals_are_rounded_once(kind: str) -> None:
    a = FLOATS[kind]
    mine = kit.apply(f"rcp.rn.{kind} {{d}}, {{a}};", [(kind, a)], kind)
    right, defined = of_fractions(lambda x: 1 / x, kind, a)
    same(mine[defined], right[defined])
    root = kit.apply(f"sqrt.rn.{kind} {{d}}, {{a}};", [(kind, a)], kind)
    for x, r in zip(a.tolist(), root.tolist(), strict=True):
        if x > 0 and math.isfinite(x):
            # The root lies within half a unit on either side: compare squares.
            down, up = (float(np.nextafter(a.dtype.type(r), a.dtype.type(to))) for to in (0, np.inf))
            low, high = (Fraction(r) + Fraction(down)) / 2, (Fraction(r) + Fraction(up)) / 2
            assert low**2 <= Fraction(x) <= high**2
        elif x == 0:
            assert r == 0
        else:
            assert math.isnan(r) or x == math.inf


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_minimum_maximum_absolute_value(kind: str) -> None:
    a, b = pairs(FLOATS[kind])
    for name, pick in (("max", np.fmax), ("min", np.fmin)):
        mine = kit.apply(f"{name}.{kind} {{d}}, {{a}}, {{b}};", [(kind, a), (kind, b)], kind)
        right = pick(a, b)
        zeros = (a == 0) & (b == 0)
        negative = np.signbit(a) & np.signbit(b) if name == "max" else np.signbit(a) | np.signbit(b)
        right = np.where(zeros, np.where(negative, -0.0, 0.0).astype(a.dtype), right)
        same(mine, right)
    same(kit.apply(f"abs.{kind} {{d}}, {{a}};", [(kind, a)], kind), np.abs(a))


COMPARISONS = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b and a == a and b == b, "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    "neu": lambda a, b: a != b, "gtu": lambda a, b: not a <= b, "ltu": lambda a, b: not a >= b,
    "equ": lambda a, b: a == b or a != a or b != b, "leu": lambda a, b: not a > b, "geu": lambda a, b: not a < b,
    "num": lambda a, b: a == a and b == b, "nan": lambda a, b: a != a or b != b,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("comparison", COMPARISONS)
def test_comparisons_of_floats(comparison: str, kind: str) -> None:
    a, b = pairs(FLOATS[kind][:20])
    mine = kit.apply(f"setp.{comparison}.{kind} {{d}}, {{a}}, {{b}};", [(kind, a), (kind, b)], "pred")
    right = [COMPARISONS[comparison](x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert mine.tolist() == right


INTEGERS = [0, 1, 2, 3, 5, 7, 31, 32, 33, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**32 - 7, 123456789]


def integers(bits: int, signed: bool) -> list[int]:
    values = [v & ((1 << bits) - 1) for v in (*INTEGERS, *(v * 0x100000001 for v in INTEGERS))]
    return [v - (1 << bits) if signed and v >> (bits - 1) else v for v in values]


def wrap(value: int, bits: int, signed: bool) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if signed and value >> (bits - 1) else value


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


WHOLE: list[tuple[str, str, Callable[[int, int], int]]] = [
    *((f"add.s{n}", f"s{n}", lambda a, b: a + b) for n in (16, 32, 64)),
    *((f"sub.s{n}", f"s{n}", lambda a, b: a - b) for n in (32, 64)),
    *((f"mul.lo.s{n}", f"s{n}", lambda a, b: a * b) for n in (32, 64)),
    *((f"min.s{n}", f"s{n}", min) for n in (32, 64)),
    *((f"max.s{n}", f"s{n}", max) for n in (32, 64)),
    *((f"and.b{n}", f"b{n}", lambda a, b: a & b) for n in (16, 32, 64)),
    *((f"or.b{n}", f"b{n}", lambda a, b: a | b) for n in (16, 32, 64)),
    ("xor.b32", "b32", lambda a, b: a ^ b),
    ("div.s32", "s32", quotient), ("div.s64", "s64", quotient), ("div.u32", "u32", quotient),
]  # fmt: skip


@pytest.mark.parametrize(("opcode", "kind", "function"), WHOLE, ids=[w[0] for w in WHOLE])
def test_integers(opcode: str, kind: str, function: Callable[[int, int], int]) -> None:
    bits, signed = int(kind[1:]), kind[0] == "s"
    a, b = (list(x) for x in zip(*itertools.product(integers(bits, signed), repeat=2), strict=True))
    if opcode.startswith("div"):
        a, b = (list(x) for x in zip(*((x, y) for x, y in zip(a, b, strict=True) if y), strict=True))
    mine = kit.apply(opcode + " {d}, {a}, {b};", [(kind, np.array(x, kit.DTYPE[kind])) for x in (a, b)], kind)
    assert mine.tolist() == [wrap(function(x, y), bits, signed) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_wide_products(kind: str) -> None:
    signed = kind == "s32"
    a, b = (list(x) for x in zip(*itertools.product(integers(32, signed), repeat=2), strict=True))
    given = [(kind, np.array(x, kit.DTYPE[kind])) for x in (a, b)]
    wide = "s64" if signed else "u64"
    mine = kit.apply(f"mul.wide.{kind} {{d}}, {{a}}, {{b}};", given, wide)
    assert mine.tolist() == [wrap(x * y, 64, signed) for x, y in zip(a, b, strict=True)]
    c = (wide, np.full(len(a), 17, kit.DTYPE[wide]))
    mine = kit.apply(f"mad.wide.{kind} {{d}}, {{a}}, {{b}}, {{c}};", [*given, c], wide)
    assert mine.tolist() == [wrap(x * y + 17, 64, signed) for x, y in zip(a, b, strict=True)]
    narrow = kit.apply("mad.lo.s32 {d}, {a}, {b}, {a};", given, kind)
    assert narrow.tolist() == [wrap(x * y + x, 32, signed) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("kind", ["b32", "b64", "b16", "s32", "s64", "u32", "u64"])
def test_shifts(kind: str) -> None:
    bits, signed = int(kind[1:]), kind[0] == "s"
    amounts = [0, 1, 15, 16, 31, 32, 33, 63, 64, 65, 1000]
    a, by = (list(x) for x in zip(*itertools.product(integers(bits, signed), amounts), strict=True))
    given = [(kind, np.array(a, kit.DTYPE[kind])), ("u32", np.array(by, np.uint32))]
    if kind[0] == "b":
        mine = kit.apply(f"shl.{kind} {{d}}, {{a}}, {{b}};", given, kind)
        assert mine.tolist() == [wrap(x << n, bits, False) for x, n in zip(a, by, strict=True)]
    else:
        mine = kit.apply(f"shr.{kind} {{d}}, {{a}}, {{b}};", given, kind)
        assert mine.tolist() == [x >> min(n, bits) for x, n in zip(a, by, strict=True)]


@pytest.mark.parametrize("bits", [32, 64])
def test_leading_zeros_and_set_bits(bits: int) -> None:
    kind = f"b{bits}"
    values = [0, 1, 2, 3, 255, 1 << (bits - 1), (1 << bits) - 1, *(1 << i for i in range(0, bits, 7))]
    mine = kit.apply("clz." + kind + " {d}, {a};", [(kind, np.array(values, kit.DTYPE[kind]))], "u32")
    assert mine.tolist() == [bits - v.bit_length() for v in values]
    mine = kit.apply("popc." + kind + " {d}, {a};", [(kind, np.array(values, kit.DTYPE[kind]))], "u32")
    assert mine.tolist() == [v.bit_count() for v in values]


@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_bit_fields(kind: str) -> None:
    """bfe as the ISA's own pseudocode has it."""
    signed = kind == "s32"
    for position, length in itertools.product([0, 1, 8, 24, 31, 32, 40], [0, 1, 4, 8, 31, 32, 255]):
        a = integers(32, signed)
        mine = kit.apply(
            f"bfe.{kind} {{d}}, {{a}}, {position}, {length};", [(kind, np.array(a, kit.DTYPE[kind]))], kind
        )
        expected = []
        for value in a:
            bits = value & 0xFFFFFFFF
            last = min(position + length - 1, 31)
            sign = 0 if not signed or length == 0 else (bits >> last) & 1
            field = 0
            for i in range(32):
                bit = (bits >> (position + i)) & 1 if i < length and position + i <= 31 else sign
                field |= bit << i
            expected.append(wrap(field, 32, signed))
        assert mine.tolist() == expected, (position, length)


def test_bit_field_insert() -> None:
    a, b = np.array([0x12345678, 0xFFFFFFFF, 7], np.uint64), np.array([0xAAAAAAAABBBBBBBB, 0, 2**64 - 1], np.uint64)
    mine = kit.apply("bfi.b64 {d}, {a}, {b}, 32, 32;", [("b64", a), ("b64", b)], "b64")
    assert mine.tolist() == [
        ((x & 0xFFFFFFFF) << 32) | (y & 0xFFFFFFFF) for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]
    mine = kit.apply("bfi.b64 {d}, {a}, {b}, 4, 8;", [("b64", a), ("b64", b)], "b64")
    assert mine.tolist() == [((x & 0xFF) << 4) | (y & ~0xFF0) for x, y in zip(a.tolist(), b.tolist(), strict=True)]


def test_byte_permutation() -> None:
    a, b = np.array([0x83828180, 0x03020100], np.uint32), np.array([0x87868584, 0x07060504], np.uint32)
    for selector in (0x7701, 0x3210, 0x7654, 0x0426, 0x89CF):
        mine = kit.apply(f"prmt.b32 {{d}}, {{a}}, {{b}}, {selector:#x}U;", [("b32", a), ("b32", b)], "b32")
        for x, y, found in zip(a.tolist(), b.tolist(), mine.tolist(), strict=True):
            data = x.to_bytes(4, "little") + y.to_bytes(4, "little")
            nibbles = [selector >> (4 * i) & 15 for i in range(4)]
            expected = [(255 if data[n & 7] >= 128 else 0) if n & 8 else data[n & 7] for n in nibbles]
            assert list(found.to_bytes(4, "little")) == expected


def test_conversions_between_widths() -> None:
    signed = np.array(integers(32, True), np.int32)
    assert kit.apply("cvt.s64.s32 {d}, {a};", [("s32", signed)], "s64").tolist() == signed.tolist()
    unsigned = signed.view(np.uint32)
    assert kit.apply("cvt.u64.u32 {d}, {a};", [("u32", unsigned)], "u64").tolist() == unsigned.tolist()
    long = np.array(integers(64, False), np.uint64)
    assert kit.apply("cvt.u32.u64 {d}, {a};", [("u64", long)], "u32").tolist() == [
        x & 0xFFFFFFFF for x in long.tolist()
    ]
    assert kit.apply("cvt.u16.u32 {d}, {a};", [("u32", unsigned)], "u16").tolist() == [
        x & 0xFFFF for x in unsigned.tolist()
    ]
    short = unsigned.astype(np.uint16)
    assert kit.apply("cvt.u32.u16 {d}, {a};", [("u16", short)], "u32").tolist() == short.tolist()
    same(kit.apply("neg.s32 {d}, {a};", [("s32", signed)], "s32"), -signed)
    same(kit.apply("not.b64 {d}, {a};", [("b64", long)], "b64"), ~long)


def test_conversions_of_floats() -> None:
    f, d = FLOATS["f32"], FLOATS["f64"]
    same(kit.apply("cvt.f64.f32 {d}, {a};", [("f32", f)], "f64"), f.astype(F64))
    right, defined = of_fractions(lambda x: x, "f32", d)
    same(kit.apply("cvt.rn.f32.f64 {d}, {a};", [("f64", d)], "f32")[defined], right[defined].astype(F32))
    u = np.array(integers(32, False), np.uint32)
    same(kit.apply("cvt.rn.f32.u32 {d}, {a};", [("u32", u)], "f32"),
         np.array([round_fraction(Fraction(x), "f32") for x in u.tolist()], F32))  # fmt: skip
    wide = np.concatenate([f, np.array([2147483520.0, 2147483648.0, -2147483648.0, -2.5, 2.5, -0.9], F32)])
    mine = kit.apply("cvt.rzi.s32.f32 {d}, {a};", [("f32", wide)], "s32")
    expected = [0 if math.isnan(x) else int(max(min(x, 2.0**31 - 1), -(2.0**31))) for x in wide.tolist()]
    assert mine.tolist() == expected


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_half_types(kind: str) -> None:
    f = np.concatenate([FLOATS["f32"], (rng.standard_normal(200) * 10.0 ** rng.integers(-9, 6, 200)).astype(F32),
                        np.array([65504, 65519.996, 65520, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 2.0**-25, 2.0**-24], F32),
    ])  # fmt: skip
    bits = kit.apply(f"cvt.rn.{kind}.f32 {{d}}, {{a}};", [("f32", f)], "b16")

    def value(half: np.ndarray) -> np.ndarray:
        if kind == "f16":
            return half.view(np.float16).astype(F32)
        return (half.astype(np.uint32) << 16).view(F32)

    right, defined = of_fractions(lambda x: x, kind, f)
    same(value(bits)[defined], right[defined].astype(F32))
    assert np.isnan(value(bits)[np.isnan(f)]).all()
    back = kit.apply(f"cvt.f32.{kind} {{d}}, {{a}};", [("b16", bits)], "f32")
    same(back, value(bits))
    both = kit.apply(f"cvt.rn.{kind}x2.f32 {{d}}, {{a}}, {{b}};", [("f32", f), ("f32", f[::-1])], "b32")
    assert (both >> 16).tolist() == bits.tolist()
    assert (both & 0xFFFF).tolist() == bits[::-1].tolist()


def test_tf32_rounds_to_nearest_ties_away() -> None:
    f = FLOATS["f32"][np.isfinite(FLOATS["f32"])]
    f = f[(np.abs(f) < 1e38) & (np.abs(f) > 1e-37)]
    f = np.concatenate([f, np.array([1 + 2.0**-11, -1 - 2.0**-11, 1 + 2.0**-11 - 2.0**-23, 2 - 2.0**-23], F32)])
    mine = kit.apply("cvt.rna.tf32.f32 {d}, {a};", [("f32", f)], "b32").view(F32)
    for x, y in zip(f.tolist(), mine.tolist(), strict=True):
        unit = Fraction(2) ** (math.frexp(x)[1] - 11)
        scaled = abs(Fraction(x)) / unit
        assert abs(Fraction(y)) == math.floor(scaled + Fraction(1, 2)) * unit
        assert (y < 0) == (x < 0)


def test_approximate_root_stays_within_its_error() -> None:
    a = np.abs(rng.standard_normal(500)).astype(F32) * 1000
    a = np.concatenate([a, np.array([0.0, 1e-40, 2.0], F32)])
    mine = kit.apply("sqrt.approx.ftz.f32 {d}, {a};", [("f32", a)], "f32")
    assert mine[-2] == 0, "a subnormal number is flushed"
    exact_root = np.sqrt(a.astype(F64))
    ok = np.abs(mine - exact_root) <= 2.0**-23 * exact_root
    assert ok[:-2].all()


def test_select_and_predicates() -> None:
    a, b = np.arange(64, dtype=np.int32), np.arange(64, dtype=np.int32)[::-1].copy()
    text = "setp.lt.s32 %p1, {a}, {b}; setp.gt.s32 %p3, {a}, 10; and.pred %p4, %p1, %p3; or.pred %p5, %p4, !%p3;"
    mine = kit.apply(text + " selp.b32 {d}, {a}, {b}, %p5;", [("s32", a), ("s32", b)], "s32")
    taken = ((a < b) & (a > 10)) | ~(a > 10)
    assert mine.tolist() == np.where(taken, a, b).tolist()
    mine = kit.apply("mov.pred %p2, -1; @!%p2 add.s32 {a}, {a}, 1; mov.b32 {d}, {a};", [("s32", a)], "s32")
    assert mine.tolist() == a.tolist()


def test_packing() -> None:
    a = np.array([0x1122334455667788, 0xFFEEDDCCBBAA9988], np.uint64)
    mine = kit.apply("mov.b64 {{%r20, %r21}}, {a}; mov.b64 {d}, {{%r21, %r20}};", [("b64", a)], "b64")
    assert mine.tolist() == [((x & 0xFFFFFFFF) << 32) | (x >> 32) for x in a.tolist()]
    b = a.astype(np.uint32)
    mine = kit.apply("mov.b32 {{%h5, %h6}}, {a}; mov.b32 {d}, {{%h6, %h5}};", [("b32", b)], "b32")
    assert mine.tolist() == [((x & 0xFFFF) << 16) | (x >> 16) for x in b.tolist()]


# Warps


def test_shuffles() -> None:
    a = np.arange(100, 164, dtype=np.uint32)
    lanes = np.arange(64)
    for by in (1, 2, 4, 16, 31):
        mine = kit.apply(f"shfl.sync.bfly.b32 {{d}}, {{a}}, {by}, 31, -1;", [("b32", a)], "b32")
        assert mine.tolist() == (100 + (lanes ^ by)).tolist()
    for source in (0, 5, 31):
        mine = kit.apply(f"shfl.sync.idx.b32 {{d}}, {{a}}, {source}, 31, -1;", [("b32", a)], "b32")
        assert mine.tolist() == (100 + lanes // 32 * 32 + source).tolist()
    # Segments of 8 lanes: the mask 0x1800 keeps the upper bits of a lane.
    mine = kit.apply("shfl.sync.idx.b32 {d}, {a}, 3, 6175, -1;", [("b32", a)], "b32")
    assert mine.tolist() == (100 + lanes // 8 * 8 + 3).tolist()
    inside = kit.apply("shfl.sync.bfly.b32 %r9|{p}, {a}, 16, 7, -1;", [("b32", a)], "pred")
    assert inside.tolist() == [int((lane ^ 16) <= 7) for lane in lanes % 32]


@pytest.mark.parametrize(("name", "function"), [("add", sum), ("min", min), ("max", max)])
def test_reductions_of_a_warp(name: str, function: Callable[..., int]) -> None:
    a = rng.integers(-1000, 1000, 64).astype(np.int32)
    mine = kit.apply(f"redux.sync.{name}.s32 {{d}}, {{a}}, -1;", [("s32", a)], "s32")
    assert mine.tolist() == [function(a[i // 32 * 32 :][:32].tolist()) for i in range(64)]


def warp_program(body: str, shared: int = 8192) -> str:
    """Parameter 0 in, parameter 1 out; %q1 and %q2 their addresses, %r0 the thread."""
    return kit.entry("ld.param.u64 %q1, [p0];\nld.param.u64 %q2, [p1];\nmov.u32 %r0, %tid.x;\n" + body, ["u64", "u64"],
                     dynamic=True)  # fmt: skip


@pytest.mark.parametrize("count", [1, 4])
def test_ldmatrix_and_stmatrix(count: int) -> None:
    """Each 8 x 8 matrix of 16-bit elements: lane l holds elements 2 (l % 4) and the next of row l / 4."""
    device = kit.Device()
    halves = rng.integers(0, 65536, (count, 8, 8)).astype(np.uint16)
    source, out = device.array(halves), device.array(np.zeros((32, count), np.uint32), written=False)
    back = device.array(np.zeros((count, 8, 8), np.uint16), written=False)
    registers = ", ".join(f"%r{20 + i}" for i in range(count))
    rows = 8 * count
    ptx = kit.entry(
        f"""
        ld.param.u64 %q1, [p0]; ld.param.u64 %q2, [p1]; ld.param.u64 %q3, [p2];
        mov.u32 %r0, %tid.x; mov.u32 %r1, smem; shl.b32 %r2, %r0, 4; add.s32 %r3, %r1, %r2;
        setp.lt.u32 %p1, %r0, {rows};
        cvt.u64.u32 %q4, %r2; add.s64 %q5, %q1, %q4;
        @%p1 ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%q5];
        @%p1 st.shared.v4.b32 [%r3], {{%r10, %r11, %r12, %r13}};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x{count}.shared.b16 {{{registers}}}, [%r3];
        mul.wide.u32 %q6, %r0, {4 * count}; add.s64 %q6, %q2, %q6;
        """
        + "\n".join(f"st.global.b32 [%q6 + {4 * i}], %r{20 + i};" for i in range(count))
        + f"""
        bar.sync 0;
        add.s32 %r4, %r3, 2048;
        stmatrix.sync.aligned.m8n8.x{count}.shared.b16 [%r4], {{{registers}}};
        bar.sync 0;
        add.s64 %q7, %q3, %q4;
        @%p1 ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r4];
        @%p1 st.global.v4.b32 [%q7], {{%r10, %r11, %r12, %r13}};
        """,
        ["u64"] * 3, dynamic=True,
    )  # fmt: skip
    device.launch(ptx, [source, out, back], shared_bytes=4096)
    for lane, matrix in itertools.product(range(32), range(count)):
        low, high = halves[matrix, lane // 4, 2 * (lane % 4) :][:2].tolist()
        assert out[lane, matrix] == low | (high << 16)
    assert (back == halves).all()


def test_mma_f64() -> None:
    """C [8, 8] += A [8, 4] B [4, 8]; integers, so that every order of the sum is exact."""
    device = kit.Device()
    a, b, c = (rng.integers(-50, 50, s).astype(F64) for s in ((8, 4), (4, 8), (8, 8)))
    arrays = [device.array(x) for x in (a, b, c)]
    out = device.array(np.zeros((8, 8)), written=False)
    ptx = kit.entry(
        """
        mov.u32 %r0, %tid.x; shr.u32 %r1, %r0, 2; and.b32 %r2, %r0, 3;
        ld.param.u64 %q1, [p0]; ld.param.u64 %q2, [p1]; ld.param.u64 %q3, [p2]; ld.param.u64 %q4, [p3];
        mad.lo.s32 %r3, %r1, 4, %r2; mad.wide.s32 %q5, %r3, 8, %q1; ld.global.f64 %d1, [%q5];
        mad.lo.s32 %r3, %r2, 8, %r1; mad.wide.s32 %q5, %r3, 8, %q2; ld.global.f64 %d2, [%q5];
        shl.b32 %r4, %r2, 1; mad.lo.s32 %r3, %r1, 8, %r4; mad.wide.s32 %q6, %r3, 8, %q3;
        ld.global.v2.f64 {%d3, %d4}, [%q6];
        mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%d5, %d6}, {%d1}, {%d2}, {%d3, %d4};
        mad.wide.s32 %q7, %r3, 8, %q4; st.global.v2.f64 [%q7], {%d5, %d6};
        """,
        ["u64"] * 4,
    )
    device.launch(ptx, [*arrays, out])
    assert (out == a @ b + c).all()


def test_mma_tf32() -> None:
    """C [16, 8] += A [16, 8] B [8, 8]. The ISA: a0 at (l / 4, l % 4), a1 8 rows below, a2 4 columns on, a3 both."""
    device = kit.Device()
    a, b, c = (rng.integers(-50, 50, s).astype(F32) for s in ((16, 8), (8, 8), (16, 8)))
    lanes = np.arange(32)
    row, column = lanes // 4, lanes % 4
    fragments = np.stack([
        a[row, column], a[row + 8, column], a[row, column + 4], a[row + 8, column + 4],
        b[column, row], b[column + 4, row],
        c[row, 2 * column], c[row, 2 * column + 1], c[row + 8, 2 * column], c[row + 8, 2 * column + 1],
    ], axis=1)  # fmt: skip
    # The lower 13 bits of an operand are ignored.
    noisy = fragments.copy()
    noisy[:, :6] = (fragments[:, :6].view(np.uint32) | 0x1FFF).view(F32)
    source, out = device.array(noisy), device.array(np.zeros((32, 4), F32), written=False)
    loads = "\n".join(f"ld.global.f32 %f{i}, [%q3 + {4 * i}];" for i in range(10))
    ptx = warp_program(
        f"""
        mul.wide.u32 %q3, %r0, 40; add.s64 %q3, %q1, %q3;
        {loads}
        mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {{%f20, %f21, %f22, %f23}},
            {{%f0, %f1, %f2, %f3}}, {{%f4, %f5}}, {{%f6, %f7, %f8, %f9}};
        mul.wide.u32 %q4, %r0, 16; add.s64 %q4, %q2, %q4;
        st.global.v4.f32 [%q4], {{%f20, %f21, %f22, %f23}};
        """
    )
    device.launch(ptx, [source, out])
    product = a @ b + c
    assert (out[:, 0] == product[row, 2 * column]).all()
    assert (out[:, 1] == product[row, 2 * column + 1]).all()
    assert (out[:, 2] == product[row + 8, 2 * column]).all()
    assert (out[:, 3] == product[row + 8, 2 * column + 1]).all()


def test_asynchronous_copies_arrive_with_their_group() -> None:
    device = kit.Device()
    source, out = device.array(np.arange(128, dtype=np.uint32)), device.array(np.zeros(128, np.uint32), written=False)
    ptx = warp_program(
        """
        mov.u32 %r1, smem; shl.b32 %r2, %r0, 4; add.s32 %r3, %r1, %r2; cvt.u64.u32 %q3, %r2;
        add.s64 %q4, %q1, %q3; add.s64 %q5, %q2, %q3;
        setp.lt.u32 %p1, %r0, 16; selp.b32 %r4, 16, 0, %p1;
        cp.async.cg.shared.global [%r3 + 0], [%q4 + 0], 0x10, %r4;
        cp.async.commit_group;
        cp.async.wait_group 0;
        ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r3];
        st.global.v4.b32 [%q5], {%r10, %r11, %r12, %r13};
        """
    )
    device.launch(ptx, [source, out], shared_bytes=512)
    # A copy of 0 of 16 bytes fills with zeros.
    assert out.tolist() == [i if i < 64 else 0 for i in range(128)]


# Control flow and the grid


def test_divergent_loops_meet_again() -> None:
    a = np.arange(64, dtype=np.uint32)
    text = """
    mov.u32 %r20, 0; mov.u32 %r21, {a};
    $loop: setp.eq.u32 %p1, %r21, 0; @%p1 bra $end;
    add.u32 %r20, %r20, %r21; sub.u32 %r21, %r21, 1; bra.uni $loop;
    $end: shfl.sync.bfly.b32 %r22, %r20, 1, 31, -1; mov.b32 {d}, %r22;
    """
    mine = kit.apply(text, [("u32", a)], "u32")
    other = np.arange(64) ^ 1
    assert mine.tolist() == (other * (other + 1) // 2).tolist()


def test_a_barrier_reduction_asks_all_threads() -> None:
    device = kit.Device()
    out = device.array(np.zeros(128, np.uint32), written=False)
    ptx = kit.entry(
        """
        ld.param.u64 %q1, [p0]; mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x;
        setp.eq.u32 %p1, %r0, 37; setp.eq.u32 %p2, %r1, 1; and.pred %p1, %p1, %p2;
        bar.red.or.pred %p3, 0, %p1;
        selp.b32 %r2, 1, 0, %p3; mad.lo.s32 %r3, %r1, 64, %r0; mad.wide.u32 %q2, %r3, 4, %q1; st.global.b32 [%q2], %r2;
        """,
        ["u64"],
    )
    device.launch(ptx, [out], grid=2, threads=64)
    assert out.tolist() == [0] * 64 + [1] * 64


def test_parameters_are_laid_out_by_alignment() -> None:
    device = kit.Device()
    out = device.array(np.zeros(2, np.float64), written=False)
    ptx = kit.entry(
        """
        ld.param.u64 %q1, [p0]; ld.param.u32 %r1, [p1]; ld.param.f64 %d1, [p2];
        cvt.rn.f32.u32 %f1, %r1; cvt.f64.f32 %d2, %f1; mov.u32 %r0, %tid.x; setp.eq.u32 %p1, %r0, 0;
        @%p1 st.global.v2.f64 [%q1], {%d1, %d2};
        """,
        ["u64", "u32", "f64"],
    )
    device.launch(ptx, [out, np.uint32(7), np.float64(0.25)])
    assert out.tolist() == [0.25, 7.0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("lop3.b32 %r1, %r2, %r3, %r4, 0x96;", "Unsupported instruction: lop3"),
        ("add.rz.f32 %f1, %f2, %f3;", "Unsupported instruction: add.rz.f32"),
        ("bar.sync 1, 64;", "a barrier of a part of a block"),
        (
            "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f0, %f1, %f2, %f3}, %q1, %q2, 1, 1, 1, 0, 0;",
            "Unsupported",
        ),
        ("ld.local.b32 %r1, [%q1];", "Unsupported instruction: ld.local.b32"),
        ("div.full.f32 %f1, %f2, %f3;", "Unsupported instruction: div.full.f32"),
        ("rcp.approx.ftz.f32 %f1, %f2;", "Unsupported instruction: rcp.approx"),
        ("ex2.approx.f32 %f1, %f2;", "Unsupported instruction: ex2.approx"),
        ("st.volatile.global.u32 [%q1], %r1;", "Unsupported instruction: st.volatile"),
        ("atom.global.max.u32 %r1, [%q1], 1;", "Unsupported instruction: atom.global.max"),
        ("atom.acquire.gpu.or.b32 %r1, [%q1], 1;", "Unsupported instruction: atom.acquire"),
    ],
)
def test_unknown_instructions_are_refused(body: str, message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        kit.Device().launch(kit.entry(body, []), [])


def test_registers_of_an_inner_scope_are_others() -> None:
    """As in inline assembly: what is declared between braces hides the register of the same name."""
    device = kit.Device()
    out = device.array(np.zeros(3, np.uint32), written=False)
    body = """
    ld.param.u64 %q1, [p0]; mov.u32 %r1, 10; mov.u32 %r2, 20;
    { .reg .b32 %r1; mov.u32 %r1, 5; { .reg .b32 %r<3>; mov.u32 %r1, 7; mov.u32 %r2, 8; }
      st.global.b32 [%q1+8], %r1; }
    st.global.b32 [%q1], %r1; st.global.b32 [%q1+4], %r2;
    """
    device.launch(kit.entry(body, ["u64"]), [out], threads=1)
    assert out.tolist() == [10, 20, 5]


def test_a_module_of_several_kernels() -> None:
    first, second = kit.entry("mov.u32 %r1, 1;", [], name="one"), kit.entry("", [], name="two")
    kernels = parse(first + second.removeprefix(kit.HEAD))
    assert {k: len(v.body) for k, v in kernels.items()} == {"one": 2, "two": 1}


def test_lines_of_source_are_reported() -> None:
    text = '.file 1 "/somewhere/kernel.py"\n'
    text += kit.entry(".loc 1 7 3\n.loc 1 9 0, function_name $x, inlined_at 1 30 4\n"
                                                          "st.global.b32 [0], 1;", [])  # fmt: skip
    with pytest.raises(Finding, match=r"kernel.py:9 \(inlined at kernel.py:30\)\n  block 0, thread 0"):
        kit.Device().launch(text, [])
