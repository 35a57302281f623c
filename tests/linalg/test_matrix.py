"""Polar decompositions, nuclear norms and tr (S1 S2)^(1/2), against SciPy, many digits and exact constructions.

The bounds are derived in docs/numerics/matrix_sqrt.md.
"""

import math
import sys
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipgan.linalg import inv_sqrtm, nuclear_norm, polar, sqrtm, trace_sqrt_product
from lipgan.linalg.covariance_factor import Factor, factorize
from lipgan.linalg.trace_sqrt_product import METHODS, trace_sqrt_product_info
from lipgan.ops import use_backend
from lipgan.reference import matrix_sqrt as reference

# `lipgan.linalg` has a function of this name.
module = sys.modules["lipgan.linalg.trace_sqrt_product"]

EPS = torch.finfo(torch.float64).eps
SHAPES = [(1, 1), (5, 5), (7, 4), (4, 7), (1, 6), (6, 1)]
SPECTRA = ["flat", "decaying", "clustered", "deficient", "one huge", "zero"]


pytestmark = pytest.mark.usefixtures("single_thread")


def basis(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]


def spectrum(kind: str, n: int) -> Tensor:
    k = torch.arange(n, dtype=torch.float64)
    return {
        "flat": 1 - 0.5 * k / n,
        "decaying": 10.0 ** (-16 * k / max(1, n - 1)),
        "clustered": torch.where(k < n / 2, 1.0, 0.25).double(),
        "deficient": torch.where(k < (n + 1) // 2, 1 - 0.5 * k / n, 0.0),
        "one huge": torch.where(k == 0, 1.0, 1e-6).double(),
        "zero": torch.zeros(n, dtype=torch.float64),
    }[kind]


def covariance(n: int, kind: str = "flat", seed: int = 0) -> Tensor:
    q = basis(n, seed)
    return reference.symmetric_part((q * spectrum(kind, n)) @ q.mT)


# ---- polar and nuclear norm ----


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_polar_against_scipy(shape: tuple[int, int], dtype: torch.dtype) -> None:
    a = torch.randn(3, *shape, dtype=torch.float64)
    u, h = polar(a.to(dtype))
    assert torch.equal(h, h.mT)
    for k in range(3):
        their_u, their_h = scipy.linalg.polar(a[k].numpy(force=True))
        values = torch.linalg.svdvals(a[k])
        unit = reference.resolution(max(shape), dtype)
        # u moves by e / s, with an error e of 4 m^(1/2) eps |a|; h by twice e.
        assert np.abs(u[k].double().numpy(force=True) - their_u).max() <= 4 * unit * float(values[0] / values[-1])
        assert np.abs(h[k].double().numpy(force=True) - their_h).max() <= 4 * unit * float(values[0])
    small = min(shape)
    product = u.mT @ u if shape[0] >= shape[1] else u @ u.mT
    assert float((product - torch.eye(small, dtype=dtype)).abs().max()) <= 4 * reference.resolution(max(shape), dtype)


def test_polar_of_a_signed_permutation_is_exact() -> None:
    a = torch.tensor([[0.0, -2.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 5.0]], dtype=torch.float64)
    u, h = polar(a)
    assert float((u - a.sign()).abs().max()) <= 4 * EPS
    assert float((h - torch.diag(torch.tensor([3.0, 2.0, 5.0], dtype=torch.float64))).abs().max()) <= 20 * EPS


@pytest.mark.parametrize("shape", [*SHAPES, (2, 4, 3)])
def test_derivatives_of_polar_and_nuclear_norm(shape: tuple[int, ...]) -> None:
    a = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    for function in (polar, nuclear_norm):
        assert torch.autograd.gradcheck(function, a)
        assert torch.autograd.gradgradcheck(function, a)
    # The gradient that is differentiated again is of another formula.
    outputs = polar(a)
    weights = [torch.randn_like(output) for output in outputs]
    once, again = (
        torch.autograd.grad(outputs, a, weights, create_graph=more, retain_graph=True)[0] for more in (False, True)
    )
    torch.testing.assert_close(again, once, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(4, 4), (6, 4), (4, 6)])
