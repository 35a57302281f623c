"""The op gradient_penalty: every backend against a float64 truth and PyTorch; gradients; layouts; bad input."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import pytest
import torch
from devices import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_accurate, max_error
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lipgan.ops import UnavailableError, _backend, empty_cache, gradient_penalty, interpolate
from lipgan.ops.gradient_penalty import KINDS, NORMS, penalize

_C: Any = _backend.native()  # None where it was not built: its tests are skipped then

BACKENDS = ["reference", "native", "triton"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

# Around the 16 lanes of a register, rows of 1 to 5 elements, the rows that are joined (31) and not (32), more norms
# than a block holds (1024), a row of several pieces, and samples of every number of dimensions.
SHAPES = [
    (1, 1),
    (7,),
    (3, 2),
    (1030, 3),
    (5, 4),
    (6, 5),
    (9, 15),
    (3, 16),
    (2, 17),
    (70, 31),
    (2, 32),
    (3, 5, 3),
    (2, 3, 5, 7),
    (3, 4, 1, 1),
    (2, 1, 4, 4),
    (2, 2, 3, 2, 3),
    (2, 16411),
]


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Gradients whose norms lie on both sides of 1."""
    generator = torch.Generator().manual_seed(seed)
    grads = torch.randn(shape, generator=generator, dtype=torch.float64)
    size = torch.rand(shape[0], generator=generator, dtype=torch.float64) * 2 / math.sqrt(max(1, math.prod(shape[1:])))
    return (grads * size.view(-1, *[1] * (len(shape) - 1))).to(dtype)


def draw_mix(batch: int, dtype: torch.dtype) -> Tensor:
    """0, 1, and numbers between."""
    mix = torch.rand(batch, generator=torch.Generator().manual_seed(1), dtype=wide(dtype))
    mix[0] = 0
    mix[-1] = 1
    return mix


def torch_penalty(grads: Tensor, kind: str, weight: float, target: float, norm: str) -> tuple[Tensor, Tensor]:
    """What one writes in PyTorch."""
    dims = [1] if norm == "pixel" else list(range(1, grads.ndim))
    norms = torch.linalg.vector_norm(grads, dim=dims) if dims else grads.abs()
    if kind == "two-sided":
        return weight * (norms - target).square().mean(), norms
    if kind == "one-sided":
        return weight * (norms - target).clamp_min(0).square().mean(), norms
    if kind == "squared":
        return weight * norms.square().mean() / 2, norms
    return weight * (norms.amax() - target).square(), norms


