"""What the kernels ask of a GPU, computed from their launches: bytes, operations, launches, and the least time.

python scripts/gpu_model.py            writes docs/gpu-model.md
python scripts/gpu_model.py --check    says whether the page is what the script writes, but for the host's times

The launchers run on CPU tensors with the launches left out (`lipgan bench overhead`); what each launch reads and writes
follows from its arguments, in most cases from the tables that the kernel itself reads. Nothing here has run on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from lipgan.kernels import gradient_penalty, matrix_sqrt, mlp_gradient_penalty, nearest_neighbours, spectral_norm
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lipgan.bench import harness, overhead
from lipgan.bench.spectral_norm import resnet_128, sngan_32
from lipgan.ops import _backend
from lipgan.ops._address import DTYPE_NUMBERS
from lipgan.ops.gradient_penalty import KINDS
from lipgan.ops.spectral_norm import cuda
from lipgan.reference import gradient_penalty as reference_penalty
from lipgan.reference import spectral_norm as reference_norm

op: Any = sys.modules["lipgan.ops.gradient_penalty"]  # the package has a function of that name

PAGE = Path(__file__).resolve().parents[1] / "docs" / "gpu-model.md"


@dataclass(frozen=True)
class Card:
    """Published peaks: bytes a second, operations a second in float32 and float64 outside of the matrix units."""

    name: str
    bandwidth: float
    peaks: dict[torch.dtype, float]


CARDS = (
    Card("H100", 3.35e12, {torch.float32: 67e12, torch.float64: 34e12}),
    Card("MI300X", 5.3e12, {torch.float32: 163.4e12, torch.float64: 81.7e12}),
)


@dataclass
class Work:
    """What a call asks of the memory and of the arithmetic."""

    read: float = 0
    written: float = 0
    operations: float = 0
    in_float64: float = 0  # more of them, of a call that computes in float32 otherwise
    launches: list[str] = field(default_factory=list)

    def add(self, name: str, read: float, written: float, operations: float, in_float64: float = 0) -> None:
        self.launches.append(name)
        self.read += read
        self.written += written
        self.operations += operations
        self.in_float64 += in_float64

    def seconds(self, card: Card, dtype: torch.dtype) -> float:
        """The time of the slower of memory and arithmetic, if all else were free."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        arithmetic = self.operations / card.peaks[wide] + self.in_float64 / card.peaks[torch.float64]
        return max((self.read + self.written) / card.bandwidth, arithmetic)


# ---- ours: from the arguments of each launch ----


def _bits(dtype: Any) -> int:
    return int(dtype.primitive_bitwidth) // 8


def _rows(geometry: Tensor) -> list[list[int]]:
    return geometry.tolist()


def _tables(a: dict[str, Any]) -> int:
    return sum(a[name].nbytes for name in ("addresses", "geometry", "work") if name in a)


def _iterate(a: dict[str, Any]) -> tuple[float, float, float]:
    # W once from memory; the second product finds a block of rows in the cache.
    t, wide = _bits(a["DTYPE"]), a["scratch"].element_size()
    read = written = operations = 0
    for h, w, padded_w, blocks, *_ in _rows(a["geometry"]):
        read += h * w * t + w * (t if a["FIRST"] else wide)
        written += (h + blocks * padded_w + 4 * blocks) * wide
        operations += 4 * h * w
    return read + _tables(a), written, operations


def _reduce(a: dict[str, Any]) -> tuple[float, float, float]:
    wide = a["scratch"].element_size()
    read = written = operations = 0
    for _, _, padded_w, blocks, column_tiles, *_ in _rows(a["geometry"]):
        read += (blocks * padded_w + 4 * blocks) * wide
        written += (padded_w + 3 * column_tiles) * wide
        operations += 2 * blocks * padded_w
    return read + _tables(a), written, operations


def _sigma(a: dict[str, Any]) -> tuple[float, float, float]:
    t, wide = _bits(a["DTYPE"]), a["scratch"].element_size()
    rows = _rows(a["geometry"])
    read = sum((h * w + h + w) * t for h, w, *_ in rows)
    return read + _tables(a), sum(2 * row[3] * wide for row in rows), sum(2 * h * w for h, w, *_ in rows)


