"""The Frechet distance against scipy, higher precision, exact constructions, and finite differences.

The scale of an error is ``tr S1 + tr S2``, the terms that cancel in the distance.
"""

import itertools
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
import scipy.linalg
import torch
from devices import DEVICE, as_on_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import lipgan
from lipgan.linalg.covariance_factor import factorize
from lipgan.linalg.small_covariances import SMALL
from lipgan.metrics import (
    FeatureStats,
    FrechetDistance,
    FrechetInfo,
    feature_stats,
    frechet,
    frechet_distance,
    frechet_distance_from_features,
)

EPS = torch.finfo(torch.float64).eps
METHODS = ["auto", "cholesky", "eigh", "svd", "polar"]
FEATURE_METHODS = ["auto", "cross-gram", "covariance"]


pytestmark = pytest.mark.usefixtures("single_thread")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(d: int, seed: int) -> Tensor:
    return torch.linalg.qr(randn(d, d, seed=seed))[0]


def spectrum(kind: str, d: int) -> Tensor:
    k = torch.arange(d, dtype=torch.float64)
    spectra = {
        "flat": torch.ones_like(k),
        "decaying": 10 ** (-8 * k / max(1, d - 1)),
        "clustered": torch.where(k % 2 == 0, 1.0, 1e-3),
        "rank-deficient": torch.where(k < (d + 1) // 2, 1 + k / d, 0.0),
        "rank-1": torch.where(k == 0, 1.0, 0.0),
        "one huge": torch.where(k == 0, 1e8, 1.0),
        "zero": torch.zeros_like(k),
    }
    return spectra[kind]


SPECTRA = ["flat", "decaying", "clustered", "rank-deficient", "rank-1", "one huge", "zero"]


class Pair:
    """Two covariances of known factors, their means, and the distance from the factors."""

    def __init__(self, first: str, second: str, d: int, seed: int = 0, same_basis: bool = False) -> None:
        bases = [orthogonal(d, seed), orthogonal(d, seed if same_basis else seed + 1)]
        factors = [q * spectrum(kind, d).sqrt() for q, kind in zip(bases, (first, second), strict=True)]
        covs = [factor @ factor.T for factor in factors]
        self.cov1, self.cov2 = (0.5 * (cov + cov.T) for cov in covs)
        self.mean1, self.mean2 = randn(d, seed=seed + 2), randn(d, seed=seed + 3)
        self.scale = sum(float(factor.square().sum()) for factor in factors)
        # Singular values of a product of factors are off by roundings of its norm, small ones included.
        cross = float(torch.linalg.svdvals(factors[0].T @ factors[1]).sum())
        self.truth = float((self.mean1 - self.mean2).square().sum()) + self.scale - 2 * cross
        self.scale += self.truth

    @property
    def statistics(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.mean1, self.cov1, self.mean2, self.cov2


# ---- values ----


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(SPECTRA),
    st.sampled_from(SPECTRA),
    st.integers(1, 64),
    st.integers(0, 1000),
    st.booleans(),
    st.sampled_from([2.0**-52, 2.0**-26, 1.0, 2.0**26, 2.0**52]),  # whose roots scale the means without rounding
)
def test_any_spectra(first: str, second: str, d: int, seed: int, same_basis: bool, scale: float) -> None:
    pair = Pair(first, second, d, seed, same_basis)
    mean1, cov1, mean2, cov2 = pair.statistics
    root = math.sqrt(scale)
    value, info = frechet_distance(mean1 * root, cov1 * scale, mean2 * root, cov2 * scale, return_info=True)
    error = abs(float(value) - scale * pair.truth)
    assert error <= 1e-10 * scale * pair.scale
    assert error <= info.error_bound + 4 * EPS * scale * pair.scale  # what rounds in the truth
    assert info.error_bound < 1e-6 * scale * pair.scale


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("kinds", [("clustered", "flat"), ("rank-deficient", "clustered"), ("decaying", "decaying")])
def test_large_exact_constructions(kinds: tuple[str, str]) -> None:
    # Wider than the blocks of the products, and in one basis, so that the trace is a sum of known roots.
    d = 600
    pair = Pair(*kinds, d, same_basis=True)
    roots = [spectrum(kind, d).sqrt() for kind in kinds]
    means = (pair.mean1 - pair.mean2).square().sum()
    truth = float(means + (roots[0] - roots[1]).square().sum())
    value = float(frechet_distance(*pair.statistics))
    assert abs(value - truth) <= 1e-10 * float(means + roots[0].square().sum() + roots[1].square().sum())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kinds", list(itertools.product(["flat", "rank-deficient", "rank-1"], repeat=2)))
@pytest.mark.parametrize("d", [1, 2, 7, 8, 9, 31, 65])
def test_every_method(method: str, kinds: tuple[str, str], d: int) -> None:
    pair = Pair(*kinds, d)
    value, info = frechet_distance(*pair.statistics, method=method, return_info=True)
    # Eigenvalues of products, which "cholesky" and "eigh" insist on, lose half of the digits of what is near 0.
    loose = method in ("cholesky", "eigh", "polar")
    assert abs(float(value) - pair.truth) <= (1e-6 if loose else 1e-10) * pair.scale
    assert abs(float(value) - pair.truth) <= info.error_bound + 4 * EPS * pair.scale
    assert isinstance(info, FrechetInfo)
    assert info.route == method or method == "auto"
    assert (info.iterations > 0) == (info.route == "polar")


def mpmath_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Any:
    with mpmath.workdps(60):
        s1, s2 = mpmath.matrix(cov1.tolist()), mpmath.matrix(cov2.tolist())
        values, vectors = mpmath.eigsy(s1)
        factor = vectors * mpmath.diag([mpmath.sqrt(max(x, 0)) for x in values])
        cross = sum(mpmath.sqrt(max(x, 0)) for x in mpmath.eigsy(factor.T * s2 * factor, eigvals_only=True))
        means = sum((mpmath.mpf(a) - mpmath.mpf(b)) ** 2 for a, b in zip(mean1.tolist(), mean2.tolist(), strict=True))
        return means + sum(s1[k, k] + s2[k, k] for k in range(s1.rows)) - 2 * cross


@pytest.mark.parametrize("d", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("condition", [1.0, 1e4, 1e8])
def test_against_mpmath(d: int, condition: float) -> None:
    decay = condition ** -(torch.arange(d, dtype=torch.float64) / max(1, d - 1))
    first, second = orthogonal(d, 1) * decay.sqrt(), orthogonal(d, 2) * decay.flip(0).sqrt()
    cov1, cov2 = (0.5 * (s + s.T) for s in (first @ first.T, second @ second.T))
    mean1, mean2 = randn(d), randn(d, seed=1)
    truth = mpmath_distance(mean1, cov1, mean2, cov2)
    value, info = frechet_distance(mean1, cov1, mean2, cov2, return_info=True)
    scale = float(cov1.trace() + cov2.trace() + (mean1 - mean2).square().sum())
    assert abs(float(mpmath.mpf(float(value)) - truth)) <= min(1e-10 * scale, info.error_bound)


def test_condition_1e16_within_the_bound() -> None:
    # A diagonal is exact in float64, so the truth is; the rounding of a full matrix would move it by 1e-8.
    d = 17
    decay = 10 ** (-torch.arange(d, dtype=torch.float64))
    for second in (decay, torch.ones_like(decay), decay.flip(0)):
        mean = torch.zeros(d, dtype=torch.float64)
        truth = float((decay + second - 2 * (decay * second).sqrt()).sum())
        value, info = frechet_distance(mean, decay.diag(), mean, second.diag(), return_info=True)
        assert abs(float(value) - truth) <= info.error_bound
        assert info.error_bound <= 1e-6 * float((decay + second).sum())


# ---- few features, by a shorter way ----


def features(d: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics of correlated features, as on the CPU: nothing shorter is there for a GPU."""
    x, y = randn(4 * d + 8, d), randn(3 * d + 9, d, seed=1) @ randn(d, d, seed=2)
    sides = [(x.mean(0), x.T.cov().reshape(d, d)), (y.mean(0), y.T.cov().reshape(d, d))]
    return tuple(value.cpu() for side in sides for value in side)  # type: ignore[return-value]


def in_general(*statistics: Any) -> tuple[Any, FrechetInfo]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frechet, "_small_distance", lambda *_: None)
        result: tuple[Any, FrechetInfo] = frechet_distance(*statistics, return_info=True)
    return result


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("d", [1, 2, 3, 16, 64, 65, 96])
def test_few_features_as_many(d: int, dtype: torch.dtype, graded: bool) -> None:
    mean1, cov1, mean2, cov2 = features(d)
    sizes = torch.linspace(-2, 2, d, dtype=torch.float64, device="cpu").exp() if graded else torch.ones(d, device="cpu")
    statistics = [x.to(dtype) for x in (mean1, cov1 * torch.outer(sizes, sizes), mean2, cov2)]
    small = frechet._small_distance(tuple(statistics), True)  # type: ignore[arg-type]
    assert small is not None, "it is to be served"
    value, info = frechet_distance(*statistics, return_info=True)
    expected, bound = in_general(*statistics)
    assert float(value) == small[0]
    assert info == small[1]
    assert (info.route, info.rank, info.clipped) == (bound.route, bound.rank, bound.clipped)
    assert abs(float(value) - float(expected)) <= info.error_bound + bound.error_bound
    assert info.error_bound == pytest.approx(bound.error_bound, rel=0.2 if graded else 0.03)
    assert float(frechet_distance(*statistics)) == float(value)
    assert float(frechet_distance(*statistics[2:], *statistics[:2])) == float(value)
    arrays = [x.numpy() for x in statistics]
    assert frechet_distance(*arrays) == float(value)


@pytest.mark.parametrize("where", [0, 1, 2, 3])
@pytest.mark.parametrize("what", ["nan", "inf", "huge", "gradient", "length", "other kind", "half type"])
def test_what_few_features_leave_to_the_general_way(where: int, what: str) -> None:
    statistics: list[Any] = [x.clone() for x in features(3)]
    entry = statistics[where].view(-1)[0]
    if what in ("nan", "inf", "huge"):
        entry.fill_({"nan": math.nan, "inf": math.inf, "huge": 1e200}[what])
    else:
        x = statistics[where]
        changed = {
            "gradient": x.clone().requires_grad_(),
            "length": x[1:],
            "other kind": x.numpy(),
            "half type": x.half(),
        }
        statistics[where] = changed[what]
    assert frechet._small_distance(tuple(statistics), False) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize("what", ["asymmetric", "indefinite", "singular", "zero"])
def test_covariances_that_few_features_leave_to_the_general_way(side: int, what: str) -> None:
    statistics = [*features(3)]
    cov = statistics[side].clone()
    if what == "asymmetric":
        cov[0, 1] += 1e-4 * cov[0, 0]
    elif what == "indefinite":
        cov -= 2 * torch.linalg.eigvalsh(cov)[0] * torch.eye(3, dtype=torch.float64, device="cpu")
    else:
        cov = torch.ones_like(cov) if what == "singular" else torch.zeros_like(cov)
    statistics[side] = cov
    assert frechet._small_distance(tuple(statistics), False) is None  # type: ignore[arg-type]
    if what in ("asymmetric", "indefinite"):
        with pytest.raises(ValueError, match=r"symmetric|semi-definite"):
            frechet_distance(*statistics)


@pytest.mark.parametrize("d", [2, 33])
def test_against_scipy(d: int) -> None:
    x, y = randn(4 * d, d).numpy(force=True), randn(4 * d, d, seed=1).numpy(force=True) * 2 + 1
    mu1, sigma1, mu2, sigma2 = x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T)
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
    value = lipgan.frechet_distance(mu1, sigma1, mu2, sigma2)
    assert type(value) is np.float64
    assert value == pytest.approx(expected, rel=1e-11)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SPECTRA), st.sampled_from(SPECTRA), st.integers(1, 20), st.integers(0, 100))
def test_symmetric_to_the_bit(first: str, second: str, d: int, seed: int) -> None:
    mean1, cov1, mean2, cov2 = Pair(first, second, d, seed).statistics
    assert torch.equal(frechet_distance(mean1, cov1, mean2, cov2), frechet_distance(mean2, cov2, mean1, cov1))
    # Equal diagonals leave the order to the rest.
    signs = randn(d, seed=seed).sign()
    cov3 = cov1 * torch.outer(signs, signs)
    assert torch.equal(frechet_distance(mean1, cov1, mean2, cov3), frechet_distance(mean2, cov3, mean1, cov1))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SPECTRA), st.integers(1, 64), st.integers(0, 100), st.sampled_from([1e-16, 1.0, 1e16]))
def test_identical_sides_are_at_distance_0(kind: str, d: int, seed: int, scale: float) -> None:
    pair = Pair(kind, kind, d, seed)
    cov = pair.cov1 * scale
    for method in ("auto", "svd", "polar"):
        value = frechet_distance(pair.mean1, cov, pair.mean1, cov, method=method)
        assert 0 <= value <= 1e-9 * cov.trace()


@pytest.mark.parametrize("power", [-300, -160, -40, 40, 150, 300])
def test_never_nan_at_any_scale(power: int) -> None:
    pair = Pair("decaying", "rank-deficient", 6)
    for powers in ((power, power), (power, 0), (power, -power)):
        scales = [10.0**p for p in powers]
        cov1, cov2 = pair.cov1 * scales[0], pair.cov2 * scales[1]
        zero = torch.zeros(6, dtype=torch.float64)
        value = float(frechet_distance(zero, cov1, zero, cov2))
        total = float(cov1.trace() + cov2.trace())
        assert 0 <= value <= total * (1 + 1e-12)
        # By the inequality of Cauchy and Schwarz.
        least = (math.sqrt(float(cov1.trace())) - math.sqrt(float(cov2.trace()))) ** 2
        assert value >= least * (1 - 1e-9)


def test_overflow_is_infinite() -> None:
    mean, cov = torch.full((2,), 1e308, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    assert frechet_distance(mean, cov, -mean, cov) == math.inf
    assert frechet_distance(mean, cov, 0 * mean, cov) == math.inf
    assert frechet_distance(mean, cov, mean, cov) == 0
    assert 0 <= frechet_distance(0 * mean, cov * 1e308, 0 * mean, cov * 1e308) <= 1e299
    assert frechet_distance(0 * mean, cov * 1.7e308, 0 * mean, cov) == math.inf


@pytest.mark.parametrize(("n", "d"), [(2, 1), (2, 10), (2, 300), (5, 64), (50, 64), (64, 64), (65, 64)])
def test_few_samples(n: int, d: int) -> None:
    x, y = randn(n, d), randn(n, d, seed=1) + 1
    factors = [(z - z.mean(0)) / math.sqrt(n - 1) for z in (x, y)]
    cross = float(torch.linalg.svdvals(factors[0] @ factors[1].T).sum())
    scale = sum(float(factor.square().sum()) for factor in factors)
    truth = float((x.mean(0) - y.mean(0)).square().sum()) + scale - 2 * cross
    first, second = FeatureStats(d).update(x), FeatureStats(d).update(y)
    value, info = frechet_distance(first.mean, first.cov, second.mean, second.cov, return_info=True)
    assert abs(float(value) - truth) <= 1e-10 * (scale + truth)
    assert info.clipped <= 1e-10 * scale
    for method in FEATURE_METHODS:
        assert abs(float(frechet_distance_from_features(x, y, method=method)) - truth) <= 1e-10 * (scale + truth)


@pytest.mark.parametrize("method", FEATURE_METHODS)
def test_features_with_a_common_offset(method: str) -> None:
    x, y = (randn(40, 5, seed=k) * 1024 for k in (0, 1))
    x, y = x.round() / 1024, y.round() / 1024 + 1  # exact with the offset
    expected = float(frechet_distance_from_features(x, y, method=method))
    assert float(frechet_distance_from_features(x + 1e6, y + 1e6, method=method)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("method", FEATURE_METHODS)
@pytest.mark.parametrize("ddof", [0, 1])
def test_features_agree_with_statistics(method: str, ddof: int) -> None:
    for n1, n2, d in ((30, 20, 8), (6, 200, 8), (200, 6, 8), (5, 7, 8)):
        x, y = randn(n1, d), randn(n2, d, seed=1) * 2 + 0.5
        first, second = (FeatureStats(d, ddof=ddof, device=DEVICE).update(z) for z in (x, y))
        expected = frechet_distance(first.mean, first.cov, second.mean, second.cov)
        value = frechet_distance_from_features(x, y, method=method, ddof=ddof)
        assert value.shape == ()
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


def test_auto_takes_the_smaller_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, ...]] = []
    norm = frechet.nuclear_norm
    monkeypatch.setattr(frechet, "nuclear_norm", lambda a: sizes.append(tuple(a.shape)) or norm(a))
    frechet_distance_from_features(randn(4, 10), randn(25, 10))
    frechet_distance_from_features(randn(4, 10), randn(26, 10))
    frechet_distance_from_features(randn(11, 10), randn(11, 10))
    assert sizes == [(4, 25)]


@pytest.mark.parametrize("power", [-200, -8, 8, 200])
@pytest.mark.parametrize("method", FEATURE_METHODS)
def test_features_of_any_scale(power: int, method: str) -> None:
    x, y = randn(6, 9), randn(12, 9, seed=1)
    expected = float(frechet_distance_from_features(x, y, method=method))
    value = float(frechet_distance_from_features(x * 10.0**power, y * 10.0**power, method=method))
    if power == 200:
        assert value == math.inf
    elif power == -200:
        assert value == 0
    else:
        assert value == pytest.approx(expected * 10.0 ** (2 * power), rel=1e-11)


# ---- kinds of input ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_dtypes_are_widened(dtype: torch.dtype) -> None:
    pair = Pair("flat", "flat", 12)
    narrow = [x.to(dtype) for x in pair.statistics]
    value = frechet_distance(*narrow)
    assert value.dtype == torch.float64
    wide = [x.double() for x in narrow]
    wide[1], wide[3] = (0.5 * (s + s.T) for s in (wide[1], wide[3]))
    torch.testing.assert_close(value, frechet_distance(*wide), rtol=1e-12, atol=0)
    x, y = randn(5, 12).to(dtype), randn(6, 12, seed=1).to(dtype)
    value = frechet_distance_from_features(x, y)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, frechet_distance_from_features(x.double(), y.double()), rtol=1e-12, atol=0)


# ---- statistics that rounding made indefinite ----


def moments(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and ``E[x x^T] - m m^T``, all in one dtype."""
    x = x.to(dtype)
    mean = x.mean(0)
    return mean, x.T @ x / len(x) - torch.outer(mean, mean)


def rectified(offset: float, n: int, d: int) -> tuple[Tensor, Tensor]:
    """Two sets of features, exact in float32."""
    x, y = randn(n, d), 1.2 * randn(n, d, seed=1) + 0.1
    return tuple((z.clamp_min(0) + offset).float().double() for z in (x, y))


def clipped_at_most(given: list[Tensor], truth: list[Tensor]) -> float:
    """Negative eigenvalues of a definite matrix plus E add up to the nuclear norm of E at most (Lidskii)."""
    errors = (s.double() - t for s, t in zip(given, truth, strict=True))
    # Unresolved eigenvalues are left out too, and each is a rounding in float64.
    return sum(float(torch.linalg.matrix_norm(0.5 * (e + e.T), "nuc")) for e in errors) * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize("offset", [0.0, 1.0, 3.0, 10.0])
@pytest.mark.parametrize(("n", "d"), [(256, 400), (50, 100), (600, 64)])
@pytest.mark.parametrize("method", ["auto", "svd"])
def test_second_moments_in_float32(n: int, d: int, offset: float, method: str) -> None:
    x, y = rectified(offset, n, d)
    truth = float(frechet_distance_from_features(x, y, ddof=0))
    (mu1, s1), (mu2, s2) = moments(x, torch.float32), moments(y, torch.float32)
    value, info = frechet_distance(mu1, s1, mu2, s2, method=method, return_info=True)
    # Seen: 0.8e-3 at the largest offset, by what rounding adds to eigenvalues that are 0.
    assert float(value) == pytest.approx(truth, rel=2e-3)
    exact = [torch.cov(z.T, correction=0) for z in (x, y)]
    assert info.clipped <= clipped_at_most([s1, s2], exact)
    assert info.clipped > 0 or n > d
    arrays = frechet_distance(*(z.numpy(force=True) for z in (mu1, s1, mu2, s2)), method=method)
    assert arrays == as_on_cpu(float(value))


@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(("n", "d"), [(256, 400), (50, 100)])
def test_covariances_in_half_precision(n: int, d: int, dtype: torch.dtype, accuracy: float) -> None:
    x, y = rectified(0.0, n, d)
    truth = float(frechet_distance_from_features(x, y, ddof=0))
    exact = [torch.cov(z.T, correction=0) for z in (x, y)]
    s1, s2 = (s.to(dtype) for s in exact)
    value, info = frechet_distance(x.mean(0), s1, y.mean(0), s2, return_info=True)
    # A quarter of the accuracy was seen.
    assert float(value) == pytest.approx(truth, rel=accuracy)
    assert 0 < info.clipped <= clipped_at_most([s1, s2], exact)
    trace = lipgan.linalg.trace_sqrt_product(s1, s2)
    expected = lipgan.linalg.trace_sqrt_product(*exact)
    assert trace.dtype == torch.float32
    assert float(trace) == pytest.approx(float(expected), rel=4 * accuracy)


@pytest.mark.parametrize(
    ("dtype", "passes", "refused"),
    [(torch.float64, 1e-7, 1e-5), (torch.float32, 1e-5, 1e-3), (torch.float16, 1e-3, 0.1), (torch.bfloat16, 1e-2, 0.5)],
)
def test_what_is_rounding_depends_on_the_dtype(dtype: torch.dtype, passes: float, refused: float) -> None:
    mean = torch.zeros(3, dtype=torch.float64)
    cov = torch.eye(3, dtype=dtype)
    value, info = frechet_distance(mean, patched(2, 2, -passes).to(dtype), mean, cov, return_info=True)
    assert info.clipped == pytest.approx(passes, rel=0.01)
    assert float(value) == pytest.approx(1 - passes, rel=1e-3)
    with pytest.raises(ValueError, match="sigma1 must be positive semi-definite, got the eigenvalues -"):
        frechet_distance(mean, patched(2, 2, -refused).to(dtype), mean, cov)
    # Asymmetry too.
    frechet_distance(mean, patched(0, 1, passes).to(dtype), mean, cov)
    with pytest.raises(ValueError, match="sigma1 must be symmetric"):
        frechet_distance(mean, patched(0, 1, refused).to(dtype), mean, cov)


@pytest.mark.parametrize(
    ("dtype", "mean", "smallest", "passes"),
    [
        (torch.float32, 10.0, -5e-3, True),
        (torch.float32, 0.0, -5e-3, False),
        (torch.float32, 1e4, -0.2, True),
        (torch.float32, 1e4, -0.3, False),  # more than a quarter of the largest
        (torch.float64, 100.0, -5e-3, True),
        (torch.float64, 10.0, -5e-3, False),
        (torch.float16, 10.0, -0.1, False),
    ],
)
def test_a_mean_explains_some_negative_eigenvalues(
    dtype: torch.dtype, mean: float, smallest: float, passes: bool
) -> None:
    mu, cov, sigma = torch.full((3,), mean), torch.eye(3), patched(1, 1, smallest).to(dtype)
    if passes:
        _, info = frechet_distance(mu, sigma, mu, cov, return_info=True)
        assert info.clipped == pytest.approx(-smallest, rel=1e-5)
        # Statistics far from 1 are multiplied before they are judged.
        if dtype == torch.float64:
            frechet_distance(mu.double() * 1e120, sigma * 1e240, mu, cov)
    else:
        with pytest.raises(ValueError, match="sigma1 must be positive semi-definite"):
            frechet_distance(mu, sigma, mu, cov)


def test_files_of_float32(tmp_path: pathlib.Path) -> None:
    x, y = rectified(3.0, 256, 400)
    stats = []
    for k, z in enumerate((x, y)):
        mean, cov = moments(z, torch.float32)
        np.savez(tmp_path / f"{k}.npz", mu=mean.numpy(force=True), sigma=cov.numpy(force=True))
        stats.append(FeatureStats.load(tmp_path / f"{k}.npz"))
    value, info = frechet.distance_of_statistics(*stats)
    assert float(value) == pytest.approx(float(frechet_distance_from_features(x, y, ddof=0)), rel=2e-3)
    assert info.clipped > 0
    assert stats[0].dtype == torch.float32
    assert FeatureStats(3).dtype == torch.float64
    # The factor leaves out the same.
    missing = stats[0].factor @ stats[0].factor.T - stats[0].cov
    assert 0 < float(missing.trace()) <= info.clipped


# ---- arrays and tensors ----


@pytest.mark.filterwarnings("error")
def test_arrays_in_arrays_out() -> None:
    pair = Pair("flat", "clustered", 12)
    arrays = [x.numpy(force=True) for x in pair.statistics]
    for array in arrays:
        array.flags.writeable = False
    value, info = frechet_distance(*arrays, return_info=True)
    assert type(value) is np.float64
    assert value == as_on_cpu(frechet_distance(*pair.statistics).item())
    assert info.rank == (12, 12)
    fortran = [np.asfortranarray(x[::-1].copy()[::-1]) for x in arrays]
    assert frechet_distance(*fortran) == value
    assert frechet_distance_from_features(randn(4, 3).numpy(force=True), randn(5, 3).numpy(force=True)).shape == ()


def test_inputs_are_not_changed() -> None:
    pair = Pair("rank-deficient", "flat", 12)
    before = [x.clone() for x in pair.statistics]
    for method in METHODS:
        frechet_distance(*pair.statistics, method=method)
    assert all(torch.equal(a, b) for a, b in zip(before, pair.statistics, strict=True))


# ---- a side prepared once ----


@pytest.mark.parametrize("kinds", list(itertools.product(["flat", "decaying", "rank-deficient"], repeat=2)))
def test_factors_change_nothing_but_roundings(kinds: tuple[str, str]) -> None:
    pair = Pair(*kinds, 20)
    factors = [factorize(cov).matrix for cov in (pair.cov1, pair.cov2)]
    for given_factors in (
        {"factor1": factors[0]},
        {"factor2": factors[1]},
        {"factor1": factors[0], "factor2": factors[1]},
    ):
        value = frechet_distance(*pair.statistics, **given_factors)
        assert abs(float(value) - pair.truth) <= 1e-10 * pair.scale
        swapped = {f"factor{3 - int(name[-1])}": factor for name, factor in given_factors.items()}
        mean1, cov1, mean2, cov2 = pair.statistics
        assert torch.equal(frechet_distance(mean2, cov2, mean1, cov1, **swapped), value)
    # Any factor will do, not only that of Cholesky.
    turned = factors[0] @ orthogonal(factors[0].shape[1], 5)
    value = frechet_distance(*pair.statistics, factor1=turned)
    assert abs(float(value) - pair.truth) <= 1e-10 * pair.scale


def test_a_prepared_side_is_not_factorized(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair("flat", "flat", 20)
    factor = factorize(pair.cov1).matrix
    module = sys.modules["lipgan.linalg.trace_sqrt_product"]  # its name is that of a function of the package
    monkeypatch.setattr(module, "factorize_covariance", lambda *_: pytest.fail("factorized"))
    frechet_distance(*pair.statistics, factor1=factor)
    with pytest.raises(pytest.fail.Exception):
        frechet_distance(*pair.statistics, method="cholesky")


@pytest.mark.parametrize("n", [5, 40])
def test_the_factor_lies_beside_mu_and_sigma(tmp_path: Any, n: int) -> None:
    path = tmp_path / "reference.npz"
    reference = FeatureStats(9).update(randn(n, 9))
    reference.save(path, factor=True)
    with np.load(path) as file:
        assert sorted(file.files) == ["count", "ddof", "factor", "mu", "sigma"]
        factor = file["factor"]
        np.testing.assert_allclose(factor @ factor.T, file["sigma"], atol=1e-12)
    loaded = FeatureStats.load(path)
    assert torch.equal(loaded.factor, torch.from_numpy(factor))
    assert loaded.factor.shape == (9, min(n - 1, 9))
    # New samples make a new covariance, and the factor one of it.
    loaded.update(randn(20, 9, seed=2))
    torch.testing.assert_close(loaded.factor @ loaded.factor.T, loaded.cov)
    loaded.merge(reference)
    torch.testing.assert_close(loaded.factor @ loaded.factor.T, loaded.cov)


def test_a_stale_factor_is_refused(tmp_path: Any) -> None:
    pair = Pair("flat", "clustered", 9)
    stale = factorize(pair.cov1 * 1.001).matrix
    with pytest.raises(ValueError, match="factor1 must be a factor L of its covariance"):
        frechet_distance(*pair.statistics, factor1=stale)
    path = tmp_path / "stale.npz"
    np.savez(path, mu=pair.mean1, sigma=pair.cov1, factor=stale)
    with pytest.raises(ValueError, match=r"stale\.npz is no file of feature statistics: factor must be a factor L"):
        FeatureStats.load(path)


# ---- gradients ----


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return randn(*shape, seed=seed).requires_grad_()


@pytest.mark.parametrize("method", METHODS)
def test_gradients_in_the_statistics(method: str) -> None:
    mean1, mean2, factor1, factor2 = leaf(4), leaf(4, seed=1), leaf(4, 5, seed=2), leaf(4, 6, seed=3)

    def distance(mean1: Tensor, factor1: Tensor, mean2: Tensor, factor2: Tensor) -> Any:
        return frechet_distance(mean1, factor1 @ factor1.T, mean2, factor2 @ factor2.T, method=method)

    assert gradcheck(distance, (mean1, factor1, mean2, factor2))


def test_gradient_in_repeated_spectra() -> None:
    turn = leaf(5, 5)
    eye = torch.eye(5, dtype=torch.float64)
    zero = torch.zeros(5, dtype=torch.float64)
    assert gradcheck(
        lambda a: frechet_distance(zero, eye + 0.1 * (a + a.T), zero, 3 * eye), 0 * turn.detach() + turn * 0
    )
    cov = (2 * eye).requires_grad_()
    (grad,) = torch.autograd.grad(frechet_distance(zero, cov, zero, 8 * eye), cov)
    # d/dS (tr S - 2 tr (8 S)^(1/2)) = I - (8 / 2)^(1/2) I
    torch.testing.assert_close(grad, -eye)


@pytest.mark.parametrize("method", FEATURE_METHODS)
@pytest.mark.parametrize(
    ("n1", "n2", "d"), [(4, 6, 9), (6, 6, 9), (2, 2, 5), (2, 2, 1), (12, 15, 4), (3, 30, 5), (30, 3, 5), (9, 9, 9)]
)
def test_gradients_in_the_features(method: str, n1: int, n2: int, d: int) -> None:
    def distance(x: Tensor, y: Tensor) -> Tensor:
        return frechet_distance_from_features(x, y, method=method)

    assert gradcheck(distance, (leaf(n1, d), leaf(n2, d, seed=1)))


@pytest.mark.parametrize("method", FEATURE_METHODS)
def test_gradients_of_dead_and_repeated_features(method: str) -> None:
    # Two features that are constant on both sides, samples that occur twice: covariances of lower rank than their size.
    def spread(x: Tensor) -> Tensor:
        return torch.cat([x, x[:2], 0 * x[:1]])

    alive = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return frechet_distance_from_features(spread(x) * alive, spread(y) * alive + 2, method=method)

    for n1, n2 in ((3, 4), (12, 10)):
        assert gradcheck(distance, (leaf(n1, 6), leaf(n2, 6, seed=1)))


@pytest.mark.parametrize("method", FEATURE_METHODS)
def test_a_feature_that_only_one_side_lacks(method: str) -> None:
    # The derivative across the rank of a side: only x gets it, whose zero column the other side is correlated with.
    y = randn(12, 4, seed=1)
    y[:, 3] += y[:, 0]
    x = randn(10, 4)
    x[:, 3] = 0
    x.requires_grad_()
    (grad,) = torch.autograd.grad(frechet_distance_from_features(x, y, method=method), x)
    # The distance has a kink along this column in all directions but those in the span of the others.
    others = torch.linalg.qr(x.detach()[:, :3] - x.detach()[:, :3].mean(0))[0]
    step = torch.zeros_like(x)
    step[:, 3] = others @ torch.tensor([0.3, -0.5, 0.8], dtype=torch.float64)
    with torch.no_grad():
        h = 1e-6
        up, down = (frechet_distance_from_features(x + s * h * step, y, method="cross-gram") for s in (1, -1))
    assert float((grad * step).sum()) == pytest.approx(float(up - down) / (2 * h), rel=1e-6)


@pytest.mark.parametrize("method", FEATURE_METHODS)
@pytest.mark.parametrize(("n", "d"), [(4, 6), (20, 6), (2, 3)])
def test_the_gradient_at_the_minimum_is_0(method: str, n: int, d: int) -> None:
    x = randn(n, d)
    fake = x.clone().requires_grad_()
    value = frechet_distance_from_features(x, fake, method=method)
    (grad,) = torch.autograd.grad(value, fake)
    assert value <= 1e-9 * x.square().sum()
    assert grad.abs().max() <= 1e-9


def test_the_gradient_has_the_dtype_of_the_features() -> None:
    x, y = randn(5, 8).float().requires_grad_(), randn(6, 8, seed=1).bfloat16().requires_grad_()
    grads = torch.autograd.grad(frechet_distance_from_features(x, y), (x, y))
    wide = [z.detach().double().requires_grad_() for z in (x, y)]
    expected = torch.autograd.grad(frechet_distance_from_features(*wide), wide)
    for grad, z, truth in zip(grads, (x, y), expected, strict=True):
        assert grad.dtype == z.dtype
        # Rounded once, on the way out.
        assert (grad.double() - truth).abs().max() <= torch.finfo(z.dtype).eps * truth.abs().max()


def test_second_derivatives_are_right_or_refused() -> None:
    x, y = leaf(4, 9), leaf(6, 9, seed=1)
    assert gradgradcheck(lambda x, y: frechet_distance_from_features(x, y, method="cross-gram"), (x, y))
    x, y = leaf(12, 4), leaf(15, 4, seed=1)
    for method in ("auto", "cross-gram", "covariance"):
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(frechet_distance_from_features(x, y, method=method), x, create_graph=True)
    x, y = leaf(4, 6), leaf(12, 6, seed=1)
    assert gradgradcheck(lambda x, y: frechet_distance_from_features(x, y, method="cross-gram"), (x, y))


@pytest.mark.parametrize("n", [16, 64])
def test_descending_the_distance(n: int) -> None:
    # Toy features: a linear generator learns mean and covariance of the data; n = 64 takes the route by covariances.
    d = 20
    real = randn(n, d) @ randn(d, d, seed=1) / d**0.5 + 1
    noise = randn(n, d, seed=2)
    weight = torch.eye(d, dtype=torch.float64).mul(0.5).requires_grad_()
    bias = torch.zeros(d, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=0.05)
    values = []
    for _ in range(150):
        optimizer.zero_grad()
        value = frechet_distance_from_features(real, noise @ weight + bias)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.02 * values[0]
    assert sum(later < earlier for earlier, later in itertools.pairwise(values[:40])) > 35


# ---- the streaming metric ----


def test_metric_of_batches() -> None:
    real, fake = randn(50, 3, 2, 2).float(), randn(40, 3, 2, 2, seed=1).float() * 2
    metric = FrechetDistance(nn.Flatten())
    for images, is_real in ((real, True), (fake, False)):
        for batch in images.split(17):
            assert metric.update(batch, real=is_real) is None
    expected = frechet_distance_from_features(real.flatten(1), fake.flatten(1))
    torch.testing.assert_close(metric.compute(), expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(metric.compute(), expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("d", [3, 90])  # few features have a way of their own
def test_a_common_offset_costs_the_metric_no_accuracy(d: int) -> None:
    # Multiples of 1/1024, exact with the offset, where float64 has a resolution of 1/4096.
    real, fake = (randn(60, d, seed=k).mul(1024).round() / 1024 for k in (0, 1))
    expected, metric = frechet_distance_from_features(real, fake), FrechetDistance()
    for batch, is_real in ((real, True), (fake, False)):
        for part in (batch + 2.0**40).split(17):
            metric.update(part, real=is_real)
    torch.testing.assert_close(metric.compute(), expected, rtol=1e-9, atol=0)


def test_metric_of_features_and_arrays() -> None:
    metric = FrechetDistance(ddof=0)
    real, fake = randn(5, 9), randn(6, 9, seed=1)
    metric.update(real.numpy(force=True), real=True)
    metric.update(fake, real=False)
    expected = frechet_distance_from_features(real, fake, ddof=0)
    torch.testing.assert_close(metric.compute(), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("reset_real_features", [True, False])
def test_metric_reset(reset_real_features: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    factorized: list[str] = []
    real_factorize = feature_stats.factorize
    monkeypatch.setattr(feature_stats, "factorize", lambda *a, **k: factorized.append("") or real_factorize(*a, **k))
    metric = FrechetDistance(None, reset_real_features)
    d = SMALL + 1  # fewer need no factor of one side
    real, fake, other = (randn(3 * d, d, seed=seed) for seed in range(3))
    metric.update(real, real=True)
    metric.update(fake, real=False)
    metric.compute()
    metric.reset()
    if reset_real_features:
        with pytest.raises(ValueError, match="the real side needs at least 2 samples, got 0"):
            metric.compute()
        metric.update(real, real=True)
    metric.update(other, real=False)
    torch.testing.assert_close(metric.compute(), frechet_distance_from_features(real, other), rtol=1e-11, atol=0)
    assert len(factorized) == 1 + reset_real_features


def test_metric_takes_no_gradient_and_leaves_the_network_alone() -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).train()
    metric = FrechetDistance(network.eval())
    metric.update(torch.randn(10, 4, requires_grad=True), real=True)
    metric.update(torch.randn(10, 4), real=False)
    assert not metric.compute().requires_grad
    assert not network.training


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: FrechetDistance(2048), TypeError, "features must be callable or None, got int"),
        (lambda m: FrechetDistance(ddof=3), ValueError, "ddof must be 0 or 1, got 3"),
        (lambda m: m.update(torch.ones(3, 4), real=1), TypeError, "real must be a bool, got 1"),
        (lambda m: m.update(torch.ones(4), real=True), ValueError, r"features must have shape \(n, d\), got \(4,\)"),
        (lambda m: m.update([1.0], real=True), TypeError, "features must be a NumPy array or a tensor, got list"),
        (lambda m: m.update(torch.ones(3, 4).long(), real=True), TypeError, "features must have a real .* torch.int64"),
        (
            lambda m: m.update(torch.ones(3, 5), real=True),
            ValueError,
            r"features must have shape \(n, 4\), got \(3, 5\)",
        ),
        (lambda m: m.update(torch.ones(3, 5), real=False), ValueError, r"features must have shape \(n, 4\)"),
        (lambda m: m.compute(), ValueError, "the generated side needs at least 2 samples, got 0"),
    ],
)
def test_bad_use_of_the_metric(call: Callable[[FrechetDistance], object], error: Any, message: str) -> None:
    metric = FrechetDistance()
    metric.update(torch.randn(3, 4), real=True)
    with pytest.raises(error, match=message):
        call(metric)


# ---- bad input ----


def bad(**changes: Any) -> dict[str, Any]:
    eye, zero = torch.eye(3), torch.zeros(3)
    return {"mu1": zero, "sigma1": eye, "mu2": zero, "sigma2": eye, **changes}


def patched(row: int, column: int, value: float) -> Tensor:
    s = torch.eye(3)
    s[row, column] = value
    return s


@pytest.mark.parametrize("side", [1, 2])
@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("sigma", torch.ones(3, 2), ValueError, r"sigma# must have shape \(3, 3\), got \(3, 2\)"),
        ("sigma", torch.eye(4), ValueError, r"sigma# must have shape \(3, 3\), got \(4, 4\)"),
        ("sigma", torch.ones(3), ValueError, r"sigma# must have shape \(3, 3\), got \(3,\)"),
        ("sigma", torch.eye(3)[None], ValueError, r"sigma# must have shape \(3, 3\), got \(1, 3, 3\)"),
        ("sigma", patched(0, 1, 0.01), ValueError, "sigma# must be symmetric"),
        ("sigma", patched(0, 0, -1.0), ValueError, "sigma# must be positive semi-definite"),
        ("sigma", patched(2, 2, -0.01), ValueError, "sigma# must be positive semi-definite"),
        ("sigma", patched(0, 0, math.nan), ValueError, "sigma# must be finite, got 1 entries"),
        ("sigma", patched(2, 2, math.inf), ValueError, "sigma# must be finite, got 1 entries"),
        ("sigma", torch.eye(3).long(), TypeError, "sigma# must have a real floating-point dtype, got torch.int64"),
        ("sigma", torch.eye(3).cfloat(), TypeError, "sigma# must have a real .* torch.complex64"),
        (
            "sigma",
            [[1.0]],
            TypeError,
            "sigma# must be a NumPy array or a tensor, got list|sigma# must be a tensor like",
        ),
        ("sigma", np.eye(3), TypeError, "sigma# must be a tensor like mu1, got ndarray"),
        ("mu", torch.zeros(3, 1), ValueError, r"mu# must have shape \(d,\), got \(3, 1\)"),
        ("mu", torch.zeros(0), ValueError, r"mu# must have shape \(d,\), got \(0,\)"),
        ("mu", torch.full((3,), math.nan), ValueError, "mu# must be finite, got 3 entries"),
        ("mu", torch.zeros(3).int(), TypeError, "mu# must have a real floating-point dtype, got torch.int32"),
        ("factor", torch.eye(4), ValueError, r"factor# must have shape \(3, r\), got \(4, 4\)"),
        ("factor", torch.eye(3) * math.nan, ValueError, "factor# must be finite, got 9 entries"),
        ("factor", torch.eye(3) * 2, ValueError, "factor# must be a factor L of its covariance"),
        ("factor", torch.eye(3).long(), TypeError, "factor# must have a real"),
    ],
)
def test_bad_statistics(side: int, name: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message.replace("#", str(side))):
        frechet_distance(**bad(**{f"{name}{side}": value}))


def test_bad_pairs() -> None:
    with pytest.raises(ValueError, match="mu2 must have the length of mu1, 3, got 2"):
        frechet_distance(**bad(mu2=torch.zeros(2), sigma2=torch.eye(2)))
    with pytest.raises(ValueError, match=r"method must be one of auto, .*, got 'sqrtm'"):
        frechet_distance(**bad(), method="sqrtm")
    with pytest.raises(TypeError, match="mu1 must have a real floating-point dtype, got int64"):
        frechet_distance(np.zeros(3, int), np.eye(3), np.zeros(3), np.eye(3))
    meta = {name: value.to("meta") for name, value in bad().items() if name.endswith("2")}
    with pytest.raises(ValueError, match=f"all arguments must be on one device, got {DEVICE}, meta"):
        frechet_distance(**bad(**meta))


@pytest.mark.parametrize("name", ["real", "fake"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.ones(4), ValueError, r"must have shape \(n, d\), got \(4,\)"),
        (torch.ones(4, 0), ValueError, r"must have shape \(n, d\), got \(4, 0\)"),
        (torch.ones(0, 3), ValueError, "must have at least 2 samples, got 0"),
        (torch.ones(1, 3), ValueError, "must have at least 2 samples, got 1"),
        (torch.full((2, 3), math.inf), ValueError, "must be finite, got 6 entries"),
        (torch.ones(4, 3).long(), TypeError, "must have a real floating-point dtype, got torch.int64"),
        (torch.ones(4, 3).cdouble(), TypeError, "must have a real .* torch.complex128"),
        ([[1.0, 2.0]], TypeError, "must be a NumPy array or a tensor, got list"),
    ],
)
def test_bad_features(name: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"{name} {message}"):
        frechet_distance_from_features(**{"real": torch.ones(4, 3), "fake": torch.ones(4, 3), name: value})


def test_bad_feature_options() -> None:
    x = torch.ones(4, 3)
    with pytest.raises(ValueError, match="fake must have 3 features like real, got 2"):
        frechet_distance_from_features(x, x[:, :2])
    with pytest.raises(ValueError, match=f"fake must be on the device of real, {DEVICE}, got meta"):
        frechet_distance_from_features(x, x.to("meta"))
    with pytest.raises(ValueError, match="method must be one of auto, cross-gram, covariance, got 'svd'"):
        frechet_distance_from_features(x, x, method="svd")
    with pytest.raises(ValueError, match="ddof must be 0 or 1, got 2"):
        frechet_distance_from_features(x, x, ddof=2)
