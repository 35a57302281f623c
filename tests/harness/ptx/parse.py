"""Text of PTX to kernels: parameters, registers, shared variables, and instructions with their lines of source."""

import functools
import re
import struct
from dataclasses import dataclass, field

import numpy as np

BYTES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4, "s32": 4,
         "f32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8}  # fmt: skip


class Unsupported(Exception):
    """PTX that the emulator does not know."""


@dataclass(frozen=True)
class Register:
    name: str
    negated: bool = False  # !%p


@dataclass(frozen=True)
class Immediate:
    """A constant; `bits` of a float constant, or a signed integer of any size."""

    value: int
    is_float: str = ""  # "f32" or "f64"


@dataclass(frozen=True)
class Symbol:
    """A label, a variable, or a special register."""

    name: str


@dataclass(frozen=True)
class Address:
    base: Register | Symbol | Immediate
    offset: int


@dataclass(frozen=True)
class Vector:
    items: tuple["Operand", ...]


@dataclass(frozen=True)
class Pair:
    """%r|%p: a result and a predicate."""

    first: Register
    second: Register


Operand = Register | Immediate | Symbol | Address | Vector | Pair


@dataclass(frozen=True)
class Instruction:
    predicate: Register | None
    opcode: str  # all of it: "ld.global.v4.b32"
    operands: tuple[Operand, ...]
    where: str  # "file.py:12", of the line of source
    text: str

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")


@dataclass
class Kernel:
    name: str
    parameters: list[tuple[str, str, int]] = field(default_factory=list)  # name, type, bytes
    registers: dict[str, str] = field(default_factory=dict)  # prefix or name -> type
    shared: list[tuple[str, int, int]] = field(default_factory=list)  # name, alignment, bytes
    dynamic_shared: str | None = None
    body: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # -> index into body
    threads: int | None = None  # .reqntid

    def type_of(self, register: str) -> str:
        found = self.registers.get(register) or self.registers.get(register.rstrip("0123456789"))
        if found is None:
            raise Unsupported(f"{self.name} declares no register {register}")
        return found


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_ALIGN_VARIABLE = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?")
_INSTRUCTION = re.compile(r"(?:@(!?\s*%[\w$]+)\s+)?([\w.:]+)\s*(.*)")
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)*?(?:\.align\s+\d+\s+)?)?"
                        r"([\w$]+)(?:\[(\d+)\])?")  # fmt: skip


@functools.lru_cache(1 << 16)
def _operand(text: str) -> Operand:
    text = text.strip()
    if text.startswith("{"):
        return Vector(tuple(_operand(t) for t in text[1:-1].split(",")))
    if text.startswith("["):
        base, sign, offset = re.fullmatch(r"\[\s*([^\s+\-]+)\s*(?:([+-])\s*(-?\w+)\s*)?\]", text).groups()
        value = int(offset, 0) * (-1 if sign == "-" else 1) if offset else 0
        return Address(_operand(base), value)
    if "|" in text:
        first, second = text.split("|")
        return Pair(_operand(first), _operand(second))
    if text.startswith("!"):
        return Register(text[1:].strip(), True)
    if text.startswith(("0f", "0F")):
        return Immediate(int(text[2:], 16), "f32")
    if text.startswith(("0d", "0D")):
        return Immediate(int(text[2:], 16), "f64")
    if re.fullmatch(r"-?0[xX][0-9a-fA-F]+U?|-?\d+U?", text):
        return Immediate(int(text.rstrip("U"), 0))
    if re.fullmatch(r"-?\d*\.\d+(?:[eE][+-]?\d+)?", text):
        return Immediate(struct.unpack("<Q", struct.pack("<d", float(text)))[0], "f64")
    if re.match(r"%(?:tid|ntid|ctaid|nctaid|laneid|warpid|envreg\d+|clock\w*|smid|dynamic_smem_size)\b", text):
        return Symbol(text)
    if text.startswith("%"):
        return Register(text)
    return Symbol(text)