def _scale(a: dict[str, Any]) -> tuple[float, float, float]:
    t, wide = _bits(a["DTYPE"]), a["scratch"].element_size()
    read = written = operations = 0
    for h, w, padded_w, blocks, column_tiles, *_ in _rows(a["geometry"]):
        read += h * w * t + (h + padded_w + 3 * blocks + 3 * column_tiles) * wide
        written += (h * w + h + w) * t + wide
        operations += 2 * h * w
    return read + _tables(a), written, operations


def _grad_dot(a: dict[str, Any]) -> tuple[float, float, float]:
    numbers = sum(h * w for h, w, *_ in _rows(a["geometry"]))
    return 2 * numbers * _bits(a["DTYPE"]) + _tables(a), a["partials"].nbytes, 2 * numbers


def _grad_weight(a: dict[str, Any]) -> tuple[float, float, float]:
    numbers, t = sum(h * w for h, w, *_ in _rows(a["geometry"])), _bits(a["DTYPE"])
    return numbers * t + a["uv"].nbytes + a["partials"].nbytes + _tables(a), numbers * t, 3 * numbers


def _double_dot(a: dict[str, Any]) -> tuple[float, float, float]:
    numbers = sum(h * w for h, w, *_ in _rows(a["geometry"]))
    return 3 * numbers * _bits(a["DTYPE"]) + a["uv"].nbytes + _tables(a), a["partials"].nbytes, 6 * numbers


def _double_grads(a: dict[str, Any]) -> tuple[float, float, float]:
    numbers, t = sum(h * w for h, w, *_ in _rows(a["geometry"])), _bits(a["DTYPE"])
    scalars = a["to_sigma"].nbytes + a["to_grad_sigma"].nbytes
    read = 3 * numbers * t + a["partials"].nbytes + a["sigma_ptr"].nbytes + _tables(a)
    return read, 2 * numbers * t + scalars, 4 * numbers


def _penalty(a: dict[str, Any]) -> tuple[float, float, float]:
    grads = a["grads"]
    written = a["norms"].nbytes + (0 if a["KIND"] == "max" else a["cotangent"].nbytes)
    read, partial, added = _last_program(a, "partials", a["ALONE"])
    return grads.nbytes + read, written + partial, (2 if a["KIND"] == "max" else 4) * grads.numel() + added


def _penalty_parts(a: dict[str, Any]) -> tuple[float, float, float]:
    grads = a["grads"]
    read, partial, added = _last_program(a, "parts", False)
    return grads.nbytes + read, a["norms"].nbytes + partial, 2 * grads.numel() + added


def _last_program(a: dict[str, Any], partials: str, alone: bool) -> tuple[int, int, int]:
    """What the ticket and the sum of the partial results take; a launch of one program writes the penalty at once."""
    if alone:
        return 0, a["penalty"].nbytes, 0
    size = a[partials].nbytes
    top = a["top"].nbytes if a["KIND"] == "max" else 0
    return size + a["ticket"].nbytes, size + a["ticket"].nbytes + a["penalty"].nbytes + top, 2 * a[partials].numel()


def _penalty_scale(a: dict[str, Any]) -> tuple[float, float, float]:
    grads = a["grads"]
    return grads.nbytes + a["norms"].nbytes, a["cotangent"].nbytes, 2 * grads.numel()


def _gram(a: dict[str, Any]) -> tuple[float, float, float]:
    x, out = a["x"], a["out"]
    batch = x.shape[0]
    # Of the lower triangle, in whole tiles.
    return x.nbytes, out.nbytes, 2 * batch * a["tiles"] * a["BLOCK"] ** 2 * a["m"]


def _product(a: dict[str, Any]) -> tuple[float, float, float]:
    x, q = a["x"], a["q"]
    return x.nbytes + q.nbytes, a["out"].nbytes, 2 * x.shape[0] * a["tiles"] * a["BLOCK"] ** 2 * a["n"]


def _mlp_activate(a: dict[str, Any]) -> tuple[float, float, float]:
    size, matrix = a["factors"].element_size(), a["h"] * a["w"]
    read = matrix * (1 + a["SCALED"]) + a["w"] * (a["BIASED"] + a["LAST"])
    written = matrix * (1 + a["KEEPS"] + a["LAST"] + (a["CURVE"] != ""))
    # Of a smooth activation: the polynomials and what is made of them, counted roughly.
    return read * size, written * size, matrix * (60 if a["CURVE"] else 4)


