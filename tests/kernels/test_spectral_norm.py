"""The Triton kernels of spectral_norm, in Triton's interpreter, against float64 and against PyTorch."""

import grouped as kernels
import numpy as np
import pytest
import torch
from lipgan.kernels import config
from lipgan.kernels.common import accumulation_dtype
from lipgan.kernels.spectral_norm import backward as backward_kernels
from lipgan.kernels.spectral_norm import forward as forward_kernels
from tolerance import assert_as_accurate
from torch import Tensor

pytestmark = pytest.mark.interpreter

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

# Sides of 1, primes, tall, wide. (9, 1030) has several blocks of rows and a second, partial column tile;
# widths of 16 and 2048 take the 16-byte loads, the others do not; (6, 130) crosses a tile of the column sums.
SHAPES = [(1, 1), (1, 13), (13, 1), (5, 7), (23, 16), (6, 2048), (9, 1030), (6, 130)]

EPS = 1e-12

# Roundings of a result beyond those of PyTorch: sums are trees or chains of at most w / 1024 terms, so their
# error is one or two roundings of the sum of the absolute terms (which `sizes` computes); then come a square
# root, a reciprocal and a product.
ROUNDINGS = 4.0


def make_group(shapes: list[tuple[int, int]], dtype: torch.dtype, scale: float = 1.0) -> tuple[list[Tensor], ...]:
    weights = [(torch.randn(shape, dtype=torch.float64) * scale).to(dtype) for shape in shapes]
    us = [torch.nn.functional.normalize(torch.randn(h, dtype=torch.float64), dim=0).to(dtype) for h, _ in shapes]
    vs = [torch.nn.functional.normalize(torch.randn(w, dtype=torch.float64), dim=0).to(dtype) for _, w in shapes]
    return weights, us, vs


def iterate(weight: Tensor, u: Tensor, v: Tensor, n: int, eps: float = EPS) -> tuple[Tensor, ...]:
    """(y, sigma, u, v) by PyTorch, in the dtype of the arguments."""
    for _ in range(n):
        u = torch.nn.functional.normalize(weight @ v, dim=0, eps=eps)
        v = torch.nn.functional.normalize(weight.T @ u, dim=0, eps=eps)
    sigma = torch.vdot(u, weight @ v)
    return weight / sigma, sigma, u, v


def truth_of(weight: Tensor, u: Tensor, v: Tensor, n: int, eps: float = EPS) -> tuple[Tensor, ...]:
    """(y, sigma, u, v) by NumPy's long double, rounded to float64."""
    w_, u_, v_ = (x.double().numpy().astype(np.longdouble) for x in (weight, u, v))
    for _ in range(n):
        t = w_ @ v_
        u_ = t / max(np.sqrt(t @ t), np.longdouble(eps))
        s = w_.T @ u_
        v_ = s / max(np.sqrt(s @ s), np.longdouble(eps))
    sigma = u_ @ w_ @ v_
    return tuple(torch.tensor(np.float64(x)) for x in (w_ / sigma, sigma, u_, v_))


def sizes(weight: Tensor, truth: tuple[Tensor, ...], n: int) -> tuple[float, ...]:
    """For each of (y, sigma, u, v), the size of the terms that it is a sum of, by the triangle inequality.

    The size of y is that of its own rounding; what it inherits from sigma is relative to A, the wider dtype.
    """
    absolute = weight.double().abs()
    y, sigma, u, v = (x.abs() for x in truth)
    terms = float(u @ absolute @ v)
    wide = torch.finfo(accumulation_dtype(weight.dtype)).eps / torch.finfo(weight.dtype).eps
    of_y = float(y.max()) * (1.0 + wide * terms / float(sigma))
    if n == 0:
        return of_y, terms, 0.0, 0.0
    of_u, of_v = float((absolute @ v).max() / sigma), float((u @ absolute).max() / sigma)
    return of_y, terms, 1.0 + wide * of_u, 1.0 + wide * of_v


