"""The op spectral_norm: every backend against a float64 truth, SciPy and PyTorch; gradients; bad input."""

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from devices import DEVICE
from grouped import assert_double_accurate, double_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_accurate, max_error
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import reduce_storage
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lipgan.ops import (
    UnavailableError,
    _backend,
    empty_cache,
    explain,
    interpolate,
    resolve,
    spectral_norm,
    spectral_norm_group,
    use_backend,
)
from lipgan.ops._address import address
from lipgan.ops.spectral_norm import autograd, backends
from lipgan.ops.spectral_norm.layout import memory_order

_C: Any = _backend.native()  # None where it was not built: its tests are skipped then

BACKENDS = ["reference", "native", "triton"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

# Shape and dim. Sizes around the 16 lanes of a register and the 8 rows of a sweep; dims in front, behind, between.
SHAPES = [
    ((1, 1), 0),
    ((1, 37), 0),
    ((37, 1), 0),
    ((7, 15), 0),
    ((8, 16), 0),
    ((9, 17), 0),
    ((13, 31), 0),
    ((65, 33), 0),
    ((5, 3, 3, 3), 0),
    ((11, 6), 1),
    ((6, 5, 4, 4), 1),
    ((3, 4, 5), 2),
]


def draw(shape: tuple[int, ...], dim: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, and unit vectors u and v that are not yet singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    h = shape[dim]
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    u = F.normalize(torch.randn(h, generator=generator, dtype=torch.float64), dim=0)
    v = F.normalize(torch.randn(math.prod(shape) // h, generator=generator, dtype=torch.float64), dim=0)
    return weight.to(dtype), u.to(dtype), v.to(dtype)


def torch_spectral_norm(
    weight: Tensor, u: Tensor, v: Tensor, iterations: int, eps: float, dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The steps of torch.nn.utils.parametrizations.spectral_norm, in the dtype of the weight."""
    matrix = weight.movedim(dim, 0).flatten(1)
    with torch.no_grad():
        for _ in range(iterations):
            u = F.normalize(matrix @ v, dim=0, eps=eps)
            v = F.normalize(matrix.T @ u, dim=0, eps=eps)
    sigma = torch.vdot(u, matrix @ v)
    return weight / sigma, sigma, u, v


def floor(weight: Tensor, dim: int, sigma: Tensor) -> float:
    """Roundings that the a priori bound of docs/numerics/spectral_norm.md allows.

    A sum of n products in 4 or more lanes is off by at most (n / 4 + 4) eps |x| |y|, so W v by that times |W|_F: times
    |W|_F / sigma relative to its norm. Two such products follow each other, and a handful of single roundings.
    """
    h = weight.shape[dim]
    n = max(h, weight.numel() // h)
    return 2 * (n / 4 + 4) * float(weight.double().norm() / sigma.double().abs()) + 8


def compare(
    ours: tuple[Tensor, ...], weight: Tensor, u: Tensor, v: Tensor, iterations: int, dim: int, eps: float = 1e-12
) -> None:
    truth = torch_spectral_norm(weight.double(), u.double(), v.double(), iterations, eps, dim)
    peer = torch_spectral_norm(weight, u, v, iterations, eps, dim)
    y, sigma, new_u, new_v = ours
    assert y.dtype == new_u.dtype == new_v.dtype == weight.dtype
    assert sigma.dtype == (torch.float64 if weight.dtype == torch.float64 else torch.float32)
    roundings = floor(weight, dim, truth[1])
    # sigma is returned in the accumulation dtype; for half types u and v are rounded after it was taken.
    assert_as_accurate(sigma, peer[1].to(sigma.dtype), truth[1], roundings=roundings)
    for value, theirs, exact in ((y, peer[0], truth[0]), (new_u, peer[2], truth[2]), (new_v, peer[3], truth[3])):
        assert_as_accurate(value, theirs, exact, roundings=roundings)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_forward(isa: str, dtype: torch.dtype, shape: tuple[int, ...], dim: int, iterations: int) -> None:
    weight, u, v = draw(shape, dim, dtype)
    before = [tensor.clone() for tensor in (weight, u, v)]
    ours = spectral_norm(weight, u, v, iterations, dim=dim, backend="native")
    compare(ours, weight, u, v, iterations, dim)
    for tensor, copy in zip((weight, u, v), before, strict=True):
        assert torch.equal(tensor, copy), "an input was changed"


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("iterations", [0, 2])
@pytest.mark.parametrize(("shape", "dim"), [SHAPES[2], SHAPES[6], SHAPES[10]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_of_other_backends(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...], dim: int, iterations: int
) -> None:
    weight, u, v = draw(shape, dim, dtype)
    compare(spectral_norm(weight, u, v, iterations, dim=dim, backend=backend), weight, u, v, iterations, dim)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_backward(isa: str, dtype: torch.dtype, shape: tuple[int, ...], dim: int) -> None:
    check_backward("native", dtype, shape, dim)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("shape", "dim"), [SHAPES[2], SHAPES[6], SHAPES[10]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_of_other_backends(backend: str, dtype: torch.dtype, shape: tuple[int, ...], dim: int) -> None:
    check_backward(backend, dtype, shape, dim)


def check_backward(backend: str, dtype: torch.dtype, shape: tuple[int, ...], dim: int) -> None:
    weight, u, v = draw(shape, dim, dtype)
    grad_y = torch.randn(shape, dtype=torch.float64).to(dtype)
    # The same u and v for all, so that only the backward differs.
    _, _, u, v = torch_spectral_norm(weight.double(), u.double(), v.double(), 5, 1e-12, dim)
    u, v = u.to(dtype), v.to(dtype)

    def gradient(function: Callable[..., tuple[Tensor, ...]], wide: bool) -> Tensor:
        tensors = [t.double() if wide else t for t in (weight, u, v, grad_y)]
        w = tensors[0].clone().requires_grad_()
        y = function(w, tensors[1], tensors[2])[0]
        return torch.autograd.grad(y, w, tensors[3])[0]

    def theirs(w: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return torch_spectral_norm(w, u, v, 0, 1e-12, dim)

    def ours(w: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return spectral_norm(w, u, v, 0, dim=dim, backend=backend)

    truth = gradient(theirs, wide=True)
    sigma = torch_spectral_norm(weight.double(), u.double(), v.double(), 0, 1e-12, dim)[1]
    # dY cancels against its part along u v^T, which is at most |dY|_F |Y|_F large; floor() holds |Y|_F.
    scale = float(grad_y.double().norm() / sigma.abs())
    mine, peer = gradient(ours, wide=False), gradient(theirs, wide=False)
    assert_as_accurate(mine, peer, truth, roundings=floor(weight, dim, sigma), scale=scale)


# Shape, the order of the dimensions in memory, dim: weights whose memory is not that of their matrix. Two tiles of
# columns and three blocks of rows; channels last; transposed convolutions; one that is copied; a plain one.
LAYOUTS: list[tuple[tuple[int, ...], tuple[int, ...], int]] = [
    ((9, 10, 103), (0, 2, 1), 0),
    ((8, 16, 3, 2), (0, 2, 3, 1), 0),
    ((70, 17, 8), (0, 1, 2), 1),
    ((2, 17, 3, 4), (0, 2, 3, 1), 1),
    ((16, 3), (1, 0), 0),
    ((4, 3, 2, 5), (0, 2, 1, 3), 0),
    ((1, 3, 2), (0, 2, 1), 0),
    ((5, 7), (0, 1), 0),
]
# And, for the forward, two tiles of columns of a transposed matrix.
FORWARD_LAYOUTS = [*LAYOUTS, ((560, 9), (0, 1), 1)]


def laid(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same values, with the dimensions in that order in memory."""
    return tensor.permute(order).contiguous().permute([order.index(d) for d in range(len(order))])


def laid_group(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]:
    """Weights of all the layouts, u, v and dims."""
    layers = [draw(shape, dim, dtype, seed) for seed, (shape, _, dim) in enumerate(FORWARD_LAYOUTS)]
    weights, us, vs = (list(column) for column in zip(*layers, strict=True))
    weights = [laid(weight, order) for weight, (_, order, _) in zip(weights, FORWARD_LAYOUTS, strict=True)]
    return weights, us, vs, [dim for *_, dim in FORWARD_LAYOUTS]


def strides(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Those of the sizes beyond 1: others say nothing."""
    return [[n for n, size in zip(x.stride(), x.shape, strict=True) if size > 1] for x in tensors]


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("iterations", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_of_weights_that_lie_otherwise(backend: str, dtype: torch.dtype, iterations: int) -> None:
    weights, us, vs, dims = laid_group(dtype)
    ys, sigma, new_us, new_vs = spectral_norm_group(weights, us, vs, iterations, dims=dims, backend=backend)
    assert strides(ys) == strides(weights)
    for layer in zip(zip(ys, sigma, new_us, new_vs, strict=True), weights, us, vs, dims, strict=True):
        ours, weight, u, v, dim = layer
        compare(ours, weight, u, v, iterations, dim)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_derivatives_of_weights_that_lie_otherwise(backend: str, dtype: torch.dtype) -> None:
    shapes, dims = [shape for shape, *_ in LAYOUTS], [dim for *_, dim in LAYOUTS]
    *arrays, sigma, us, vs = double_inputs(shapes, dims, dtype)
    grads, grad_ys, ys = ([laid(x, order) for x, (_, order, _) in zip(xs, LAYOUTS, strict=True)] for xs in arrays)
    # Gradients that lie otherwise than Y.
    grads[0], grad_ys[2] = grads[0].contiguous(), laid(grad_ys[2], (1, 0, 2))
    uv = backends.join_vectors(us, vs)
    results = backends.double_bwd(grads, grad_ys, ys, sigma, uv, dims, backend)
    assert_double_accurate(results, (grads, grad_ys, ys, sigma, us, vs), dims)
    grad_sigma = torch.randn_like(sigma)
    found = backends.bwd(grad_ys, grad_sigma, ys, sigma, uv, dims, backend)
    assert strides(found) == strides(ys)
    peer = backends.bwd(grad_ys, grad_sigma, ys, sigma, uv, dims, "reference")
    wide = [[x.double() for x in xs] for xs in (grad_ys, ys)]
    truth = backends.bwd(wide[0], grad_sigma.double(), wide[1], sigma.double(), uv.double(), dims, "reference")
    for mine, theirs, exact, dy, y in zip(found, peer, truth, *wide, strict=True):
        # <dY, Y> is a sum of terms that cancel, in the accumulation dtype.
        narrow = torch.finfo(sigma.dtype).eps / torch.finfo(dtype).eps
        scale = float(exact.abs().max()) + narrow * float((dy * y).abs().sum()) * 4
        assert_as_accurate(mine, theirs, exact, roundings=8.0, scale=scale)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_have_the_memory_format_of_the_weight(backend: str) -> None:
    weight, u, v = draw((6, 5, 3, 3), 0, torch.float32)
    leaf = weight.to(memory_format=torch.channels_last).requires_grad_()
    y = spectral_norm(leaf, u, v, backend=backend)[0]
    y.square().sum().backward()
    for tensor in (y, leaf.grad):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "dim"), [((6, 9), 0), ((5, 3, 2), 1)])
def test_converged_iteration_gives_scipys_largest_singular_value(
    backend: str, shape: tuple[int, ...], dim: int
) -> None:
    weight, u, v = draw(shape, dim, torch.float64)
    matrix = weight.movedim(dim, 0).flatten(1)
    # Some hundred iterations; only the last two by a backend that is slow where there is no GPU.
    _, _, u, v = spectral_norm(weight, u, v, 400, dim=dim, backend="reference" if backend == "triton" else backend)
    y, sigma, _, _ = spectral_norm(weight, u, v, 2, dim=dim, backend=backend)
    expected = scipy.linalg.svdvals(matrix.numpy(force=True))[0]
    assert abs(float(sigma) - expected) <= 1e-12 * expected
    assert abs(scipy.linalg.svdvals(y.movedim(dim, 0).flatten(1).numpy(force=True))[0] - 1) <= 1e-12


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize(("shape", "dim"), [((5, 7), 0), ((1, 5), 0), ((4, 6), 1), ((3, 4, 3, 2), 1), ((3, 4, 2), 2)])
def test_first_and_second_order_gradients(backend: str, shape: tuple[int, ...], dim: int) -> None:
    weight, u, v = draw(shape, dim, torch.float64)
    _, _, u, v = spectral_norm(weight, u, v, 3, dim=dim)

    def function(w: Tensor) -> tuple[Tensor, Tensor]:
        y, sigma, _, _ = spectral_norm(w, u, v, 0, dim=dim, backend=backend)
        return y, sigma

    assert torch.autograd.gradcheck(function, weight.requires_grad_())
    assert torch.autograd.gradgradcheck(function, weight)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_second_order_is_as_accurate_as_the_reference(backend: str, dtype: torch.dtype) -> None:
    shapes, dims = [shape for shape, _ in SHAPES], [dim for _, dim in SHAPES]
    *arrays, sigma, us, vs = double_inputs(shapes, dims, dtype)
    # Gradients of other strides, as double backward gives them.
    arrays[0][6], arrays[1][9] = arrays[0][6].T.contiguous().T, arrays[1][9].T.contiguous().T
    results = backends.double_bwd(*arrays, sigma, backends.join_vectors(us, vs), dims, backend)
    assert_double_accurate(results, (*arrays, sigma, us, vs), dims)


@pytest.mark.backend("native")
@pytest.mark.parametrize("numel", [30_000, 1_200_000])
def test_second_order_of_blocks_and_threads(isa: str, numel: int) -> None:
    """Several blocks of rows and slabs, beyond the caches too, where stores are streamed."""
    w = 3001
    shapes, dims = [(numel // w, w), (numel // w // 8, 5, 8, 75)], [0, 1]
    inputs = double_inputs(shapes, dims, torch.float32)
    *arrays, sigma, us, vs = inputs
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(backends.double_bwd(*arrays, sigma, backends.join_vectors(us, vs), dims, "native"))
    finally:
        torch.set_num_threads(before)
    assert_double_accurate(results[0], inputs, dims, roundings=64.0)
    for mine, others in zip(*results, strict=True):
        assert all(map(torch.equal, mine, others))


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_order_where_sigma_counts_as_zero(backend: str) -> None:
    *arrays, sigma, us, vs = double_inputs([(5, 7), (4, 6)], [0, 0], torch.float32)
    sigma[0] = torch.finfo(torch.float32).tiny / 2
    to_grad_ys, to_ys, to_sigma, to_grad_sigma = backends.double_bwd(
        *arrays, sigma, backends.join_vectors(us, vs), [0, 0], backend
    )
    q = us[0] @ arrays[0][0] @ vs[0]
    torch.testing.assert_close(to_grad_ys[0], arrays[0][0] - q * arrays[2][0])
    torch.testing.assert_close(to_ys[0], -q * arrays[1][0])
    assert to_sigma[0] == 0
    assert to_sigma[1] != 0
    torch.testing.assert_close(to_grad_sigma[0], q)


@pytest.mark.backend("native")
@pytest.mark.parametrize("grouped", [False, True])
def test_a_penalty_through_the_normalization_takes_the_fused_second_order(
    grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradients are those of plain PyTorch, of each order; the third one is of PyTorch's operations."""
    calls: list[int] = []

    def counted(*args: Any) -> Any:
        if args[-1] == "native":
            calls.append(len(args[0]))
        return backends.double_bwd(*args)

    monkeypatch.setattr(autograd, "double_bwd", counted)
    layers = [draw(shape, 0, torch.float64, seed) for seed, shape in enumerate([(5, 4), (3, 5)])]
    weights, us, vs = (list(column) for column in zip(*layers, strict=True))
    weights = [weight.requires_grad_() for weight in weights]
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)

    def penalty(backend: str) -> Tensor:
        if grouped:
            ys, sigma, _, _ = spectral_norm_group(weights, us, vs, 0, backend=backend)
        else:
            alone = [spectral_norm(*layer, 0, backend=backend) for layer in zip(weights, us, vs, strict=True)]
            ys, sigma, _, _ = zip(*alone, strict=True)
        scores = torch.tanh(x @ ys[0].T) @ ys[1].T
        loss = scores.square().sum() + sigma[0] * sigma[1]
        grads = torch.autograd.grad(loss, [x, *weights], create_graph=True)
        return sum(grad.square().sum() for grad in grads)

    expected = torch.autograd.grad(penalty("reference"), weights)
    for mine, theirs in zip(torch.autograd.grad(penalty("native"), weights), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    assert calls == ([2] if grouped else [1, 1])
    third = [
        torch.autograd.grad(
            sum(g.square().sum() for g in torch.autograd.grad(penalty(backend), weights, create_graph=True)), weights
        )
        for backend in ("reference", "native")
    ]
    for mine, theirs in zip(*third, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_gradient_of_sigma_alone_and_of_some_layers_of_a_group() -> None:
    weights = [draw((4, 3), 0, torch.float64, seed)[0].requires_grad_() for seed in range(3)]
    us = [draw((4, 3), 0, torch.float64, seed)[1] for seed in range(3)]
    vs = [draw((4, 3), 0, torch.float64, seed)[2] for seed in range(3)]
    ys, sigma, us, vs = spectral_norm_group(weights, us, vs, 1)
    grads = torch.autograd.grad(sigma[1], weights, retain_graph=True)
    assert torch.allclose(grads[1], torch.outer(us[1], vs[1]))
    assert not grads[0].any()
    assert not grads[2].any()
    grads = torch.autograd.grad(ys[2].sum(), weights, allow_unused=True)
    assert grads[0] is None
    assert grads[1] is None
    alone = spectral_norm(weights[2], us[2], vs[2], 0)[0]
    assert torch.allclose(grads[2], torch.autograd.grad(alone.sum(), weights[2])[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_group_equals_its_layers_bit_by_bit(backend: str) -> None:
    shapes = [(5, 3), (1, 40), (33, 65), (7, 2, 3, 3)]
    layers = [draw(shape, 0, torch.float32, seed) for seed, shape in enumerate(shapes)]
    weights, us, vs = (list(column) for column in zip(*layers, strict=True))
    ys, sigma, new_us, new_vs = spectral_norm_group(weights, us, vs, 2, backend=backend)
    for layer, (weight, u, v) in enumerate(layers):
        y, s, new_u, new_v = spectral_norm(weight, u, v, 2, backend=backend)
        for grouped, single in ((ys[layer], y), (sigma[layer], s), (new_us[layer], new_u), (new_vs[layer], new_v)):
            assert torch.equal(grouped, single)


@pytest.mark.backend("native")
@pytest.mark.parametrize("shape", [(300, 1000), (40, 64, 3, 3), (1000, 300), (2, 300_000)])
@pytest.mark.parametrize("dim", [0, 1])
def test_result_does_not_depend_on_the_number_of_threads(shape: tuple[int, ...], dim: int) -> None:
    weight, u, v = draw(shape, dim, torch.float32)
    weight.requires_grad_()
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            y, sigma, new_u, new_v = spectral_norm(weight, u, v, 2, dim=dim, backend="native")
            results.append((y, sigma, new_u, new_v, torch.autograd.grad(y.square().sum(), weight)[0]))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for ours, first in zip(result, results[0], strict=True):
            assert torch.equal(ours, first)
    compare(results[0][:4], weight.detach(), u, v, 2, dim)


@pytest.mark.parametrize("numel", [9_000_000])
def test_large_outputs_that_bypass_the_caches(isa: str, numel: int) -> None:
    # Beyond 8 MB the stores are streamed; an odd width puts rows across cache lines.
    w = 3001
    weight, u, v = draw((numel // w, w), 0, torch.float32)
    weight.requires_grad_()
    y, sigma, new_u, new_v = spectral_norm(weight, u, v, 1, backend="native")
    assert torch.equal(y, weight.detach() * (1 / sigma.detach()))
    grad_y = torch.randn_like(y)
    grad = torch.autograd.grad(y, weight, grad_y)[0]
    along = (grad_y.double() * y.detach().double()).sum()
    truth = (grad_y.double() - along * torch.outer(new_u.double(), new_v.double())) / sigma.detach().double()
    # |dY| / sigma at most 6, a part along u v^T of that size, and three roundings of each.
    assert max_error(grad, truth) <= 8 * torch.finfo(torch.float32).eps * float(truth.abs().max())


@pytest.mark.backend("native")
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple),
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_strides_and_dim(shape: tuple[int, ...], data: st.DataObject, dtype: torch.dtype) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    order = data.draw(st.permutations(range(len(shape))))
    step = data.draw(st.integers(1, 2))
    weight, u, v = draw(shape, dim, dtype)
    # The same values behind other strides: permuted storage, and every other element of a larger tensor.
    storage = weight.permute(*order).contiguous().repeat_interleave(step, dim=0)[::step]
    strided = storage.permute(*[order.index(k) for k in range(len(shape))])
    assert torch.equal(strided, weight)
    strided_u = u.repeat_interleave(2)[::2]
    results = spectral_norm(strided, strided_u, v, 1, dim=dim, backend="native")
    assert strides([results[0]]) == strides([torch.empty_like(strided)])
    # What is read where it lies is summed up in the order in which it lies.
    if strided.is_contiguous() or memory_order(strided, dim % len(shape)) is None:
        assert all(map(torch.equal, results, spectral_norm(weight, u, v, 1, dim=dim, backend="native")))
    # A cancelled sigma makes the a priori bound useless.
    sigma = torch_spectral_norm(weight.double(), u.double(), v.double(), 1, 1e-12, dim)[1]
    if sigma.abs() > 0.1 * weight.double().norm():
        compare(spectral_norm(strided, u, v, 1, dim=dim, backend="native"), weight, u, v, 1, dim)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1])
def test_zero_matrix_gives_zeros_and_finite_gradients(backend: str, dtype: torch.dtype, dim: int) -> None:
    weight, u, v = draw((5, 12), dim, dtype)
    weight = torch.zeros_like(weight, requires_grad=True)
    for iterations in (0, 2):
        y, sigma, new_u, new_v = spectral_norm(weight, u, v, iterations, dim=dim, backend=backend)
        assert not y.any()
        assert sigma.item() == 0
        assert new_u.isfinite().all()
        assert new_v.isfinite().all()
        grad = torch.autograd.grad(y.sum() + sigma.to(y.dtype), weight)[0]
        assert grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_scales_far_from_one(backend: str, scale: float) -> None:
    weight, u, v = draw((19, 23), 0, torch.float32)
    y, sigma, _, _ = spectral_norm(weight * scale, u, v, 3, eps=1e-38, backend=backend)
    expected, expected_sigma, _, _ = spectral_norm(weight, u, v, 3, eps=1e-38, backend=backend)
    # The scaling itself rounds each entry once, and moves nothing else but the last places.
    assert max_error(y, expected) <= 32 * torch.finfo(torch.float32).eps
    assert abs(float(sigma) / scale / float(expected_sigma) - 1) <= 32 * torch.finfo(torch.float32).eps


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "largest", "eps"),
    [
        (torch.float32, 3.4e38, 1e-12),
        (torch.float32, 1e30, 1e-12),
        (torch.bfloat16, 3e38, 1e-12),
        (torch.float64, 1e155, 1e-12),
        (torch.float64, 1.7e308, 1e-12),
        (torch.float64, 1e-170, 1e-300),
    ],
)
@pytest.mark.parametrize(("shape", "dim"), [((19, 23), 0), ((5, 600), 0), ((6, 5, 4), 1), ((2, 1), 1)])
@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_weights_at_the_ends_of_the_range(
    backend: str, dtype: torch.dtype, largest: float, eps: float, shape: tuple[int, ...], dim: int, iterations: int
) -> None:
    weight, u, v = draw(shape, dim, torch.float64)
    weight = (weight / weight.abs().max() * largest).to(dtype)
    u, v = u.to(dtype), v.to(dtype)
    weight.requires_grad_()
    y, sigma, new_u, new_v = spectral_norm(weight, u, v, iterations, eps, dim, backend=backend)
    # The truth is that of the same weight, a power of two away.
    power = 2.0 ** -round(math.log2(largest))
    ordinary = weight.detach().double() * power
    truth = torch_spectral_norm(ordinary, u.double(), v.double(), iterations, 1e-300, dim)
    roundings = floor(ordinary, dim, truth[1]) + 8
    for ours, exact in ((y, truth[0]), (new_u, truth[2]), (new_v, truth[3])):
        bound = roundings * torch.finfo(sigma.dtype).eps + torch.finfo(dtype).eps
        assert max_error(ours, exact) <= bound * float(exact.abs().max())
    exact_sigma = float(truth[1]) / power  # a Python float: infinite beyond float64
    if abs(exact_sigma) <= torch.finfo(sigma.dtype).max:
        assert abs(float(sigma.detach()) / exact_sigma - 1) <= roundings * torch.finfo(sigma.dtype).eps
    else:
        assert float(sigma.detach()) == math.copysign(math.inf, exact_sigma)
    # Beyond the range of sigma the gradient is below that of W; it is 0, not NaN.
    (grad,) = torch.autograd.grad(y.sum(), weight)
    assert grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_at_the_end_of_the_range_leaves_its_group_alone(backend: str) -> None:
    layers = [draw((6, 10), 0, torch.float32, seed) for seed in range(3)]
    weights, us, vs = (list(column) for column in zip(*layers, strict=True))
    clean, clean_sigma, *_ = spectral_norm_group(weights, us, vs, 2, backend=backend)
    weights[1] = weights[1] / weights[1].abs().max() * 3e38
    ys, sigma, *_ = spectral_norm_group(weights, us, vs, 2, backend=backend)
    for layer in (0, 2):
        assert torch.equal(ys[layer], clean[layer])
        assert sigma[layer] == clean_sigma[layer]
    torch.testing.assert_close(ys[1], clean[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nonfinite_weights_propagate_within_their_layer(backend: str, poison: float) -> None:
    layers = [draw((6, 10), 0, torch.float32, seed) for seed in range(3)]
    weights, us, vs = (list(column) for column in zip(*layers, strict=True))
    clean, *_ = spectral_norm_group(weights, us, vs, 1, backend=backend)
    weights[1] = weights[1].clone()
    weights[1][2, 3] = poison
    ys, sigma, _, _ = spectral_norm_group(weights, us, vs, 1, backend=backend)
    theirs = torch_spectral_norm(weights[1], us[1], vs[1], 1, 1e-12, 0)
    assert torch.equal(ys[1].isfinite(), theirs[0].isfinite())
    assert not sigma[1].isfinite()
    assert torch.equal(ys[0], clean[0])
    assert torch.equal(ys[2], clean[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_eps_bounds_the_norm_from_below(backend: str) -> None:
    weight, u, v = draw((7, 9), 0, torch.float64)
    ours = spectral_norm(weight, u, v, 1, eps=100.0, backend=backend)
    for value, theirs in zip(ours, torch_spectral_norm(weight, u, v, 1, 100.0, 0), strict=True):
        assert torch.allclose(value, theirs, rtol=1e-12, atol=0)


def test_function_transforms() -> None:
    weight, u, v = draw((5, 7), 0, torch.float64)
    gradient = torch.func.grad(lambda w: spectral_norm(w, u, v, 0)[0].pow(3).sum())(weight)
    leaf = weight.clone().requires_grad_()
    assert torch.allclose(gradient, torch.autograd.grad(spectral_norm(leaf, u, v, 0)[0].pow(3).sum(), leaf)[0])


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2)])
def test_opcheck(backend: str | None, order: tuple[int, ...]) -> None:
    shapes = [((5, 7), 0), ((3, 4, 2), 1)]
    layers = [draw(shape, dim, torch.float32) for shape, dim in shapes]
    weights, us, vs = (list(column) for column in zip(*layers, strict=True))
    weights[1] = laid(weights[1], order)
    dims = [dim for _, dim in shapes]
    ys, sigma, us, vs = spectral_norm_group(weights, us, vs, 1, dims=dims)
    uv = torch.cat([us[0], vs[0], us[1], vs[1]])
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.lipgan.spectral_norm_fwd.default, (weights, us, vs, 1, 1e-12, dims, backend), test_utils=checks
    )
    for grad_sigma in (None, torch.ones(2)):
        torch.library.opcheck(
            torch.ops.lipgan.spectral_norm_bwd.default,
            (weights, grad_sigma, ys, sigma, uv, dims, backend),
            test_utils=checks,
        )


def _trained(order: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """A weight of 128 KB that lies in ``order``, with u and v."""
    weight, u, v = draw((128, 16, 4, 4), 0, torch.float32)
    return laid(weight, order).requires_grad_(), u, v


def _loss(weight: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A number of the normalized weight that keeps it for its own backward, and the normalized weight."""
    y = spectral_norm(weight, u, v, backend="native")[0]
    return (y * y).sin().sum() + y.pow(3).sum(), y


# Contiguous, channels last, transposed, and an order that the kernels read from a copy.
in_orders = pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 2, 3), (0, 2, 1, 3)], ids=str)


@pytest.mark.cpu
@pytest.mark.backend("native")
@in_orders
def test_gradient_takes_the_memory_of_a_normalized_weight_that_nobody_can_read_any_more(order: tuple[int, ...]) -> None:
    weight, u, v = _trained(order)
    y = spectral_norm(weight, u, v, backend="reference")[0]
    truth = torch.autograd.grad((y * y).sin().sum() + y.pow(3).sum(), weight)[0]
    loss, y = _loss(weight, u, v)
    y.untyped_storage()  # Python's object for the storage outlives its name
    address = y.data_ptr()
    del y
    (grad,) = torch.autograd.grad(loss, weight)
    assert (grad.data_ptr() == address) == (order != (0, 2, 1, 3))
    assert grad.stride() == weight.stride()
    assert not grad.requires_grad
    assert not grad._is_view()
    assert torch.allclose(grad, truth, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(loss, weight)


@pytest.mark.cpu
@pytest.mark.backend("native")
def test_gradients_of_a_group_take_the_memory_of_its_normalized_weights() -> None:
    orders = [(0, 2, 3, 1), (0, 1, 2, 3), (1, 0, 2, 3), (0, 2, 3, 1)]
    weights, us, vs = (list(column) for column in zip(*map(_trained, orders), strict=True))
    ys = spectral_norm_group(weights, us, vs, backend="reference")[0]
    truth = torch.autograd.grad(sum(y.pow(3).sum() for y in ys), weights)
    ys = spectral_norm_group(weights, us, vs, backend="native")[0]
    addresses, loss, kept = [y.data_ptr() for y in ys], sum(y.pow(3).sum() for y in ys), ys[3]
    before = kept.detach().clone()
    del ys
    grads = torch.autograd.grad(loss, weights)
    taken = [grad.data_ptr() == where for grad, where in zip(grads, addresses, strict=True)]
    assert taken == [True, True, True, False]
    assert torch.equal(kept, before)
    for grad, expected, weight in zip(grads, truth, weights, strict=True):
        assert grad.stride() == weight.stride()
        assert torch.allclose(grad, expected, rtol=1e-4, atol=1e-5)


def _in_hands(loss: Tensor, y: Tensor) -> Callable[[], Tensor]:
    return lambda: y


def _detached(loss: Tensor, y: Tensor) -> Callable[[], Tensor]:
    view = y.detach()
    return lambda: view


def _row(loss: Tensor, y: Tensor) -> Callable[[], Tensor]:
    row = y[3]
    return lambda: row


def _in_another_graph(loss: Tensor, y: Tensor) -> Callable[[], Tensor]:
    other = torch.ones_like(y).requires_grad_()
    product = (y.detach() * other).sum()
    return lambda: torch.autograd.grad(product, other)[0]


class _KeepsAttribute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x
        return x.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.expand_as(ctx.x)


def _in_an_attribute_of_a_function(loss: Tensor, y: Tensor) -> Callable[[], Tensor]:
    node: Any = _KeepsAttribute.apply(y).grad_fn  # type: ignore[no-untyped-call]
    return lambda: node.x


def _in_numpy(loss: Tensor, y: Tensor) -> Callable[[], Tensor]:
    array = y.detach().numpy()
    return lambda: torch.from_numpy(array)


def _storage(loss: Tensor, y: Tensor) -> Callable[[], Tensor]:
    storage, shape, strides = y.untyped_storage(), y.shape, y.stride()
    return lambda: torch.empty(0).set_(storage, 0, shape, strides)


def _in_another_process(loss: Tensor, y: Tensor) -> Callable[[], Tensor]:
    shape, strides = y.shape, y.stride()
    rebuild, arguments = reduce_storage(y.detach().untyped_storage())  # what a queue sends
    return lambda: torch.empty(0).set_(rebuild(*arguments), 0, shape, strides)


KEEPERS = [_in_hands, _detached, _row, _in_another_graph, _in_an_attribute_of_a_function, _in_numpy, _storage]
KEEPERS += [_in_another_process]


@pytest.mark.cpu
@pytest.mark.backend("native")
@in_orders
@pytest.mark.parametrize("keep", KEEPERS)
def test_normalized_weight_that_is_still_held_outlives_the_backward(
    keep: Callable[[Tensor, Tensor], Callable[[], Tensor]], order: tuple[int, ...]
) -> None:
    weight, u, v = _trained(order)
    loss, y = _loss(weight, u, v)
    before = y.detach().clone()
    held = keep(loss, y)
    del y
    torch.autograd.grad(loss, weight)
    assert torch.equal(held(), before[3] if keep is _row else before)


@pytest.mark.cpu
@pytest.mark.backend("native")
@in_orders
def test_graph_that_is_kept_keeps_the_normalized_weight(order: tuple[int, ...]) -> None:
    weight, u, v = _trained(order)
    loss = (spectral_norm(weight, u, v, backend="native")[0] * torch.arange(4)).sum()  # only its own backward holds Y
    grads = [torch.autograd.grad(loss, weight, retain_graph=retain)[0] for retain in (True, True, False)]
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


@pytest.mark.cpu
@pytest.mark.backend("native")
@in_orders
def test_what_hooks_have_saved_outlives_the_backward(order: tuple[int, ...]) -> None:
    weight, u, v = _trained(order)
    saved: list[Tensor] = []

    def pack(x: Tensor) -> int:
        saved.append(x.detach())
        return len(saved) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda index: saved[index]):
        loss = (spectral_norm(weight, u, v, backend="native")[0] * torch.arange(4)).sum()
    before = [x.clone() for x in saved]
    # In the backward two tensors have the memory of Y, as where no hook has saved it.
    torch.autograd.grad(loss, weight)
    assert all(torch.equal(x, kept) for x, kept in zip(saved, before, strict=True))


@pytest.mark.cpu
@pytest.mark.backend("native")
@in_orders
def test_hook_on_the_backward_cannot_take_the_gradient_for_the_normalized_weight(order: tuple[int, ...]) -> None:
    weight, u, v = _trained(order)
    loss, y = _loss(weight, u, v)
    node: Any = y.grad_fn
    node.register_hook(lambda *_: node.saved_tensors)
    del y
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, weight)


@pytest.mark.cpu
@pytest.mark.backend("native")
def test_modes_of_the_caller_do_not_change_how_holders_are_counted() -> None:
    class Keeps(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            kept.append(func(*args, **(kwargs or {})))
            return kept[-1]

    kept: list[object] = []
    alone = autograd._holders_of_saved.__wrapped__()
    with Keeps():
        assert autograd._holders_of_saved.__wrapped__() == alone


def bad(**changes: object) -> Callable[[], object]:
    weight, u, v = draw((4, 6), 0, torch.float32)
    arguments: dict[str, object] = {"weight": weight, "u": u, "v": v, **changes}
    return lambda: spectral_norm(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (bad(weight=torch.ones(3)), ValueError, r"weight must have at least 2 dimensions, got shape \(3,\)"),
        (bad(weight=torch.tensor(1.0)), ValueError, "weight must have at least 2 dimensions"),
        (bad(weight=torch.ones(0, 6)), ValueError, r"weight must not be empty, got shape \(0, 6\)"),
        (bad(weight=torch.ones(4, 0)), ValueError, r"weight must not be empty, got shape \(4, 0\)"),
        (bad(weight=torch.ones(4, 6, dtype=torch.int64)), TypeError, "got torch.int64"),
        (bad(weight=torch.ones(4, 6, dtype=torch.complex64)), TypeError, "got torch.complex64"),
        (bad(u=torch.ones(5)), ValueError, r"u must have shape \(4,\) .* got \(5,\)"),
        (bad(v=torch.ones(6, 1)), ValueError, r"v must have shape \(6,\) .* got \(6, 1\)"),
        (bad(u=torch.ones(4).double()), TypeError, "u must have the dtype of weight, torch.float32, got torch.float64"),
        (bad(v=torch.ones(6, device="meta")), ValueError, f"v must be on the device of weight, {DEVICE}, got meta"),
        (bad(eps=0.0), ValueError, "eps must be positive, got 0.0"),
        (bad(eps=-1e-3), ValueError, "eps must be positive, got -0.001"),
        (bad(eps=math.nan), ValueError, "eps must be positive, got nan"),
        (bad(eps=math.inf), ValueError, "eps must be finite, got inf"),
        (bad(n_power_iterations=-1), ValueError, "n_power_iterations must not be negative, got -1"),
        (bad(dim=2), IndexError, r"dim must be in \[-2, 1\] .* got 2"),
        (bad(backend="fast"), ValueError, "backend must be one of reference, native, triton, cuda, got 'fast'"),
        (lambda: spectral_norm_group([], [], []), ValueError, "at least one tensor"),
        (lambda: spectral_norm_group([torch.ones(2, 2)], [], []), ValueError, "the same length, got 1, 0, 0 and 1"),
        (
            lambda: spectral_norm_group(
                [torch.ones(2, 2), torch.ones(2, 2).double()],
                [torch.ones(2), torch.ones(2).double()],
                [torch.ones(2), torch.ones(2).double()],
            ),
            ValueError,
            "weights must share one dtype and device",
        ),
    ],
)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.backend("native")
def test_backend_that_cannot_serve_is_an_error_and_leaves_the_choice_unchanged() -> None:
    weight, u, v = draw((4, 6), 0, torch.float32)
    assert explain("spectral_norm", "cuda", "cpu") is not None
    with pytest.raises(UnavailableError, match="backend 'cuda' cannot serve spectral_norm on cpu"):
        spectral_norm(weight, u, v, backend="cuda")
    with use_backend("reference"):
        assert resolve("spectral_norm", None, "cpu") == "reference"
        with pytest.raises(ValueError, match="got 'fast'"), use_backend("fast"):
            pass
        assert resolve("spectral_norm", None, "cpu") == "reference"
    assert resolve("spectral_norm", None, "cpu") == "native"


@pytest.mark.cpu
@pytest.mark.backend("native")
def test_native_module_refuses_what_a_kernel_could_not_survive() -> None:
    weight, u, v = draw((4, 6), 0, torch.float32)
    forward, backward = torch.ops.lipgan.spectral_norm_fwd.default, torch.ops.lipgan.spectral_norm_bwd.default
    for bad_u, bad_v, message in (
        (u[:3], v, "u must hold 4 elements, got 3"),
        (u, v[:5], "v must hold 6 elements, got 5"),
        (u.double(), v, "u has a dtype"),
        (u, v.half(), "v has a dtype"),
        (u.int(), v, "u must be float32"),
    ):
        with pytest.raises(ValueError, match=message):
            forward([weight], [bad_u], [bad_v], 1, 1e-12, [0], "native")
    with pytest.raises(ValueError, match="dim is out of range"):
        forward([weight], [u], [v], 1, 1e-12, [2], "native")
    with pytest.raises(ValueError, match="differ in length"):
        forward([weight, weight], [u], [v], 1, 1e-12, [0, 0], "native")
    y, sigma, u, v = spectral_norm(weight, u, v)
    for arguments, message in (
        (([weight[:3]], None, [y], sigma[None], torch.cat([u, v]), [0]), "grad_y must hold 24 elements, got 18"),
        (([weight], None, [y], sigma[None], u, [0]), "uv must hold 10 elements, got 4"),
        (([weight], torch.ones(2), [y], sigma[None], torch.cat([u, v]), [0]), "grad_sigma must hold 1"),
        (([weight], None, [y], sigma[None].double(), torch.cat([u, v]), [0]), "sigma has a dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            backward(*arguments, "native")
    for numbers in (1.5, [1.0], weight.numpy(force=True)):
        with pytest.raises(TypeError, match="weight must be a tensor"):
            _C.spectral_norm_fwd([numbers], [u], [v], 1, 1e-12, [0], 1)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="isa must be one of"):
        _C.set_isa("quantum")


@pytest.mark.cpu
@pytest.mark.backend("native")
def test_the_module_refuses_to_write_over_what_it_reads() -> None:
    memory = torch.randn(200)
    y, grad, sigma, uv = memory[:24].view(4, 6), memory[24:48].view(4, 6), torch.ones(1), torch.randn(10)

    def backward(grads: list[Tensor], ys: list[Tensor], spent: list[bool], uv: Tensor = uv, **others: Any) -> Any:
        count = len(ys)
        sigma, grad_sigma = others.get("sigma", torch.ones(count)), others.get("grad_sigma")
        vectors = uv if count == 1 else uv.repeat(count)
        return _C.spectral_norm_bwd(grads, grad_sigma, ys, sigma, vectors, [0] * count, spent, 1)

    kept = memory.clone()
    for arguments, others, name in (
        (([y], [y], [True]), {}, "y 0 is spent, but shares memory with grad_y 0"),
        (([memory[20:44].view(4, 6)], [y], [True]), {}, "y 0 is spent, but shares memory with grad_y 0"),
        (([grad, grad], [y, y], [False, True]), {}, "y 1 is spent, but shares memory with y 0"),
        (([grad, y], [memory[48:72].view(4, 6), y], [False, True]), {}, "y 1 .* with grad_y 1"),
        (([grad], [y], [True], memory[14:24]), {}, "y 0 .* with uv"),
        (([grad], [y], [True]), {"sigma": memory[:1]}, "y 0 .* with sigma"),
        (([grad], [y], [True]), {"grad_sigma": memory[23:24]}, "y 0 .* with grad_sigma"),
        (([grad], [y], [True, True]), {}, "the lists of a group differ in length"),
    ):
        with pytest.raises(ValueError, match=name):
            backward(*arguments, **others)
    assert torch.equal(memory, kept)
    with pytest.raises(TypeError):
        backward([grad], [y], ["yes"])  # type: ignore[list-item]
    # Where nothing is written over, all may be the same; neighbours may touch; a copy has memory of its own.
    (expected,) = backward([grad.clone()], [y.clone()], [False])
    (alone,), twice = backward([y], [y], [False]), backward([y, y], [y, y], [False] * 2)
    assert all(torch.equal(result, alone) for result in twice)
    for strided in (y.t().contiguous().t(), torch._neg_view(-y), y.repeat(1, 2)[:, :6]):
        before = strided.clone()
        (result,) = backward([grad], [strided], [True])
        torch.testing.assert_close(result, expected)
        assert torch.equal(strided, before)
    (result,) = backward([grad], [y], [True])
    assert result.data_ptr() == y.data_ptr()
    assert torch.equal(result, expected)
    half = [x.half() for x in (grad, kept[:24].view(4, 6), uv)]
    (expected,) = _C.spectral_norm_bwd(half[:1], None, half[1:2], sigma, half[2], [0], [False], 1)
    (result,) = _C.spectral_norm_bwd(half[:1], None, half[1:2], sigma, half[2], [0], [True], 1)
    assert result.data_ptr() == half[1].data_ptr()
    assert torch.equal(result, expected)


@pytest.mark.cpu
@pytest.mark.backend("native")
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_vectors_that_cannot_be_moved_by_one_call() -> None:
    move = _C.spectral_norm_move
    uv = torch.arange(1.0, 11.0)
    u, v = torch.zeros(4), torch.zeros(6)
    for vectors, message in (
        ([u], "uv must hold 4 elements, got 10"),
        ([u, v, u], "uv must hold 14 elements, got 10"),
        ([], "uv must hold 0 elements, got 10"),
        ([u, v.int()], "vector must be float32"),
        ([u, uv[:6]], "a vector shares memory with uv"),
        ([uv[:4], uv[4:]], "a vector shares memory with uv"),
    ):
        with pytest.raises(ValueError, match=message):
            move(uv, vectors)
    for vectors in ([u, 1.5], [u, None], [u, v.numpy(force=True)]):
        with pytest.raises(TypeError, match="vector must be a tensor"):
            move(uv, vectors)
    raw = torch.zeros(25, dtype=torch.uint8)
    for other in (
        v.half(),
        v.double(),
        torch.zeros(12)[::2],
        torch.zeros(1).expand(6),
        torch._neg_view(torch.zeros(6)),
        torch._efficientzerotensor(6),
        torch.frombuffer(raw.numpy(force=True), dtype=torch.float32, offset=1, count=6),
    ):
        assert not move(uv, [u, other])  # and nothing done: PyTorch copies
        assert not u.any()
    assert not move(uv.half(), [u, v])
    # Of one memory the last number stays, as in copies one after the other.
    both = torch.zeros(7)
    assert move(uv, [both[:4], both[1:]])
    assert both.tolist() == [1.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]
    fixed = np.zeros(6, np.float32)
    fixed.flags.writeable = False
    assert move(torch._neg_view(-uv.repeat_interleave(2)[::2]), [u, torch.from_numpy(fixed)])
    assert torch.cat([u, torch.from_numpy(fixed)]).tolist() == uv.tolist()


@pytest.mark.cpu
@pytest.mark.backend("native")
def test_memory_of_outputs_is_reused_and_never_shared() -> None:
    weight, u, v = draw((128, 256), 0, torch.float32)  # 128 KB
    empty_cache()
    ys = [spectral_norm(weight * (k + 1), u, v)[0] for k in range(4)]
    assert len({y.data_ptr() for y in ys}) == 4
    assert _C.cached_bytes() == 0
    kept, address = ys[0].clone(), ys[3].data_ptr()
    del ys[1:]
    cached = _C.cached_bytes()
    assert cached >= 3 * weight.nbytes
    again = [spectral_norm(-weight, u, v)[0] for _ in range(3)]
    assert address in {y.data_ptr() for y in again}
    assert _C.cached_bytes() == 0
    assert torch.equal(ys[0], kept), "memory in use was handed out again"
    view = again[0][1:]
    del again
    assert _C.cached_bytes() < cached, "memory behind a view was given back"
    assert view.isfinite().all()
    del view, ys
    assert empty_cache() >= 4 * weight.nbytes
    assert _C.cached_bytes() == 0


@pytest.mark.backend("native")
def test_memory_that_nobody_asks_for_is_given_back() -> None:
    empty_cache()
    big, small = torch.zeros(16 << 20), torch.zeros(16 << 10)  # 64 MB and 64 KB
    one = torch.ones(1)
    del_me = [interpolate(big[None], big[None], one) for _ in range(2)]
    several = [interpolate(small[None], small[None], one) for _ in range(40)]
    del del_me, several
    assert _C.cached_bytes() >= 2 * big.nbytes + 40 * small.nbytes
    # What is in use by turns stays, what is not goes: two sweeps, of 1024 outputs each.
    for _ in range(2100):
        x = interpolate(small[None], small[None], one)
        y = interpolate(small[None], small[None], one)
        del x, y
    assert 2 * small.nbytes <= _C.cached_bytes() < 8 * small.nbytes
    empty_cache()


AFFINITY_SCRIPT = """
import os, torch
from lipgan import _C
from lipgan.ops import _backend
_backend.native()
def threads():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("Threads:")).split()[1])
torch.set_num_threads(1)  # no threads but those of the kernels
weight, vector = torch.ones(2048, 2048), torch.ones(2048)
matrices, x = torch.eye(64).repeat(64, 1, 1), torch.ones(900, 64)
cores = sorted(os.sched_getaffinity(0))
os.sched_setaffinity(0, cores[:1])
before = threads()
_C.spectral_norm_fwd([weight], [vector], [vector], 1, 1e-12, [0], 16)
_C.matrix_sqrt_fwd(matrices, False, 0.0, 1e-6, False, 16)
_C.nearest_neighbours_fwd(x, None, 1, 16)
_C.gradient_penalty_interpolate(weight, weight, vector, 16)
_C.gradient_penalty_fwd(weight, "two-sided", 1.0, 1.0, "sample", 16)
layers = [weight, weight[:1]], [None, None], [0.0], [None]
_C.mlp_gradient_penalty_fwd(weight, *layers, "max", 1.0, 1.0, None, [], 0, 1, [], [], 16)
print(threads() - before)
"""


@pytest.mark.backend("native")
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the affinity of a process is Linux's")
def test_no_more_threads_than_the_process_may_use_processors() -> None:
    # PyTorch's number may be that of another machine: threads beyond the processors wait in turn at every barrier.
    result = subprocess.run([sys.executable, "-c", AFFINITY_SCRIPT], capture_output=True, text=True)
    assert result.stdout == "0\n", result.stdout + result.stderr


def test_calls_from_several_threads_at_once() -> None:
    layers = [draw((130, 260), 0, torch.float32, seed) for seed in range(8)]
    expected = [spectral_norm(*layer, 2) for layer in layers]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for ours, first in zip(pool.map(lambda layer: spectral_norm(*layer, 2), layers), expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, first, strict=True))


THREADS_SCRIPT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("lipgan._C", sys.argv[1])
module = sys.modules["lipgan._C"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.thread_pool() == "std::thread"  # there is no PyTorch yet whose threads could serve
import torch
from lipgan.ops import spectral_norm
torch.set_num_threads(3)
weight = torch.randn(400, 700)
ours, theirs = (spectral_norm(weight, torch.ones(400), torch.ones(700), 2, backend=b) for b in ("native", "reference"))
for a, b in zip(ours, theirs):
    torch.testing.assert_close(a, b)
print("served")
"""


@pytest.mark.backend("native")
@pytest.mark.slow
def test_threads_are_pytorchs_and_plain_ones_serve_without() -> None:
    if sys.platform == "linux":
        assert _C.thread_pool() == "openmp"
    result = subprocess.run([sys.executable, "-c", THREADS_SCRIPT, _C.__file__], capture_output=True, text=True)
    assert result.stdout == "served\n", result.stderr


def test_modes_and_the_profiler_see_the_op() -> None:
    class Names(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    weight, u, v = draw((4, 6), 0, torch.float32)
    weight.requires_grad_()
    with Names() as mode:
        torch.autograd.grad(spectral_norm(weight, u, v)[0].sum(), weight)
    assert "lipgan.spectral_norm_fwd.default" in mode.names
    assert "lipgan.spectral_norm_bwd.default" in mode.names
    with torch.profiler.profile() as profile:
        spectral_norm(weight, u, v)
    assert "lipgan::spectral_norm_fwd" in {event.key for event in profile.key_averages()}
    with FakeTensorMode():
        fake = spectral_norm(torch.empty(4, 6), torch.empty(4), torch.empty(6))
    assert [tuple(t.shape) for t in fake] == [(4, 6), (), (4,), (6,)]


@pytest.mark.cpu
def test_address_refuses_what_a_kernel_could_not_survive() -> None:
    tensor = torch.ones(4, 6)
    assert address(tensor, torch.float32, 24, "cpu") == tensor.data_ptr()
    for wrong, dtype, numel, device in (
        (tensor, torch.float64, 24, "cpu"),
        (tensor, torch.float32, 25, "cpu"),
        (tensor.T, torch.float32, 24, "cpu"),
        (tensor, torch.float32, 24, "cuda"),
    ):
        with pytest.raises(RuntimeError, match=f"expected {numel} contiguous elements of {dtype} on {device}"):
            address(wrong, dtype, numel, device)