def _mlp_backward(a: dict[str, Any]) -> tuple[float, float, float]:
    matrix = a["h"] * a["w"] * a["deltas"].element_size()
    return (2 + a["SMOOTH"]) * matrix, (1 + a["SMOOTH"]) * matrix, (1 + a["SMOOTH"]) * a["h"] * a["w"]


def _mlp_seed(a: dict[str, Any]) -> tuple[float, float, float]:
    read = a["x"].nbytes + a["v"].nbytes + (a["score_grads"].nbytes if a["LOSS"] and not a["STACKED"] else 0)
    return read, (1 + a["STACKED"]) * a["x"].nbytes, 2 * a["x"].numel()


def _mlp_tangent(a: dict[str, Any]) -> tuple[float, float, float]:
    size, matrix, steep = a["factors"].element_size(), a["h"] * a["w"], (a["last"] - a["first"]) * a["w"]
    mixed, own = a["LOSS"] and not a["STACKED"], a["SMOOTH"] or a["TOP"]
    read = steep * (2 + a["SMOOTH"]) + matrix * (mixed + a["TOP"]) + (a["h"] if a["LOSS"] else 0)
    return read * size, matrix * (1 + mixed + own) * size, matrix * (1 + 2 * mixed + a["SMOOTH"] + 2 * a["TOP"])


def _mlp_adjoint(a: dict[str, Any]) -> tuple[float, float, float]:
    matrix = a["h"] * a["w"] * a["factors"].element_size()
    return (2 + a["SMOOTH"]) * matrix, matrix, (1 + a["SMOOTH"]) * a["h"] * a["w"]


def _mlp_sums(a: dict[str, Any]) -> tuple[float, float, float]:
    size = a["last_grad"].element_size()
    numbers = a["steep"] * a["w"] + a["h"] * (a["w"] * a["APART"] + a["kept"] * a["BIASES"] + a["LOSS"])
    return numbers * size, (a["w"] + (a["width"] + 1) * a["BIASES"]) * size, 2 * numbers


# Sweeps of Jacobi's method that are counted: as many as eigenvalues of one size take in float64 for n = 64.
_SWEEPS = 9


def _root(a: dict[str, Any]) -> tuple[float, ...]:
    # Of a round: the entries between the pairs (a sum over each row), two updates of the matrix and one of the vectors,
    # of 4 operations a number. Then a sum of n products. Of whole tiles.
    count, n, block = a["count"], a["n"], a["BLOCK"]
    rounds = _SWEEPS * (n + n % 2 - 1)
    spectrum = a["roots"].nbytes + a["vectors"].nbytes
    return a["a"].nbytes, a["root"].nbytes + spectrum + a["seen"].nbytes, count * block**2 * (13 * rounds + 2 * n)


def _pairs(a: dict[str, Any], written: int) -> tuple[float, ...]:
    # All of y for every block of points of x, from the caches but for the first time; 3 operations a feature and pair.
    m, n, d = a["m"], a["n"], a["d"]
    if a["pending"] is not None:  # none is
        return a["pending"].nbytes, 0, 0
    return a["x"].nbytes + a["y"].nbytes, written, 0, 3.0 * m * n * d


def _shift(a: dict[str, Any]) -> tuple[float, ...]:
    points = a["points"]
    return points.nbytes, a["shifted"].nbytes + a["norms"].nbytes, 0, 4 * points.numel()


def _bounds(a: dict[str, Any]) -> tuple[float, ...]:
    rows, columns, d = a["row_tiles"] * a["BLOCK"], a["width"], a["d"]
    return (rows + columns) * d * 4 + a["y_norms"].nbytes, rows * columns * 4, 2 * rows * columns * d


