"""Norms of matrices and convolutions, against exact arithmetic, LAPACK and dense Jacobians.

The error bounds are derived in docs/numerics/spectral_norm_bound.md and docs/numerics/conv_spectral_norm.md.
"""

import itertools
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lipgan.linalg import conv_spectral_norm, conv_spectral_norm_bound, spectral_norm_bound
from lipgan.linalg.conv_operator import ConvOperator

# torch's own convolution warns so.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

EPS64 = torch.finfo(torch.float64).eps
EPS32 = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The operators here are too small to share: with several threads most of the time goes into waiting."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def relative_excess(shape: tuple[int, ...], rank: int, n_iterations: int, dtype: torch.dtype) -> float:
    """``rank^(1/q) (1 + rho) - 1``, eq. (7) of docs/numerics/spectral_norm_bound.md."""
    p, n = sorted(shape)
    rho = 2 * (p * (n + 4) + p * p + 8) * EPS64
    if dtype != torch.float64:
        rho += 2 * EPS32
    return float(rank ** (2.0 ** -(n_iterations + 1)) * (1 + rho) - 1)


def lapack_error(shape: tuple[int, ...]) -> float:
    """The backward error of the singular values by LAPACK: a modest polynomial of the shape, here its sum."""
    return sum(shape) * EPS64


def exceeds_sigma(bound: float, a: Tensor) -> bool:
    """Whether ``bound >= sigma(a)``, decided in exact arithmetic: bound^2 I - A A^T has no negative pivot."""
    rows = [[Fraction(x) for x in row] for row in a.double().tolist()]
    size = len(rows)
    gram = [[sum(x * y for x, y in zip(p, q, strict=True)) for q in rows] for p in rows]
    m = [[Fraction(bound) ** 2 * (i == j) - gram[i][j] for j in range(size)] for i in range(size)]
    for k in range(size):
        if m[k][k] < 0 or (m[k][k] == 0 and any(m[k][j] for j in range(k, size))):
            return False
        if m[k][k] == 0:
            continue
        for i in range(k + 1, size):
            factor = m[i][k] / m[k][k]
            for j in range(k, size):
                m[i][j] -= factor * m[k][j]
    return True


def spectrum(kind: str, p: int) -> np.ndarray:
    return {
        "flat": np.ones(p),
        "decaying": 0.5 ** np.arange(p),
        "rank-1": np.eye(p)[0],
        "repeated": np.where(np.arange(p) < (p + 1) // 2, 1.0, 0.1),
        "near-tie": 1 - 1e-9 * np.arange(p),
    }[kind]


def with_spectrum(kind: str, m: int, n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    p = min(m, n)
    left = np.linalg.qr(rng.standard_normal((m, p)))[0]
    right = np.linalg.qr(rng.standard_normal((n, p)))[0]
    return (left * spectrum(kind, p)) @ right.T


matrices = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["flat", "decaying", "rank-1", "repeated", "near-tie"]),
        "m": st.integers(1, 40),
        "n": st.integers(1, 40),
        "exponent": st.integers(-30, 30),
        "seed": st.integers(0, 2**31),
    }
)


@settings(max_examples=150, deadline=None)
@given(matrices, st.integers(1, 12), st.sampled_from([torch.float32, torch.float64]))
def test_bound_lies_between_sigma_and_the_convergence_factor(
    drawn: dict[str, Any], n_iterations: int, dtype: torch.dtype
) -> None:
    scale = 10.0 ** drawn.pop("exponent")
    a = torch.as_tensor(with_spectrum(**drawn) * scale).to(dtype)
    shape = (drawn["m"], drawn["n"])
    sigma = float(scipy.linalg.svdvals(a.double().numpy(force=True))[0])
    bound = float(spectral_norm_bound(a, n_iterations=n_iterations))
    excess = relative_excess(shape, min(shape), n_iterations, dtype)
    assert bound / sigma - 1 >= -lapack_error(shape)
    assert bound / sigma - 1 <= excess + lapack_error(shape)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_bound_is_certified_in_exact_arithmetic(data: st.DataObject) -> None:
    dtype, width = data.draw(st.sampled_from([(torch.float32, 32), (torch.float64, 64)]))
    m, n = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    limit = 2.0**100
    entry = st.floats(-limit, limit, width=width, allow_subnormal=True) | st.sampled_from([0.0, 1.0, -1.0])
    rows = st.lists(entry, min_size=n, max_size=n)
    a = torch.tensor(data.draw(st.lists(rows, min_size=m, max_size=m)), dtype=dtype)
    bound = spectral_norm_bound(a, n_iterations=data.draw(st.integers(1, 45)))
    assert bound.dtype == dtype
    assert exceeds_sigma(float(bound), a)


