"""csrc/cuda/gradient_penalty.cu, run by the host executor, and the module lipgan._cuda where it is built."""

import contextlib
import ctypes
import importlib
import math
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import host_executor
import numpy as np
import pytest
import torch
from arena import Arena
from cuda_sources import GRADIENT_PENALTY
from lipgan.kernels import config
from lipgan.kernels.gradient_penalty.launch import _plan
from tolerance import assert_as_accurate
from torch import Tensor

from lipgan.ops import _backend, gradient_penalty, interpolate
from lipgan.reference import gradient_penalty as reference

op: Any = sys.modules["lipgan.ops.gradient_penalty"]

pytestmark = pytest.mark.skipif(host_executor.GXX is None, reason=host_executor.NO_GXX)

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]  # numbered as in lipgan/dtype.h
CUDA_ERROR_INVALID_VALUE = 1
WEIGHT, TARGET = 3.0, 0.7


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = host_executor.build(GRADIENT_PENALTY, tmp_path_factory.mktemp("gradient_penalty"))
    loaded.workspace_size.restype = ctypes.c_int64
    return loaded


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def run(
    library: ctypes.CDLL,
    grads: Tensor,
    kind: str,
    weight: float = WEIGHT,
    target: float = TARGET,
    *,
    multiprocessors: int = 3,
    order: int = 2,
    misaligned: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(penalty, norms [outer, inner], cotangent) of gradients [outer, length, inner] on the host executor."""
    dtype, accumulate = grads.dtype, wide(grads.dtype)
    arena, sizes = Arena(), [ctypes.c_int64(size) for size in grads.shape]
    given, cotangent = arena.copy(grads, misaligned), arena.empty(grads.shape, dtype, misaligned)
    norms = arena.empty([grads.shape[0], grads.shape[2]], accumulate)
    penalty = arena.empty([1], accumulate)
    number = DTYPES.index(dtype)
    workspace = arena.empty([library.workspace_size(number, *sizes)], torch.uint8)
    host_executor.configure(library, multiprocessors=multiprocessors, seed=order)
    error = library.gradient_penalty_fwd(
        number, op.KINDS.index(kind), pointer(given), pointer(penalty), pointer(norms), pointer(cotangent), *sizes,
        ctypes.c_double(weight), ctypes.c_double(target), pointer(workspace),
    )  # fmt: skip
    assert error == 0, library.host_executor_message().decode()
    arena.assert_guards_untouched()
    torch.testing.assert_close(given, grads, rtol=0, atol=0, equal_nan=True)
    # Copies: the arena's memory goes away with it.
    return penalty[0].clone(), norms.clone(), cotangent.clone()


def draw(shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """Gradients whose norms lie on both sides of the target."""
    grads = torch.randn(shape, dtype=torch.float64)
    norms = grads.norm(dim=1, keepdim=True)
    return (grads / norms * TARGET * (0.5 + torch.rand_like(norms))).to(dtype)


def expected(grads: Tensor, kind: str, weight: float, target: float) -> tuple[Tensor, Tensor, Tensor]:
    return reference.gradient_penalty_fwd(grads, kind, weight, target, "pixel")


def check(
    results: tuple[Tensor, Tensor, Tensor], grads: Tensor, kind: str, weight: float = WEIGHT, target: float = TARGET
) -> None:
    penalty, norms, cotangent = results
    dtype, accumulate = grads.dtype, wide(grads.dtype)
    truth = expected(grads.double(), kind, weight, target)
    peer = expected(grads.to(accumulate), kind, weight, target)
    # As of the C++ form: a square root of a sum that is taken in double, and one rounding; of float64 a chain of sums.
    of_norm = 2.0 if accumulate == torch.float32 else grads.shape[1] / 8 + 4
    assert_as_accurate(norms, peer[1], truth[1], roundings=of_norm)
    excess = float(truth[1].max()) + target
    assert_as_accurate(penalty, peer[0], truth[0], roundings=4 * of_norm, scale=weight * excess**2)
    slope = 2 * weight / (1 if kind == "max" else norms.numel()) * excess
    scale = slope * torch.finfo(accumulate).eps / torch.finfo(dtype).eps + float(truth[2].abs().max())
    assert_as_accurate(cotangent, peer[2].to(dtype), truth[2], roundings=2 * of_norm + 4, scale=scale)


# Rows: of one number, of fewer than 16 bytes, by threads, warps and blocks, whole packs and not, +- 1; more than are
# wanted as items; so many that warps take what blocks would. Columns: one and several that share a column, ragged
# tiles, several matrices, more than are wanted.
ROWS = [(1, 1, 1), (7, 1, 1), (3, 2, 1), (1030, 3, 1), (6, 5, 1), (9, 16, 1), (70, 31, 1), (5, 64, 1), (3, 130, 1),
        (4, 256, 1), (1030, 40, 1), (3, 1500, 1), (2, 4100, 1), (2051, 150, 1)]  # fmt: skip
COLUMNS = [(2, 1, 5), (1, 7, 64), (3, 3, 100), (2, 17, 66), (2, 70, 66), (4, 33, 2), (1, 130, 33)]


@pytest.mark.parametrize("shape", ROWS + COLUMNS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_penalty(library: ctypes.CDLL, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    grads = draw(shape, dtype)
    # The larger shapes by one kind with its cotangent at once and one without.
    for kind in op.KINDS if math.prod(shape) < 1_000 else ("one-sided", "max"):
        check(run(library, grads, kind), grads, kind)


@pytest.mark.parametrize("more", [1, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_blocks_share(library: ctypes.CDLL, dtype: torch.dtype, more: int) -> None:
    grads = draw((2, config.longest_row(dtype.itemsize) + more, 1), dtype)
    for kind in ("squared", "max") if more == 1 else ("two-sided", "one-sided"):
        check(run(library, grads, kind, multiprocessors=4), grads, kind)


@pytest.mark.parametrize("shape", [(5, 64, 1), (3, 2048, 1), (2, 16_400, 1), (2, 17, 66)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned(library: ctypes.CDLL, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    grads = draw(shape, dtype)
    for kind in ("two-sided", "max"):
        check(run(library, grads, kind, misaligned=True), grads, kind)


@pytest.mark.parametrize("shape", [(70, 50, 1), (9, 1500, 1), (2, 20_000, 1), (2, 70, 130)], ids=str)
@pytest.mark.parametrize("kind", ["two-sided", "max"])
def test_same_bits_on_every_grid_and_in_every_order(
    library: ctypes.CDLL, kind: str, shape: tuple[int, int, int]
) -> None:
    grads = draw(shape, torch.float32)
    first = run(library, grads, kind, multiprocessors=1, order=0)
    for multiprocessors, order in [(2, 1), (16, 7)]:
        again = run(library, grads, kind, multiprocessors=multiprocessors, order=order)
        assert all(map(torch.equal, again, first))


# Rows by threads of a warp, by a block, by several; columns of one thread and of several.
SMALL = [(6, 4, 1), (5, 300, 1), (2, 16_388, 1), (2, 5, 3), (1, 70, 9)]


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_and_the_target(library: ctypes.CDLL, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """The direction of a gradient of norm 0 is 0; a norm at the target has no cotangent, and none below it."""
    grads = draw(shape, dtype)
    grads[:, :, 0] = 0
    for kind in op.KINDS:
        penalty, norms, cotangent = run(library, grads, kind)
        assert norms[:, 0].eq(0).all()
        assert cotangent[:, :, 0].eq(0).all()
        check((penalty, norms, cotangent), grads, kind)
    grads = torch.zeros(shape, dtype=dtype)
    grads[:, 1] = 2.0
    for kind, target in (("two-sided", 2.0), ("one-sided", 2.5), ("max", 2.0)):
        penalty, norms, cotangent = run(library, grads, kind, target=target)
        assert penalty == 0
        assert norms.eq(2).all()
        assert cotangent.eq(0).all()


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_a_shared_maximum(library: ctypes.CDLL, shape: tuple[int, int, int]) -> None:
    grads = draw(shape, torch.float32) * 0.1
    grads[:, :, -1] = 0
    grads[0, 0, -1], grads[-1, 2, -1] = 3.0, -3.0
    _, _, cotangent = run(library, grads, "max")
    expected = torch.zeros_like(grads)
    ties = 1 if shape[0] == 1 else 2
    if ties == 1:  # of one matrix the second one is in the same column
        check(run(library, grads, "max"), grads, "max")
        return
    expected[0, 0, -1], expected[-1, 2, -1] = 1.0, -1.0
    torch.testing.assert_close(cotangent, expected * 2 * WEIGHT / ties * (3.0 - TARGET))


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("kind", op.KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(library: ctypes.CDLL, value: float, kind: str, shape: tuple[int, int, int]) -> None:
    for dtype in (torch.float32, torch.float64):
        grads = draw(shape, dtype)
        clean = run(library, grads, kind)
        grads[-1, 2, -1] = value
        penalty, norms, cotangent = run(library, grads, kind)
        truth = expected(grads, kind, WEIGHT, TARGET)
        assert penalty.isnan() == truth[0].isnan()
        assert not penalty.isfinite()
        torch.testing.assert_close(norms, truth[1], equal_nan=True)
        if kind != "max":  # the others are as they were
            same = torch.ones_like(norms, dtype=torch.bool)
            same[-1, -1] = False
            assert torch.equal(norms[same], clean[1][same])
            columns = same.unsqueeze(1).expand_as(cotangent)
            assert torch.equal(cotangent[columns], clean[2][columns])
        assert not cotangent[-1, 2, -1].isfinite()
        assert (cotangent.isfinite() == truth[2].isfinite()).all()


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 1e-30), (torch.float32, 1e30), (torch.float32, 2.0**120), (torch.bfloat16, 1e-36),
     (torch.float64, 1e-200), (torch.float64, 1e-300), (torch.float64, 1e200), (torch.float64, 2.0**1010)],
)  # fmt: skip
def test_norms_at_the_ends_of_the_range(
    library: ctypes.CDLL, dtype: torch.dtype, scale: float, shape: tuple[int, int, int]
) -> None:
    """Squares leave the range where norms do not. Next to them are gradients of an ordinary size."""
    power = 2.0 ** round(math.log2(scale))
    ordinary = draw(shape, dtype)
    grads = (ordinary.double() * power).to(dtype)
    penalty, norms, cotangent = run(library, grads, "one-sided", target=0.0, weight=1 / power)
    exact = torch.linalg.vector_norm(grads.double() / power, dim=1)
    torch.testing.assert_close(norms.double() / power, exact, rtol=8 * torch.finfo(norms.dtype).eps, atol=0)
    # weight n^2 is of the size of the norms, and the cotangent 2 weight / N g of the size of 1.
    count = norms.numel()
    mean = (exact.square() / count).sum()
    torch.testing.assert_close(penalty.double() / power, mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(cotangent.double(), 2 / count * grads.double() / power, rtol=1e-2, atol=1e-300)
    mixed = torch.where(torch.rand(shape) < 0.5, grads, ordinary)
    _, norms, _ = run(library, mixed, "two-sided")
    extended = mixed.double().numpy(force=True).astype(np.longdouble)  # of which no square leaves the range
    exact = torch.from_numpy(np.sqrt((extended**2).sum(1)).astype(np.float64))
    torch.testing.assert_close(norms.double(), exact, rtol=8 * torch.finfo(norms.dtype).eps, atol=0)


def test_samples_without_elements(library: ctypes.CDLL) -> None:
    for kind in op.KINDS:
        penalty, norms, _ = run(library, torch.empty(3, 0, 1), kind)
        assert norms.eq(0).all()
        assert penalty == (0 if kind in ("one-sided", "squared") else torch.tensor(WEIGHT * TARGET**2))


@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (5, 61), (3, 64), (7, 3000)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_interpolate(library: ctypes.CDLL, dtype: torch.dtype, shape: tuple[int, int], misaligned: bool) -> None:
    arena = Arena()
    real, fake = (arena.copy(torch.randn(shape).to(dtype), misaligned) for _ in range(2))
    mix = arena.copy(torch.rand(shape[0], dtype=wide(dtype)))
    mix[0] = 1.0
    fake[0] = float("inf")
    if shape[0] > 1:
        mix[1], real[1] = 0.0, float("nan")
    x_hat = arena.empty(shape, dtype, misaligned)
    arrays, sizes = map(pointer, (real, fake, mix, x_hat)), map(ctypes.c_int64, shape)
    assert library.gradient_penalty_interpolate(DTYPES.index(dtype), *arrays, *sizes) == 0
    arena.assert_guards_untouched()
    assert torch.equal(x_hat[0], real[0])
    if shape[0] > 1:
        assert torch.equal(x_hat[1], fake[1])
    m = mix[2:, None].double()
    exact = m * real[2:].double() + (1 - m) * fake[2:].double()
    peer = torch.lerp(fake[2:].to(mix.dtype), real[2:].to(mix.dtype), mix[2:, None]).to(dtype)
    if shape[0] > 2:
        assert_as_accurate(x_hat[2:], peer, exact, roundings=4)


class Executed:
    """lipgan._cuda, as far as the op needs it, of the host executor."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.launched: list[str] = []

    def gradient_penalty_fwd_workspace(self, dtype: int, *sizes: int) -> int:
        return self.library.workspace_size(dtype, *map(ctypes.c_int64, sizes))

    def gradient_penalty_fwd(self, dtype: int, kind: int, *arguments: Any) -> None:
        *arrays, outer, length, inner, weight, target, workspace, stream = arguments
        assert stream == 7
        self.launched.append("fwd")
        host_executor.configure(self.library, multiprocessors=2, seed=2)
        sizes = map(ctypes.c_int64, (outer, length, inner))
        error = self.library.gradient_penalty_fwd(
            dtype, kind, *map(ctypes.c_void_p, arrays), *sizes, ctypes.c_double(weight), ctypes.c_double(target),
            ctypes.c_void_p(workspace),
        )  # fmt: skip
        assert error == 0

    def gradient_penalty_interpolate(self, dtype: int, *arguments: int) -> None:
        *arrays, batch, length, stream = arguments
        assert stream == 7
        self.launched.append("interpolate")
        sizes = ctypes.c_int64(batch), ctypes.c_int64(length)
        assert self.library.gradient_penalty_interpolate(dtype, *map(ctypes.c_void_p, arrays), *sizes) == 0


@pytest.fixture
def executed(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Executed:
    """CPU tensors go to the host executor where the backend "cuda" is asked for."""
    module = Executed(library)
    missing = _backend._missing
    monkeypatch.setattr(_backend, "cuda", lambda: module)
    monkeypatch.setattr(_backend, "_missing", lambda backend, d: None if backend == "cuda" else missing(backend, d))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    _backend._resolve.cache_clear()
    yield module
    _backend._resolve.cache_clear()


LYING = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "of others": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "permuted": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "a part": lambda x: torch.cat([x.flatten(), x.flatten()[:1]])[1:].view(x.shape),
    "negated": lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag,
}


@pytest.mark.parametrize("lying", LYING)
@pytest.mark.parametrize("norm", op.NORMS)
@pytest.mark.parametrize("kind", op.KINDS)
def test_the_op(executed: Executed, kind: str, norm: str, lying: str) -> None:
    """Layouts that the kernel does not know of, by the public function, with gradients of first and second order."""
    grads = LYING[lying](torch.randn(3, 5, 4, 6)).requires_grad_()
    leaf = grads.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    penalty, norms = gradient_penalty(grads, kind, weight=2.0, target=0.5, norm=norm, backend="cuda")
    other, other_norms = gradient_penalty(leaf, kind, weight=2.0, target=0.5, norm=norm, backend="reference")
    assert executed.launched == ["fwd"]
    torch.testing.assert_close(norms, other_norms, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(penalty, other, rtol=1e-5, atol=1e-6)
    assert norms.is_contiguous()
    first, expected = (torch.autograd.grad(p, x, create_graph=True)[0] for p, x in ((penalty, grads), (other, leaf)))
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-6)
    second, expected = (torch.autograd.grad(f.sin().sum(), x)[0] for f, x in ((first, grads), (expected, leaf)))
    torch.testing.assert_close(second, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lying", LYING)
def test_the_op_interpolate(executed: Executed, lying: str) -> None:
    real, fake = (LYING[lying](torch.randn(3, 5, 4, 6)) for _ in range(2))
    mix = torch.tensor([0.0, 0.25, 1.0])
    leaf = real.detach().requires_grad_()
    x_hat = interpolate(leaf, fake, mix, backend="cuda")
    assert executed.launched == ["interpolate"]
    other = interpolate(real, fake, mix, backend="reference")
    torch.testing.assert_close(x_hat, other)
    assert x_hat.stride() == other.stride()
    (grad,) = torch.autograd.grad(x_hat.sum(), leaf)
    torch.testing.assert_close(grad, mix.view(-1, 1, 1, 1).expand_as(grad))


def test_which_penalty_a_gpu_is_asked_for_first() -> None:
    """CUDA for what takes Triton two launches, of gradients that are not large."""

    def of(shape: tuple[int, ...], kind: str = "two-sided", norm: str = "sample", dtype=torch.float32, on="cuda"):
        made = torch.empty(shape, dtype=dtype, device="meta")
        given = SimpleNamespace(shape=made.shape, numel=made.numel, element_size=made.element_size,
                                is_contiguous=made.is_contiguous, is_cuda=on == "cuda")  # fmt: skip
        return op._first(given, kind, norm)

    for dtype in DTYPES:
        longest = config.longest_row(dtype.itemsize)
        for length in (longest, longest + 1):
            for kind in op.KINDS:
                launches = 1 + (_plan(4, length, 1, dtype, kind).scale is not None)
                assert of((4, length), kind, dtype=dtype) == (None if launches == 1 else "cuda"), (dtype, length, kind)
                assert of((4, length), kind, dtype=dtype, on="cpu") is None
    assert of((8, 3, 32, 32), norm="pixel") is None
    assert of((8, 3, 32, 32), "max", "pixel") == "cuda"
    assert of((512, 16_384), "max") == "cuda"
    assert of((513, 16_384), "max") is None
    assert _backend.resolve("gradient_penalty", "reference", "cuda", "cuda") == "reference"


@pytest.mark.parametrize("field", ["outer", "length", "inner", "workspace", "dtype", "kind"])
def test_invalid_arguments(library: ctypes.CDLL, field: str) -> None:
    values = {"outer": 4, "length": 4, "inner": 1, "workspace": 0, "dtype": 0, "kind": 0}
    values[field] = {"outer": 0, "length": -1, "inner": 0, "workspace": 8, "dtype": 4, "kind": 4}[field]
    sizes = [ctypes.c_int64(values[name]) for name in ("outer", "length", "inner")]
    error = library.gradient_penalty_fwd(
        values["dtype"], values["kind"], *[None] * 4, *sizes,
        ctypes.c_double(1), ctypes.c_double(1), ctypes.c_void_p(values["workspace"]),
    )  # fmt: skip
    assert error == CUDA_ERROR_INVALID_VALUE


# An installation may do without the module; conftest.py skips what is marked so, and says why.
@pytest.mark.backend("cuda module")
def test_module_sizes() -> None:
    module = importlib.import_module("lipgan._cuda")
    assert module.gradient_penalty_fwd_workspace(0, 64, 3072, 1) == 2 * 8 * 1024
    # A part has 4096 numbers at least: (q, s) of each, and a norm in double.
    assert module.gradient_penalty_fwd_workspace(0, 2, 16385, 1) == 8 * (2 * 2 * 5 + 2)
    assert module.gradient_penalty_fwd_workspace(1, 2, 8193, 1) == 8 * (2 * 2 * 3 + 2)


WITHOUT_A_DEVICE = """
import pytest
import lipgan._cuda as module

missing = r"CUDA error: .*driver|CUDA error: no CUDA-capable device"
with pytest.raises(RuntimeError, match=missing):
    module.gradient_penalty_fwd(0, 0, 0, 0, 0, 0, 4, 4, 1, 1.0, 1.0, 0, 0)
with pytest.raises(RuntimeError, match=missing):
    module.gradient_penalty_interpolate(0, 0, 0, 0, 0, 4, 4, 0)
module.gradient_penalty_interpolate(0, 0, 0, 0, 0, 0, 4, 0)
"""


@pytest.mark.backend("cuda module")
def test_module_without_a_device() -> None:
    """Where there is one, it is hidden from the process."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", WITHOUT_A_DEVICE], env=environment, check=True)