def _by_bounds(a: dict[str, Any], pairs: int, written: int, operations: int, in_float64: int) -> tuple[float, ...]:
    # The bounds are read twice, for the second time from the caches; D of the pairs that they leave open. Bytes written
    # are those of a row, operations those of a pair.
    rows = min(a["bounds"].shape[0], len(a["x"]) - a["first"])
    read = rows * (a["width"] * 4 + a["x"][0].nbytes) + a["y"].nbytes + a["y_norms"].nbytes
    wide = rows * a["n"] * in_float64 + rows * pairs * 3.0 * a["d"]
    return read, rows * written, rows * a["n"] * operations, wide


#: What a launch reads and writes of memory beyond the caches, in bytes, and its operations, those in float64 of a call
#: in float32 apart: from its arguments.
LAUNCHES: dict[str, Callable[[dict[str, Any]], tuple[float, ...]]] = {
    "spectral_norm_iterate_kernel": _iterate,
    "spectral_norm_reduce_kernel": _reduce,
    "spectral_norm_sigma_kernel": _sigma,
    "spectral_norm_scale_kernel": _scale,
    "_spectral_norm_grad_dot_kernel": _grad_dot,
    "_spectral_norm_grad_weight_kernel": _grad_weight,
    "_spectral_norm_double_dot_kernel": _double_dot,
    "_spectral_norm_double_grads_kernel": _double_grads,
    "_gradient_penalty_rows_kernel": _penalty,
    "_gradient_penalty_columns_kernel": _penalty,
    "_gradient_penalty_parts_kernel": _penalty_parts,
    "_gradient_penalty_scale_kernel": _penalty_scale,
    "_gradient_penalty_interpolate_kernel": lambda a: (
        a["real"].nbytes + a["fake"].nbytes + a["mix_ptr"].nbytes, a["x_hat"].nbytes, 3 * a["real"].numel()
    ),
    "_matrix_sqrt_gram_kernel": _gram,
    "_matrix_sqrt_product_kernel": _product,
    "_mlp_gradient_penalty_activate_kernel": _mlp_activate,
    "_mlp_gradient_penalty_backward_kernel": _mlp_backward,
    "_mlp_gradient_penalty_seed_kernel": _mlp_seed,
    "_mlp_gradient_penalty_tangent_kernel": _mlp_tangent,
    "_mlp_gradient_penalty_adjoint_kernel": _mlp_adjoint,
    "_mlp_gradient_penalty_sums_kernel": _mlp_sums,
    "_matrix_sqrt_root_kernel": _root,
    "_nearest_neighbours_kernel": lambda a: _pairs(a, a["squared"].nbytes + a["indices"].nbytes),
    "_ball_counts_kernel": lambda a: _pairs(a, a["x_counts"].nbytes + a["y_counts"].nbytes),
    "_neighbour_shift_kernel": _shift,
    "_neighbour_bounds_kernel": _bounds,
    # Of a pair: the upper bound, two comparisons with it and one with the lower bound.
    "_nearest_by_bounds_kernel": lambda a: _by_bounds(a, a["k"], 16 * a["k"] + 4, 3, 1),
    # Of a pair, twice: two bounds and a radius scaled, and four comparisons with radii moved by their rounding. No pair
    # is left open.
    "_counts_by_bounds_kernel": lambda a: _by_bounds(a, 0, 20, 0, 22),
}  # fmt: skip


