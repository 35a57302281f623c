"""Ahead-of-time compilation of every kernel, for GPUs that need not be present.

    python -m lipgan.kernels.aot --targets sm_80,sm_90,sm_100,gfx942

What to compile is not listed by hand: CASES call the launchers on uninitialized CPU tensors while launches
are recorded instead of run, so the signatures are the launchers' own. A later op adds its cases to CASES, and
nothing else.

Each build is checked: no register spills, shared memory within the limit of the target, 128-bit global loads,
and no matrix product in less than the precision of its operands (TF32, XF32), except where a launch says
PRECISION="tf32x3": there the compiler must have made three products in TF32 of each.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from . import config, gradient_penalty, matrix_sqrt, mlp_gradient_penalty, nearest_neighbours, spectral_norm
from .activations import CURVES

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# Bytes of shared memory that one program may use. CUDA C++ Programming Guide, table "Technical Specifications
# per Compute Capability"; AMD Instinct MI300 instruction set architecture, local data share.
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    """A kernel with all that its compilation depends on."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]  # arguments that are multiples of 16
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    def describe(self) -> str:
        return " ".join(f"{key}={value}" for key, value in (*self.constants, *self.options))


@dataclass(frozen=True)
class Build:
    """What the compiler made of a launch for a target."""

    kernel: str
    description: str
    target: str
    registers: int
    spills: int
    shared: int
    wide_loads: int  # of 128 bits or more
    violations: tuple[str, ...]


def _argument(value: Any) -> tuple[str, bool]:
    """Type of an argument that is no compile-time constant, and whether it is a multiple of 16."""
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype], value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        return ("i32" if -(1 << 31) <= value < 1 << 31 else "i64"), value % 16 == 0
    raise TypeError(f"no rule for a kernel argument of type {type(value).__name__}")