def check_forward(
    outputs: tuple[list[Tensor], Tensor, list[Tensor], list[Tensor]],
    inputs: tuple[list[Tensor], ...],
    n: int,
    eps: float = EPS,
) -> None:
    ys, sigma, new_us, new_vs = outputs
    wide = accumulation_dtype(ys[0].dtype)
    assert sigma.dtype == wide
    for i, (weight, u, v) in enumerate(zip(*inputs, strict=True)):
        truth = truth_of(weight, u, v, n, eps)
        peer = iterate(weight.to(wide), u.to(wide), v.to(wide), n, eps)
        ours = ys[i], sigma[i], new_us[i], new_vs[i]
        for value, reference, exact, size in zip(ours, peer, truth, sizes(weight, truth, n), strict=True):
            assert_as_accurate(value, reference.to(value.dtype), exact, roundings=ROUNDINGS, scale=size)


FORWARD_CASES = [
    *((torch.float32, n) for n in (0, 1, 3)),
    *((torch.float64, n) for n in (0, 3)),
    (torch.float16, 1),
    *((torch.bfloat16, n) for n in (0, 3)),
]


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize(("dtype", "n"), FORWARD_CASES)
def test_forward_is_as_accurate_as_torch(dtype: torch.dtype, n: int) -> None:
    inputs = make_group(SHAPES, dtype)
    before = [x.clone() for group in inputs for x in group]
    outputs = kernels.spectral_norm_fwd(*inputs, n, EPS)
    assert all(map(torch.equal, (x for group in inputs for x in group), before)), "inputs changed"
    assert all(x.dtype == dtype for group in (outputs[0], outputs[2], outputs[3]) for x in group)
    check_forward(outputs, inputs, n)