def _split(text: str) -> list[str]:
    """Operands at commas outside of braces and brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "{[":
            depth += 1
        elif c in "}]":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]] if text.strip() else []


def parse(text: str) -> dict[str, Kernel]:
    """The kernels (.entry) of a module of PTX, by name."""
    files = {int(i): path.rsplit("/", 1)[-1] for i, path in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text)}
    text = _COMMENT.sub("", text)
    kernels: dict[str, Kernel] = {}
    dynamic = None
    module_shared = []
    position = 0
    # What stands outside of bodies: shared variables and the heads of kernels.
    for head in re.finditer(r"(?:\.visible\s+|\.weak\s+)?\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", text):
        outside = text[position : head.start()]
        for align, kind, name, size in _ALIGN_VARIABLE.findall(outside):
            if size in ("", "0") and ".extern" in outside:
                dynamic = name
            else:
                module_shared.append((name, int(align), int(size or 1) * BYTES[kind]))
        kernel = Kernel(head[1], shared=list(module_shared), dynamic_shared=dynamic)
        for _, kind, name, count in _PARAMETER.findall(head[2]):
            kernel.parameters.append((name, kind, BYTES[kind] * int(count or 1)))
        threads = re.search(r"\.reqntid\s+(\d+)", head[3])
        kernel.threads = int(threads[1]) if threads else None
        position = _body(text, head.end(), kernel, files)
        kernels[kernel.name] = kernel
    return kernels


def _body(text: str, position: int, kernel: Kernel, files: dict[int, str]) -> int:
    """Parse from behind the opening brace; the place behind the closing one."""
    where = "?"
    scopes: list[dict[str, str]] = [{}]  # of the braces that are open: registers declared there -> type
    opened: list[int] = [0]  # the number of each; inline assembly has registers of its own
    count = 0
    token = re.compile(
        r"\s*(?:(?P<label>[\w$]+):(?!:)|(?P<loc>\.loc\s+(\d+)\s+(\d+)[^\n]*)|(?P<open>\{)|(?P<close>\})"
        r"|(?P<statement>[.@\w%][^;]*);)"
    )
    while scopes:
        match = token.match(text, position)
        if match is None:
            raise Unsupported(f"cannot read PTX at {text[position : position + 80]!r}")
        position = match.end()
        if match["label"]:
            kernel.labels[match["label"]] = len(kernel.body)
        elif match["loc"]:
            where = f"{files.get(int(match[3]), match[3])}:{match[4]}"
            inlined = re.findall(r"inlined_at (\d+) (\d+)", match["loc"])
            for number, line in inlined:
                where += f" (inlined at {files.get(int(number), number)}:{line})"
        elif match["open"]:
            count += 1
            scopes.append({})
            opened.append(count)
        elif match["close"]:
            scopes.pop()
            opened.pop()
        else:
            statement = " ".join(match["statement"].split())
            if statement.startswith(".reg"):
                kind, names = re.fullmatch(r"\.reg\s*\.(\w+)\s+(.*)", statement).groups()
                for name in names.split(","):
                    scopes[-1][re.sub(r"<\d+>", "", name.strip())] = kind
                    if len(scopes) == 1:
                        kernel.registers[re.sub(r"<\d+>", "", name.strip())] = kind
                continue
            if len(scopes) > 1:
                statement = re.sub(r"%[\w$]+", lambda m: _scoped(m[0], scopes, opened, kernel), statement)
            _statement(statement, kernel, where)
    return position


def _scoped(name: str, scopes: list[dict[str, str]], opened: list[int], kernel: Kernel) -> str:
    """The name under which the register of the innermost scope that declares it is kept."""
    for scope, number in zip(scopes[:0:-1], opened[:0:-1], strict=True):
        kind = scope.get(name) or scope.get(name.rstrip("0123456789"))
        if kind is not None:
            kernel.registers[f"{name}_in{number}"] = kind
            return f"{name}_in{number}"
    return name


def _statement(statement: str, kernel: Kernel, where: str) -> None:
    if statement.startswith(".shared"):
        align, kind, name, size = _ALIGN_VARIABLE.match(statement).groups()
        kernel.shared.append((name, int(align), int(size or 1) * BYTES[kind]))
    elif statement.startswith((".pragma", ".loc")):
        pass
    elif statement.startswith("."):
        raise Unsupported(f"directive {statement!r}")
    else:
        guard, opcode, rest = _INSTRUCTION.fullmatch(statement).groups()
        operands = tuple(_operand(t) for t in _split(rest))
        predicate = _operand(guard) if guard else None
        kernel.body.append(Instruction(predicate, opcode, operands, where, statement))


def constant(operand: Immediate, dtype: np.dtype) -> np.ndarray:
    """An immediate as an array of one element of a dtype (of NumPy)."""
    size = np.dtype(dtype).itemsize
    if (operand.is_float, size) in (("f32", 8), ("f64", 4)):
        wide = np.array([operand.value], np.uint32 if operand.is_float == "f32" else np.uint64)
        value = wide.view(np.float32 if operand.is_float == "f32" else np.float64)
        return value.astype(np.float64 if size == 8 else np.float32).view(dtype)
    bits = operand.value & ((1 << (8 * size)) - 1)
    return np.array([bits], f"u{size}").view(dtype)