class _CudaModule:
    """lipgan._cuda, of which the launches are added up and not run."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def spectral_norm_bwd_workspace(self, layers: list[tuple[int, ...]]) -> int:
        return 16 * len(layers)

    def spectral_norm_bwd(self, dtype: int, layers: list[tuple[int, ...]], *_: int) -> None:
        size = next(t.itemsize for t, number in DTYPE_NUMBERS.items() if number == dtype)
        numbers, vectors = sum(h * w for *_, h, w, _, _ in layers), sum(h + w for *_, h, w, _, _ in layers)
        # Twice dY, once Y; the partial products are left out, 8 bytes for each 4096 numbers at least.
        self.work.add(
            "spectral_norm_bwd_kernel", (3 * numbers + vectors) * size, numbers * size, 5 * numbers
        )  # fmt: skip

    def gradient_penalty_fwd_workspace(self, *_: int) -> int:
        return 16384

    def gradient_penalty_fwd(self, dtype: int, kind: int, *arguments: float) -> None:
        _, _, _, _, outer, length, inner, *_ = arguments
        size = next(t.itemsize for t, number in DTYPE_NUMBERS.items() if number == dtype)
        wide, numbers, norms = max(size, 4), outer * length * inner, outer * inner
        # The second reading of "max" and of long rows, as of Triton's second launch; what items give is left out.
        again = KINDS[kind] == "max" or (inner == 1 and length * wide > op._BYTES_OF_ONE_PROGRAM)
        read = (2 * numbers * size + norms * wide) if again else numbers * size
        self.work.add("gradient_penalty_fwd_kernel", read, numbers * size + (norms + 1) * wide, 4 * numbers)


@contextlib.contextmanager
def _cuda_module(module: _CudaModule) -> Iterator[None]:
    """Inside, CPU tensors go to `module` as a GPU's would go to lipgan._cuda."""
    no_device, stream = contextlib.nullcontext(), SimpleNamespace(cuda_stream=0)

    def of_device(result: Any) -> Callable[..., Any]:
        return lambda *_: result  # a mock would take longer than what it stands for

    with contextlib.ExitStack() as stack:
        for where, name, result in (
            (_backend, "cuda", module), (torch.cuda, "device", no_device), (torch.cuda, "current_stream", stream),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(where, name, of_device(result)))
        yield


