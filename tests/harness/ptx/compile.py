"""Triton and nvcc as compilers of what the emulator runs, with a cache; and launches from the launchers themselves.

Triton is compiled by a process of its own, since the tests run with TRITON_INTERPRET=1: it is told the kernel and the
arguments of a launch, and answers with PTX and metadata. Signature and divisibility are those of kernels/aot.py, which
tests/test_aot.py compares with Triton's own launcher.
"""

import contextlib
import ctypes
import hashlib
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from lipgan.kernels import aot, common
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

from . import execute, memory
from .parse import parse

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
KERNELS = Path(aot.__file__).parent
CACHE = Path(os.environ.get("LIPGAN_PTX_CACHE", Path(tempfile.gettempdir()) / f"lipgan-ptx-{os.getuid()}"))
NVCC = shutil.which("nvcc")


@dataclass(frozen=True)
class Compiled:
    """PTX of a launch, and what Triton says of it."""

    ptx: str
    name: str
    num_warps: int
    shared: int
    arguments: tuple[str, ...]  # names of the parameters that are no constants, in the order of the signature
    types: tuple[str, ...]
    scratch: int  # pointers that the launcher adds at the end


def source_key() -> str:
    """Changes with the kernels and with Triton."""
    digest = hashlib.sha256(triton.__version__.encode())
    for path in sorted([*KERNELS.glob("**/*.py"), HERE / "compile_worker.py"]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _cached(key: str, make: Callable[[], bytes]) -> bytes:
    CACHE.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = CACHE / key
    if not path.exists():
        made = make()
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_bytes(made)
        partial.replace(path)  # at once: other processes read the cache meanwhile
    return path.read_bytes()


class TritonCompiler:
    """A process that compiles launches to PTX, started when the cache does not know one."""

    def __init__(self) -> None:
        self.key = source_key()
        self.process: subprocess.Popen[bytes] | None = None
        self.folder: tempfile.TemporaryDirectory[str] | None = None
        self.known: dict[bytes, Compiled] = {}

    def __call__(self, request: tuple[Any, ...], key: str | None = None) -> Compiled:
        packed = pickle.dumps(request)
        if packed not in self.known:
            name = hashlib.sha256(packed).hexdigest()[:24]
            answer = _cached(f"{key or self.key}-{name}", lambda: self._ask(packed))
            self.known[packed] = Compiled(**pickle.loads(answer))
        return self.known[packed]

    def _ask(self, packed: bytes) -> bytes:
        if self.process is None:
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            self.folder = tempfile.TemporaryDirectory(prefix="lipgan-ptx-triton-")
            environment["TRITON_CACHE_DIR"] = self.folder.name
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "compile_worker.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env=environment,
            )  # fmt: skip
        self.process.stdin.write(struct.pack("<q", len(packed)) + packed)
        self.process.stdin.flush()
        (size,) = struct.unpack("<q", self.process.stdout.read(8))
        answer = self.process.stdout.read(abs(size))
        if size < 0:
            raise RuntimeError(f"Triton does not compile {pickle.loads(packed)[:2]}: {answer.decode()}")
        return answer

    def edited(self, name: str, old: str, new: str) -> Callable[[tuple[Any, ...]], Compiled]:
        """A compiler for which kernels/ has `new` in place of `old` (once, in one file), seen by kernels of a name."""
        found = [p for p in KERNELS.glob("**/*.py") if old in p.read_text()]
        assert len(found) == 1, f"{old!r} is in {len(found)} files"
        text = found[0].read_text()
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
        digest = hashlib.sha256(repr((self.key, str(found[0]), old, new)).encode()).hexdigest()[:16]
        package = f"edited_{digest}"
        folder = Path(tempfile.gettempdir()) / f"lipgan-ptx-edits-{os.getuid()}"

        def compile_(request: tuple[Any, ...]) -> Compiled:
            if name not in request[1]:
                return self(request)
            # Only where the cache knows nothing the copy is read. Another process may make the same one.
            if not (folder / package).exists():
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                with tempfile.TemporaryDirectory(dir=folder) as own:
                    copy = Path(own) / package
                    shutil.copytree(KERNELS, copy, ignore=shutil.ignore_patterns("__pycache__"))
                    (copy / found[0].relative_to(KERNELS)).write_text(text.replace(old, new))
                    with contextlib.suppress(OSError):
                        copy.rename(folder / package)
            module = request[0].replace("lipgan.kernels", package, 1)
            return self((f"{folder}|{module}", *request[1:]), key=digest)

        return compile_

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()
            self.process.stdout.close()
            self.process = None
            self.folder.cleanup()


