"""The table of instructions: opcode -> a function that compiles an instruction to a closure run(execution, mask).

A register of a launch is one array with an element per thread of the blocks that run together, or of one element where
all have the same value. `mask` is None for all threads, or bool [threads].

Tensor cores: the products of a step (k = 4 or 8) and the accumulator are added in float64 and rounded once to float32,
toward zero, where real ones align and truncate; float64 ones are a chain of fused multiply-adds from k = 0 on. The ISA
leaves the order of both open.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from . import arithmetic as ar
from .arithmetic import F32, F64, S32, S64, U16, U32, U64
from .memory import Finding
from .parse import BYTES, Address, Immediate, Instruction, Kernel, Pair, Register, Symbol, Unsupported, Vector, constant

Run = Callable[[Any, Any], None]
NUMPY = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": U16, "u16": U16, "s16": np.int16, "f16": np.float16,
    "bf16": U16, "b32": U32, "u32": U32, "s32": S32, "f32": F32, "b64": U64, "u64": U64, "s64": S64, "f64": F64,
    "pred": np.bool_, "f16x2": U32, "bf16x2": U32, "tf32": U32,
}  # fmt: skip
STORED = {1: np.uint8, 2: U16, 4: U32, 8: U64}

TABLE: dict[str, Callable[["Compiler", Instruction], Run]] = {}


def instruction(*names: str):
    def register(function):
        for name in names:
            TABLE[name] = function
        return function

    return register


class Compiler:
    """Compiles the instructions of one kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.index: dict[str, int] = {}
        self.types: list[Any] = []
        self.shared: dict[str, int] = {}  # variable -> address
        self.parameters: dict[str, int] = {}  # parameter -> address in parameter space
        end = 0
        for name, _, size in kernel.parameters:
            end += -end % min(16, size & -size)
            self.parameters[name] = end
            end += size
        self.parameter_bytes = end
        self.widths = {4}

    def register(self, operand: Register) -> int:
        if operand.name not in self.index:
            self.index[operand.name] = len(self.types)
            kind = self.kernel.type_of(operand.name)
            self.types.append(np.bool_ if kind == "pred" else STORED[BYTES[kind]])
        return self.index[operand.name]

    def reader(self, operand: Any, dtype: Any) -> Callable[[Any], np.ndarray]:
        """A function of the execution that gives the operand as an array of a dtype."""
        if isinstance(operand, Register):
            i = self.register(operand)
            stored = np.dtype(self.types[i])
            wanted = np.dtype(dtype)
            if stored == np.bool_:
                return (lambda ex: ~ex.get(i)) if operand.negated else (lambda ex: ex.get(i))
            if stored.itemsize == wanted.itemsize:
                if stored == wanted:
                    return lambda ex: ex.get(i)
                return lambda ex: ex.get(i).view(dtype)
            if wanted.itemsize < stored.itemsize:
                return lambda ex: ex.get(i).astype(STORED[wanted.itemsize]).view(dtype)
            raise Unsupported(f"register {operand.name} is narrower than {wanted}")
        if isinstance(operand, Immediate):
            value = np.array([operand.value != 0]) if dtype is np.bool_ else constant(operand, dtype)
            return lambda ex: value
        if isinstance(operand, Symbol):
            name = operand.name
            if name.startswith("%"):
                return lambda ex: ex.special(name).astype(dtype)
            if name in self.shared or name in self.parameters:
                value = np.array([self.shared.get(name, self.parameters.get(name))], np.uint64).astype(dtype)
                return lambda ex: value
        raise Unsupported(f"operand {operand}")

    def writer(self, operand: Any, dtype: Any) -> Callable[[Any, np.ndarray, Any], None]:
        if not isinstance(operand, Register):
            if isinstance(operand, Symbol) and operand.name == "_":
                return lambda ex, value, m: None
            raise Unsupported(f"destination {operand}")
        i = self.register(operand)
        stored, given = np.dtype(self.types[i]), np.dtype(dtype)
        if stored == given or stored == np.bool_:
            return lambda ex, value, m: ex.put(i, value, m)
        if stored.itemsize == given.itemsize:
            return lambda ex, value, m: ex.put(i, value.view(stored), m)
        if stored.itemsize < given.itemsize:
            raise Unsupported(f"register {operand.name} is narrower than {given}")
        wide = np.dtype(f"{'i' if given.kind == 'i' else 'u'}{stored.itemsize}")
        bits = given if given.kind in "iu" else np.dtype(f"u{given.itemsize}")
        return lambda ex, value, m: ex.put(i, value.view(bits).astype(wide).view(stored), m)

    def address(self, operand: Address, dtype: Any) -> Callable[[Any], np.ndarray]:
        base = self.reader(operand.base, dtype)
        if not operand.offset:
            return base
        offset = np.array([operand.offset & ((1 << 8 * np.dtype(dtype).itemsize) - 1)], dtype)
        return lambda ex: base(ex) + offset

    def compile(self, ins: Instruction) -> Run:
        build = TABLE.get(ins.parts[0])
        if build is None:
            raise Unsupported(f"Unsupported instruction: {ins.text}")
        run = build(self, ins)
        if ins.predicate is None:
            return run
        guard = self.reader(ins.predicate, np.bool_)

        def guarded(ex, m):
            m = ex.narrowed(m, guard(ex))
            if m is None or m.any():
                run(ex, m)

        return guarded