@contextlib.contextmanager
def recorded() -> Iterator[Work]:
    """Inside, launches of Triton kernels are added up and not run."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    work = Work()

    def add(kernel: Any, *args: Any, **kwargs: Any) -> None:
        name = kernel.fn.__name__
        if name != "fill_kernel":  # of new addresses; a steady call has none
            work.add(name, *LAUNCHES[name]({**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}))

    with contextlib.ExitStack() as stack:
        stack.enter_context(overhead.without_launches())
        for kind in (JITFunction, InterpretedFunction):
            stack.enter_context(mock.patch.object(kind, "run", add))
        stack.enter_context(_cuda_module(_CudaModule(work)))
        stack.enter_context(_Counting(work, products_only=True))
        yield work


# ---- torch's own: from the operations that it dispatches ----

# What makes memory, and computes nothing.
_FREE = ("empty", "detach", "lift_fresh", "_unsafe_view")


class _Counting(TorchDispatchMode):
    """Every operation that is not a view is a launch that reads its arguments and writes its results.

    Args:
        products_only: count matrix products alone, which launchers of kernels leave to torch.
    """

    def __init__(self, work: Work, *, products_only: bool = False) -> None:
        super().__init__()
        self.work, self.products_only = work, products_only

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.")
        if self.products_only and not name.startswith(("mm", "addmm", "bmm", "baddbmm")):
            return out
        if (
            not any(f"{free}" in name.split("_")[-1 if name.startswith("_") else 0] for free in _FREE)
            and not func.is_view
        ):
            read = {key: value for key, value in (kwargs or {}).items() if key != "out"}
            tensors = [x for x in torch.utils._pytree.tree_leaves((args, read)) if isinstance(x, Tensor)]
            results = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor)]
            count = flop_registry.get(func.overloadpacket)
            if count is not None:
                operations = count(*args, **read, out_val=out)
            elif name.startswith(("mv", "dot", "vdot")):
                operations = 2 * max(x.numel() for x in tensors)
            else:
                operations = max(x.numel() for x in (*tensors, *results))
            self.work.add(name, sum(x.nbytes for x in tensors), sum(x.nbytes for x in results), operations)
        return out


def counted(run: Callable[[], object]) -> Work:
    with torch.no_grad(), _Counting(Work()) as counting:
        run()
    return counting.work


# ---- the rows ----


@dataclass(frozen=True)
class Row:
    """A call.

    Attributes:
        small: a call of the same, of so small tensors that products which the host computes take no time; None: `ours`.
    """

    op: str
    shape: str
    dtype: torch.dtype
    ours: Callable[[], object]
    theirs: Callable[[], object] | None
    small: Callable[[], object] | None = None
    takes_time: bool = True  # of the host alone: none of it is PyTorch's, which would compute on the CPU here


def _spectral_rows(name: str, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Row]:
    weights = [torch.empty(shape, dtype=dtype) for shape in shapes]
    us, vs = [w.new_empty(w.shape[0]) for w in weights], [w.new_empty(w[0].numel()) for w in weights]
    dims = [0] * len(weights)
    meta = [[x.to("meta") for x in xs] for xs in (weights, us, vs)]
    sigma = torch.ones(len(weights), dtype=torch.float32)
    meta_sigma = sigma.to("meta")
    uv = weights[0].new_empty(sum(u.numel() + v.numel() for u, v in zip(us, vs, strict=True)))

    def torch_forward() -> None:
        # torch.nn.utils.parametrizations.spectral_norm, of each weight.
        for weight, u, v in zip(*meta, strict=True):
            matrix = weight.flatten(1)
            u = torch.nn.functional.normalize(torch.mv(matrix, v), dim=0, eps=1e-12)
            v = torch.nn.functional.normalize(torch.mv(matrix.H, u), dim=0, eps=1e-12)
            weight / torch.vdot(u, torch.mv(matrix, v))

    def torch_backward() -> None:
        reference_norm.spectral_norm_bwd(meta[0], None, meta[0], meta_sigma, *meta[1:], dims)

    return [
        Row("spectral_norm, forward", name, dtype,
            lambda: spectral_norm.spectral_norm_fwd(weights, us, vs, 1, 1e-12), torch_forward),
        Row("spectral_norm, backward", name, dtype,
            lambda: spectral_norm.spectral_norm_bwd(weights, None, weights, sigma, uv), torch_backward),
        Row("spectral_norm, backward by CUDA", name, dtype,
            lambda: cuda.bwd(weights, None, weights, sigma, uv, dims), torch_backward),
        Row("spectral_norm, second order", name, dtype,
            lambda: spectral_norm.spectral_norm_double_bwd(weights, weights, weights, sigma, uv),
            lambda: reference_norm.spectral_norm_double_bwd(meta[0], meta[0], meta[0], meta_sigma, *meta[1:], dims)),
    ]  # fmt: skip


def _penalty_rows(shape: tuple[int, ...], dtype: torch.dtype, kind: str = "two-sided") -> list[Row]:
    grads = torch.empty(shape, dtype=dtype)
    meta = grads.to("meta")
    layout = (shape[0], math.prod(shape[1:]), 1)
    name = " x ".join(map(str, shape))

    def theirs() -> None:
        reference_penalty.gradient_penalty_fwd(meta, kind, 10.0, 1.0, "sample")

    return [
        Row(f"gradient_penalty, {kind}", name, dtype,
            lambda: gradient_penalty.gradient_penalty_fwd(grads, kind, 10.0, 1.0, layout), theirs),
        Row(f"gradient_penalty, {kind}, by CUDA", name, dtype,
            lambda: op._cuda_fwd(grads, kind, 10.0, 1.0, "sample"), theirs),
    ]  # fmt: skip


def _perceptron_row(what: str, sizes: list[int], batch: int, curve: str, loss: bool) -> Row:
    """A critic with one activation throughout; the penalty of all samples, and a loss of them if there is one."""

    def ours(sizes: list[int], batch: int) -> None:
        weights = [torch.empty(after, before) for before, after in itertools.pairwise(sizes)]
        hidden = len(weights) - 1
        mlp_gradient_penalty.mlp_gradient_penalty_fwd(
            torch.empty(batch, sizes[0]), weights, [torch.empty(size) for size in sizes[1:]], [0.2] * hidden,
            [None] * hidden, "two-sided", 10.0, 1.0, torch.empty(batch) if loss else None, [], 0, batch,
            [curve] * hidden if curve else [], [0.0] * 3 * hidden if curve else [],
        )  # fmt: skip

    # As of the textbook, of parameters and samples that are there already.
    parameters = [torch.empty(a, b, device="meta", requires_grad=True) for b, a in itertools.pairwise(sizes)]
    biases = [torch.empty(size, device="meta", requires_grad=True) for size in sizes[1:]]
    x, w = torch.empty(batch, sizes[0], device="meta", requires_grad=True), torch.empty(batch, 1, device="meta")

    @torch.enable_grad()  # type: ignore[untyped-decorator]
    def theirs() -> None:
        a = x
        for k, (weight, bias) in enumerate(zip(parameters, biases, strict=True)):
            a = torch.nn.functional.linear(a, weight, bias)
            if k < len(biases) - 1:
                a = torch.tanh(a) if curve else torch.nn.functional.leaky_relu(a, 0.2)
        (gradient,) = torch.autograd.grad(a.sum(), x, create_graph=True)
        penalty = 10.0 * (gradient.norm(dim=1) - 1).square().mean()
        total = penalty + (w * a).sum() if loss else penalty
        torch.autograd.grad(total, [*parameters, *biases], allow_unused=True)

    small = [4] * (len(sizes) - 1) + [1]
    return Row(
        f"mlp_gradient_penalty, {what}", f"{batch} x {'-'.join(map(str, sizes))}", torch.float32,
        lambda: ours(sizes, batch), theirs, lambda: ours(small, 2),
    )  # fmt: skip


def rows() -> list[Row]:
    """The calls of the table."""
    result: list[Row] = []
    for name, shapes in (("SNGAN-32 critic", sngan_32()), ("ResNet-128 critic", resnet_128())):
        result += _spectral_rows(name, shapes, torch.float32)
    for shape in ((256, 2), (64, 3, 32, 32), (16, 3, 128, 128)):
        result += _penalty_rows(shape, torch.float32)
    result += _penalty_rows((64, 3, 32, 32), torch.float32, "max")
    real, fake, mix = torch.ones(64, 3072), torch.ones(64, 3072), torch.ones(64)
    result.append(
        Row("interpolate", "64 x 3 x 32 x 32", torch.float32,
            lambda: gradient_penalty.gradient_penalty_interpolate(real, fake, mix),
            lambda: mix[:, None] * real + (1 - mix)[:, None] * fake)
    )  # fmt: skip
    small = [2, 128, 128, 128, 1]
    of = ("leaky ReLU", "", False), ("leaky ReLU, with a loss", "", True), ("tanh", "tanh", False)
    for what, curve, loss in of:
        result.append(_perceptron_row(what, small, 256, curve, loss))
    result.append(_perceptron_row("leaky ReLU", [3072, 1024, 1024, 1], 256, "", False))
    for dtype in (torch.float32, torch.float64):
        x = torch.empty(2048, 2048, dtype=dtype)

        def torch_step(x: Tensor = torch.empty_like(x, device="meta")) -> None:  # noqa: B008 -- once, for this dtype
            gram = x.mT @ x
            torch.addmm(x, x, torch.addmm(gram, gram, gram, beta=-1.25, alpha=0.375), beta=1.875)

        result.append(
            Row("polar iteration, a step", "2048 x 2048", dtype,
                lambda x=x: matrix_sqrt.polar_iteration(x, [(1.875, -1.25, 0.375)]), torch_step)
        )  # fmt: skip
    for dtype in (torch.float32, torch.float64):
        for n in (32, 64):
            a = torch.empty(1000, n, n, dtype=dtype)
            result.append(
                Row("matrix_sqrt, forward", f"1000 x {n} x {n}", dtype,
                    lambda a=a: matrix_sqrt.matrix_sqrt_fwd(a, False, 0.0, 1e-6, True), None)
            )  # fmt: skip
    x = torch.empty(10_000, 512)
    radii = torch.empty(10_000, dtype=torch.float64)
    result += [
        Row("nearest_neighbours, k = 5", "10000 x 10000 x 512", torch.float32,
            lambda: nearest_neighbours.nearest_neighbours(x, None, 5), None, takes_time=False),
        Row("ball_counts", "10000 x 10000 x 512", torch.float32,
            lambda: nearest_neighbours.ball_counts(x, x, radii, radii, False), None, takes_time=False),
    ]  # fmt: skip
    return result


def _si(value: float) -> str:
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g}"


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.3g}"


def _operations(work: Work) -> str:
    return _si(work.operations) + (f", {_si(work.in_float64)} in float64" if work.in_float64 else "")


COLUMNS = [
    "op", "shape", "dtype", "bytes", "operations", "launches", *(f"{card.name} us" for card in CARDS),
    "torch: bytes", "launches", *(f"{card.name} us" for card in CARDS), "host us",
]  # fmt: skip

HEAD = """# What the kernels ask of a GPU