@pytest.mark.parametrize("n", [1, 2, 7, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_known_sigma_is_not_undercut(n: int, dtype: torch.dtype) -> None:
    # Integers: sigma^2 = |u|^2 |v|^2 for u v^T, 1 for the identity; exact in Python.
    u, v = torch.arange(1, n + 1, dtype=dtype), torch.arange(n, 0, -1, dtype=dtype) % 5 + 1
    squared = int((u.double() ** 2).sum()) * int((v.double() ** 2).sum())
    assert Fraction(float(spectral_norm_bound(torch.outer(u, v), n_iterations=30))) ** 2 >= squared
    for n_iterations in (1, 10, 50):
        assert float(spectral_norm_bound(torch.eye(n, dtype=dtype), n_iterations=n_iterations)) >= 1


@pytest.mark.parametrize("n_iterations", [1, 3, 8])
def test_bound_is_the_schatten_norm(n_iterations: int) -> None:
    a = torch.randn(13, 29, dtype=torch.float64)
    q = 2.0 ** (n_iterations + 1)
    s = scipy.linalg.svdvals(a.numpy(force=True))
    schatten = s[0] * ((s / s[0]) ** q).sum() ** (1 / q)
    tolerance = relative_excess((13, 29), 1, n_iterations, torch.float64) + lapack_error((13, 29))
    assert abs(float(spectral_norm_bound(a, n_iterations=n_iterations)) / schatten - 1) <= tolerance


def test_bound_decreases_with_the_iterations_and_reaches_sigma() -> None:
    a = torch.randn(30, 20, dtype=torch.float64)
    bounds = [float(spectral_norm_bound(a, n_iterations=t)) for t in range(1, 31)]
    assert all(later <= earlier * (1 + 1e-11) for earlier, later in itertools.pairwise(bounds))
    # 20^(2^-31) - 1 = 1.4e-9
    assert bounds[-1] / float(scipy.linalg.svdvals(a.numpy(force=True))[0]) - 1 <= 1.5e-9


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 1.1, 1.3, 1.7])
def test_rounding_of_long_inner_products_is_covered(value: float) -> None:
    # sigma^2 = n value^2; the sum of the squares has a rounding error in each term, all in one direction.
    n = 100_000
    bound = float(spectral_norm_bound(torch.full((1, n), value, dtype=torch.float64)))
    assert Fraction(bound) ** 2 >= n * Fraction(value) ** 2


@pytest.mark.parametrize("scale", [5e-324, 1e-310, 1e-160, 1e-30, 1e30, 1e160, 1e307])
def test_bound_at_extreme_scales(scale: float) -> None:
    for m, n in ((1, 5), (3, 5)):
        a = torch.full((m, n), scale, dtype=torch.float64)
        bound = float(spectral_norm_bound(a))
        # sigma = sqrt(m n) scale; at the smallest numbers steps of the subnormal grid come on top.
        assert Fraction(bound) ** 2 >= m * n * Fraction(scale) ** 2
        assert bound <= (m * n) ** 0.5 * scale * (1 + 1e-12) + 2 * 5e-324


def test_bound_of_subnormal_float32() -> None:
    a = torch.full((1, 5), 1e-45)
    assert exceeds_sigma(float(spectral_norm_bound(a)), a)


def test_bound_beyond_the_largest_number_is_inf() -> None:
    for dtype in (torch.float32, torch.float64):
        assert spectral_norm_bound(torch.full((3, 3), torch.finfo(dtype).max, dtype=dtype)) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bound_of_batches_strides_and_half_types(dtype: torch.dtype) -> None:
    a = torch.randn(2, 3, 9, 5).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for batch in (a, a.mT, a[..., ::2, 1:], a.transpose(0, 1)):
        bound = spectral_norm_bound(batch)
        assert bound.dtype == wide
        assert bound.shape == batch.shape[:-2]
        sigma = torch.linalg.svdvals(batch.double())[..., 0]
        excess = relative_excess(tuple(batch.shape[-2:]), min(batch.shape[-2:]), 10, wide)
        assert (bound.double() >= sigma).all()
        assert (bound.double() / sigma - 1 <= excess + lapack_error(tuple(batch.shape[-2:]))).all()