def elementwise(c: Compiler, ins: Instruction, inputs: list[Any], output: Any, function: Callable[..., Any]) -> Run:
    write = c.writer(ins.operands[0], output)
    reads = [c.reader(o, t) for o, t in zip(ins.operands[1:], inputs, strict=True)]
    if len(reads) == 1:
        (a,) = reads
        return lambda ex, m: write(ex, function(a(ex)), m)
    if len(reads) == 2:
        a, b = reads
        return lambda ex, m: write(ex, function(a(ex), b(ex)), m)
    a, b, d = reads
    return lambda ex, m: write(ex, function(a(ex), b(ex), d(ex)), m)


def check_modifiers(ins: Instruction, known: set[str]) -> None:
    unknown = [p for p in ins.parts[1:-1] if p not in known]
    if unknown:
        raise Unsupported(f"Unsupported instruction: {ins.text} (.{unknown[0]})")


def simple(arity: int, function: Callable[..., Any], modifiers: str = "rn ftz"):
    def build(c: Compiler, ins: Instruction) -> Run:
        check_modifiers(ins, set(modifiers.split()))
        t = NUMPY[ins.parts[-1]]
        f = function
        if "ftz" in ins.parts:

            def f(*xs):
                return ar.flush32(function(*map(ar.flush32, xs)))

        return elementwise(c, ins, [t] * arity, t, f)

    return build


def absolute(a):
    if a.dtype == F32:
        return (a.view(U32) & U32(0x7FFFFFFF)).view(F32)
    return np.abs(a)


def choose(of_float, of_integer):
    return lambda a, b: of_float(a, b) if a.dtype.kind == "f" else of_integer(a, b)


TABLE.update(
    add=simple(2, lambda a, b: a + b),
    sub=simple(2, lambda a, b: a - b),
    abs=simple(1, absolute),
    neg=simple(1, lambda a: -a),
    min=simple(2, choose(ar.minimum, np.minimum)),
    max=simple(2, choose(ar.maximum, np.maximum)),
    rem=simple(2, lambda a, b: a - b * ar.divide_integers(a, b)),
)
TABLE["not"] = simple(1, lambda a: ~a)
TABLE["and"] = simple(2, lambda a, b: a & b)
TABLE["or"] = simple(2, lambda a, b: a | b)
TABLE["xor"] = simple(2, lambda a, b: a ^ b)


@instruction("div")
def _div(c: Compiler, ins: Instruction) -> Run:
    t = NUMPY[ins.parts[-1]]
    if np.dtype(t).kind == "f":
        check_modifiers(ins, {"rn"})
        return elementwise(c, ins, [t, t], t, lambda a, b: a / b)
    return elementwise(c, ins, [t, t], t, ar.divide_integers)