compiler = TritonCompiler()
_programs: dict[str, execute.Program] = {}


def program_of(ptx: str, name: str) -> execute.Program:
    """The compiled kernel of some PTX; kept, because compiling costs about as much as running."""
    key = hashlib.sha256(ptx.encode()).hexdigest() + name
    if key not in _programs:
        if len(_programs) > 64:
            _programs.pop(next(iter(_programs)))
        _programs[key] = execute.Program(parse(ptx)[name])
    return _programs[key]


def _describe(value: Any) -> Any:
    """An argument of a launch as the worker needs it: of a tensor its dtype and alignment."""
    if isinstance(value, torch.Tensor):
        return ("tensor", str(value.dtype).removeprefix("torch."), value.data_ptr() % 16)
    return ("value", value)


GUARD = 4096  # bytes between tensors made inside a session


class _Tensors(TorchDispatchMode):
    """Registers the memory of every tensor that is made, and whether it was written."""

    FACTORIES = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")

    def __init__(self, session: "Session") -> None:
        super().__init__()
        self.session = session

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        name = function._schema.name.removeprefix("aten::")
        made = name not in self.FACTORIES
        if not made:
            result = self.session.allocate(result)
        for tensor in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.session.register(tensor, written=made)
        if function._schema.is_mutable:
            for argument, described in zip(arguments, function._schema.arguments, strict=False):
                if described.alias_info is not None and described.alias_info.is_write:
                    self.session.mark_written(argument)
        return result