@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 3), (0, 4), (4, 0), (2, 0, 3), (0, 3, 3)])
def test_zero_and_empty_matrices(shape: tuple[int, ...]) -> None:
    a = torch.zeros(shape, requires_grad=True)
    bound = spectral_norm_bound(a)
    assert bound.shape == shape[:-2]
    assert (bound == 0).all()
    bound.sum().backward()
    assert a.grad is not None
    assert (a.grad == 0).all()


def test_one_matrix_of_a_batch_does_not_touch_another() -> None:
    a = torch.randn(4, 3, 3, dtype=torch.float64)
    alone = spectral_norm_bound(a[3])
    a[0], a[1, 0, 0], a[2, 1, 1] = 0, float("nan"), float("-inf")
    a.requires_grad_()
    bound = spectral_norm_bound(a)
    assert bound[0] == 0
    assert bound[1].isnan()
    assert bound[2] == float("inf")
    assert bound[3] == alone
    bound.sum().backward()
    assert a.grad is not None
    assert (a.grad[0] == 0).all()
    assert a.grad[3].isfinite().all()


@pytest.mark.parametrize("shape", [(4, 3), (3, 5), (2, 3, 3), (1, 1)])
def test_bound_gradcheck(shape: tuple[int, ...]) -> None:
    a = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    for n_iterations in (1, 4):
        assert torch.autograd.gradcheck(lambda x, t=n_iterations: spectral_norm_bound(x, n_iterations=t), a)
    assert torch.autograd.gradgradcheck(lambda x: spectral_norm_bound(x, n_iterations=3), a)


def test_bound_gradient_is_that_of_the_schatten_norm_and_tends_to_uv() -> None:
    a = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    u, s, vh = torch.linalg.svd(a.detach(), full_matrices=False)
    for n_iterations in (2, 20):
        q = 2.0 ** (n_iterations + 1)
        bound = spectral_norm_bound(a, n_iterations=n_iterations)
        (grad,) = torch.autograd.grad(bound, a)
        expected = (u * (s / bound.detach()) ** (q - 1)) @ vh
        # A relative error rho of the bound enters the power as (q - 1) rho.
        rho = relative_excess((6, 9), 1, n_iterations, torch.float64) + lapack_error((6, 9))
        assert (grad - expected).abs().max() <= 2 * q * rho
    assert (grad - torch.outer(u[:, 0], vh[0])).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("a", "kwargs", "error", "message"),
    [
        (torch.tensor(1.0), {}, ValueError, r"a must have at least two dimensions, got shape \(\)"),
        (torch.ones(3), {}, ValueError, r"a must have at least two dimensions, got shape \(3,\)"),
        (torch.ones(3, 3, dtype=torch.int64), {}, TypeError, "a must have a real .* torch.int64"),
        (torch.ones(3, 3, dtype=torch.bool), {}, TypeError, "a must have a real .* torch.bool"),
        (torch.ones(3, 3, dtype=torch.complex64), {}, TypeError, "a must have a real .* torch.complex64"),
        (np.ones((3, 3)), {}, TypeError, "a must be a tensor, got ndarray"),
        (torch.ones(3, 3), {"n_iterations": 0}, ValueError, "n_iterations must be at least 1, got 0"),
        (torch.ones(3, 3), {"n_iterations": 2.0}, TypeError, "n_iterations must be an int, got 2.0"),
    ],
)
def test_bound_bad_input(a: Any, kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        spectral_norm_bound(a, **kwargs)


CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}

# input size, channels in, channels out, kernel, options of the layer
Case = tuple[tuple[int, ...], int, int, Any, dict[str, Any]]

