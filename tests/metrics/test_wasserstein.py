"""Wasserstein distances against all permutations, scipy, samples repeated to one size, and closed forms."""

import itertools
import math
import sys

import numpy as np
import pytest
import scipy.optimize
import scipy.spatial.distance
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipgan.metrics import sliced_wasserstein_distance, wasserstein_distance

SIZES = st.integers(1, 12)
ORDERS = st.sampled_from([1, 1.5, 2, 3])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def repeated(x: Tensor, y: Tensor, p: float) -> float:
    """The distance of the samples, repeated to one size, where an assignment is exact."""
    size = math.lcm(len(x), len(y))
    a, b = (rows.reshape(len(rows), -1).repeat_interleave(size // len(rows), 0).numpy() for rows in (x, y))
    costs = scipy.spatial.distance.cdist(a, b) ** p
    rows, columns = scipy.optimize.linear_sum_assignment(costs)
    return float(costs[rows, columns].mean() ** (1 / p))


# ---- exact ----


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("p", [1, 1.5, 2])
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_all_permutations(n: int, p: float, d: int) -> None:
    x, y = randn(n, d), randn(n, d, seed=1)
    powers = (x[:, None] - y).norm(dim=2).pow(p)
    best = min(float(powers[range(n), list(order)].mean()) for order in itertools.permutations(range(n)))
    assert wasserstein_distance(x, y, p) == pytest.approx(best ** (1 / p), rel=1e-13)


@settings(max_examples=100, deadline=None)
@given(SIZES, SIZES, ORDERS, st.integers(0, 99), st.booleans())
def test_on_a_line(m: int, n: int, p: float, seed: int, ties: bool) -> None:
    x, y = randn(m, seed=seed), randn(n, seed=seed + 1)
    if ties:
        x, y = x.round(), y.round()
    value = wasserstein_distance(x, y, p)
    assert value == pytest.approx(repeated(x, y, p), rel=1e-12, abs=1e-14)
    assert wasserstein_distance(x[:, None].numpy(), y[:, None].numpy(), p) == value
    if p == 1:
        assert value == pytest.approx(scipy.stats.wasserstein_distance(x, y), rel=1e-12, abs=1e-14)


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, st.integers(2, 4), ORDERS, st.integers(0, 99), st.booleans())
def test_the_linear_program(m: int, n: int, d: int, p: float, seed: int, ties: bool) -> None:
    x, y = randn(m, d, seed=seed), randn(n, d, seed=seed + 1)
    if ties:
        x, y = x.round(), y.round()
    value = wasserstein_distance(x, y, p)
    assert value == pytest.approx(repeated(x, y, p), rel=1e-9, abs=1e-12)
    assert wasserstein_distance(y, x, p) == pytest.approx(value, rel=1e-9, abs=1e-12)


def test_hundreds_of_samples() -> None:
    x, y = randn(60, 3), randn(90, 3, seed=1)
    assert wasserstein_distance(x, y) == pytest.approx(repeated(x, y, 1), rel=1e-9)


@pytest.mark.parametrize("theta", [0.0, 0.5, -2.0])
def test_parallel_lines(theta: float) -> None:
    # The example of the lectures: (0, U) and (theta, U) are |theta| apart however little they overlap.
    u = torch.linspace(0, 1, 50, dtype=torch.float64)
    x, y = torch.stack([0 * u, u], 1), torch.stack([0 * u + theta, u], 1)
    assert wasserstein_distance(x, y) == pytest.approx(abs(theta), abs=1e-14)
    assert wasserstein_distance(x, x) == 0


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
@pytest.mark.parametrize("shapes", [((7,), (7,)), ((7,), (5,)), ((7, 2), (7, 2)), ((7, 2), (5, 2))])
def test_any_scale(shapes: tuple[tuple[int, ...], tuple[int, ...]], scale: float) -> None:
    x, y = randn(*shapes[0]), randn(*shapes[1], seed=1)
    value = wasserstein_distance(x * scale, y * scale, 3)
    assert value == pytest.approx(scale * wasserstein_distance(x, y, 3), rel=1e-9)
    sliced = [
        sliced_wasserstein_distance(x * s, y * s, generator=torch.Generator().manual_seed(0)) for s in (1.0, scale)
    ]
    assert sliced[1] == pytest.approx(scale * sliced[0], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_dtypes_are_computed_in_float64(dtype: torch.dtype) -> None:
    x, y = randn(9, 3).to(dtype), randn(9, 3, seed=1).to(dtype)
    assert wasserstein_distance(x, y) == wasserstein_distance(x.double(), y.double())
    assert wasserstein_distance(x.T.contiguous().T, y) == wasserstein_distance(x, y)


# ---- sliced ----


@pytest.mark.parametrize("chunk", [1, 20, 1 << 22])
@pytest.mark.parametrize(("m", "n"), [(8, 8), (8, 5), (1, 7)])
def test_sliced_is_the_mean_over_directions(m: int, n: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["lipgan.metrics.wasserstein"], "_CHUNK_ENTRIES", chunk)
    x, y = randn(m, 3), randn(n, 3, seed=1)
    directions = torch.randn(3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    directions /= directions.norm(dim=0)
    truth = np.mean([wasserstein_distance(x @ v, y @ v, 2) ** 2 for v in directions.T]) ** 0.5
    value = sliced_wasserstein_distance(x, y, projections=20, generator=torch.Generator().manual_seed(5))
    assert value == pytest.approx(truth, rel=1e-12)
    assert value <= wasserstein_distance(x, y, 2)


def test_sliced_of_shifted_samples() -> None:
    # Of a shift by v, the mean of (u.v)^2 over the sphere is |v|^2 / d.
    x = randn(50, 4)
    value = sliced_wasserstein_distance(x, x + 3, projections=20_000, generator=torch.Generator().manual_seed(0))
    assert value == pytest.approx(3, rel=0.02)
    assert sliced_wasserstein_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-7)
    assert sliced_wasserstein_distance(x[:, :1], x[:, :1] + 3) == pytest.approx(3)


# ---- bad input ----


@pytest.mark.parametrize("function", [wasserstein_distance, sliced_wasserstein_distance])
@pytest.mark.parametrize(
    ("y", "p", "error", "message"),
    [
        ([1.0], 1, TypeError, "y must be a NumPy array or a tensor, got list"),
        (torch.ones(3, 2), 1, ValueError, "y must have 1 features like x, got 2"),
        (torch.ones(3, 1, 1), 1, ValueError, r"y must have shape \(n, d\), got \(3, 1, 1\)"),
        (torch.ones(0), 1, ValueError, "y must have at least 1 sample, got 0"),
        (torch.tensor([torch.nan]), 1, ValueError, "y must be finite, got 1 entries"),
        (torch.ones(3), 0.5, ValueError, "p must be at least 1 and finite, got 0.5"),
        (torch.ones(3), math.inf, ValueError, "p must be at least 1 and finite, got inf"),
        (torch.ones(3), math.nan, ValueError, "p must be at least 1 and finite, got nan"),
        (torch.ones(3), "1", TypeError, "p must be a number, got '1'"),
    ],
)
def test_bad_input(function: type, y: object, p: float, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        function(torch.ones(2), y, p)


def test_an_unsolved_program_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    solve = scipy.optimize.linprog

    def stopped(*args: object, options: dict[str, object], **kwargs: object) -> object:
        return solve(*args, options={**options, "maxiter": 0, "presolve": False}, **kwargs)

    monkeypatch.setattr(scipy.optimize, "linprog", stopped)
    with pytest.raises(RuntimeError, match="the transport of 5 to 4 samples was not solved"):
        wasserstein_distance(randn(5, 2), randn(4, 2, seed=1))