def torch_penalize(
    grads: Tensor, kind: str, weight: float, target: float, norm: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(penalty, norms, cotangent) by PyTorch and its autograd, in `dtype`."""
    leaf = grads.detach().to(dtype, copy=True).requires_grad_()
    penalty, norms = torch_penalty(leaf, kind, weight, target, norm)
    return penalty.detach(), norms.detach(), torch.autograd.grad(penalty, leaf)[0]


def compare(
    ours: tuple[Tensor, Tensor, Tensor], grads: Tensor, kind: str, weight: float, target: float, norm: str
) -> None:
    dtype = wide(grads.dtype)
    penalty, norms, cotangent = ours
    assert penalty.dtype == norms.dtype == dtype
    assert cotangent.dtype == grads.dtype
    truth = torch_penalize(grads, kind, weight, target, norm, torch.float64)
    peer = torch_penalize(grads, kind, weight, target, norm, dtype)
    largest = float(truth[1].max())
    # A norm is one square root of a sum that is taken in double (for float64: in 4 or more lanes, so off by at most
    # (n / 4 + 4) / 2 roundings relative to the norm), and is rounded once.
    n = grads.shape[1] if norm == "pixel" else grads[0].numel()
    of_norm = 2.0 if dtype == torch.float32 else n / 8 + 4
    assert_as_accurate(norms, peer[1], truth[1], roundings=of_norm)
    # (n - t)^2 of a norm off by e is off by 2 |n - t| e, summands of one sign, and rounded a few times.
    excess = largest + target
    assert_as_accurate(penalty, peer[0], truth[0], roundings=4 * of_norm, scale=weight * excess**2)
    # An entry is at most the slope, 2 weight / N (n - t): of a norm off by e, and the product of three rounded numbers,
    # rounded to the dtype of the gradients.
    count = 1 if kind == "max" else norms.numel()
    to_storage = torch.finfo(dtype).eps / torch.finfo(grads.dtype).eps
    scale = 2 * weight / count * excess * to_storage + float(truth[2].abs().max())
    assert_as_accurate(cotangent, peer[2].to(grads.dtype), truth[2], roundings=2 * of_norm + 4, scale=scale)


def check_penalty(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    grads = draw(shape, dtype)
    before = grads.clone()
    for norm in NORMS if len(shape) > 1 else NORMS[:1]:
        for kind in KINDS:
            compare(penalize(grads, kind, 3.0, 0.7, norm, backend=backend), grads, kind, 3.0, 0.7, norm)
    assert torch.equal(grads, before), "the input was changed"


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_penalty(isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check_penalty("native", dtype, shape)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("shape", [(7,), (5, 4), (3, 5, 3), (2, 3, 5, 7)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_penalty_of_other_backends(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check_penalty(backend, dtype, shape)


def check_interpolation(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    real, fake, mix = draw(shape, dtype), draw(shape, dtype, 1), draw_mix(shape[0], dtype)
    x_hat = interpolate(real, fake, mix, backend=backend)
    column = mix.view(-1, *[1] * (len(shape) - 1))
    truth = column.double() * real.double() + (1 - column.double()) * fake.double()
    peer = torch.lerp(fake.to(mix.dtype), real.to(mix.dtype), column).to(dtype)
    scale = float(torch.maximum(real.abs(), fake.abs()).max())
    # 1 - mix, two products, a sum: each rounded in the accumulation dtype; then one rounding on store.
    assert_as_accurate(x_hat, peer, truth, roundings=4, scale=scale)
    assert torch.equal(x_hat[-1], real[-1])
    if shape[0] > 1:
        assert torch.equal(x_hat[0], fake[0])


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_interpolation(isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check_interpolation("native", dtype, shape)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("shape", [(7,), (5, 4), (2, 3, 5, 7)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_interpolation_of_other_backends(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check_interpolation(backend, dtype, shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [3, 40])
def test_interpolation_at_its_ends_is_the_sample_bit_by_bit(backend: str, width: int) -> None:
    # A zero keeps its sign, and the sample that does not count may be infinite.
    own = torch.tensor([0.0, -0.0, 1.5]).repeat(width)[:width].expand(2, width)
    other = torch.tensor([math.inf, 1.0, math.nan]).repeat(width)[:width].expand(2, width)
    for real, fake, mix in ((own, other, torch.ones(2)), (other, own, torch.zeros(2))):
        x_hat = interpolate(real, fake, mix, backend=backend)
        assert torch.equal(x_hat.view(torch.int32), own.contiguous().view(torch.int32))


# ---- layouts ----


def with_strides(tensor: Tensor, order: list[int], step: int) -> Tensor:
    """The same values behind other strides: permuted storage, and every other element of a larger tensor."""
    storage = tensor.permute(*order).contiguous().repeat_interleave(step, dim=0)[::step]
    return storage.permute(*[order.index(k) for k in range(tensor.ndim)])


@pytest.mark.backend("native")
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=5).map(tuple),
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    backend=st.sampled_from(["reference", "native"]),
)
@settings(max_examples=120, deadline=None)
def test_any_shape_and_strides(
    shape: tuple[int, ...], data: st.DataObject, dtype: torch.dtype, kind: str, backend: str
) -> None:
    norm = data.draw(st.sampled_from(NORMS if len(shape) > 1 else NORMS[:1]))
    order = data.draw(st.permutations(range(len(shape))))
    grads = draw(shape, dtype)
    strided = with_strides(grads, order, data.draw(st.integers(1, 2)))
    assert torch.equal(strided, grads)
    ours = penalize(strided, kind, 2.0, 0.5, norm, backend=backend)
    compare(ours, grads, kind, 2.0, 0.5, norm)
    fake, mix = draw(shape, dtype, 1), draw_mix(shape[0], dtype)
    dense = interpolate(grads, fake, mix, backend=backend)
    mixed = interpolate(strided, with_strides(fake, order, 1), mix, backend=backend)
    # Another order of the elements takes them through other lanes, where a product and a sum may be fused or not.
    assert max_error(mixed, dense) <= 2 * torch.finfo(dtype).eps * float(torch.maximum(grads.abs(), fake.abs()).max())
    # The layout of the result is the one that the fake implementation announces.
    with FakeTensorMode() as mode:
        announced = penalize(mode.from_tensor(strided), kind, 2.0, 0.5, norm)
        announced_mixed = interpolate(mode.from_tensor(strided), mode.from_tensor(strided), mode.from_tensor(mix))
    for real, expected in zip(ours, announced, strict=True):
        assert (real.shape, real.stride(), real.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert interpolate(strided, strided, mix, backend=backend).stride() == announced_mixed.stride()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("shape", "layout"), [((3, 5, 4, 2), torch.channels_last), ((2, 3, 2, 2, 3), torch.channels_last_3d)]
)
def test_channels_last_stays_channels_last(
    backend: str, norm: str, shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    grads = draw(shape, torch.float32)
    last = grads.contiguous(memory_format=layout)
    penalty, norms, cotangent = penalize(last, "two-sided", 1.0, 1.0, norm, backend=backend)
    assert cotangent.is_contiguous(memory_format=layout)
    assert norms.is_contiguous()
    compare((penalty, norms, cotangent), grads, "two-sided", 1.0, 1.0, norm)
    fake, mix = draw(shape, torch.float32, 1), draw_mix(shape[0], torch.float32)
    x_hat = interpolate(last, fake.contiguous(memory_format=layout), mix, backend=backend)
    assert x_hat.is_contiguous(memory_format=layout)
    assert max_error(x_hat, interpolate(grads, fake, mix, backend=backend)) <= 1e-6


# ---- numbers ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS)
def test_zero_gradients(backend: str, dtype: torch.dtype, kind: str, norm: str) -> None:
    grads = torch.zeros(3, 4, 2, dtype=dtype)
    grads[1, :, 1] = 0.5  # a norm of 1 among norms of 0
    penalty, norms, cotangent = penalize(grads, kind, 2.0, 0.25, norm, backend=backend)
    assert penalty.isfinite()
    assert norms[0].eq(0).all()
    assert cotangent[0].eq(0).all()
    assert cotangent[2].eq(0).all()
    # The slopes by hand: 2 weight / N (1 - target), and weight / N times the norm.
    count = 1 if kind == "max" else norms.numel()
    expected = 2.0 / count * (1.0 if kind == "squared" else 2 * 0.75) * 0.5
    torch.testing.assert_close(cotangent[1, :, 1].double(), torch.full((4,), expected).double(), rtol=1e-2, atol=0)
    penalty, _, cotangent = penalize(torch.zeros_like(grads), kind, 2.0, 0.25, norm, backend=backend)
    assert float(penalty) == {"two-sided": 0.125, "one-sided": 0.0, "squared": 0.0, "max": 0.125}[kind]
    assert not cotangent.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        *((torch.float32, scale) for scale in (1e-36, 1e-30, 1e-22, 1e18, 1e30, 1e37)),
        *((torch.float64, scale) for scale in (1e-300, 1e-200, 1e-150, 1e160, 1e300)),
        *((torch.bfloat16, scale) for scale in (1e-30, 1e30)),
    ],
)
def test_norms_whose_squares_leave_the_range(backend: str, norm: str, dtype: torch.dtype, scale: float) -> None:
    grads = (torch.randn(3, 5, 4, dtype=torch.float64) * scale).to(dtype)
    _, norms, cotangent = penalize(grads, "two-sided", 1.0, 0.0, norm, backend=backend)
    dims = [1] if norm == "pixel" else [1, 2]
    exact = torch.linalg.vector_norm(grads.double() / scale, dim=dims)
    eps = torch.finfo(norms.dtype).eps
    assert max_error(norms.double() / scale, exact) <= 8 * eps * float(exact.max())
    # With the target 0 the cotangent is the gradient times 2 / N, whatever the norm.
    expected = grads.double() / scale * (2 / norms.numel())
    tolerance = 8 * max(eps, torch.finfo(dtype).eps) * float(expected.abs().max())
    assert max_error(cotangent.double() / scale, expected) <= tolerance


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nonfinite_gradients_reach_the_penalty(backend: str, kind: str, norm: str, poison: float) -> None:
    grads = draw((4, 5, 3), torch.float32)
    clean = penalize(grads, kind, 1.0, 1.0, norm, backend=backend)
    grads[2, 1, 1] = poison
    penalty, norms, cotangent = penalize(grads, kind, 1.0, 1.0, norm, backend=backend)
    assert math.isnan(penalty) if math.isnan(poison) else not penalty.isfinite()
    assert int((~norms.isfinite()).sum()) == 1
    assert not cotangent[2].isfinite().all()
    if kind != "max":
        assert torch.equal(cotangent[0], clean[2][0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(4, 3), (2, 2, 3, 2)])
def test_norms_that_share_the_maximum_share_its_gradient_as_amax_does(backend: str, shape: tuple[int, ...]) -> None:
    for norm in NORMS:
        grads = draw(shape, torch.float64) * 0.01
        grads[0] = grads[-1] = 1.0
        compare(penalize(grads, "max", 3.0, 0.5, norm, backend=backend), grads, "max", 3.0, 0.5, norm)


@pytest.mark.backend("native")
@pytest.mark.parametrize("kind", KINDS)
def test_result_does_not_depend_on_the_number_of_threads(kind: str) -> None:
    before = torch.get_num_threads()
    try:
        # Whole rows, pieces of few rows, short rows, columns; all of them large enough for several threads.
        for shape, norm in (
            ((64, 8191), "sample"),
            ((3, 200_003), "sample"),
            ((100_003, 3), "sample"),
            ((5, 3, 40_001), "pixel"),
        ):
            grads = draw(shape, torch.float32)
            results = []
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                mix = draw_mix(shape[0], torch.float32)
                result = penalize(grads, kind, 2.0, 0.9, norm, backend="native")
                results.append((*result, interpolate(grads, -grads, mix, backend="native")))
            for result in results[1:]:
                for ours, first in zip(result, results[0], strict=True):
                    assert torch.equal(ours, first)
            compare(results[0][:3], grads, kind, 2.0, 0.9, norm)
    finally:
        torch.set_num_threads(before)


def test_large_outputs_that_bypass_the_caches(isa: str) -> None:
    # Beyond 32 MB the stores are streamed; an odd width puts rows across cache lines.
    grads = draw((2900, 3001), torch.float32)
    norms = grads.double().norm(dim=1)
    expected = grads.double() * (2 / 2900 * (norms - 1) / norms).unsqueeze(1)
    penalty, _, cotangent = penalize(grads, "two-sided", 1.0, 1.0, "sample", backend="native")
    eps = torch.finfo(torch.float32).eps
    assert max_error(cotangent, expected) <= 8 * eps * float(expected.abs().max())
    assert abs(float(penalty) - float((norms - 1).square().mean())) <= 2 * eps
    pixel = penalize(grads.view(29, 100, 3001), "squared", 290.0, 0.0, "pixel", backend="native")[2]
    assert max_error(pixel.view(2900, 3001), grads * (290.0 / (29 * 3001))) <= 2 * eps * float(grads.abs().max())
    mix = draw_mix(2900, torch.float32)
    x_hat = interpolate(grads, grads.neg(), mix, backend="native")
    truth = grads.double() * (2 * mix.double() - 1).unsqueeze(1)
    assert max_error(x_hat, truth) <= 4 * eps * float(grads.abs().max())


def test_calls_from_several_threads_at_once() -> None:
    grads = [draw((3, 70_000), torch.float32, seed) for seed in range(8)]
    expected = [penalize(g, "max", 1.0, 1.0, "sample") for g in grads]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            results = pool.map(lambda g: penalize(g, "max", 1.0, 1.0, "sample"), grads)
            for ours, first in zip(results, expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, first, strict=True))


@pytest.mark.backend("native")
def test_memory_of_outputs_is_reused() -> None:
    grads = draw((64, 1024), torch.float32)
    empty_cache()
    address = penalize(grads, "squared", 1.0, 0.0, "sample")[2].data_ptr()
    assert _C.cached_bytes() >= grads.nbytes
    assert penalize(grads, "squared", 1.0, 0.0, "sample")[2].data_ptr() == address


# ---- autograd ----


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS)
def test_first_and_second_order_gradients(backend: str, kind: str, norm: str) -> None:
    grads = (draw((4, 3, 2), torch.float64) + 0.3).requires_grad_()

    def penalty(grads: Tensor) -> Tensor:
        return gradient_penalty(grads, kind, weight=3.0, target=0.7, norm=norm, backend=backend)[0]

    assert torch.autograd.gradcheck(penalty, grads)
    assert torch.autograd.gradgradcheck(penalty, grads)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_zero_are_zero_in_both_orders(kind: str) -> None:
    grads = torch.zeros(3, 4, requires_grad=True)
    penalty, _ = gradient_penalty(grads, kind)
    (first,) = torch.autograd.grad(penalty, grads, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), grads)
    assert not first.any()
    assert second.isfinite().all()


def test_gradients_of_half_types_and_of_a_weighted_sum() -> None:
    for dtype in DTYPES:
        grads = draw((4, 6), dtype).requires_grad_()
        penalty, norms = gradient_penalty(grads, weight=2.0)
        assert not norms.requires_grad
        (ours,) = torch.autograd.grad(3 * penalty + 1, grads)
        assert ours.dtype == dtype
        _, _, cotangent = penalize(grads.detach(), "two-sided", 2.0, 1.0, "sample")
        assert torch.equal(ours, (3.0 * cotangent.to(wide(dtype))).to(dtype))


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_gradients_of_interpolation(backend: str) -> None:
    real, fake = (draw((4, 3, 2), torch.float64, seed).requires_grad_() for seed in range(2))
    mix = draw_mix(4, torch.float64)
    function = lambda *samples: interpolate(*samples, mix, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(function, (real, fake))
    assert torch.autograd.gradgradcheck(function, (real, fake))
    # One of the two alone, and half types.
    (grad,) = torch.autograd.grad(interpolate(real.detach(), fake, mix, backend=backend).sum(), fake)
    assert torch.equal(grad, (1 - mix).view(-1, 1, 1).expand_as(grad))
    half = real.detach().half().requires_grad_()
    (grad,) = torch.autograd.grad(interpolate(half, half.detach(), mix.float(), backend=backend).sum(), half)
    assert grad.dtype == torch.float16
    assert not interpolate(real.detach(), fake.detach(), mix).requires_grad
    with torch.no_grad():
        assert not interpolate(real, fake, mix).requires_grad


def test_function_transforms() -> None:
    grads, other, mix = draw((5, 7), torch.float64), draw((5, 7), torch.float64, 1), draw_mix(5, torch.float64)

    def loss(real: Tensor) -> Tensor:
        return gradient_penalty(interpolate(real, other, mix), "two-sided")[0]

    leaf = grads.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(grads), torch.autograd.grad(loss(leaf), leaf)[0])


@pytest.mark.hardware
def test_compiled_without_a_graph_break() -> None:
    real, fake, mix = draw((5, 7), torch.float32), draw((5, 7), torch.float32, 1), draw_mix(5, torch.float32)

    def loss(real: Tensor) -> Tensor:
        return gradient_penalty(interpolate(real, fake, mix), "one-sided", weight=2.0)[0]

    leaf = real.clone().requires_grad_()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(leaf)
    torch.testing.assert_close(compiled, loss(leaf))
    ours, theirs = torch.autograd.grad(compiled, leaf)[0], torch.autograd.grad(loss(leaf), leaf)[0]
    torch.testing.assert_close(ours, theirs)


# ---- the dispatcher ----


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("norm", NORMS)
def test_opcheck(backend: str | None, norm: str) -> None:
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    for grads in (
        draw((3, 4, 5, 2), torch.float32),
        draw((3, 4, 5, 2), torch.bfloat16).contiguous(memory_format=torch.channels_last),
        draw((3, 4, 5), torch.float64).transpose(0, 2),
    ):
        torch.library.opcheck(
            torch.ops.lipgan.gradient_penalty_fwd.default,
            (grads, "two-sided", 2.0, 1.0, norm, backend),
            test_utils=checks,
        )
        mix = draw_mix(grads.shape[0], grads.dtype)
        torch.library.opcheck(
            torch.ops.lipgan.gradient_penalty_interpolate.default, (grads, -grads, mix, backend), test_utils=checks
        )


def test_modes_and_the_profiler_see_the_ops() -> None:
    class Names(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    grads, mix = draw((4, 6), torch.float32), draw_mix(4, torch.float32)
    with Names() as mode:
        gradient_penalty(interpolate(grads, -grads, mix))
    assert "lipgan.gradient_penalty_interpolate.default" in mode.names
    assert "lipgan.gradient_penalty_fwd.default" in mode.names
    with torch.profiler.profile() as profile:
        gradient_penalty(grads)
    assert "lipgan::gradient_penalty_fwd" in {event.key for event in profile.key_averages()}


# ---- bad input ----


def mixing(**changes: object) -> Callable[[], object]:
    arguments: dict[str, object] = {"real": torch.ones(4, 6), "fake": torch.ones(4, 6), "mix": torch.ones(4), **changes}
    return lambda: interpolate(**arguments)  # type: ignore[arg-type]


def penalizing(**changes: object) -> Callable[[], object]:
    arguments: dict[str, object] = {"grads": torch.ones(4, 6), **changes}
    return lambda: gradient_penalty(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (mixing(fake=torch.ones(4, 5)), ValueError, r"fake must have the shape of real, \(4, 6\), got \(4, 5\)"),
        (mixing(fake=torch.ones(4, 6).double()), TypeError, "fake must have the dtype of real, .* got torch.float64"),
        (
            mixing(fake=torch.ones(4, 6, device="meta")),
            ValueError,
            f"fake must be on the device .* {DEVICE}, got meta",
        ),
        (mixing(mix=torch.ones(4, 1)), ValueError, r"mix must have shape \(4,\), .* got \(4, 1\)"),
        (mixing(mix=torch.ones(4).double()), TypeError, "mix must be torch.float32 .* got torch.float64"),
        (
            mixing(mix=torch.ones(4, device="meta")),
            ValueError,
            f"mix must be on the device .* {DEVICE}, got meta",
        ),
        (mixing(real=torch.ones(4, 6).long()), TypeError, "real must be float32, .* got torch.int64"),
        (mixing(real=torch.ones(0, 6)), ValueError, r"real must hold at least one sample, .* got shape \(0, 6\)"),
        (mixing(real=torch.tensor(1.0)), ValueError, r"real must hold at least one sample, .* got shape \(\)"),
        (mixing(backend="fast"), ValueError, "backend must be one of reference, native, triton, cuda, got 'fast'"),
        (mixing(backend="cuda"), UnavailableError, f"backend 'cuda' cannot serve interpolate on {DEVICE.type}"),
        (penalizing(kind="r1"), ValueError, "kind must be one of two-sided, one-sided, squared, max, got 'r1'"),
        (penalizing(norm="image"), ValueError, "norm must be one of sample, pixel, got 'image'"),
        (penalizing(weight=math.inf), ValueError, "weight must be finite, got inf"),
        (penalizing(weight=math.nan), ValueError, "weight must be finite, got nan"),
        (penalizing(target=-0.5), ValueError, "target must be finite and not negative, got -0.5"),
        (penalizing(target=math.inf), ValueError, "target must be finite and not negative, got inf"),
        (penalizing(target=math.nan), ValueError, "target must be finite and not negative, got nan"),
        (penalizing(grads=torch.ones(4, 6).int()), TypeError, "grads must be float32, .* got torch.int32"),
        (penalizing(grads=torch.ones(4, 6).cfloat()), TypeError, "grads must be float32, .* got torch.complex64"),
        (penalizing(grads=torch.ones(0, 6)), ValueError, r"grads must hold at least one sample, .* \(0, 6\)"),
        (penalizing(grads=torch.ones(4), norm="pixel"), ValueError, r"grads must have at least 2 dimensions .* \(4,\)"),
        (penalizing(backend="fast"), ValueError, "backend must be one of reference, native, triton, cuda, got 'fast'"),
    ],
)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.cpu
@pytest.mark.backend("native")
def test_native_module_refuses_what_a_kernel_could_not_survive() -> None:
    samples, mix = torch.ones(4, 6), torch.ones(4)
    for real, fake, weights, message in (
        (samples, samples[:, :5], mix, "fake must have the shape of real"),
        (samples, samples.double(), mix, "fake has a dtype"),
        (samples.int(), samples.int(), mix, "real must be float32"),
        (samples[:0], samples[:0], mix[:0], "real must hold at least one sample"),
        (samples, samples, mix[:3], "mix must hold 4 elements, got 3"),
        (samples, samples, mix.double(), "mix has a dtype"),
        (samples.half(), samples.half(), mix.half(), "mix has a dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.gradient_penalty_interpolate(real, fake, weights, 1)
    for grads, kind, norm, message in (
        (samples, "r1", "sample", "kind must be one of .* got 'r1'"),
        (samples, "max", "image", "norm must be one of sample, pixel, got 'image'"),
        (samples[:, :0], "max", "sample", "grads must hold at least one sample"),
        (torch.tensor(1.0), "max", "sample", "grads must hold at least one sample"),
        (mix, "max", "pixel", "at least 2 dimensions"),
        (samples.long(), "max", "sample", "grads must be float32"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.gradient_penalty_fwd(grads, kind, 1.0, 1.0, norm, 1)
    with pytest.raises(TypeError, match="grads must be a tensor"):
        _C.gradient_penalty_fwd(1.5, "max", 1.0, 1.0, "sample", 1)  # type: ignore[arg-type]


def test_the_norm_of_a_long_row_is_rounded_little(isa: str) -> None:
    """Equal numbers, whose sum one by one drifts to one side: by 360 units with the vectors of AVX2."""
    for c in (0.1, 0.3, 0.7, 1.1, 1.3):
        _, norms = gradient_penalty(torch.full((1, 65536), c, dtype=torch.float64), "two-sided", backend="native")
        assert abs(Fraction(norms.item()) / Fraction(c) / 256 - 1) < 16 * Fraction(2) ** -53
