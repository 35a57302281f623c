"""Divergences against scipy, closed forms of Gaussians, and the bounds that the lectures derive."""

import math

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
import torch
from devices import as_on_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipgan.metrics import jensen_shannon_divergence, kl_divergence, sample_histograms

FUNCTIONS = [kl_divergence, jensen_shannon_divergence]


def counts(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 5, (n,), generator=generator).double() + torch.eye(n, dtype=torch.float64)[0]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(0, 1000), st.sampled_from([1e-300, 1.0, 1e300]))
def test_scipy(n: int, seed: int, scale: float) -> None:
    p, q = counts(n, seed), counts(n, seed + 1)
    arrays = p.numpy(force=True), q.numpy(force=True)
    assert kl_divergence(p * scale, q) == pytest.approx(scipy.stats.entropy(*arrays), rel=1e-12, abs=1e-14)
    distance = scipy.spatial.distance.jensenshannon(*arrays)
    value = jensen_shannon_divergence(p, q * scale)
    assert value == pytest.approx(distance**2, rel=1e-12, abs=1e-14)
    assert value == pytest.approx(jensen_shannon_divergence(q, p), rel=1e-12, abs=1e-15)
    assert value <= math.log(2)
    assert jensen_shannon_divergence(*arrays) == as_on_cpu(jensen_shannon_divergence(p, q))


def test_gaussians_on_a_grid() -> None:
    # KL(N(a, s^2) | N(b, t^2)) = log(t / s) + (s^2 + (a - b)^2) / (2 t^2) - 1/2.
    x = torch.linspace(-30, 30, 20001, dtype=torch.float64)
    p, q = (-0.5 * (x - 1).square()).exp(), (-0.5 * (x / 2).square()).exp()
    assert kl_divergence(p, q) == pytest.approx(math.log(2) + 2 / 8 - 0.5, rel=1e-9)
    assert kl_divergence(q, p) == pytest.approx(-math.log(2) + 5 / 2 - 0.5, rel=1e-9)
    joint = p[::100, None] * q[::100]
    assert kl_divergence(joint, joint.T) == pytest.approx(
        kl_divergence(p[::100], q[::100]) + kl_divergence(q[::100], p[::100]), rel=1e-9
    )


def test_no_overlap() -> None:
    p, q = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.0, 0.0, 3.0])
    assert kl_divergence(p, q) == kl_divergence(q, p) == math.inf
    assert jensen_shannon_divergence(p, q) == pytest.approx(math.log(2), rel=1e-15)
    assert kl_divergence(p, p) == jensen_shannon_divergence(p, p) == 0
    assert kl_divergence(p, p + q) == pytest.approx(math.log(2), rel=1e-15)


@pytest.mark.parametrize("theta", [0.5, 0.01, 0.0])
def test_parallel_lines(theta: float) -> None:
    # The example of the lectures: however near, lines that do not meet have JS = log 2 and KL = inf.
    u = torch.linspace(0, 1, 64)
    p, q = sample_histograms(torch.stack([0 * u, u], 1), torch.stack([0 * u + theta, u], 1), 16)
    assert jensen_shannon_divergence(p, q) == pytest.approx(math.log(2) if theta else 0)
    assert kl_divergence(p, q) == (math.inf if theta else 0)


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("bins", [1, 4, 7])
def test_histograms(dim: int, bins: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    x, y = torch.randn(100, dim, generator=generator), 2 + torch.rand(50, dim, generator=generator)
    together = torch.cat([x, y]).double().numpy(force=True)
    box = list(zip(together.min(0), together.max(0), strict=True))
    for rows, histogram in zip((x, y), sample_histograms(x, y, bins), strict=True):
        truth = np.histogramdd(rows.double().numpy(force=True), bins, box)[0] / len(rows)
        np.testing.assert_array_equal(histogram.numpy(force=True), truth)
    if dim == 1:
        x, y = x.cpu(), y.cpu()  # where arrays are
        assert all(map(torch.equal, sample_histograms(x[:, 0], y[:, 0].numpy(), bins), sample_histograms(x, y, bins)))


def test_histograms_of_extremes() -> None:
    largest = torch.finfo(torch.float64).max
    x = torch.tensor([-largest, largest], dtype=torch.float64)
    assert sample_histograms(x, x[:1], 3)[0].tolist() == [0.5, 0, 0.5]
    assert sample_histograms(torch.ones(3), torch.ones(2), 3)[0].tolist() == [1, 0, 0]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("q", "error", "message"),
    [
        ([1.0], TypeError, "q must be a NumPy array or a tensor, got list"),
        (torch.ones(3, dtype=torch.int64), TypeError, "q must have a real floating-point dtype"),
        (torch.ones(2), ValueError, r"q must have the shape of p, \(3,\), got \(2,\)"),
        (torch.zeros(3), ValueError, "q must have a positive sum"),
        (torch.zeros(0), ValueError, "q must have a positive sum"),
        (torch.tensor([1.0, -0.5, 1.0]), ValueError, "q must not be negative, got -0.5"),
        (torch.tensor([1.0, torch.inf, 1.0]), ValueError, "q must be finite, got 1 entries"),
    ],
)
def test_bad_input(function: type, q: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        function(torch.ones(3), q)


def test_bad_histograms() -> None:
    with pytest.raises(ValueError, match="bins must leave at most 16777216 cells, got 50 along each of 5 axes"):
        sample_histograms(torch.ones(2, 5), torch.ones(2, 5))
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        sample_histograms(torch.ones(2), torch.ones(2), 0)
    with pytest.raises(ValueError, match="y must have 1 features like x, got 2"):
        sample_histograms(torch.ones(2), torch.ones(2, 2))