def test_derivatives_at_equal_singular_values(shape: tuple[int, int]) -> None:
    a = (2 * torch.eye(*shape, dtype=torch.float64)).requires_grad_()
    for function in (polar, nuclear_norm):
        assert torch.autograd.gradcheck(function, a)
        assert torch.autograd.gradgradcheck(function, a)


def test_derivatives_where_singular_values_are_zero() -> None:
    # Along factors the rank stays 2, and the nuclear norm and h have derivatives.
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, y: nuclear_norm(x @ y), (x, y))
    assert torch.autograd.gradcheck(lambda x, y: polar(x @ y)[1], (x, y))
    # Where there is none: the subgradient of least norm.
    a = torch.zeros(4, 3, dtype=torch.float64)
    a[0, 0] = 2
    a.requires_grad_()
    grad = torch.autograd.grad(nuclear_norm(a), a)[0]
    expected = torch.zeros(4, 3, dtype=torch.float64)
    expected[0, 0] = 1
    assert float((grad - expected).abs().max()) <= 4 * EPS
    u, h = polar(a)
    assert torch.autograd.grad(u.sum() + h.sum(), a)[0].isfinite().all()


def test_a_small_singular_value_keeps_its_direction() -> None:
    # The polar factor, the gradient, is as accurate for a singular value of 1e-9 as for 1: u moves by eps / s.
    left, right = basis(5, 1), basis(5, 2)
    a = ((left * torch.tensor([1.0, 0.5, 0.25, 1e-3, 1e-9], dtype=torch.float64)) @ right.mT).requires_grad_()
    grad = torch.autograd.grad(nuclear_norm(a), a)[0]
    assert float((grad - left @ right.mT).abs().max()) <= 100 * EPS / 1e-9
    assert float((grad.mT @ grad - torch.eye(5)).abs().max()) <= 100 * EPS


def test_nuclear_norm_dtypes_and_empty() -> None:
    a = torch.randn(3, 4, 6)
    assert nuclear_norm(a).dtype == torch.float32
    assert nuclear_norm(a.half()).dtype == torch.float32
    assert torch.allclose(nuclear_norm(a.double()), torch.linalg.matrix_norm(a.double(), "nuc"), rtol=1e-14)
    assert polar(a.bfloat16())[0].dtype == torch.bfloat16
    for shape in ((0, 3), (3, 0), (2, 0, 0), (0, 2, 3)):
        empty = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        norm = nuclear_norm(empty)
        assert norm.shape == shape[:-2]
        norm.sum().backward()
        u, h = polar(empty.detach())
        assert u.shape == shape
        assert h.shape == (*shape[:-2], shape[-1], shape[-1])


# 70 rows: beyond the kernels for small matrices.
IN_FLOAT32: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, int]]] = {
    "sqrtm": (sqrtm, (6, 6)),
    "sqrtm, large": (sqrtm, (70, 70)),
    "sqrtm by products": (lambda a: sqrtm(a, method="newton-schulz"), (20, 20)),
    "inv_sqrtm": (inv_sqrtm, (70, 70)),
    "u": (lambda a: polar(a)[0], (12, 9)),
    "h": (lambda a: polar(a)[1], (12, 9)),
    "nuclear_norm": (nuclear_norm, (12, 9)),
}


@pytest.mark.parametrize("name", IN_FLOAT32)
@pytest.mark.parametrize("create_graph", [False, True])
def test_autocast_changes_nothing(name: str, create_graph: bool, device: torch.device) -> None:
    function, shape = IN_FLOAT32[name]
    a = torch.randn(shape)
    if "sqrtm" in name:
        a = a @ a.mT / len(a) + torch.eye(len(a))
    a.requires_grad_()
    weights = torch.randn_like(function(a.detach()))

    def value_and_gradient(autocast: bool) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            y = function(a)
            return y, *torch.autograd.grad(y, a, weights, create_graph=create_graph)

    for within, outside in zip(value_and_gradient(True), value_and_gradient(False), strict=True):
        assert within.dtype == torch.float32
        assert torch.equal(within, outside)