def backward(
    grad_y: Tensor,
    grad_sigma: Tensor | None,
    y: Tensor,
    sigma: Tensor,
    u: Tensor,
    v: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, float]:
    """dW by the formula in `dtype`, and the size of its two terms, of which it is the difference."""
    dy, y, sigma, u, v = (x.to(dtype) for x in (grad_y, y, sigma, u, v))
    along = (dy * y).sum() - (0.0 if grad_sigma is None else sigma * grad_sigma.to(dtype))
    size = dy.abs().max() + (dy * y).abs().sum() * u.abs().max() * v.abs().max()
    return (dy - along * torch.outer(u, v)) / sigma, float(size / sigma)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("with_grad_sigma", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_is_as_accurate_as_torch(dtype: torch.dtype, with_grad_sigma: bool) -> None:
    ys, sigma, us, vs = kernels.spectral_norm_fwd(*make_group(SHAPES, dtype), 1, EPS)
    grad_ys = [torch.randn_like(y) for y in ys]
    grad_sigma = torch.randn_like(sigma) if with_grad_sigma else None
    grads = kernels.spectral_norm_bwd(grad_ys, grad_sigma, ys, sigma, us, vs)
    for i, grad in enumerate(grads):
        layer = grad_ys[i], None if grad_sigma is None else grad_sigma[i], ys[i], sigma[i], us[i], vs[i]
        truth, size = backward(*layer, torch.float64)
        peer, _ = backward(*layer, sigma.dtype)
        assert grad.dtype == dtype
        # The terms are rounded to A, their difference to the dtype of the weight.
        scale = float(truth.abs().max()) + size * torch.finfo(sigma.dtype).eps / torch.finfo(dtype).eps
        assert_as_accurate(grad, peer.to(dtype), truth, roundings=ROUNDINGS, scale=scale)


@pytest.mark.parametrize("shape", [(5, 7), (16, 32), (9, 1030)])
def test_backward_is_the_gradient_of_torch(shape: tuple[int, int]) -> None:
    weights, us, vs = make_group([shape], torch.float64)
    ys, sigma, us, vs = kernels.spectral_norm_fwd(weights, us, vs, 2, EPS)
    grad_y, grad_sigma = torch.randn_like(ys[0]), torch.randn_like(sigma)
    (grad,) = kernels.spectral_norm_bwd([grad_y], grad_sigma, ys, sigma, us, vs)
    weight = weights[0].requires_grad_()
    s = us[0] @ weight @ vs[0]
    (expected,) = torch.autograd.grad((weight / s, s), weight, (grad_y, grad_sigma[0]))
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_double_backward_is_as_accurate_as_torch(dtype: torch.dtype) -> None:
    shapes = [(1, 13), (23, 16), (9, 1030)]
    inputs = kernels.double_inputs(shapes, [0] * len(shapes), dtype)
    kernels.assert_double_accurate(kernels.spectral_norm_double_bwd(*inputs), inputs, [0] * len(shapes))


@pytest.mark.parametrize("shape", [(5, 7), (16, 32)])
def test_double_backward_is_the_gradient_of_torch(shape: tuple[int, int]) -> None:
    (g,), (dy,), (y,), sigma, (u,), (v,) = kernels.double_inputs([shape], [0], torch.float64)
    variables = [x.clone().requires_grad_() for x in (dy, y, sigma, torch.zeros(1, dtype=torch.float64))]
    grad_y, of_y, s, grad_sigma = variables
    weight = grad_y / s - ((grad_y * of_y).sum() / s - grad_sigma) * torch.outer(u, v)
    expected = torch.autograd.grad((weight * g).sum(), variables)
    (to_grad_y,), (to_y,), *scalars = kernels.spectral_norm_double_bwd([g], [dy], [y], sigma, [u], [v])
    for mine, theirs in zip((to_grad_y, to_y, *scalars), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)


def test_double_backward_of_arguments_that_do_not_fit() -> None:
    grads, grad_ys, ys, sigma, us, vs = kernels.double_inputs([(4, 6), (3, 5)], [0, 0], torch.float32)
    with pytest.raises(ValueError, match=r"expected gradients of shape \(3, 5\), got \(3, 5\) and \(5, 3\)"):
        kernels.spectral_norm_double_bwd(grads, [grad_ys[0], grad_ys[1].T], ys, sigma, us, vs)
    with pytest.raises(ValueError, match=r"expected 2 contiguous torch\.float32 on cpu for sigma"):
        kernels.spectral_norm_double_bwd(grads, grad_ys, ys, sigma.double(), us, vs)
    with pytest.raises(ValueError, match=r"expected 18 contiguous torch\.float32 on cpu for u and v"):
        kernels.spectral_norm_double_bwd(grads, grad_ys, ys, sigma, us, [vs[0], vs[1][:3]])


@pytest.mark.parametrize("delta", [-1, 0, 1])
def test_sizes_around_the_tiles(delta: int) -> None:
    # Each shape is a group of its own, because a group takes the tile of its widest matrix.
    for h, w in [(64 + delta, 64), (128, 16 + delta), (4 + delta, 1024 + delta), (8, 512 + delta)]:
        inputs = make_group([(h, w)], torch.float32)
        check_forward(kernels.spectral_norm_fwd(*inputs, 1, EPS), inputs, 1)


def flat(outputs: tuple[list[Tensor], Tensor, list[Tensor], list[Tensor]]) -> list[Tensor]:
    """y, sigma, u and v of all layers, one vector each."""
    return [torch.cat([x.flatten() for x in group]) for group in outputs]


def test_a_group_equals_its_members() -> None:
    shapes = [(5, 40), (16, 48), (9, 64)]
    # With one tile for all, the sums have the same order, and so the same bits.
    assert len({config.matrix_tile([shape], 4).block_w for shape in shapes}) == 1
    weights, us, vs = make_group(shapes, torch.float32)
    together = flat(kernels.spectral_norm_fwd(weights, us, vs, 2, EPS))
    alone = [
        flat(kernels.spectral_norm_fwd(*([x] for x in layer), 2, EPS)) for layer in zip(weights, us, vs, strict=True)
    ]
    for value, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(value, torch.cat(parts), rtol=4e-7, atol=4e-7)


def test_equal_inputs_give_equal_bits() -> None:
    weights, us, vs = make_group([(9, 1030), (23, 130)], torch.float32)
    first, second = (kernels.spectral_norm_fwd(weights, us, vs, 1, EPS) for _ in range(2))
    assert all(map(torch.equal, flat(first), flat(second)))
    grads, again = (kernels.spectral_norm_bwd(weights, None, *outputs) for outputs in (first, second))
    assert all(map(torch.equal, grads, again))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 2])
