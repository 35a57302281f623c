"""What tests of the emulator share: a kernel of a few instructions, run over arrays."""

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import execute, memory
from .parse import parse

HEAD = ".version 8.0\n.target sm_90a\n.address_size 64\n"


def entry(body: str, parameters: Sequence[str], *, dynamic: bool = False, name: str = "kernel") -> str:
    """A module with one kernel; registers %p, %h (16 bits), %r (32), %f, %d (64, float), %q (64)."""
    declared = ",\n".join(f".param .{kind} p{i}" for i, kind in enumerate(parameters))
    return (
        HEAD
        + (".extern .shared .align 16 .b8 smem[];\n" if dynamic else "")
        + f".visible .entry {name}({declared})\n{{\n.reg .pred %p<9>;\n.reg .b16 %h<9>;\n.reg .b32 %r<40>;\n"
        + f".reg .f32 %f<40>;\n.reg .f64 %d<40>;\n.reg .b64 %q<40>;\n{body}\nret;\n}}\n"
    )


class Device:
    """Arrays in emulated global memory, and launches."""

    def __init__(self) -> None:
        self.memory = memory.GlobalMemory()
        self.memory.add_private("workspace of grid barriers", execute.WORKSPACE, 64)

    def array(self, values: Any, *, written: bool = True, name: str = "array") -> np.ndarray:
        """A copy of an array between guards; if not written, filled with poison."""
        values = np.ascontiguousarray(values)
        raw = np.full(values.nbytes + 8192, 0xFF, np.uint8)
        start = 4096 + -(raw.ctypes.data + 4096) % 64
        mine = raw[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
        if written:
            mine[...] = values
        self.memory.add(name, mine.reshape(-1).view(np.uint8), min(values.dtype.itemsize, 8), written, raw)
        return mine

    def launch(self, ptx: str, arguments: Sequence[Any], *, grid: int = 1, threads: int = 32, name: str = "kernel",
               **options: Any) -> None:  # fmt: skip
        """Arrays go by address; NumPy scalars as they are."""
        program = execute.Program(parse(ptx)[name])
        packed = b""
        for (_, _, size), value in zip(program.kernel.parameters, arguments, strict=True):
            packed = packed.ljust(len(packed) + -len(packed) % min(size, 16, size & -size), b"\0")
            if isinstance(value, np.ndarray):
                packed += struct.pack("<Q", value.ctypes.data)
            else:
                packed += value if isinstance(value, bytes) else value.tobytes()
        execute.launch(program, self.memory, packed, (grid, 1, 1), threads, **options)


# By type: the register it is kept in.
REGISTER = {"b16": "%h", "u16": "%h", "s16": "%h", "b32": "%r", "u32": "%r", "s32": "%r", "f32": "%f", "b64": "%q",
            "u64": "%q", "s64": "%q", "f64": "%d"}  # fmt: skip
DTYPE = {"b16": np.uint16, "u16": np.uint16, "s16": np.int16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32,
         "f32": np.float32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64}  # fmt: skip


def apply(instruction: str, inputs: Sequence[tuple[str, Any]], output: str) -> np.ndarray:
    """What an instruction does with arrays, an element a thread.

    Args:
        instruction: with {d} for the destination, {a}, {b}, {c} for the operands, {p} for a predicate kept as 0 or 1.
        inputs: (type, values) of a, b, c.
        output: type of the destination; "pred" stores {p} as b32.
    """
    device = Device()
    arrays = [device.array(np.asarray(values, DTYPE[kind])) for kind, values in inputs]
    kind = "b32" if output == "pred" else output
    out = device.array(np.zeros(len(arrays[0]), DTYPE[kind]), written=False)
    lines, names = ["mov.u32 %r0, %tid.x;", "mov.u32 %r39, %ctaid.x;", "mad.lo.s32 %r0, %r39, 32, %r0;"], {}
    lines += [f"setp.ge.s32 %p8, %r0, {len(out)};", "@%p8 bra $done;"]
    for i, (type_, _) in enumerate(inputs):
        names["abc"[i]] = f"{REGISTER[type_]}{i + 1}"
        size = DTYPE[type_]().itemsize
        lines += [f"ld.param.u64 %q10, [p{i}];", f"mul.wide.u32 %q11, %r0, {size};", "add.s64 %q10, %q10, %q11;",
                  f"ld.global.{type_} {names['abc'[i]]}, [%q10];"]  # fmt: skip
    names |= {"d": "%p2" if output == "pred" else f"{REGISTER[kind]}8", "p": "%p2"}
    lines.append(instruction.format(**names))
    if output == "pred":
        lines.append("selp.b32 %r8, 1, 0, %p2;")
    result = f"{REGISTER[kind]}8"
    lines += [f"ld.param.u64 %q10, [p{len(inputs)}];", f"mul.wide.u32 %q11, %r0, {out.itemsize};",
              "add.s64 %q10, %q10, %q11;", f"st.global.{kind} [%q10], {result};", "$done:"]  # fmt: skip
    ptx = entry("\n".join(lines), ["u64"] * (len(inputs) + 1))
    device.launch(ptx, [*arrays, out], grid=-(-len(out) // 32))
    return out