LAYERS: list[Case] = [
    ((9,), 3, 4, 3, {}),
    ((9,), 3, 4, 3, {"padding": 1}),
    ((10,), 2, 3, 4, {"padding": "same"}),
    ((9,), 4, 2, 4, {"padding": 1, "stride": 2}),
    ((11,), 2, 4, 3, {"padding": 2, "dilation": 2, "stride": 3, "groups": 2}),
    ((4,), 1, 1, 4, {"stride": 3}),
    ((3,), 2, 2, 7, {"padding": 5}),
    ((4,), 2, 2, 2, {"padding": 3, "stride": 2}),
    ((6, 5), 2, 3, 3, {"padding": 1}),
    ((6, 7), 3, 2, (3, 2), {"padding": (0, 1), "stride": (2, 1)}),
    ((8, 8), 3, 4, 4, {"padding": 1, "stride": 2}),
    ((7, 6), 4, 4, 3, {"padding": 2, "dilation": 2, "groups": 2}),
    ((5, 5), 3, 3, 3, {"padding": 1, "groups": 3}),
    ((6, 5), 2, 3, 3, {"padding": 1, "padding_mode": "circular"}),
    ((6, 6), 2, 3, 3, {"padding": 1, "stride": 2, "padding_mode": "circular"}),
    ((5, 6), 2, 3, 3, {"padding": (0, 2), "stride": 2, "padding_mode": "circular"}),
    ((6,), 2, 2, 2, {"padding": 5, "padding_mode": "circular"}),
    ((6,), 2, 2, 3, {"padding": 6, "stride": 4, "padding_mode": "circular"}),
    ((3,), 2, 3, 6, {"padding": 3, "padding_mode": "circular"}),
    ((7,), 2, 3, 4, {"padding": "same", "padding_mode": "circular"}),
    ((6, 5), 2, 3, 3, {"padding": 1, "padding_mode": "reflect"}),
    ((6, 5), 2, 3, 3, {"padding": 2, "stride": 2, "padding_mode": "replicate"}),
    ((3, 4, 3), 2, 3, 3, {"padding": 1}),
    ((4, 4, 4), 2, 2, 2, {"stride": 2, "padding": 1}),
    ((3, 3, 4), 1, 2, 3, {"padding": 1, "padding_mode": "circular"}),
    ((5,), 3, 2, 4, {"transposed": True, "stride": 2, "padding": 1}),
    ((4,), 2, 2, 3, {"transposed": True, "stride": 2, "dilation": 4, "output_padding": 3}),
    ((4, 3), 3, 2, 4, {"transposed": True, "stride": 2, "padding": 1}),
    ((4, 4), 4, 2, 3, {"transposed": True, "stride": 2, "padding": 1, "output_padding": 1, "groups": 2}),
    ((5, 4), 2, 3, 3, {"transposed": True, "dilation": 2, "padding": 2}),
    ((2, 3, 2), 2, 2, 3, {"transposed": True, "stride": (1, 2, 1), "padding": 1}),
]


def build(case: Case) -> tuple[Any, tuple[int, ...], dict[str, Any]]:
    """The torch layer in float64, its input size, and the arguments of our functions."""
    size, channels_in, channels_out, kernel, options = case
    layer_options = dict(options)
    classes = TRANSPOSED if layer_options.pop("transposed", False) else CONVS
    layer_options.update(bias=False, dtype=torch.float64)
    layer = classes[len(size)](channels_in, channels_out, kernel, **layer_options)
    return layer, size, options


def dense(layer: nn.Module, channels_in: int, size: tuple[int, ...]) -> np.ndarray:
    """The Jacobian of a linear layer, one column per input element."""
    columns = torch.eye(channels_in * int(np.prod(size)), dtype=torch.float64)
    with torch.no_grad():
        return layer(columns.unflatten(1, (channels_in, *size))).flatten(1).T.numpy(force=True)


def power_iteration_error(s: np.ndarray, inputs: int, n_iterations: int) -> float:
    """Eq. (3) of docs/numerics/conv_spectral_norm.md with T = 1e6 inputs, the smallest over the k."""
    ratio = s / s[0]
    tails = np.append(1e6 * inputs * ratio[1:] ** (4 * n_iterations - 2), 0.0)
    return float((1 - ratio**2 + tails).min() + rounding(s))


