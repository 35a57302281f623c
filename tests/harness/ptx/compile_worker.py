"""Compiles launches of Triton kernels to PTX: requests on stdin, answers on stdout (see compile.py)."""

import importlib
import os
import pickle
import struct
import sys
import traceback
from typing import Any
from unittest import mock

import torch
import triton
from lipgan.kernels import aot
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource


def argument(described: tuple[Any, ...]) -> Any:
    """A stand-in for an argument: of a tensor the dtype and the alignment count."""
    if described[0] == "value":
        return described[1]
    _, dtype, remainder = described
    kind = getattr(torch, dtype)
    raw = torch.empty(64 + remainder, dtype=torch.uint8)
    return raw[remainder : remainder + 16].view(kind)


def load(module: str) -> Any:
    """A module by its name; "folder|name" for one of a package that lies in a folder."""
    folder, _, name = module.rpartition("|")
    if folder and folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    return importlib.import_module(name)


def answer(request: tuple[Any, ...]) -> dict[str, Any]:
    module, name, target, arguments, options = request
    kernel = getattr(load(module), name)
    launch = aot.launch_of(kernel, (), {k: argument(v) for k, v in arguments} | dict(options))
    source = ASTSource(
        launch.kernel, dict(launch.signature), dict(launch.constants),
        {(launch.kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in launch.aligned},
    )  # fmt: skip
    # The machine code is not needed.
    with mock.patch.object(CUDABackend, "make_cubin", return_value=b""):
        compiled = triton.compile(source, target=aot.TARGETS[target], options=dict(launch.options))
    metadata = compiled.metadata
    for asked in ("global_scratch_size", "profile_scratch_size"):
        if getattr(metadata, asked, 0):
            raise RuntimeError(f"{name} asks for {asked}, which the emulator does not lay out")
    runtime = [(k, t) for k, t in source.signature.items() if t != "constexpr"]
    ptx = compiled.asm["ptx"]
    declared = ptx[ptx.index(".entry") : ptx.index(")", ptx.index(".entry"))].count(".param")
    return {
        "ptx": ptx, "name": metadata.name, "num_warps": metadata.num_warps, "shared": metadata.shared,
        "arguments": tuple(k for k, _ in runtime), "types": tuple(t for _, t in runtime),
        "scratch": declared - len(runtime),
    }  # fmt: skip


def main() -> None:
    stdin, stdout = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what compilers print is no answer
    while head := stdin.read(8):
        packed = stdin.read(struct.unpack("<q", head)[0])
        try:
            made = pickle.dumps(answer(pickle.loads(packed)))
            stdout.write(struct.pack("<q", len(made)) + made)
        except Exception:
            made = traceback.format_exc().encode()
            stdout.write(struct.pack("<q", -len(made)) + made)
        stdout.flush()


if __name__ == "__main__":
    main()