@dataclass
class Session:
    """Runs what Triton launches inside `with session.running():` on the emulator.

    Args:
        target: "sm_80" or "sm_90".
        edit: changes the PTX of a kernel, for planted faults: (name, ptx) -> ptx.
        compile: makes PTX of a request; another one compiles edited sources.
        options: further arguments of execute.launch.
    """

    target: str
    edit: Callable[[str, str], str] = lambda name, ptx: ptx
    compile: Callable[[tuple[Any, ...]], Compiled] = compiler
    options: dict[str, Any] = field(default_factory=dict)
    counters: dict[str, execute.Counters] | None = None
    launched: list[str] = field(default_factory=list)
    on_line: Callable[[tuple[str, str, int]], None] | None = None  # told (kernel, text, its place among equal texts)

    def __post_init__(self) -> None:
        self.memory = memory.GlobalMemory()
        self.memory.add_private("workspace of grid barriers", execute.WORKSPACE, 64)
        self.storages: dict[int, memory.Region] = {}

    def allocate(self, like: torch.Tensor) -> torch.Tensor:
        """An uninitialized tensor between guards, so that what misses it meets nothing else."""
        size = like.untyped_storage().nbytes()
        if size == 0:
            return like
        raw = torch.from_numpy(np.full(size + 2 * GUARD + 64, 0xFF, np.uint8))
        start = GUARD + -(raw.data_ptr() + GUARD) % 64
        return raw[start : start + size].view(like.dtype).as_strided(like.shape, like.stride())

    def copy(self, tensor: torch.Tensor, misaligned: bool = False) -> torch.Tensor:
        """A contiguous copy between guards; kernels may then find it by an address in a table."""
        size = tensor.numel() * tensor.element_size()
        if size == 0:
            return tensor.clone()
        with _disable_current_modes():  # or the guards would be registered with it
            raw = torch.from_numpy(np.full(size + 2 * GUARD + 64, 0xFF, np.uint8))
            start = GUARD + -(raw.data_ptr() + GUARD) % 64 + (tensor.element_size() if misaligned else 0)
            copied = raw[start : start + size].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        self._add(copied.data_ptr(), size, copied, True, "")
        return copied

    def register(self, tensor: torch.Tensor, written: bool = True, name: str = "") -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:
            return
        if written:
            if storage.data_ptr() not in self.storages and tensor.data_ptr() not in self.storages:
                self._add(storage.data_ptr(), storage.nbytes(), tensor, True, name)
        else:
            self._add(tensor.data_ptr(), tensor.numel() * tensor.element_size(), tensor, False, name)

    def _add(self, address: int, size: int, tensor: torch.Tensor, written: bool, name: str) -> None:
        # What lay there before is gone.
        old = [r for r in self.memory.regions if r.start < address + size and address < r.end]
        if old and written:
            return
        for region in old:
            self.memory.regions.remove(region)
        name = name or f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        granule = min(tensor.element_size(), 8)
        self.storages[address] = self.memory.add_at(name, address, size, granule, written, tensor.untyped_storage())

    def mark_written(self, tensor: torch.Tensor) -> None:
        for region in self.memory.regions:
            if region.start <= tensor.data_ptr() < region.end:
                region.written[:] = True

    @contextlib.contextmanager
    def running(self) -> Iterator["Session"]:
        session = self

        def run(kernel: InterpretedFunction, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
            session.launch(kernel, arguments, keywords, grid)

        # A launch that ends with a finding leaves its ticket as it is.
        common.forget_tickets()
        try:
            with mock.patch.object(InterpretedFunction, "run", run), _Tensors(self):
                yield self
        finally:
            common.forget_tickets()

    def launch(self, kernel: InterpretedFunction, arguments: tuple, keywords: dict[str, Any], grid: Any) -> None:
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | {
            k: v for k, v in keywords.items() if k in kernel.arg_names
        }
        options = {k: v for k, v in keywords.items() if k not in kernel.arg_names}
        request = (
            kernel.fn.__module__, kernel.fn.__name__, self.target,
            tuple((k, _describe(v)) for k, v in values.items()), tuple(options.items()),
        )  # fmt: skip
        made = self.compile(request)
        self.launched.append(made.name)
        program = program_of(self.edit(made.name, made.ptx), made.name)
        packed = b""
        for (_, kind, size), name, declared in zip(
            program.kernel.parameters, (*made.arguments, *[None] * made.scratch),
            (*made.types, *["*i8"] * made.scratch), strict=True,
        ):  # fmt: skip
            value = 0 if name is None else values[name]
            packed = packed.ljust(len(packed) + -len(packed) % size, b"\0")
            if isinstance(value, torch.Tensor):
                self.register(value, name=name)
                value = value.data_ptr()
            if declared in ("fp64", "fp32"):
                assert kind == {"fp64": "f64", "fp32": "f32"}[declared], (kind, declared)
                packed += struct.pack("<d" if declared == "fp64" else "<f", value)
            else:
                packed += int(value).to_bytes(size, "little", signed=value < 0)
        size = tuple(grid) if isinstance(grid, (tuple, list)) else (grid,)
        counters = None
        if self.counters is not None:
            counters = self.counters.setdefault(made.name, execute.Counters())
        execute.launch(
            program, self.memory, packed, (*size, 1, 1)[:3], made.num_warps * 32, shared_bytes=made.shared,
            shared_limit=aot.SHARED_LIMIT[self.target], counters=counters, **self.options,
        )  # fmt: skip
        if self.on_line is not None:
            numbers: dict[str, int] = {}
            for block in program.blocks:
                for ins in [ins for _, ins in block.runs] + ([block.end] if block.end else []):
                    number = numbers[ins.text] = numbers.get(ins.text, -1) + 1
                    if block.executed:
                        self.on_line((made.name, ins.text, number))

    def assert_written(self, tensor: torch.Tensor) -> None:
        """That kernels wrote all of a result."""
        for region in self.memory.regions:
            if region.start <= tensor.data_ptr() < region.end:
                assert region.written.all(), f"{region.name}: element {int(np.argmin(region.written))} was not written"
                return
        raise AssertionError("no kernel knows this tensor")


def nvcc_ptx(source: str, architecture: int, *, include: Path | None = None) -> str:
    """PTX that nvcc makes of CUDA C++ ("#include" may name files below csrc)."""
    return _nvcc(source, ("-ptx", f"-arch=compute_{architecture}", "-lineinfo"), "ptx").decode()


def included_by_nvcc() -> list[Path]:
    """The files that CUDA sources may include from this repository: a change of one makes a new entry of the cache."""
    return sorted(p for p in (ROOT / "csrc").glob("**/*") if p.suffix in (".h", ".cuh", ".cu"))


def _nvcc(source: str, flags: tuple[str, ...], suffix: str) -> bytes:
    digest = hashlib.sha256(repr((source, flags)).encode())
    for path in [*included_by_nvcc(), HERE / "runtime.cpp"]:
        digest.update(path.read_bytes())
    digest.update(subprocess.run([NVCC, "--version"], capture_output=True).stdout)

    def make() -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            unit, out = Path(folder) / "unit.cu", Path(folder) / f"unit.{suffix}"
            unit.write_text(source)
            command = [NVCC, "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}", *flags,
                       str(unit), "-o", str(out)]  # fmt: skip
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            return out.read_bytes()

    return _cached(f"nvcc-{digest.hexdigest()[:24]}.{suffix}", make)


_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t,
    ctypes.c_int,
)  # fmt: skip