def rounding(s: np.ndarray) -> float:
    return 10 * len(s) * EPS64


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_conv_spectral_norm_is_the_norm_of_the_dense_jacobian(case: Case) -> None:
    layer, size, options = build(case)
    s = scipy.linalg.svdvals(dense(layer, case[1], size))
    inputs = case[1] * int(np.prod(size))
    n_iterations = 50
    while (tolerance := power_iteration_error(s, inputs, n_iterations)) > 1e-2:
        n_iterations *= 2
    assert n_iterations <= 1600, "the singular values lie too near each other for this test"
    sigma = float(conv_spectral_norm(layer.weight.detach(), size, n_iterations=n_iterations, **options))
    assert -tolerance <= sigma / s[0] - 1 <= rounding(s)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_conv_operator_and_its_adjoint(case: Case) -> None:
    layer, size, options = build(case)
    jacobian = torch.as_tensor(dense(layer, case[1], size))
    weight = layer.weight.detach()
    operator = ConvOperator.create(weight, size, **options)
    x = torch.randn(operator.input_shape, dtype=torch.float64)
    y = torch.randn(operator.output_shape, dtype=torch.float64)
    torch.testing.assert_close(operator(weight, x).flatten(), jacobian @ x.flatten())
    torch.testing.assert_close(operator.adjoint(weight, y).flatten(), jacobian.T @ y.flatten())


BOUNDED = [case for case in LAYERS if case[4].get("padding_mode") not in ("reflect", "replicate")]


@pytest.mark.parametrize("case", BOUNDED, ids=str)
@pytest.mark.parametrize("kernel_kind", ["random", "ones", "alternating"])
def test_conv_spectral_norm_bound_is_a_bound(case: Case, kernel_kind: str) -> None:
    layer, size, options = build(case)
    weight = layer.weight.detach()
    if kernel_kind != "random":
        # All singular vectors alike over the positions, which is where a wrong embedding would show.
        sign = -1.0 if kernel_kind == "alternating" else 1.0
        weight.copy_(sign ** torch.arange(weight.shape[-1], dtype=torch.float64).expand_as(weight))
    sigma = scipy.linalg.svdvals(dense(layer, case[1], size))[0]
    bound = float(conv_spectral_norm_bound(weight, size, n_iterations=16, **options))
    assert bound >= sigma * (1 - 1e-13)
    # A frequency block has a norm of at most sqrt(taps) |W|_F by Cauchy-Schwarz; circular padding repeats an
    # output at most 3 times in each dimension.
    taps = np.prod(weight.shape[2:])
    assert bound <= float(weight.norm()) * taps**0.5 * 3 ** (len(size) / 2) * (1 + 1e-3)


@pytest.mark.parametrize(
    "case",
    [
        ((6, 5), 2, 3, 3, {"padding": 1, "padding_mode": "circular"}),
        ((7,), 3, 3, 5, {"padding": 4, "dilation": 2, "padding_mode": "circular"}),
        ((6, 8), 2, 3, 3, {"padding": 1, "stride": 2, "padding_mode": "circular"}),
        ((6, 6), 4, 4, 3, {"padding": 1, "stride": 3, "groups": 2, "padding_mode": "circular"}),
        ((3, 4, 3), 2, 2, 3, {"padding": 1, "padding_mode": "circular"}),
        ((8, 8), 3, 4, 2, {"stride": 2}),
        ((4, 4), 3, 4, 2, {"stride": 2, "transposed": True}),
    ],
    ids=str,
)
def test_conv_spectral_norm_bound_is_tight_where_the_blocks_are_the_operator(case: Case) -> None:
    layer, size, options = build(case)
    sigma = scipy.linalg.svdvals(dense(layer, case[1], size))[0]
    # At most 4 * 9 rows in a block: 36^(2^-31) - 1 < 2e-9.
    bound = float(conv_spectral_norm_bound(layer.weight.detach(), size, n_iterations=30, **options))
    assert 1 - 1e-13 <= bound / sigma <= 1 + 3e-9


def test_zero_padding_bound_closes_in_as_the_input_grows() -> None:
    weight = torch.randn(3, 2, 3, dtype=torch.float64)
    ratios = []
    for size in (4, 16, 64, 128):
        layer = nn.Conv1d(2, 3, 3, padding=1, bias=False, dtype=torch.float64)
        layer.weight.data.copy_(weight)
        sigma = scipy.linalg.svdvals(dense(layer, 2, (size,)))[0]
        ratios.append(float(conv_spectral_norm_bound(weight, size, padding=1, n_iterations=20)) / sigma)
    assert all(ratio >= 1 - 1e-13 for ratio in ratios)
    assert ratios[-1] < 1.001
    assert ratios[-1] < ratios[0]