def launch_of(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """The launch kernel[grid](*args, **kwargs), specialized as Triton's launcher would."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {key: value for key, value in kwargs.items() if key in kernel.arg_names}
    options = {key: value for key, value in kwargs.items() if key not in kernel.arg_names}
    signature, constants, aligned = {}, {}, []
    for parameter in kernel.params:
        value = values[parameter.name]
        # Triton makes a constant of None and of the integer 1.
        is_one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, float | int) and parameter.annotation_type:
            signature[parameter.name] = parameter.annotation_type
            if not parameter.do_not_specialize and isinstance(value, int) and value % 16 == 0:
                aligned.append(parameter.name)
        else:
            signature[parameter.name], is_aligned = _argument(value)
            if is_aligned:
                aligned.append(parameter.name)
    return Launch(
        kernel,
        signature=tuple(signature.items()),
        constants=tuple(constants.items()),
        aligned=tuple(aligned),
        options=tuple(options.items()),
    )


@contextlib.contextmanager
def recorded() -> Iterator[dict[Launch, None]]:
    """Inside, launches of Triton kernels are recorded (once each, in order) and not run."""
    launches: dict[Launch, None] = {}

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches[launch_of(kernel, args, kwargs)] = None

    # A table of addresses that was not written must not be taken for one that was.
    spectral_norm.tables.forget_addresses()
    try:
        with mock.patch.object(JITFunction, "run", record):
            yield launches
    finally:
        spectral_norm.tables.forget_addresses()


def _spectral_norm_cases() -> None:
    def forward_and_backward(
        dtype: torch.dtype,
        shapes: list[tuple[int, int]],
        iterations: tuple[int, ...] = (0, 2),
        layouts: tuple[tuple[int, int, int], ...] | None = None,
    ) -> None:
        weights = [torch.empty(shape, dtype=dtype) for shape in shapes]
        us = [torch.empty(h, dtype=dtype) for h, _ in shapes]
        vs = [torch.empty(w, dtype=dtype) for _, w in shapes]
        for n in iterations:
            ys, sigma, uv = spectral_norm.spectral_norm_fwd(weights, us, vs, n, 1e-12, layouts)
        for grad_sigma in (sigma, None) if dtype == torch.float32 else (sigma,):
            spectral_norm.spectral_norm_bwd(weights, grad_sigma, ys, sigma, uv, layouts)
        spectral_norm.spectral_norm_double_bwd(weights, weights, ys, sigma, uv, layouts)

    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        forward_and_backward(dtype, [(1024, 8192)])  # the largest register tile
        # One kernel for a group of all layouts: channels last, transposed convolutions of either format.
        forward_and_backward(dtype, [(1024, 8192)] * 3, layouts=((0, 8192, 512), (0, 16, 8192), (0, 1, 8192)))
    forward_and_backward(torch.float32, [(64, 27), (1, 48)])  # the square tile of small layers
    forward_and_backward(torch.float32, [(512, 20000)], iterations=(1,))  # the wide tile of the column sums


def _gradient_penalty_cases() -> None:
    def forward(dtype: torch.dtype, shape: tuple[int, int, int], kinds: tuple[str, ...] = ("two-sided", "max")) -> None:
        for kind in kinds:
            gradient_penalty.gradient_penalty_fwd(torch.empty(shape, dtype=dtype), kind, weight=10.0, target=1.0)

    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        samples = torch.empty(16, 4096, dtype=dtype)
        mix = torch.empty(16, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        gradient_penalty.gradient_penalty_interpolate(samples, samples, mix)
        forward(dtype, (16, config.longest_row(dtype.itemsize), 1))
        forward(dtype, (16, 131072, 1), ("two-sided",))  # rows in parts
        forward(dtype, (16, 512, 256))  # columns walked down
    for kind in gradient_penalty.KINDS:
        forward(torch.float32, (256, 640, 1), (kind,))  # several rows a program
        forward(torch.float32, (16, 131072, 1), (kind,))
        forward(torch.float32, (16, 64, 1024), (kind,))  # columns in registers


def _matrix_sqrt_cases() -> None:
    for dtype, precision in ((torch.float32, "ieee"), (torch.float64, "ieee"), (torch.float32, "tf32x3")):
        for batch, m, n in (
            (1, 4096, 4096),  # the largest tiles
            (1, 2048, 2048),  # the statistics of Inception features
            (1, 256, 2048),  # the Gram matrix is that of the rows, so the strides change places
            (1000, 32, 32),  # small matrices: a tile each
        ):
            matrices = torch.empty(batch, m, n, dtype=dtype)
            matrix_sqrt.polar_iteration(matrices, [(1.875, -1.25, 0.375)], precision=precision)
    for dtype in (torch.float32, torch.float64):
        for n in (32, 64):
            matrices = torch.empty(1000, n, n, dtype=dtype)
            matrix_sqrt.matrix_sqrt_fwd(matrices, False, 0.0, 1e-6, True)
        matrix_sqrt.matrix_sqrt_fwd(matrices, True, 1e-3, 1e-6, False)
    # In float32 a thread of the smallest tile has too few numbers for a wide load on gfx942.
    matrix_sqrt.matrix_sqrt_fwd(torch.empty(1000, 16, 16, dtype=torch.float64), False, 0.0, 1e-6, True)


def _nearest_neighbours_cases() -> None:
    for dtype in (torch.float32, torch.float64):
        # By the exact kernels alone, and by bounds, with both tiles of the product, before them.
        for m, n in ((16, 512), (1024, 512), (4096, 4096)):
            x, y = torch.empty(m, 2048, dtype=dtype), torch.empty(n, 2048, dtype=dtype)
            x_radii, y_radii = torch.empty(m, dtype=torch.float64), torch.empty(n, dtype=torch.float64)
            nearest_neighbours.nearest_neighbours(x, y, 20)  # two passes
            nearest_neighbours.nearest_neighbours(x, None, 5)
            for closed in (False, True):
                nearest_neighbours.ball_counts(x, y, x_radii, y_radii, closed)


def _mlp_gradient_penalty_cases() -> None:
    def forward(dtype: torch.dtype, curves: list[str], *, scaled: bool, loss: bool) -> None:
        batch, width, hidden = 256, 128, max(len(curves), 3)
        x, square = torch.empty(batch, width, dtype=dtype), torch.empty(width, width, dtype=dtype)
        scale = torch.empty(batch, width, dtype=dtype) if scaled else None
        mlp_gradient_penalty.mlp_gradient_penalty_fwd(
            x, [square] * hidden + [square[:1]], [square[0]] * hidden + [None], [0.2] * hidden, [scale] * hidden,
            "two-sided", 10.0, 1.0, x[:, 0].contiguous() if loss else None, [], 0, batch // 2 if loss else batch,
            curves, [1.0] * 3 * len(curves),
        )  # fmt: skip

    for dtype in (torch.float32, torch.float64):
        forward(dtype, [], scaled=False, loss=False)
        forward(dtype, [], scaled=True, loss=True)
        forward(dtype, ["", "tanh", ""], scaled=True, loss=False)
        forward(dtype, [*CURVES, "gelu"], scaled=False, loss=True)


# Calls of the launchers of an op that reach every kernel, dtype and launch shape worth compiling.
CASES: dict[str, Callable[[], None]] = {
    "gradient_penalty": _gradient_penalty_cases,
    "spectral_norm": _spectral_norm_cases,
    "matrix_sqrt": _matrix_sqrt_cases,
    "mlp_gradient_penalty": _mlp_gradient_penalty_cases,
    "nearest_neighbours": _nearest_neighbours_cases,
}


def launches_of(ops: Iterable[str]) -> list[Launch]:
    """The launches of the cases of some ops."""
    with recorded() as launches:
        for op in ops:
            CASES[op]()
    return list(launches)


def wide_loads(assembly: str) -> int:
    """Number of global loads of 128 bits or more per thread, in PTX or AMD assembly."""
    vectors = re.findall(r"\bld\.global[\w.:]*?\.v(\d)\.[bfsu](\d+)\b", assembly)
    nvidia = sum(int(count) * int(bits) >= 128 for count, bits in vectors)
    to_shared = re.findall(r"\bcp\.async\.cg\.shared\.global\b", assembly)  # exists for 16 bytes only
    return nvidia + len(to_shared) + len(re.findall(r"\b(?:global|buffer)_load_(?:dwordx4|b128)\b", assembly))


def loads(assembly: str) -> bool:
    """Whether a kernel reads global memory at all; one that writes its arguments does not."""
    return re.search(r"\b(?:ld\.global|cp\.async|(?:global|buffer|flat)_load)", assembly) is not None


def reduced_precision(ttgir: str, assembly: str) -> list[str]:
    """The matrix products that round float32 operands to fewer bits: TF32 (NVIDIA) or XF32 (AMD)."""
    found = set(re.findall(r"inputPrecision = ((?:tf32|bf16)\w*)", ttgir))
    found |= set(re.findall(r"\b(?:mma|wgmma|tcgen05)[\w.:]*[.:](tf32)\b", assembly))
    found |= set(re.findall(r"\bv_mfma\w*_(xf32)\b", assembly))
    return sorted(found)


def products(ir: str) -> list[str]:
    """The precision of every matrix product in TTIR or TTGIR: "ieee", "tf32", "tf32x3", ..."""
    # An operation with operands of float32 is in TF32 where it has no attribute to say otherwise (tc_gen5_mma).
    found = []
    for name, rest in re.findall(r"\b(tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) ([^\n]*)", ir):
        by_name = re.search(r"inputPrecision = ([a-z]\w*)", rest)
        by_number = re.search(r"inputPrecision = (\d) : i32", rest)
        if by_name:
            found.append(by_name[1])
        elif by_number:
            found.append(("tf32", "tf32x3", "ieee")[int(by_number[1])])
        else:
            found.append("tf32" if name == "ttng.tc_gen5_mma" and "xf32" in rest else "ieee")
    return found


def precision_violations(precision: str | None, ttir: str, ttgir: str, assembly: str) -> list[str]:
    """What is wrong with the matrix products of a kernel that was asked for a precision, or for none."""
    if precision == "tf32x3":
        asked, made = products(ttir), products(ttgir)
        if asked and set(asked) == {"tf32x3"} and made == ["tf32"] * (3 * len(asked)):
            return []
        return [f"matrix products in {made} where three in tf32 make one: {asked}"]
    violations = [f"a matrix product in {found}" for found in reduced_precision(ttgir, assembly)]
    if precision is not None and set(products(ttgir)) != {precision}:
        violations.append(f"matrix products in {products(ttgir)} where {precision} was asked for")
    return violations


def _resources(compiled: CompiledKernel, ptxas_log: str) -> tuple[int, int]:
    """Registers per thread, and bytes (NVIDIA) or vector registers (AMD) that were spilled to memory.

    A scalar register of AMD that is spilled goes into a lane of a vector register, which is no memory.
    """
    if "ptx" in compiled.asm:
        registers = re.findall(r"Used (\d+) registers", ptxas_log)
        spills = re.findall(r"(\d+) bytes spill", ptxas_log)
    else:
        registers = re.findall(r"\.vgpr_count:\s+(\d+)", compiled.asm["amdgcn"])
        spills = re.findall(r"\.vgpr_spill_count:\s+(\d+)", compiled.asm["amdgcn"])
    if not registers or not spills:
        raise RuntimeError(f"the compiler reports no resource usage: {ptxas_log!r}")
    return max(map(int, registers)), sum(map(int, spills))


def build(launch: Launch, target: str) -> Build:
    """Compile one launch for one target and check the result; a failure to compile is a violation too."""
    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        dict(launch.constants),
        {(launch.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    log = io.StringIO()
    try:
        # The resource usage stands in the log of ptxas, which a build found in the cache does not have.
        with (
            contextlib.redirect_stdout(log),
            mock.patch.object(knobs.nvidia, "dump_ptxas_log", True),
            mock.patch.object(knobs.compilation, "always_compile", True),
        ):
            compiled = triton.compile(source, target=TARGETS[target], options=dict(launch.options))
    except Exception as error:
        message = f"does not compile: {type(error).__name__}: {error}"
        return Build(launch.name, launch.describe(), target, 0, 0, 0, 0, (message,))
    registers, spills = _resources(compiled, log.getvalue())
    assembly = compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]
    shared, wide = compiled.metadata.shared, wide_loads(assembly)
    violations = []
    if spills:
        violations.append(f"{spills} spilled")
    if shared > SHARED_LIMIT[target]:
        violations.append(f"{shared} bytes of shared memory exceed {SHARED_LIMIT[target]}")
    if not wide and loads(assembly):
        violations.append("no 128-bit load")
    precision = dict(launch.constants).get("PRECISION")
    violations += precision_violations(precision, compiled.asm["ttir"], compiled.asm["ttgir"], assembly)
    return Build(launch.name, launch.describe(), target, registers, spills, shared, wide, tuple(violations))


# A kernel does not survive pickling, so each worker process records the launches for itself.
_launches: list[Launch] = []


def _start_worker(ops: list[str]) -> None:
    _launches[:] = launches_of(ops)


def _build_in_worker(index: int, target: str) -> Build:
    return build(_launches[index], target)


def build_all(ops: list[str], targets: list[str], jobs: int) -> Iterator[Build]:
    """Compile and check the launches of some ops for some targets, leaving the user's cache alone."""
    work = [
        (index, target)
        for index, launch in enumerate(launches_of(ops))
        for target in targets
        if not (dict(launch.constants).get("PRECISION") == "tf32x3" and TARGETS[target].backend == "hip")
    ]
    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache),
        ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start_worker, (ops,)) as pool,
    ):
        yield from pool.map(_build_in_worker, *zip(*work, strict=True))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lipgan.kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--op", action="append", choices=CASES, help="only this op; may be repeated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilations at a time")
    options = parser.parse_args(arguments)
    targets = options.targets.split(",")
    for target in targets:
        if target not in TARGETS:
            parser.error(f"unknown target {target!r}; known are {', '.join(TARGETS)}")
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET replaces the compiler; unset it")
    failed = count = 0
    columns = ("kernel", "target", "registers", "spills", "shared", "wide loads", "constants and options")
    row = "{:34} {:7} {:>9} {:>6} {:>6} {:>10}  {}"
    print(row.format(*columns))
    for made in build_all(options.op or list(CASES), targets, options.jobs):
        numbers = (made.registers, made.spills, made.shared, made.wide_loads)
        print(row.format(made.kernel, made.target, *numbers, made.description), flush=True)
        for violation in made.violations:
            print(f"  VIOLATION: {violation}", flush=True)
        count, failed = count + 1, failed + bool(made.violations)
    print(f"{count} builds, {failed} with violations")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
