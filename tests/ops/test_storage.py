"""Tensors whose memory is not what it seems: put-off negations, odd addresses, zeros without memory; and new memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.utils.deterministic
from torch import Tensor

from lipgan.ops import _backend, gradient_penalty, interpolate, spectral_norm, spectral_norm_group
from lipgan.ops import matrix_sqrt as roots
from lipgan.ops._address import address, materialized
from lipgan.ops.mlp_gradient_penalty import penalize
from lipgan.ops.nearest_neighbours import ball_counts, nearest_neighbours

_C: Any = _backend.native()  # None where it was not built: its tests are skipped then


def _misaligned(tensor: Tensor) -> Tensor:
    """The same values, one byte after a multiple of 64."""
    raw = bytearray(tensor.nbytes + 65)
    base = torch.frombuffer(raw, dtype=torch.uint8).data_ptr()
    offset = -base % 64 + 1
    result = torch.frombuffer(raw, dtype=tensor.dtype, offset=offset, count=tensor.numel()).view(tensor.shape)
    assert result.data_ptr() % tensor.element_size() == 1
    return result.copy_(tensor)


def _negated(tensor: Tensor) -> Tensor:
    """The same values behind a negation that is put off, contiguous."""
    result = torch._neg_view(-tensor)
    assert result.is_neg()
    assert result.is_contiguous()
    return result


def _from_complex(tensor: Tensor) -> Tensor:
    result = torch.complex(tensor, -tensor).conj().imag
    assert result.is_neg()
    return result


def _spectral_norm(backend: str, dtype: torch.dtype) -> tuple[Callable[..., Any], list[Tensor]]:
    weight, u, v = torch.randn(5, 9).to(dtype), torch.randn(5).to(dtype), torch.randn(9).to(dtype)
    return partial(spectral_norm, n_power_iterations=2, backend=backend), [weight, u, v]


def _spectral_norm_backward(backend: str, dtype: torch.dtype) -> tuple[Callable[..., Any], list[Tensor]]:
    def run(*args: Tensor) -> list[Tensor]:
        grad_y, grad_sigma, y, sigma, uv = args
        return torch.ops.lipgan.spectral_norm_bwd.default([grad_y], grad_sigma, [y], sigma, uv, [0], backend)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = [torch.randn(5, 9).to(dtype), torch.randn(1, dtype=wide), torch.randn(5, 9).to(dtype)]
    return run, [*tensors, torch.rand(1, dtype=wide) + 1, torch.randn(14).to(dtype)]


def _interpolate(backend: str, dtype: torch.dtype) -> tuple[Callable[..., Any], list[Tensor]]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    real, fake = torch.randn(4, 3, 5).to(dtype), torch.randn(4, 3, 5).to(dtype)
    return partial(interpolate, backend=backend), [real, fake, torch.rand(4, dtype=wide)]


def _penalty(backend: str, dtype: torch.dtype, norm: str = "sample") -> tuple[Callable[..., Any], list[Tensor]]:
    return partial(gradient_penalty, norm=norm, backend=backend), [torch.randn(4, 3, 5).to(dtype)]


def _mlp(backend: str, dtype: torch.dtype) -> tuple[Callable[..., Any], list[Tensor]]:
    def run(x: Tensor, first: Tensor, last: Tensor, bias: Tensor, scale: Tensor) -> list[Tensor]:
        weights = (x, [first, last], [bias, None], [0.2], [scale], "two-sided", 1.0, 1.0)
        results: list[Tensor] = []
        for curves, constants in (([], []), (["softplus"], [2.0, 1.0, 0.0])):
            penalty, norms, grads, bias_grads = penalize(*weights, curves=curves, constants=constants, backend=backend)
            results += [penalty, norms, *grads, *bias_grads]
        return results

    tensors = [torch.randn(6, 3), torch.randn(7, 3), torch.randn(1, 7), torch.randn(7), torch.rand(6, 7)]
    return run, [tensor.to(dtype) for tensor in tensors]


def _root(backend: str, dtype: torch.dtype) -> tuple[Callable[..., Any], list[Tensor]]:
    a = torch.randn(3, 4, 4)
    a = a @ a.mT + torch.eye(4)
    return partial(roots.root, backend=backend), [a.to(dtype)]


def _nearest(backend: str, dtype: torch.dtype) -> tuple[Callable[..., Any], list[Tensor]]:
    return partial(nearest_neighbours, k=2, backend=backend), [torch.randn(9, 3).to(dtype), torch.randn(7, 3).to(dtype)]


def _counts(backend: str, dtype: torch.dtype) -> tuple[Callable[..., Any], list[Tensor]]:
    points = [torch.randn(9, 3).to(dtype), torch.randn(7, 3).to(dtype)]
    return partial(ball_counts, backend=backend), [*points, *(torch.rand(n, dtype=torch.float64) * 4 for n in (9, 7))]


def _polar_kernels(backend: str, dtype: torch.dtype) -> tuple[Callable[..., Any], list[Tensor]]:
    from lipgan.kernels import matrix_sqrt as kernels

    def run(m: Tensor, gram: Tensor) -> list[Tensor]:
        product = kernels.symmetric_product(m)
        return [product, kernels.polynomial(m, gram, 1.0, -0.5, 0.1), kernels.polar_iteration(m, [(1.0, 0.1, 0.2)])]

    gram = torch.randn(4, 4)
    return run, [torch.randn(6, 4).to(dtype), (gram + gram.T).to(dtype)]


ALL, WIDE = (torch.float32, torch.float64, torch.float16, torch.bfloat16), (torch.float32, torch.float64)
OPS: dict[str, tuple[Callable[..., tuple[Callable[..., Any], list[Tensor]]], tuple[str, ...], tuple[torch.dtype, ...]]]
OPS = {
    "spectral_norm": (_spectral_norm, ("reference", "native", "triton"), ALL),
    "spectral_norm_bwd": (_spectral_norm_backward, ("reference", "native", "triton"), ALL),
    "interpolate": (_interpolate, ("reference", "native", "triton"), ALL),
    "gradient_penalty": (_penalty, ("reference", "native", "triton"), ALL),
    "gradient_penalty by pixel": (partial(_penalty, norm="pixel"), ("reference", "native", "triton"), ALL),
    "mlp_gradient_penalty": (_mlp, ("reference", "native", "triton"), WIDE),
    "matrix_sqrt": (_root, ("reference", "native", "triton"), WIDE),
    "nearest_neighbours": (_nearest, ("reference", "native", "triton"), WIDE),
    "ball_counts": (_counts, ("reference", "native", "triton"), WIDE),
    "polar": (_polar_kernels, ("triton",), WIDE),
}
# There are no complex numbers of bfloat16.
CASES = [
    (op, backend, dtype, disguise)
    for op, (_, backends, dtypes) in OPS.items()
    for backend in backends
    for dtype in dtypes
    for disguise in (_negated, _from_complex, _misaligned)
    if not (disguise is _from_complex and dtype == torch.bfloat16)
]


@pytest.mark.slow
@pytest.mark.parametrize(("op", "backend", "dtype", "disguise"), CASES)
def test_what_counts_is_the_values(
    op: str, backend: str, dtype: torch.dtype, disguise: Callable[[Tensor], Tensor]
) -> None:
    function, tensors = OPS[op][0](backend, dtype)
    expected = function(*tensors)
    for which in (range(len(tensors)), *([k] for k in range(len(tensors)))):  # all of them, then each
        disguised = [disguise(tensor) if k in which else tensor for k, tensor in enumerate(tensors)]
        for ours, plain in zip(function(*disguised), expected, strict=True):
            assert torch.equal(ours, plain), f"argument {list(which)} in disguise"


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_channels_last_keeps_its_layout(backend: str) -> None:
    plain = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    expected = gradient_penalty(plain, norm="pixel", backend=backend)
    for grads in (torch._neg_view(-plain), torch._neg_view(-plain.contiguous())):
        for ours, theirs in zip(gradient_penalty(grads, norm="pixel", backend=backend), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    x_hat = interpolate(torch._neg_view(-plain), plain, torch.rand(2), backend=backend)
    assert x_hat.stride() == plain.stride()


@pytest.mark.hardware
@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_zeros_without_memory(backend: str) -> None:
    zeros = torch._efficientzerotensor((5, 9))
    y, sigma, _, _ = spectral_norm(zeros, torch.ones(5), torch.ones(9), backend=backend)
    assert not y.any()
    assert sigma == 0
    penalty, norms = gradient_penalty(zeros, backend=backend)
    assert penalty == 1
    assert not norms.any()


@pytest.mark.cpu
def test_addresses_refuse_what_a_kernel_would_misread() -> None:
    plain = torch.randn(6)
    assert materialized(plain) is plain
    for tensor in (_negated(plain), _misaligned(plain)):
        assert torch.equal(materialized(tensor), plain)
        with pytest.raises(RuntimeError, match="expected 6 contiguous elements"):
            address(tensor, torch.float32, 6, "cpu")


@pytest.mark.cpu
@pytest.mark.backend("triton")
def test_kernels_copy_what_they_would_misread() -> None:
    from lipgan.kernels import spectral_norm as kernels

    weight, u, v = torch.randn(4, 4), torch.randn(4), torch.randn(4)
    for odd in (_negated(weight), _misaligned(weight)):
        same = odd.resolve_neg().contiguous().clone()
        ours, expected = (kernels.spectral_norm_fwd([w], [u], [v], 1, 1e-12) for w in (odd, same))
        for one, other in zip((*ours[0], *ours[1:]), (*expected[0], *expected[1:]), strict=True):
            assert torch.equal(one, other)
    with pytest.raises(ValueError, match="expected contiguous"):
        kernels.spectral_norm_fwd([weight.T], [u], [v], 1, 1e-12)


# ---- new memory ----


@pytest.mark.backend("native")
@pytest.mark.parametrize("numel", [10, 100_000])
@pytest.mark.parametrize("fill", [True, False])
def test_new_memory_is_filled_where_pytorch_fills_its_own(numel: int, fill: bool) -> None:
    before = torch.utils.deterministic.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    x = torch.ones(2, 2)
    try:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(True, warn_only=True)
        interpolate(x, x, torch.ones(2), backend="native")
        _C.empty(numel).zero_()  # memory that is likely to come next
        assert bool(_C.empty(numel).isnan().all()) is fill
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = before
    if not deterministic:
        interpolate(x, x, torch.ones(2), backend="native")
        _C.empty(numel).zero_()
        assert not _C.empty(numel).isnan().all(), "outputs are filled after PyTorch has stopped it"


# ---- nothing to do: shapes with a 0, no iterations, groups of one and of none ----


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
@pytest.mark.parametrize("closed", [False, True])
def test_balls_and_neighbours_of_no_points(backend: str, closed: bool) -> None:
    some, none = torch.zeros(5, 3), torch.zeros(0, 3)
    radii, no_radii = torch.ones(5, dtype=torch.float64), torch.ones(0, dtype=torch.float64)
    for x, y, rx, ry in (
        (some, none, radii, no_radii),
        (none, some, no_radii, radii),
        (none, none, no_radii, no_radii),
    ):
        of_x, of_y = ball_counts(x, y, rx, ry, closed=closed, backend=backend)
        assert of_x.shape == (2, len(x))
        assert of_y.shape == (2, len(y))
        assert not of_x.any()
        assert not of_y.any()
    squared, indices = nearest_neighbours(none, some, k=2, backend=backend)
    assert squared.shape == indices.shape == (0, 2)
    for x, y in ((some, none), (none, none), (some[:1], None)):
        with pytest.raises(ValueError, match="k must be from 1 to the number of points to choose from, 0, got 1"):
            nearest_neighbours(x, y, k=1, backend=backend)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
@pytest.mark.parametrize("kind", ["two-sided", "one-sided", "squared", "max"])
def test_samples_without_elements_are_refused(backend: str, kind: str) -> None:
    # A norm of nothing would be 0, and the penalty of no samples 0 / 0.
    for shape in ((0,), (0, 4), (0, 4, 2), (3, 0), (3, 0, 2)):
        with pytest.raises(ValueError, match="grads must"):
            gradient_penalty(torch.empty(shape), kind, backend=backend)
        with pytest.raises(ValueError, match="real must"):
            interpolate(torch.empty(shape), torch.empty(shape), torch.empty(shape[0]), backend=backend)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_no_iterations_leave_the_vectors_bit_by_bit(backend: str) -> None:
    weights = [torch.randn(3, 4), torch.randn(20, 30)]
    us, vs = [torch.randn(3), torch.randn(20)], [torch.randn(4), torch.randn(30)]
    ys, sigma, new_us, new_vs = spectral_norm_group(weights, us, vs, 0, backend=backend)
    for layer, (weight, u, v) in enumerate(zip(weights, us, vs, strict=True)):
        assert torch.equal(new_us[layer], u)
        assert torch.equal(new_vs[layer], v)
        truth = u.double() @ weight.double() @ v.double()
        assert abs(sigma[layer] - truth) <= 1e-5 * u.norm() * weight.norm() * v.norm()
        torch.testing.assert_close(ys[layer], weight / sigma[layer])


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_groups_and_weights_of_nothing_are_refused(backend: str) -> None:
    with pytest.raises(ValueError, match="weights must hold at least one tensor"):
        spectral_norm_group([], [], [], backend=backend)
    for h, w in ((0, 3), (3, 0), (0, 0)):
        with pytest.raises((ValueError, ZeroDivisionError), match="must not be empty"):
            spectral_norm(torch.empty(h, w), torch.empty(h), torch.empty(w), backend=backend)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 0), (0, 0, 0), (2, 0, 3, 3)])
@pytest.mark.parametrize("grad", [False, True])
def test_roots_of_no_matrices(backend: str, shape: tuple[int, ...], grad: bool) -> None:
    a = torch.empty(shape, requires_grad=grad)
    root = roots.root(a, backend=backend)
    assert root.shape == shape
    if grad:
        assert torch.autograd.grad(root.sum(), a)[0].shape == shape


@pytest.mark.hardware
@pytest.mark.backend("triton")
@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (0, 4, 3), (2, 0, 3), (2, 3, 0)])
def test_polar_kernels_of_nothing(shape: tuple[int, ...]) -> None:
    from lipgan.kernels import matrix_sqrt as kernels

    m = torch.empty(shape)
    gram = kernels.symmetric_product(m)
    assert torch.equal(gram, m.mT @ m)
    assert kernels.polynomial(m, gram, 1.0, 2.0, 3.0).shape == shape
    for steps in ([], [(1.0, 0.0, 0.0)] * 3):
        assert kernels.polar_iteration(m, steps).shape == shape


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
@pytest.mark.parametrize("kind", ["two-sided", "max"])
def test_perceptron_of_one_layer_and_of_one_sample(backend: str, kind: str) -> None:
    # A linear critic: g is the weight for every sample.
    w = torch.tensor([[3.0, 4.0]])
    penalty, norms, (grad,), _ = penalize(torch.randn(1, 2), [w], [None], [], [], kind, 1.0, 1.0, backend=backend)
    assert penalty == 16
    assert norms.tolist() == [5]
    torch.testing.assert_close(grad, 2 * 4 * w / 5)