def test_polar_opcheck() -> None:
    a = torch.randn(2, 5, 3, dtype=torch.float64)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.lipgan.polar_fwd.default, (a,), test_utils=checks)
    u, h, roots, vectors = torch.ops.lipgan.polar_fwd(a)
    torch.library.opcheck(torch.ops.lipgan.polar_bwd.default, (a, h, u, roots, vectors), test_utils=checks)


# ---- tr (S1 S2)^(1/2) ----


def exact_pair(n: int, ranks: tuple[int, int], seed: int) -> tuple[Tensor, Tensor, float]:
    """Two covariances of one basis, and the trace: both are rounded, and the trace moves by that."""
    q = basis(n, seed)
    generator = torch.Generator().manual_seed(seed)
    spectra = []
    for rank in ranks:
        values = 0.1 + torch.rand(n, generator=generator, dtype=torch.float64)
        values[rank:] = 0
        spectra.append(values)
    first, second = (reference.symmetric_part((q * values) @ q.mT) for values in spectra)
    return first, second, float((spectra[0] * spectra[1]).sqrt().sum())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ranks", [(30, 30), (30, 7), (7, 30), (12, 7), (1, 1)])
def test_trace_of_exact_constructions(method: str, ranks: tuple[int, int]) -> None:
    first, second, truth = exact_pair(30, ranks, seed=3)
    trace, info = trace_sqrt_product_info(first, second, method=method)
    # The route by one factor sees the other covariance with the noise of its zeros, and says so in its bound.
    relative = 1e-10 if method in ("auto", "svd", "polar") else max(1e-10, info.error_bound / truth)
    assert abs(float(trace) - truth) <= relative * truth
    assert abs(float(trace) - truth) <= info.error_bound
    auto = "cholesky" if first.device.type == "cpu" or ranks != (30, 30) else "polar"
    assert info.route == (method if method != "auto" else auto)
    assert (info.iterations > 0) == (info.route == "polar")


def truth_by_many_digits(first: Tensor, second: Tensor) -> float:
    """Of the matrices as they are, their negative eigenvalues set to 0."""
    with mpmath.workdps(50):
        factors = []
        for s in (first, second):
            values, vectors = mpmath.eigsy(mpmath.matrix(s.tolist()))
            factors.append(vectors * mpmath.diag([mpmath.sqrt(max(0, value)) for value in values]))
        product = factors[0].T * factors[1]
        gram = product * product.T
        return float(sum(mpmath.sqrt(max(0, x)) for x in mpmath.eigsy((gram + gram.T) / 2, eigvals_only=True)))


@pytest.mark.parametrize("kinds", [("flat", "clustered"), ("one huge", "flat"), ("decaying", "decaying")])
def test_trace_against_many_digits(kinds: tuple[str, str]) -> None:
    first, second = covariance(6, kinds[0], 1), covariance(6, kinds[1], 2)
    truth = truth_by_many_digits(first, second)
    for method in METHODS:
        trace, info = trace_sqrt_product_info(first, second, method=method)
        assert abs(float(trace) - truth) <= info.error_bound + 2 * EPS * truth, method
        if "decaying" not in kinds:
            assert abs(float(trace) - truth) <= 1e-10 * truth, method
    specified = float(reference.trace_sqrt_product(first, second))
    assert abs(specified - truth) <= info.error_bound + 2 * EPS * truth