@instruction("rcp", "sqrt")
def _root(c: Compiler, ins: Instruction) -> Run:
    t = NUMPY[ins.parts[-1]]
    f = np.sqrt if ins.parts[0] == "sqrt" else (lambda a: t(1) / a)
    if ins.parts[1:-1] == ["rn"]:
        return elementwise(c, ins, [t], t, f)
    if ins.opcode == "sqrt.approx.ftz.f32":
        write, read = c.writer(ins.operands[0], F32), c.reader(ins.operands[1], F32)

        def run(ex, m):
            # The maximum relative error is 2^-23; the launch says where in that interval results lie.
            root = np.sqrt(ar.flush32(read(ex)).astype(F64)) * (1.0 + ex.approximation * 2.0**-23)
            exact = ex.approximation == 0
            write(ex, ar.flush32(root.astype(F32) if exact else ar.toward_zero32(root)), m)

        return run
    raise Unsupported(f"Unsupported instruction: {ins.text}")


@instruction("mul", "mad")
def _mul(c: Compiler, ins: Instruction) -> Run:
    name = ins.parts[-1]
    t = NUMPY[name]
    if np.dtype(t).kind == "f":
        return simple(2, lambda a, b: a * b)(c, ins)
    if "wide" in ins.parts:
        wide = {"s32": S64, "u32": U64, "s16": S32, "u16": U32}[name]
        if ins.parts[0] == "mul":
            return elementwise(c, ins, [t, t], wide, lambda a, b: a.astype(wide) * b.astype(wide))
        return elementwise(c, ins, [t, t, wide], wide, lambda a, b, d: a.astype(wide) * b.astype(wide) + d)
    if "lo" in ins.parts:
        if ins.parts[0] == "mul":
            return elementwise(c, ins, [t, t], t, lambda a, b: a * b)
        return elementwise(c, ins, [t, t, t], t, lambda a, b, d: a * b + d)
    if "hi" in ins.parts and name in ("s32", "u32") and ins.parts[0] == "mul":
        wide = S64 if name == "s32" else U64
        return elementwise(c, ins, [t, t], t, lambda a, b: ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(t))
    raise Unsupported(f"Unsupported instruction: {ins.text}")


@instruction("fma")
def _fma(c: Compiler, ins: Instruction) -> Run:
    if ins.opcode not in ("fma.rn.f32", "fma.rn.f64"):
        raise Unsupported(f"Unsupported instruction: {ins.text}")
    t = NUMPY[ins.parts[-1]]
    return elementwise(c, ins, [t] * 3, t, ar.fma32 if t is F32 else ar.fma64)


@instruction("shl", "shr")
def _shift(c: Compiler, ins: Instruction) -> Run:
    t = NUMPY[ins.parts[-1]]
    return elementwise(c, ins, [t, U32], t, ar.shift_left if ins.parts[0] == "shl" else ar.shift_right)


@instruction("clz", "popc")
def _count_bits(c: Compiler, ins: Instruction) -> Run:
    check_modifiers(ins, set())
    t = NUMPY[ins.parts[-1]]
    return elementwise(c, ins, [t], U32, ar.leading_zeros if ins.parts[0] == "clz" else ar.set_bits)


@instruction("bfe")
def _bfe(c: Compiler, ins: Instruction) -> Run:
    t = NUMPY[ins.parts[-1]]
    return elementwise(c, ins, [t, U32, U32], t, ar.extract_bits)


@instruction("bfi")
def _bfi(c: Compiler, ins: Instruction) -> Run:
    t = NUMPY[ins.parts[-1]]
    write = c.writer(ins.operands[0], t)
    a, b, p, n = (c.reader(o, k) for o, k in zip(ins.operands[1:], (t, t, U32, U32), strict=True))
    return lambda ex, m: write(ex, ar.insert_bits(a(ex), b(ex), p(ex), n(ex)), m)


@instruction("prmt")
def _prmt(c: Compiler, ins: Instruction) -> Run:
    if ins.opcode != "prmt.b32":
        raise Unsupported(f"Unsupported instruction: {ins.text}")
    return elementwise(c, ins, [U32] * 3, U32, ar.permute_bytes)