def test_a_zero_matrix_stays_zero(dtype: torch.dtype, n: int) -> None:
    weights, us, vs = make_group([(5, 7), (16, 32)], dtype)
    weights[0].zero_()
    ys, sigma, us, vs = kernels.spectral_norm_fwd(weights, us, vs, n, EPS)
    assert sigma[0] == 0
    assert not ys[0].any()
    assert all(x.isfinite().all() for x in (*ys, *us, *vs))
    grads = kernels.spectral_norm_bwd([torch.ones_like(y) for y in ys], torch.ones_like(sigma), ys, sigma, us, vs)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e18, 1e25, 1e36])
def test_scales_whose_squares_leave_float32(scale: float) -> None:
    weights, us, vs = make_group([(9, 20), (5, 1100)], torch.float32, scale)
    ys, sigma, new_us, new_vs = kernels.spectral_norm_fwd(weights, us, vs, 2, eps=1e-37)
    for i, layer in enumerate(zip(weights, us, vs, strict=True)):
        truth = truth_of(*layer, 2, eps=1e-37)
        ours = ys[i], sigma[i], new_us[i], new_vs[i]
        # PyTorch's own float32 is no peer, because it squares; the rounded truth stands in.
        for value, exact, size in zip(ours, truth, sizes(layer[0], truth, 2), strict=True):
            assert_as_accurate(value, exact.float(), exact, roundings=ROUNDINGS, scale=size)


def test_the_clamp_of_the_norm() -> None:
    # |W v| is below eps, so u = W v / eps and v = W^T u / eps are shorter than 1, and sigma = |s|^2 / eps.
    inputs = make_group([(5, 7)], torch.float32, scale=1e-2)
    outputs = kernels.spectral_norm_fwd(*inputs, 1, eps=0.1)
    assert outputs[2][0].norm() < 0.9
    assert outputs[3][0].norm() < 0.9
    check_forward(outputs, inputs, 1, eps=0.1)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_nan_stays_in_its_layer(layer: int, bad: float, n: int) -> None:
    weights, us, vs = make_group([(5, 7), (1, 1), (9, 48)], torch.float32)
    weights[layer].view(-1)[-1] = bad
    ys, sigma, us, vs = kernels.spectral_norm_fwd(weights, us, vs, n, EPS)
    grads = kernels.spectral_norm_bwd(weights, None, ys, sigma, us, vs)
    for i in range(3):
        assert bool(sigma[i].isfinite()) == (i != layer)
        assert bool(ys[i].isfinite().all()) == (i != layer)
        assert bool(grads[i].isfinite().all()) == (i != layer)


def test_a_negative_sigma_of_given_vectors() -> None:
    weights, us, vs = make_group([(5, 7)], torch.float32)
    us[0] = torch.nn.functional.normalize(-(weights[0] @ vs[0]), dim=0)
    ys, sigma, us_out, vs_out = kernels.spectral_norm_fwd(weights, us, vs, 0, EPS)
    assert sigma[0] < 0
    torch.testing.assert_close(ys[0], weights[0] / sigma[0])
    assert torch.equal(us_out[0], us[0])
    assert torch.equal(vs_out[0], vs[0])
    assert us_out[0].data_ptr() != us[0].data_ptr()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
@pytest.mark.parametrize("n", [0, 1])
def test_empty_matrices(shape: tuple[int, int], n: int) -> None:
    weights, us, vs = make_group([shape, (5, 7)], torch.float32)
    ys, sigma, us, vs = kernels.spectral_norm_fwd(weights, us, vs, n, EPS)
    assert sigma[0] == 0
    assert ys[0].shape == shape
    assert all(x.isfinite().all() for x in (*us, *vs))
    grads = kernels.spectral_norm_bwd(ys, None, ys, sigma, us, vs)
    assert grads[0].shape == shape