**Computed, not measured**: no GPU has run these kernels. `make gpu-model` writes this page from the launches themselves
(`scripts/gpu_model.py`): the launchers run on CPU tensors with the launches left out, and what each launch reads,
writes and computes follows from its arguments and from the tables that its kernel reads.

- bytes: read from and written to memory, each array once a launch; what a launch reads again is taken to come from the
  caches (the second product of an iteration, tiles of a matrix product, points that meet all others).
- operations: additions and multiplications, of whole tiles where a product is computed in tiles. What a call in float32
  does in float64 stands apart, and is counted at the peak of float64. Of nearest neighbours and ball counts, also the
  comparisons of bounds; these are taken to leave open the k nearest of each row and no ball, and no row to the exact
  kernel. PyTorch's reductions for the mean and the largest coordinates, two or three, are not counted. Of square
  roots, those of 9 sweeps.
- us of a card: the longer of bytes over its published bandwidth and operations over its published peak outside of the
  matrix units, {cards}. It leaves out launches (a few microseconds each, unless a CUDA graph replays
  them) and all that keeps a kernel from either limit: it is the least time that a kernel can take, not an expectation.
- torch: PyTorch's operations for the same work, each a launch that reads its arguments and writes its results:
  `torch.nn.utils.parametrizations.spectral_norm` of each weight, the formulas of `lipgan.reference`, `addmm`; of a
  perceptron its penalty by autograd, with the double backward.