@instruction("selp")
def _selp(c: Compiler, ins: Instruction) -> Run:
    t = NUMPY[ins.parts[-1]]
    t = STORED[np.dtype(t).itemsize]
    return elementwise(c, ins, [t, t, np.bool_], t, lambda a, b, p: np.where(p, a, b))


def _unordered(a, b):
    return np.isnan(a) | np.isnan(b)


COMPARE = {
    "eq": lambda a, b: a == b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    "ne": lambda a, b: (a != b) if a.dtype.kind != "f" else (a != b) & ~_unordered(a, b),
    "equ": lambda a, b: (a == b) | _unordered(a, b), "neu": lambda a, b: a != b,
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b), "num": lambda a, b: ~_unordered(a, b), "nan": _unordered,
    "lo": lambda a, b: a < b, "ls": lambda a, b: a <= b, "hi": lambda a, b: a > b, "hs": lambda a, b: a >= b,
}  # fmt: skip
LOGIC = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@instruction("setp")
def _setp(c: Compiler, ins: Instruction) -> Run:
    t, compare = NUMPY[ins.parts[-1]], COMPARE[ins.parts[1]]
    if len(ins.parts) == 3:
        return elementwise(c, ins, [t, t], np.bool_, compare)
    if len(ins.parts) == 4 and ins.parts[2] in LOGIC:
        logic = LOGIC[ins.parts[2]]
        return elementwise(c, ins, [t, t, np.bool_], np.bool_, lambda a, b, p: logic(compare(a, b), p))
    raise Unsupported(f"Unsupported instruction: {ins.text}")