def test_zero_padding_norm_does_not_decrease_with_the_size() -> None:
    transposed = {"transposed": True, "stride": 2, "padding": 1}
    for options in ({"padding": 1}, {"padding": 1, "stride": 2}, transposed):
        layer, _, _ = build(((3, 3), 2, 2, 3, options))
        norms = [scipy.linalg.svdvals(dense(layer, 2, (n, n)))[0] for n in (2, 3, 5, 8)]
        assert all(small <= large * (1 + 1e-13) for small, large in itertools.pairwise(norms))


def test_the_reshaped_kernel_norm_is_not_the_operator_norm() -> None:
    # Nine equal taps: one row of norm 3, but a constant image is multiplied by 9 away from the border.
    weight = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False, dtype=torch.float64)
    layer.weight.data.copy_(weight)
    true = scipy.linalg.svdvals(dense(layer, 1, (12, 12)))[0]
    reshaped = float(torch.linalg.matrix_norm(weight.flatten(1), 2))
    ours = float(conv_spectral_norm(weight, 12, padding=1, n_iterations=500))
    bound = float(conv_spectral_norm_bound(weight, 12, padding=1))
    assert reshaped == pytest.approx(3.0)
    # sigma = (1 + 2 cos(pi / 13))^2, the square of the 1-d operator's norm
    assert true == pytest.approx((1 + 2 * np.cos(np.pi / 13)) ** 2)
    assert true > 2.8 * reshaped
    assert ours == pytest.approx(true, rel=1e-10)
    assert true <= bound <= 9.1
    # With stride 3 every input is read once, and the reshaped kernel is the operator.
    assert float(conv_spectral_norm(weight, 12, stride=3)) == pytest.approx(reshaped)


def test_the_reshaped_kernel_norm_errs_on_both_sides() -> None:
    # Three outputs, each a shift of the input: the reshaped kernel is the identity.
    shifts = torch.eye(3, dtype=torch.float64)[:, None]
    assert float(torch.linalg.matrix_norm(shifts.flatten(1), 2)) == pytest.approx(1.0)
    assert float(conv_spectral_norm(shifts, 64, padding=1)) == pytest.approx(3**0.5)
    # On an input of one element only one of the two taps is ever used.
    edge = torch.tensor([[[1.0, 1.0, 0.0]]], dtype=torch.float64)
    assert float(torch.linalg.matrix_norm(edge.flatten(1), 2)) == pytest.approx(2**0.5)
    assert float(conv_spectral_norm(edge, 1, padding=1)) == pytest.approx(1.0)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conv_norms_scale(scale: float, dtype: torch.dtype) -> None:
    weight = torch.randn(3, 2, 3, 3, dtype=dtype)
    for function in (conv_spectral_norm, conv_spectral_norm_bound):
        torch.manual_seed(1)
        expected = function(weight, 6, padding=1).double() * scale
        torch.manual_seed(1)
        scaled = function(weight * scale, 6, padding=1)
        assert scaled.dtype == dtype
        # Rounding the scaled weights moves the norm by sqrt(taps * channels) eps at most; 100 is ample.
        assert abs(float(scaled / expected) - 1) <= 100 * torch.finfo(dtype).eps


@pytest.mark.cpu  # with a generator, which has to be one of the device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conv_norms_of_half_types(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 2, 3).to(dtype)
    generator = torch.Generator()
    sigma = conv_spectral_norm(weight, 8, padding=1, generator=generator.manual_seed(3))
    assert sigma.dtype == torch.float32
    torch.testing.assert_close(
        sigma, conv_spectral_norm(weight.float(), 8, padding=1, generator=generator.manual_seed(3))
    )
    assert conv_spectral_norm_bound(weight, 8, padding=1) >= sigma


def test_conv_norms_of_zero_and_non_finite_weights() -> None:
    zero = torch.zeros(3, 2, 3, requires_grad=True)
    for function in (conv_spectral_norm, conv_spectral_norm_bound):
        value = function(zero, 8, padding=1)
        assert value == 0
        (grad,) = torch.autograd.grad(value, zero)
        assert grad.isfinite().all()
        for bad in (float("nan"), float("inf")):
            assert not function(torch.full((3, 2, 3), bad), 8).isfinite()