# A barrier of a block in PTX, with the predicates of one that votes.
BARRIER = re.compile(r"\b(?:bar|barrier)\.sync\s+0;|\bbar\.red\.or\.pred\s+(%\w+), 0, (%\w+);")


def _plain(name: str) -> str:
    """A mangled name without what nvcc makes of the unit's path, to tell anonymous namespaces apart."""
    return re.sub(r"\d*_(?:INTERNAL_|GLOBAL__N__)[0-9a-f]{8}_\d+_\w+?_cu_[0-9a-f]{8}", "", name)


class CudaLibrary:
    """CUDA C++ whose host code runs here and whose kernels run on the emulator, as PTX for an architecture.

    Args:
        source: what nvcc is given; it may include files below csrc.
        architecture: 80 or 90.
        edit: changes the PTX, for planted faults.
    """

    def __init__(self, source: str, architecture: int, edit: Callable[[str], str] = lambda ptx: ptx) -> None:
        library = _nvcc(
            source,
            # Of this only the host's part runs.
            ("-shared", "-Xcompiler", "-fPIC", "-cudart", "none", "--generate-code=arch=compute_80,code=compute_80",
             "-Xcicc", "-O0", str(HERE / "runtime.cpp")), "so",
        )  # fmt: skip
        with tempfile.NamedTemporaryFile(suffix=".so") as file:
            file.write(library)
            file.flush()
            self.library = ctypes.CDLL(file.name)
        self.ptx = edit(nvcc_ptx(source, architecture))
        self.names = {_plain(n): n for n in re.findall(r"\.entry\s+([\w$]+)", self.ptx)}
        self.error: BaseException | None = None
        self.limit = aot.SHARED_LIMIT[f"sm_{architecture}"]

    def call(self, name: str, *arguments: Any, memory: memory.GlobalMemory, multiprocessors: int,
             counters: dict[str, execute.Counters] | None = None, **options: Any) -> int:  # fmt: skip
        """Call a host function; its launches run in `memory`, and what they find is raised."""

        def launch(name_, grid, threads, pointers, shared, cooperative) -> int:
            if self.error is not None:
                return 1
            try:
                program = program_of(self.ptx, self.names[_plain(name_.decode())])
                packed = b""
                for i, (_, _, size) in enumerate(program.kernel.parameters):
                    packed = packed.ljust(program.compiler.parameters[program.kernel.parameters[i][0]], b"\0")
                    packed += ctypes.string_at(pointers[i], size)
                count = None if counters is None else counters.setdefault(_plain(name_.decode()), execute.Counters())
                execute.launch(
                    program, memory, packed, (grid, 1, 1), threads, shared_bytes=shared, counters=count,
                    cooperative=bool(cooperative), shared_limit=self.limit, **options,
                )  # fmt: skip
            except BaseException as error:
                self.error = error
                return 1
            return 0

        callback = _LAUNCH(launch)
        self.error = None
        self.library.configure_runtime(callback, multiprocessors)
        result = getattr(self.library, name)(*arguments)
        if self.error is not None:
            raise self.error
        return int(result)