- host us: the time of a call on the host with its launches left out, on the machine that wrote this page; of small or
  large tensors alike, but that here the outputs are allocated on the CPU, which takes long for large ones. Of
  mlp_gradient_penalty it is that of a small critic, with its matrix products, which are PyTorch's. It is left out where
  a call has reductions by PyTorch, which would be computed here.
"""


def page(host: Callable[[Row], float | None]) -> str:
    """The page; ``host`` gives the seconds of a call without its launches."""
    cards = ", ".join(
        f"{card.name}: {card.bandwidth / 1e12:g} TB/s, {card.peaks[torch.float32] / 1e12:g} TFLOP/s in float32, "
        f"{card.peaks[torch.float64] / 1e12:g} in float64"
        for card in CARDS
    )
    lines = [HEAD.format(cards=cards), "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    kernels: dict[tuple[str, ...], str] = {}
    for row in rows():
        with recorded() as ours:
            row.ours()
        kernels.setdefault(tuple(ours.launches), f"{row.op}, {row.shape}")
        cells = [
            row.op, row.shape, str(row.dtype).removeprefix("torch."), _si(ours.read + ours.written),
            _operations(ours), str(len(ours.launches)), *(_us(ours.seconds(card, row.dtype)) for card in CARDS),
        ]  # fmt: skip
        if row.theirs is None:
            cells += ["-"] * (2 + len(CARDS))
        else:
            theirs = counted(row.theirs)
            cells += [_si(theirs.read + theirs.written), str(len(theirs.launches))]
            cells += [_us(theirs.seconds(card, row.dtype)) for card in CARDS]
        seconds = host(row)
        cells.append("-" if seconds is None else f"{1e6 * seconds:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "The launches of a call, in order:", ""]
    lines += [f"- {call}: {', '.join(f'`{name}`' for name in names)}" for names, call in kernels.items()]
    return "\n".join(lines) + "\n"


def host_seconds(row: Row) -> float | None:
    """The median of calls with launches left out; None where something else than the host would be timed."""
    if not row.takes_time:
        return None
    with overhead.without_launches(), _cuda_module(_CudaModule(Work())):
        return harness.interleave({"call": row.small or row.ours}, seconds=0.2, warmup=3)["call"]


def without_host(text: str) -> str:
    """A page without the column of times, which are others on every machine."""
    lines = text.split("\n")
    return "\n".join(line.rsplit(" | ", 1)[0] if line.startswith("| ") else line for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    if args.check:
        same = PAGE.exists() and without_host(PAGE.read_text()) == without_host(page(lambda row: None))
        print(f"{PAGE.name} is {'what' if same else 'not what'} the script writes")
        return 0 if same else 1
    torch.set_num_threads(1)
    PAGE.write_text(page(host_seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