@pytest.mark.cpu  # with a generator, which has to be one of the device
def test_conv_norms_gradcheck() -> None:
    # Positive taps set the first singular value apart.
    weight = (1 + 0.2 * torch.randn(2, 2, 3, dtype=torch.float64)).requires_grad_()

    def norm(w: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return conv_spectral_norm(w, 5, padding=1, stride=2, n_iterations=60, generator=generator)

    # u and v are constants in the derivative, which has an error where they have not converged.
    assert torch.autograd.gradcheck(norm, weight)
    for options in ({"padding": 1, "stride": 2}, {"padding": 1, "padding_mode": "circular"}):
        assert torch.autograd.gradcheck(
            lambda w, o=options: conv_spectral_norm_bound(w, 5, n_iterations=3, **o), weight
        )


def test_conv_norms_have_one_gradient_at_convergence() -> None:
    weight = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"padding": 1, "padding_mode": "circular"}
    (power,) = torch.autograd.grad(conv_spectral_norm(weight, 6, n_iterations=400, **options), weight)
    (gram,) = torch.autograd.grad(conv_spectral_norm_bound(weight, 6, n_iterations=20, **options), weight)
    torch.testing.assert_close(power, gram, rtol=1e-4, atol=1e-4)


WEIGHT = torch.ones(4, 2, 3, 3)


@pytest.mark.parametrize(
    ("weight", "size", "kwargs", "error", "message"),
    [
        (torch.ones(4, 2), 8, {}, ValueError, r"weight must have 3, 4 or 5 dimensions, got shape \(4, 2\)"),
        (torch.ones(4, 0, 3), 8, {}, ValueError, r"weight must not be empty, got shape \(4, 0, 3\)"),
        (WEIGHT.long(), 8, {}, TypeError, "weight must have a real .* torch.int64"),
        (WEIGHT.cfloat(), 8, {}, TypeError, "weight must have a real .* torch.complex64"),
        (WEIGHT, (8,), {}, ValueError, r"input_size must have 2 entries, .* got \(8,\)"),
        (WEIGHT, (8, 0), {}, ValueError, r"input_size must be at least 1, got \(8, 0\)"),
        (WEIGHT, (8, 8.0), {}, TypeError, r"input_size must consist of ints, got \(8, 8.0\)"),
        (WEIGHT, 2, {}, ValueError, r"input_size \(2, 2\) gives an output of size \(0, 0\)"),
        (WEIGHT, 8, {"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        (WEIGHT, 8, {"stride": (1, 1, 1)}, ValueError, r"stride must have 2 entries, .* got \(1, 1, 1\)"),
        (WEIGHT, 8, {"padding": -1}, ValueError, "padding must be at least 0, got -1"),
        (WEIGHT, 8, {"padding": "full"}, ValueError, "padding must be integers, valid or same, got 'full'"),
        (WEIGHT, 8, {"padding": "same", "stride": 2}, ValueError, "padding 'same' needs stride 1, got 2"),
        (WEIGHT, 8, {"dilation": 0}, ValueError, "dilation must be at least 1, got 0"),
        (WEIGHT, 8, {"groups": 3}, ValueError, "groups must divide the 4 rows of weight, got 3"),
        (WEIGHT, 8, {"output_padding": 1}, ValueError, "output_padding needs transposed=True, got 1"),
        (WEIGHT, 8, {"transposed": True, "output_padding": 1}, ValueError, "output_padding must be below"),
        (WEIGHT, 8, {"padding_mode": "mirror"}, ValueError, "padding_mode must be one of .* got 'mirror'"),
        (WEIGHT, 8, {"padding_mode": "circular", "transposed": True}, ValueError, "must be 'zeros'"),
        (WEIGHT, 3, {"padding_mode": "circular", "padding": 4}, ValueError, "padding must be at most 3"),
        (WEIGHT, 8, {"n_iterations": 0}, ValueError, "n_iterations must be at least 1, got 0"),
    ],
)
def test_conv_norms_bad_input(
    weight: Any, size: Any, kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    for function in (conv_spectral_norm, conv_spectral_norm_bound):
        with pytest.raises(error, match=message):
            function(weight, size, **kwargs)


def test_the_bound_refuses_other_paddings() -> None:
    with pytest.raises(ValueError, match="padding_mode must be 'zeros' or 'circular' for a bound"):
        conv_spectral_norm_bound(WEIGHT, 8, padding=1, padding_mode="reflect")