@given(
    n=st.integers(1, 64),
    kinds=st.tuples(st.sampled_from(SPECTRA), st.sampled_from(SPECTRA)),
    exponents=st.tuples(st.integers(-8, 8), st.integers(-8, 8)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_trace_of_any_two_spectra(n: int, kinds: tuple[str, str], exponents: tuple[int, int], seed: int) -> None:
    pairs = enumerate(zip(kinds, exponents, strict=True))
    first, second = (covariance(n, kind, seed + k) * 10.0**e for k, (kind, e) in pairs)
    value, info = trace_sqrt_product_info(first, second)
    other, other_info = trace_sqrt_product_info(second, first)
    assert value.isfinite()
    assert float(value) >= 0
    assert abs(float(value - other)) <= info.error_bound + other_info.error_bound
    # At most the product of the traces' roots, by Cauchy and Schwarz; equal to the trace for one matrix twice.
    assert float(value) <= math.sqrt(float(first.trace() * second.trace())) * (1 + 1e-12) + info.error_bound
    same, same_info = trace_sqrt_product_info(first, first)
    assert abs(float(same - first.trace())) <= 1e-9 * float(first.trace()) + same_info.clipped


# Falling, with gaps, with zeros; of exponents too, which hypothesis draws.
HARD = {
    "1/k^2": lambda k: (1 + k) ** -2,
    "1/k^8": lambda k: (1 + k) ** -8,
    "condition 1e6": lambda k: 10 ** (-6 * k / k.amax().clamp_min(1)),
    "one small": lambda k: torch.where(k == k.amax(), 1e-9, 1.0),
    "half tiny": lambda k: torch.where(k > k.amax() / 2, 1e-12, 1.0),
    "one huge": lambda k: torch.where(k == 0, 1e8, 1.0),
    "half zero": lambda k: torch.where(k > k.amax() / 2, 0.0, 1.0),
    "rank 1": lambda k: torch.where(k == 0, 1.0, 0.0),
}
BASES = ["any", "unit", "nearly unit", "reflected", "in blocks"]


def basis_of_kind(kind: str, n: int, seed: int) -> Tensor:
    eye = torch.eye(n, dtype=torch.float64)
    if kind == "nearly unit":
        return torch.linalg.qr(eye + 1e-4 * basis(n, seed))[0]
    if kind == "reflected":
        return eye - 2 / n
    if kind == "in blocks":
        eye[: (n + 1) // 2, : (n + 1) // 2] = basis((n + 1) // 2, seed)
    return basis(n, seed) if kind == "any" else eye


@st.composite
def hard_covariances(draw: st.DrawFn, n: int) -> Tensor:
    exponents = st.lists(st.floats(-14, 2), min_size=n, max_size=n)
    values = draw(
        st.one_of(
            st.sampled_from(sorted(HARD)).map(lambda name: HARD[name](torch.arange(n, dtype=torch.float64)).double()),
            exponents.map(lambda exponents: 10 ** torch.tensor(exponents, dtype=torch.float64)),
        )
    )
    if draw(st.booleans()):
        values = values.flip(0)
    q = basis_of_kind(draw(st.sampled_from(BASES)), n, draw(st.integers(0, 3)))
    return reference.symmetric_part((q * values) @ q.mT)


@given(data=st.data(), n=st.integers(1, 7), method=st.sampled_from(["auto", "cholesky", "svd", "eigh", "polar"]))
@settings(max_examples=250, deadline=None)
def test_the_bound_holds_for_any_matrices(data: st.DataObject, n: int, method: str) -> None:
    first, second = data.draw(hard_covariances(n)), data.draw(hard_covariances(n))
    trace, info = trace_sqrt_product_info(first, second, method=method)
    truth = truth_by_many_digits(first, second)
    assert abs(float(trace) - truth) <= info.error_bound
    assert 0 <= info.undetermined <= info.error_bound


@pytest.mark.parametrize("kind", ["flat", "1/k^2", "1/k^4", "condition 1e3", "condition 1e6"])
@pytest.mark.parametrize("same", [True, False])
def test_the_bound_is_sharp(kind: str, same: bool) -> None:
    # Single errors may be 0 by chance, so bounds are compared with the root mean square over several pairs.
    n, errors, bounds = 10, [], []
    k = torch.arange(n, dtype=torch.float64)
    values = {
        "flat": torch.ones(n, dtype=torch.float64),
        "1/k^2": (1 + k) ** -2,
        "1/k^4": (1 + k) ** -4,
        "condition 1e3": 10 ** (-3 * k / (n - 1)),
        "condition 1e6": 10 ** (-6 * k / (n - 1)),
    }[kind]
    for seed in range(8):
        factors = [
            basis(n, 2 * seed + j) * (values if same or j == 0 else torch.ones_like(values)).sqrt() for j in (0, 1)
        ]
        noise = torch.randn(n, 3 * n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        first, second = (x @ x.mT for x in (factors[0] @ noise, factors[1] @ noise.flip(1)))
        trace, info = trace_sqrt_product_info(first, second)
        assert info.route == ("cholesky" if first.device.type == "cpu" else "polar")
        truth = truth_by_many_digits(first, second)
        errors.append((float(trace) - truth) / truth)
        bounds.append(info.error_bound / truth)
    rms = math.sqrt(sum(error**2 for error in errors) / len(errors))
    assert max(bounds) <= 200 * max(rms, EPS / 2)
    assert max(map(abs, errors)) <= min(bounds)


@pytest.mark.cpu  # a GPU takes products
@pytest.mark.parametrize("kind", ["1/k^2", "condition 1e6", "few samples"])
def test_auto_takes_the_eigenvalues_of_large_falling_spectra(kind: str) -> None:
    d, generator = 600, torch.Generator().manual_seed(0)
    k = torch.arange(d, dtype=torch.float64)
    roots = {"1/k^2": 1 / (1 + k), "condition 1e6": 10 ** (-3 * k / d), "few samples": torch.ones_like(k)}[kind]
    covs = []
    for seed in (0, 1):
        x = torch.randn(300 if kind == "few samples" else 2 * d, d, generator=generator, dtype=torch.float64)
        x = (x - x.mean(0)) * roots @ basis(d, seed).mT
        covs.append(reference.symmetric_part(x.mT @ x))
    trace, info = trace_sqrt_product_info(*covs)
    truth, slow = trace_sqrt_product_info(*covs, method="svd")
    assert info.route == "cholesky"
    assert abs(float(trace - truth)) <= 1e-13 * float(truth)
    assert info.error_bound - info.undetermined <= 1e-10 * float(truth)
    assert abs(float(trace - truth)) <= info.error_bound - info.undetermined + slow.error_bound - slow.undetermined
    assert (info.undetermined > 0) == (kind == "few samples")
    assert (info.rank[0] == 299) == (kind == "few samples")
    # The number is the same whether or not its bound is asked for.
    quick, unbounded = trace_sqrt_product_info(*covs, bounded=False)
    assert float(quick) == float(trace)
    assert unbounded.error_bound == math.inf


def falling(q: Tensor, values: Tensor) -> Tensor:
    return reference.symmetric_part((q * values) @ q.mT)


@pytest.mark.parametrize("seed", range(6))
def test_the_bound_sees_what_structure_hides(seed: int) -> None:
    k = torch.arange(6, dtype=torch.float64)
    # All eigenvalues but one are equal, and the reduction mixes the small row with the others: rounding of their size.
    small = torch.eye(6, dtype=torch.float64), falling(basis_of_kind("nearly unit", 6, seed), HARD["one small"](k))
    # A rank-1 matrix of which a pivoted factor may seem to leave nothing.
    rank_1 = torch.where(k % 2 == 0, 1e-3, 1.0).double().diag(), falling(basis(6, seed), HARD["rank 1"](k).double())
    for first, second in (small, rank_1):
        trace, info = trace_sqrt_product_info(first, second)
        assert abs(float(trace) - truth_by_many_digits(first, second)) <= info.error_bound


@pytest.mark.parametrize("seed", range(3))
def test_small_rows_of_the_gram_matrix_come_last(seed: int) -> None:
    # Without that, the first step of LAPACK's reduction spreads the rounding of the largest eigenvalue: 1e-11.
    values = (1 + torch.arange(12, dtype=torch.float64)) ** -6
    first, second = values.flip(0).diag(), falling(basis(12, seed), values)
    trace, _ = trace_sqrt_product_info(first, second, method="cholesky", bounded=False)
    truth = truth_by_many_digits(first, second)
    assert abs(float(trace) - truth) <= 1e-13 * truth
    x, y = first.clone().requires_grad_(), second.clone().requires_grad_()
    ours = torch.autograd.grad(trace_sqrt_product(x, y, method="cholesky"), (x, y))
    for gradient, s in zip(ours, (first, second), strict=True):
        # The trace is homogeneous of degree 1/2 in either side.
        assert abs(float((gradient * s).sum()) - truth / 2) <= 1e-9 * truth


@pytest.mark.parametrize("n", [1, 5, 256, 257, 700])
def test_diagonal_of_an_inverse(n: int) -> None:
    factor = torch.randn(n, n, dtype=torch.float64).tril() / n + torch.eye(n, dtype=torch.float64)
    expected = torch.linalg.inv(factor @ factor.mT).diagonal()
    torch.testing.assert_close(module._diagonal_of_inverse(factor), expected, rtol=1e-10, atol=0)


@pytest.mark.cpu  # a GPU takes products
def test_auto_takes_singular_values_where_eigenvalues_do_not_resolve() -> None:
    first = covariance(40, "decaying", 1)
    _, info = trace_sqrt_product_info(first + 1e-13 * torch.eye(40), first + 1e-13 * torch.eye(40))
    assert info.route == "svd"
    _, info = trace_sqrt_product_info(covariance(40), covariance(40, "clustered", 2))
    assert info.route == "cholesky"


@pytest.mark.parametrize("method", METHODS)
def test_large_triangular_factors_leave_out_their_zeros(method: str) -> None:
    # More than a block of the congruence, and not a multiple of it.
    n = 700 if method in ("auto", "cholesky") else 40
    first, second, truth = exact_pair(n, (n, n), seed=1)
    assert abs(float(trace_sqrt_product_info(first, second, method=method)[0]) - truth) <= 1e-12 * truth


def test_factors_in_place_of_covariances() -> None:
    first, second, truth = exact_pair(20, (20, 6), seed=5)
    factors = factorize(first), factorize(second)
    assert factors[0].triangular
    assert (factors[0].rank, factors[1].rank) == (20, 6)
    for a, b in ((factors[0], second), (first, factors[1]), factors, (Factor.of(factors[0].matrix), second)):
        trace, info = trace_sqrt_product_info(a, b)
        assert abs(float(trace) - truth) <= 1e-10 * truth
        assert info.rank[1] == 6 or b is second
    assert Factor.of(factors[0].matrix).triangular
    assert not Factor.of(factors[1].matrix).triangular


@pytest.mark.parametrize("method", METHODS)
def test_derivatives_of_the_trace(method: str) -> None:
    first, second = covariance(5, seed=1).requires_grad_(), covariance(5, "clustered", 2).requires_grad_()

    def function(a: Tensor, b: Tensor) -> Tensor:
        return trace_sqrt_product(reference.symmetric_part(a), reference.symmetric_part(b), method=method)

    assert torch.autograd.gradcheck(function, (first, second))
    assert torch.autograd.gradcheck(
        lambda a: trace_sqrt_product_info(factorize(second), reference.symmetric_part(a))[0], first
    )


@pytest.mark.parametrize("method", METHODS)
def test_derivatives_of_the_trace_along_factors(method: str) -> None:
    # Of rank 3 and 4 in 6 dimensions: along the factors there is a derivative, that of the nuclear norm.
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    ours = torch.autograd.grad(trace_sqrt_product(x @ x.mT, y @ y.mT, method=method), (x, y))
    truth = torch.autograd.grad(nuclear_norm(x.mT @ y), (x, y))
    for a, b in zip(ours, truth, strict=True):
        assert float((a - b).abs().max()) <= 1e-6 * float(b.abs().max())


def test_trace_of_batches_and_dtypes() -> None:
    first = torch.stack([covariance(4, seed=k) for k in range(3)])[:, None]
    second = torch.stack([covariance(4, "clustered", k) for k in range(2)])
    traces = trace_sqrt_product(first, second)
    assert traces.shape == (3, 2)
    assert float(traces[2, 1]) == float(trace_sqrt_product(first[2, 0], second[1]))
    assert trace_sqrt_product(first.float(), second.float()).dtype == torch.float32
    assert trace_sqrt_product(first.float(), second).dtype == torch.float64
    assert trace_sqrt_product(first[:0, 0], second[0]).shape == (0,)
    assert float(trace_sqrt_product(torch.zeros(0, 0), torch.zeros(0, 0))) == 0
    # float32 inputs are widened: the error is that of rounding them, and of the result.
    narrow = trace_sqrt_product(first.float(), second.float())
    assert torch.allclose(narrow.double(), traces, rtol=4 * torch.finfo(torch.float32).eps, atol=0)


# ---- polynomials and the iteration of products ----


@pytest.mark.parametrize("lower", [0.9, 0.5, 0.1, 0.02, 1e-3])
def test_optimal_polynomials_take_their_error_at_four_points(lower: float) -> None:
    a, b, c, error = reference.optimal_odd_polynomial(lower)
    x = torch.linspace(lower, 1, 200_001, dtype=torch.float64)
    deviation = a * x + b * x**3 + c * x**5 - 1
    assert float(deviation.abs().max()) == pytest.approx(error, rel=1e-9)
    # Chebyshev: nearest if and only if the largest error is taken with alternating signs at one point more than there
    # are coefficients.
    large = deviation[deviation.abs() > error * (1 - 1e-6)].sign()
    assert int((large.diff() != 0).sum()) == 3


@pytest.mark.parametrize("smallest", [0.99, 0.5, 1e-3, 1e-8, 1e-14])
def test_schedules_lead_to_one(smallest: float) -> None:
    x = torch.logspace(math.log10(smallest), 0, 20_001, dtype=torch.float64)
    y = x.clone()
    for a, b, c, reached in reference.polar_schedule(smallest):
        y = y * (a + y * y * (b + y * y * c))
        assert float(y.max()) <= 1 + 4 * EPS
        assert float(y[x >= reached * (1 + 1e-12)].min() if reached < 1 else 1.0) >= 0.5 * (1 - 1e-9)
    assert float((1 - y).abs().max()) <= 1e-14


@pytest.mark.parametrize("smallest", [0.1, 1e-8, 1e-14])
@pytest.mark.parametrize("rounding", [4 * EPS, 1e-6])
def test_schedules_forgive_a_number_that_rounding_has_taken_above_one(smallest: float, rounding: float) -> None:
    # Polynomials that are 1 at 1, and as steep as these, lead it to NaN. Another LAPACK gave such numbers.
    y = 1 + rounding
    for a, b, c, _ in reference.polar_schedule(smallest):
        y = y * (a + y * y * (b + y * y * c))
        assert y <= 1 + 4 * EPS
    assert abs(1 - y) <= 1e-14


@pytest.mark.parametrize("shape", [(8, 8), (9, 5), (5, 9), (1, 1)])
@pytest.mark.parametrize("kind", SPECTRA)
def test_trace_by_products_is_within_its_bound(shape: tuple[int, int], kind: str) -> None:
    small = min(shape)
    values = spectrum(kind, small)
    m = (basis(shape[0], 1)[:, :small] * values) @ basis(shape[1], 2)[:, :small].mT
    trace, bound, steps = reference.polar_trace(m)
    assert abs(trace - float(values.sum())) <= bound
    assert bound <= 1e-11 * float(values.sum())
    assert (steps > 0) == bool(values.any())
    # A bound that is not waited for is still one.
    rough, rough_bound, rough_steps = reference.polar_trace(m, 1e-3)
    assert abs(rough - float(values.sum())) <= rough_bound
    assert rough_bound <= 2e-3 * float(values.sum())
    assert rough_steps <= steps


@pytest.mark.hardware  # kernels without an op around them, which get the wrappers
@pytest.mark.backend("triton")
def test_trace_by_the_products_of_the_kernels() -> None:
    first, second, truth = exact_pair(9, (9, 4), seed=2)
    with use_backend("triton"):
        trace, info = trace_sqrt_product_info(first, second, method="polar")
    assert abs(float(trace) - truth) <= 1e-10 * truth
    assert info.iterations > 0


# ---- bad input ----


def with_entry(value: float) -> Tensor:
    a = covariance(3)
    a[1, 2] = value
    return a


GOOD = covariance(3)


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (np.eye(3), TypeError, "s{} must be a tensor, got ndarray"),
        (torch.eye(3, dtype=torch.int32), TypeError, "s{} must have a real floating-point dtype, got torch.int32"),
        (
            torch.eye(3, dtype=torch.complex64),
            TypeError,
            "s{} must have a real floating-point dtype, got torch.complex64",
        ),
        (torch.ones(3), ValueError, r"s{} must have at least two dimensions, got shape \(3,\)"),
        (torch.ones(3, 2), ValueError, r"s{} must be square, got shape \(3, 2\)"),
        (torch.eye(4), ValueError, "s2 must have the size of s1, "),
        (with_entry(math.nan), ValueError, "s{} must be finite, got 1 entries"),
        (with_entry(math.inf), ValueError, "s{} must be finite, got 1 entries"),
        (with_entry(3.0), ValueError, r"s{} must be symmetric, got max\|a - a\^T\| ="),
        (
            torch.diag(torch.tensor([1.0, 1.0, -0.1])),
            ValueError,
            "s{} must be positive semi-definite, got the eigenvalues -0.1",
        ),
        (-torch.eye(3), ValueError, "s{} must be positive semi-definite, got the eigenvalues -1 to -1"),
    ],
)
def test_bad_covariances(bad: Tensor, error: type[Exception], message: str, method: str, position: int) -> None:
    pair = [GOOD, bad] if position else [bad, GOOD]
    with pytest.raises(error, match=message.format(position + 1)):
        trace_sqrt_product(*pair, method=method)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: trace_sqrt_product(GOOD, GOOD, method="sqrtm"),
            ValueError,
            "method must be one of auto, cholesky, eigh",
        ),
        (
            lambda: trace_sqrt_product(GOOD.expand(2, 3, 3), GOOD.expand(3, 3, 3)),
            ValueError,
            "s2 must have leading dim",
        ),
        (lambda: trace_sqrt_product_info(GOOD[None], GOOD), ValueError, "s1 must have two dimensions"),
        (lambda: factorize(torch.ones(2, 3), name="sigma"), ValueError, "sigma must be square"),
        (lambda: polar(torch.ones(3)), ValueError, "a must have at least two dimensions"),
        (lambda: polar(torch.ones(3, 3).long()), TypeError, "a must have a real floating-point dtype, got torch.int64"),
        (lambda: polar(with_entry(math.nan)), ValueError, "a must be finite, got 1 entries"),
        (lambda: nuclear_norm(with_entry(math.inf)), ValueError, "a must be finite, got 1 entries"),
        (lambda: nuclear_norm([[1.0]]), TypeError, "a must be a tensor, got list"),
        (lambda: reference.optimal_odd_polynomial(1.0), ValueError, "lower must lie between 0 and 1, got 1.0"),
        (lambda: reference.polar_schedule(0.0), ValueError, "smallest must lie between 0 and 1, got 0.0"),
    ],
)
def test_bad_arguments(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