@instruction("mov")
def _mov(c: Compiler, ins: Instruction) -> Run:
    t = NUMPY[ins.parts[-1]]
    t = t if t is np.bool_ else STORED[np.dtype(t).itemsize]
    target, source = ins.operands
    if isinstance(target, Vector):
        part = STORED[np.dtype(t).itemsize // len(target.items)]
        read, writes = c.reader(source, t), [c.writer(o, part) for o in target.items]
        bits = 8 * np.dtype(part).itemsize

        def unpack(ex, m):
            value = read(ex)
            for i, write in enumerate(writes):
                write(ex, (value >> t(bits * i)).astype(part), m)

        return unpack
    if isinstance(source, Vector):
        part = STORED[np.dtype(t).itemsize // len(source.items)]
        reads, write = [c.reader(o, part) for o in source.items], c.writer(target, t)
        bits = 8 * np.dtype(part).itemsize

        def pack(ex, m):
            value = reads[0](ex).astype(t)
            for i, read in enumerate(reads[1:], 1):
                value = value | (read(ex).astype(t) << t(bits * i))
            write(ex, value, m)

        return pack
    return elementwise(c, ins, [t], t, lambda a: a)


@instruction("cvta")
def _cvta(c: Compiler, ins: Instruction) -> Run:
    if ins.parts[1:-1] not in (["to", "global"], ["global"]):
        raise Unsupported(f"Unsupported instruction: {ins.text}")
    return elementwise(c, ins, [U64], U64, lambda a: a)


@instruction("cvt")
def _cvt(c: Compiler, ins: Instruction) -> Run:
    *modifiers, to, source = ins.parts[1:]
    rounding = [p for p in modifiers if p != "ftz"]
    if "ftz" in modifiers or (rounding and rounding not in (["rn"], ["rzi"], ["rna"])):
        raise Unsupported(f"Unsupported instruction: {ins.text}")
    a, b = NUMPY[source], NUMPY[to]
    if to in ("f16x2", "bf16x2") and source == "f32":
        half = ar.to_f16 if to == "f16x2" else ar.to_bf16
        return elementwise(c, ins, [F32, F32], U32, lambda x, y: (half(x).astype(U32) << U32(16)) | half(y).astype(U32))
    if to == "tf32":
        return elementwise(c, ins, [F32], U32, ar.to_tf32_rna)
    if to == "bf16" and source == "f32":
        return elementwise(c, ins, [F32], U16, ar.to_bf16)
    if source == "bf16" and to == "f32":
        return elementwise(c, ins, [U16], F32, ar.from_bf16)
    if to == "f16" and source == "f32":
        return elementwise(c, ins, [F32], U16, ar.to_f16)
    if "bf16" in (to, source):
        raise Unsupported(f"Unsupported instruction: {ins.text}")
    if np.dtype(a).kind == "f" and np.dtype(b).kind != "f":
        if rounding != ["rzi"]:
            raise Unsupported(f"Unsupported instruction: {ins.text}")
        low, high = np.iinfo(b).min, np.iinfo(b).max

        def to_integer(x):
            wide = np.nan_to_num(np.trunc(x.astype(F64)), nan=0.0, posinf=np.inf, neginf=-np.inf)
            inside = (wide >= low) & (wide < float(high) + 1)
            return np.where(inside, np.where(inside, wide, 0).astype(b), np.where(wide > 0, b(high), b(low)))

        return elementwise(c, ins, [a], b, to_integer)
    return elementwise(c, ins, [a], b, lambda x: x.astype(b))


# Memory


def _vector(operand: Any) -> tuple[Any, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


@instruction("ld")
def _ld(c: Compiler, ins: Instruction) -> Run:
    parts = ins.parts[1:]
    kind = parts[-1]
    t, size = NUMPY[kind], BYTES[kind]
    targets = _vector(ins.operands[0])
    place = ins.operands[1]
    # A volatile load orders nothing: here it is a plain one, so that it has to be ordered by barriers as well.
    unknown = set(parts[:-1]) - {"param", "global", "shared", "acquire", "gpu", "v2", "v4", "nc", "volatile"}
    if unknown:
        raise Unsupported(f"Unsupported instruction: {ins.text}")
    # Without a space an address is a generic one; those of global memory are the same in both.
    space = next((p for p in parts if p in ("param", "global", "shared")), "global")
    bits = STORED[size] if np.dtype(t).kind == "f" else t
    writes = [c.writer(o, bits) for o in targets]
    width = size * len(targets)
    address = c.address(place, U64 if space != "shared" else U32)
    unsigned = STORED[size]

    if space == "param":

        def load_parameter(ex, m):
            rows = ex.parameter(address(ex), width).view(unsigned).view(bits)
            for i, write in enumerate(writes):
                write(ex, rows[:, i].copy(), m)

        return load_parameter
    acquire = "acquire" in parts
    if space == "shared":
        c.widths.add(min(width, size))
        c.widths.add(size)

    def load(ex, m):
        lanes, rows = ex.load(space, address(ex), m, width, acquire)
        columns = rows.view(unsigned).view(bits).reshape(-1, len(writes))
        for i, write in enumerate(writes):
            write(ex, ex.spread(lanes, columns[:, i]), m)

    return load


@instruction("st")
def _st(c: Compiler, ins: Instruction) -> Run:
    parts = ["shared" if p == "shared::cta" else p for p in ins.parts[1:]]
    kind = parts[-1]
    unsigned, size = STORED[BYTES[kind]], BYTES[kind]
    sources = _vector(ins.operands[1])
    if set(parts[:-1]) - {"global", "shared", "v2", "v4"}:
        raise Unsupported(f"Unsupported instruction: {ins.text}")
    # As for loads: a generic address is one of global memory.
    space = "shared" if "shared" in parts else "global"
    reads = [c.reader(o, unsigned) for o in sources]
    width = size * len(sources)
    address = c.address(ins.operands[0], U64 if space == "global" else U32)
    if space == "shared":
        c.widths.add(size)
    return lambda ex, m: ex.store(space, address(ex), m, width, [read(ex) for read in reads])


@instruction("atom")
def _atom(c: Compiler, ins: Instruction) -> Run:
    write, address = c.writer(ins.operands[0], U32), c.address(ins.operands[1], U64)
    value = c.reader(ins.operands[2], U32)
    # Of the device; without .release or .acq_rel an operation orders nothing.
    (function,) = [f for name, f in (("add", np.add), ("or", np.bitwise_or)) if name in ins.parts] or [None]
    known = {"add", "or", "b32", "u32", "global", "gpu", "relaxed", "release", "acq_rel"}
    if function is None or not known.issuperset(ins.parts[1:]):
        raise Unsupported(f"Unsupported instruction: {ins.text}")
    acquire = "acq_rel" in ins.parts
    release = acquire or "release" in ins.parts
    return lambda ex, m: write(
        ex, ex.atomic(address(ex), m, value(ex), function, release=release, acquire=acquire), m
    )  # fmt: skip


@instruction("red")
def _red(c: Compiler, ins: Instruction) -> Run:
    """An atomic addition whose old value nobody reads."""
    address, value = c.address(ins.operands[0], U64), c.reader(ins.operands[1], U32)
    if set(ins.parts[1:]) != {"global", "gpu", "relaxed", "add", "u32"}:
        raise Unsupported(f"Unsupported instruction: {ins.text}")

    def run(ex: Any, m: Any) -> None:
        ex.atomic(address(ex), m, value(ex), np.add, release=False, acquire=False)

    return run


@instruction("cp")
def _cp(c: Compiler, ins: Instruction) -> Run:
    if ins.opcode == "cp.async.commit_group":
        return lambda ex, m: ex.commit_copies(m)
    if ins.opcode == "cp.async.wait_group":
        count = ins.operands[0].value
        return lambda ex, m: ex.wait_copies(m, count)
    if ins.opcode == "cp.async.wait_all":
        return lambda ex, m: ex.wait_copies(m, -1)
    if ins.opcode not in ("cp.async.cg.shared.global", "cp.async.ca.shared.global"):
        raise Unsupported(f"Unsupported instruction: {ins.text}")
    to, source, size = ins.operands[:3]
    c.widths.add(min(4, size.value))
    copied = c.reader(ins.operands[3] if len(ins.operands) > 3 else size, U32)
    target, origin, width = c.address(to, U32), c.address(source, U64), size.value
    return lambda ex, m: ex.copy_async(target(ex), origin(ex), m, width, copied(ex))


# Warps


@instruction("shfl")
def _shfl(c: Compiler, ins: Instruction) -> Run:
    mode = ins.parts[2]
    if ins.parts[1] != "sync" or mode not in ("bfly", "idx", "up", "down"):
        raise Unsupported(f"Unsupported instruction: {ins.text}")
    target = ins.operands[0]
    inside = c.writer(target.second, np.bool_) if isinstance(target, Pair) else None
    write = c.writer(target.first if isinstance(target, Pair) else target, U32)
    a, b, clamp, members = (c.reader(o, U32) for o in ins.operands[1:])

    def run(ex, m):
        value, by, limit = ex.wide(a(ex)), b(ex).astype(S32) & 31, clamp(ex).astype(S32)
        lane = ex.lane
        segment, last = (limit >> 8) & 31, limit & 31
        highest = (lane & segment) | (last & ~segment)
        lowest = lane & segment
        if mode == "bfly":
            source, ok = lane ^ by, (lane ^ by) <= highest
        elif mode == "idx":
            source = lowest | (by & ~segment)
            ok = source <= highest
        elif mode == "up":
            source, ok = lane - by, lane - by >= highest
        else:
            source, ok = lane + by, lane + by <= highest
        source = np.where(ok, source, lane)
        from_ = ex.first_of_warp + source
        ex.check_members(m, members(ex), from_)
        write(ex, value[from_], m)
        if inside is not None:
            inside(ex, ok, m)

    return run


@instruction("redux")
def _redux(c: Compiler, ins: Instruction) -> Run:
    name, kind = ins.parts[2:]
    if name not in ("add", "min", "max", "and", "or", "xor"):
        raise Unsupported(f"Unsupported instruction: {ins.text}")
    t = NUMPY[kind]
    write, a, members = c.writer(ins.operands[0], t), c.reader(ins.operands[1], t), c.reader(ins.operands[2], U32)
    function = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
                "xor": np.bitwise_xor}[name]  # fmt: skip

    def run(ex, m):
        ex.check_members(m, members(ex))
        value = ex.wide(a(ex)).reshape(-1, 32)
        member = ((ex.wide(members(ex)) >> ex.lane.astype(U32)) & U32(1)).astype(bool).reshape(-1, 32)
        if member.all():
            reduced = function.reduce(value, axis=1, dtype=t)
        else:
            neutral = {"add": 0, "or": 0, "xor": 0, "and": -1}.get(name)
            if neutral is None:
                neutral = np.iinfo(t).max if name == "min" else np.iinfo(t).min
            reduced = function.reduce(np.where(member, value, np.array(neutral).astype(t)), axis=1, dtype=t)
        write(ex, np.repeat(reduced.astype(t), 32), m)

    return run


@instruction("bar", "barrier")
def _bar(c: Compiler, ins: Instruction) -> Run:
    if ins.opcode == "bar.warp.sync":
        members = c.reader(ins.operands[0], U32)
        return lambda ex, m: ex.warp_barrier(m, members(ex))
    raise Unsupported(f"Unsupported instruction: {ins.text}")


@instruction("fence")
def _fence(c: Compiler, ins: Instruction) -> Run:
    if ins.opcode == "fence.proxy.async.shared::cta" or ins.opcode == "fence.proxy.async":
        return lambda ex, m: ex.proxy_fence(m)
    raise Unsupported(f"Unsupported instruction: {ins.text}")


@instruction("ldmatrix", "stmatrix")
def _matrix(c: Compiler, ins: Instruction) -> Run:
    count = {"x1": 1, "x2": 2, "x4": 4}[ins.parts[4]]
    if ins.parts[1:4] != ["sync", "aligned", "m8n8"] or ins.parts[5:] != ["shared", "b16"]:
        raise Unsupported(f"Unsupported instruction: {ins.text}")
    is_load = ins.parts[0] == "ldmatrix"
    registers, place = ins.operands if is_load else ins.operands[::-1]
    address = c.address(place, U32)
    quads = [c.writer(o, U32) if is_load else c.reader(o, U32) for o in registers.items]
    c.widths.add(4)

    def run(ex, m):
        ex.check_whole_warps(m)
        lane = np.arange(32)
        rows = ex.wide(address(ex)).reshape(-1, 32)
        if ((rows[:, : 8 * count] & U32(15)) != 0).any():
            warp = int(np.argmax((rows[:, : 8 * count] & U32(15)).any(axis=1)))
            ex.fail("misaligned", "a row of a matrix is not at a multiple of 16 bytes", warp * 32)
        for i, quad in enumerate(quads):
            # Lane 8 i + j holds the address of row j of matrix i; lane l gets or gives its word l % 4 of row l / 4.
            words = (rows[:, 8 * i + lane // 4] + (4 * (lane % 4)).astype(U32)).reshape(-1)
            if is_load:
                lanes, found = ex.load("shared", words, m, 4, False, "matrix")
                quad(ex, ex.spread(lanes, found.view(U32).reshape(-1)), m)
            else:
                ex.store("shared", words, m, 4, [quad(ex)], "matrix")

    return run


@instruction("mma")
def _mma(c: Compiler, ins: Instruction) -> Run:
    d, a, b, acc = ins.operands
    lane = np.arange(32)
    group, place = lane // 4, lane % 4
    if ins.opcode == "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64":
        writes = [c.writer(o, F64) for o in d.items]
        (ra,), (rb,) = ([c.reader(o, F64) for o in v.items] for v in (a, b))
        rc = [c.reader(o, F64) for o in acc.items]

        def run64(ex, m):
            ex.check_whole_warps(m)
            x = ex.wide(ra(ex)).reshape(-1, 8, 4)  # [row, k]
            y = ex.wide(rb(ex)).reshape(-1, 8, 4)  # [column, k]
            total = np.stack([ex.wide(r(ex)).reshape(-1, 8, 4) for r in rc], axis=3).reshape(-1, 8, 8)
            for k in range(4):
                p, q = np.broadcast_arrays(x[:, :, None, k], y[:, None, :, k])
                total = ar.fma64(p.reshape(-1), q.reshape(-1), total.reshape(-1)).reshape(-1, 8, 8)
            pairs = total.reshape(-1, 8, 4, 2)
            for i, write in enumerate(writes):
                write(ex, np.ascontiguousarray(pairs[..., i]).reshape(-1), m)

        return run64
    if ins.opcode == "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32":
        writes = [c.writer(o, F32) for o in d.items]
        ra, rb = ([c.reader(o, U32) for o in v.items] for v in (a, b))
        rc = [c.reader(o, F32) for o in acc.items]

        def run32(ex, m):
            ex.check_whole_warps(m)
            warps = ex.threads // 32
            x, y, z = np.empty((warps, 16, 8)), np.empty((warps, 8, 8)), np.empty((warps, 16, 8))
            for i, r in enumerate(ra):
                x[:, group + 8 * (i % 2), place + 4 * (i // 2)] = ar.tf32(ex.wide(r(ex))).reshape(-1, 32)
            for i, r in enumerate(rb):
                y[:, place + 4 * i, group] = ar.tf32(ex.wide(r(ex))).reshape(-1, 32)
            for i, r in enumerate(rc):
                z[:, group + 8 * (i // 2), 2 * place + i % 2] = ex.wide(r(ex)).reshape(-1, 32)
            total = ar.toward_zero32(x @ y + z)
            for i, write in enumerate(writes):
                write(ex, total[:, group + 8 * (i // 2), 2 * place + i % 2].reshape(-1), m)

        return run32
    raise Unsupported(f"Unsupported instruction: {ins.text}")


@instruction("wgmma")
def _wgmma(c: Compiler, ins: Instruction) -> Run:
    if ins.parts[1] == "fence":
        return lambda ex, m: ex.check_whole_warps(m)
    if ins.parts[1] == "commit_group":
        return lambda ex, m: ex.commit_products(m)
    if ins.parts[1] == "wait_group":
        count = ins.operands[0].value
        return lambda ex, m: ex.wait_products(m, count)
    shape = ins.parts[4]
    if ins.parts[1:4] != ["mma_async", "sync", "aligned"] or ins.parts[5:] != ["f32", "tf32", "tf32"]:
        raise Unsupported(f"Unsupported instruction: {ins.text}")
    columns = int(shape.removeprefix("m64n").removesuffix("k8"))
    d, a, b, keep, scale_a, scale_b = ins.operands
    if (scale_a.value, scale_b.value) != (1, 1):
        raise Unsupported(f"Unsupported instruction: {ins.text}")
    accumulators = [c.register(o) for o in d.items]
    from_registers = isinstance(a, Vector)
    ra = [c.reader(o, U32) for o in a.items] if from_registers else c.reader(a, U64)
    rb, kept = c.reader(b, U64), c.reader(keep, np.bool_)
    lane = np.arange(128)
    group, place, warp = lane % 32 // 4, lane % 4, lane // 32
    c.widths.add(4)

    def run(ex, m):
        ex.check_whole_warps(m)
        if ex.block_threads % 128:
            raise Unsupported("wgmma by a part of a warpgroup")
        groups = ex.threads // 128
        if from_registers:
            x = np.empty((groups, 64, 8))
            for i, r in enumerate(ra):
                x[:, 16 * warp + group + 8 * (i % 2), place + 4 * (i // 2)] = ar.tf32(ex.wide(r(ex))).reshape(-1, 128)
        else:
            x = ar.tf32(ex.load_described(ex.wide(ra(ex)), 64, m))
        y = ar.tf32(ex.load_described(ex.wide(rb(ex)), columns, m))
        total = x @ y.transpose(0, 2, 1)
        keeps = ex.wide(kept(ex)).reshape(groups, 128)[:, 0]
        results = {}
        for i, register in enumerate(accumulators):
            at = (slice(None), 16 * warp + group + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * place + i % 2)
            before = ex.wide(ex.accumulator(register)).view(F32).reshape(groups, 128).astype(F64)
            value = total[at] + np.where(keeps[:, None], before, 0.0)
            results[register] = ar.toward_zero32(value).reshape(-1).view(U32)
        ex.start_product(results, m)

    return run


def _control(c: Compiler, ins: Instruction) -> Run:
    raise Unsupported(f"{ins.text} is control flow, which execute.py compiles")


for _name in ("bra", "ret", "exit", "trap"):
    TABLE[_name] = _control
__all__ = ["NUMPY", "TABLE", "Compiler", "Finding"]