def test_addresses_that_are_not_aligned() -> None:
    # The rows start 4 bytes past a multiple of 16, so that 16-byte loads would fault on a GPU.
    buffer = torch.randn(8 * 32 + 1)
    weight = buffer[1:].view(8, 32)
    assert weight.data_ptr() % 16 != 0
    _, us, vs = make_group([(8, 32)], torch.float32)
    shifted = kernels.spectral_norm_fwd([weight], us, vs, 1, EPS)
    aligned = kernels.spectral_norm_fwd([weight.clone()], us, vs, 1, EPS)
    for a, b in zip(shifted, aligned, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_more_partial_results_than_a_step_combines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "PARTIALS_PER_STEP", 4)
    forward_kernels.forward_plans.clear()
    for shape in [(9 * 256, 1), (1, 9 * 128)]:
        inputs = make_group([shape], torch.float32)
        outputs = kernels.spectral_norm_fwd(*inputs, 1, EPS)
        check_forward(outputs, inputs, 1)
    forward_kernels.forward_plans.clear()


def test_partial_dot_products_of_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "elements_per_partial", lambda numel, itemsize: 2 * config.flat_block(itemsize))
    backward_kernels.backward_plans.clear()
    # Two steps, then one whole step and a partial one, then an unaligned gradient, all of it masked.
    ys, sigma, us, vs = kernels.spectral_norm_fwd(*make_group([(128, 100), (128, 100)], torch.float32), 1, EPS)
    grad_ys = [torch.randn(128, 100), torch.randn(128 * 100 + 1)[1:].view(128, 100)]
    grads = kernels.spectral_norm_bwd(grad_ys, None, ys, sigma, us, vs)
    backward_kernels.backward_plans.clear()
    for i, grad in enumerate(grads):
        layer = grad_ys[i], None, ys[i], sigma[i], us[i], vs[i]
        (truth, size), (peer, _) = (backward(*layer, dtype) for dtype in (torch.float64, torch.float32))
        assert_as_accurate(grad, peer, truth, roundings=ROUNDINGS, scale=size)


def test_arguments_that_do_not_fit() -> None:
    weights, us, vs = make_group([(4, 6)], torch.float32)
    with pytest.raises(ValueError, match="expected a matrix"):
        kernels.spectral_norm_fwd(weights, vs, us, 1, EPS)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.spectral_norm_fwd([weights[0].T.contiguous().T], us, vs, 1, EPS)
    with pytest.raises(ValueError, match=r"torch\.float32 on cpu"):
        kernels.spectral_norm_fwd(weights, us, [vs[0].double()], 1, EPS)
    ys, sigma, us, vs = kernels.spectral_norm_fwd(weights, us, vs, 1, EPS)
    with pytest.raises(ValueError, match="gradients"):
        kernels.spectral_norm_bwd([ys[0].T], None, ys, sigma, us, vs)
    with pytest.raises(ValueError, match="u and v of all layers, 10 numbers, got 9"):
        kernels.spectral_norm_bwd(ys, None, ys, sigma, us, [vs[0][1:]])
    with pytest.raises(ValueError, match="two or more dimensions"):
        kernels.spectral_norm_fwd(us, us, vs, 1, EPS)
    with pytest.raises(ValueError, match="sigma"):
        kernels.spectral_norm_bwd(ys, sigma.double(), ys, sigma, us, vs)
    with pytest.raises(ValueError, match="too wide"):
        forward_kernels._forward_plan((torch.Size([4, 1 << 30]),), None, torch.float32, torch.device("cpu"), EPS)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (64, 27), (512, 4608), (4096, 16384), (3, 40000)])
def test_launch_shapes(shape: tuple[int, int], itemsize: int) -> None:
    tile = config.matrix_tile([shape], itemsize)
    elements = tile.block_h * tile.block_w
    assert elements & (elements - 1) == 0, "tiles have sides of powers of 2"
    assert elements * max(itemsize, 4) <= 32 << 10, "accumulators of a tile take at most a third of the registers"
    assert config.column_tile([shape]).block_w in (128, 512)
    numel = shape[0] * shape[1]
    part = config.elements_per_partial(numel, itemsize)
    assert part % config.flat_block(itemsize) == 0
    assert config.ceil_div(numel, part) <= 1024
