"""Wasserstein distances against all permutations, scipy, samples repeated to one size, and closed forms.

Far groups and high orders are checked in whole numbers without bound, by the Hungarian method. The bounds are derived
in docs/numerics/wasserstein.md.
"""

import importlib
import itertools
import math
import sys
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import scipy.optimize
import scipy.spatial.distance
import scipy.stats
import torch
from devices import as_on_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipgan.metrics import sliced_wasserstein_distance, wasserstein_distance

wasserstein_module = importlib.import_module("lipgan.metrics.wasserstein")

SIZES = st.integers(1, 12)
ORDERS = st.sampled_from([1, 1.5, 2, 3])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def repeated(x: Tensor, y: Tensor, p: float) -> float:
    """The distance of the samples, repeated to one size, where an assignment is exact."""
    size = math.lcm(len(x), len(y))
    a, b = (rows.reshape(len(rows), -1).repeat_interleave(size // len(rows), 0).numpy(force=True) for rows in (x, y))
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
    x, y = x.numpy(force=True), y.numpy(force=True)
    assert wasserstein_distance(x[:, None], y[:, None], p) == as_on_cpu(value)
    if p == 1:
        assert value == pytest.approx(scipy.stats.wasserstein_distance(x, y), rel=1e-12, abs=1e-14)


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, st.integers(2, 4), ORDERS, st.integers(0, 99), st.booleans())
def test_plans_of_unequal_sizes(m: int, n: int, d: int, p: float, seed: int, ties: bool) -> None:
    x, y = randn(m, d, seed=seed), randn(n, d, seed=seed + 1)
    if ties:
        x, y = x.round(), y.round()
    value = wasserstein_distance(x, y, p)
    assert value == pytest.approx(repeated(x, y, p), rel=1e-9, abs=1e-12)
    assert wasserstein_distance(y, x, p) == pytest.approx(value, rel=1e-9, abs=1e-12)


def test_hundreds_of_samples() -> None:
    x, y = randn(60, 3), randn(90, 3, seed=1)
    assert wasserstein_distance(x, y) == pytest.approx(repeated(x, y, 1), rel=1e-9)


# ---- distances by products, and prices to begin with ----


def by_longer_arithmetic(x: Tensor, y: Tensor) -> np.ndarray:
    a, b = (np.asarray(rows.numpy(force=True), np.longdouble) for rows in (x, y))
    return np.sqrt(np.square(a[:, None] - b).sum(2))


@pytest.mark.parametrize("case", ["far from the origin", "near pairs", "tiny", "clusters"])
def test_distances_by_products_keep_their_digits(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wasserstein_module, "_MANY_DIFFERENCES", 0)
    d = 40
    x, y = randn(50, d) / 8, randn(60, d, seed=1) / 8
    if case == "far from the origin":
        x, y = x / 16 + 1, y / 16 + 1
    elif case == "near pairs":
        y[:20] = x[:20]  # distances of 0, and of the rounding
        y[20:40] = x[20:40] + 1e-9 * randn(20, d, seed=2)
        y[40:45] = x[40:45] + 1e-170 * randn(5, d, seed=3)
        x[40:45] = 0
        y[40:45] = 1e-170 * randn(5, d, seed=3)
    elif case == "tiny":
        x, y = x * 1e-200, y * 1e-200
    elif case == "clusters":
        shifts = 2 * torch.arange(5, dtype=torch.float64)[:, None] / 5
        x, y = (rows * 1e-3 + shifts.repeat(len(rows) // 5, 1) for rows in (x, y))
    if x.device.type == "cpu" and case != "tiny":
        assert (wasserstein_module._by_products(x, y) is None) == (case == "clusters")
    distances = wasserstein_module._distances(x, y).numpy(force=True)
    truth = by_longer_arithmetic(x, y)
    assert np.array_equal(distances == 0, truth == 0)
    # docs/numerics/wasserstein.md, "Rounding"
    assert (np.abs(distances - truth) <= (2 * d + 9) * 2.0**-53 * truth).all()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("p", [1, 2, 40])
def test_an_assignment_that_begins_with_prices(p: float, ties: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wasserstein_module, "_PRICED_FROM", 2)
    monkeypatch.setattr(wasserstein_module, "_MANY_DIFFERENCES", 0)
    x, y = randn(90, 33), 0.8 * randn(90, 33, seed=1) + 0.1
    if ties:
        x, y = x.round(), y.round()
    costs = by_longer_arithmetic(x, y) ** p
    best = costs[scipy.optimize.linear_sum_assignment(np.asarray(costs, float))].mean() ** (1 / np.longdouble(p))
    value, info = wasserstein_distance(x, y, p, return_info=True)
    assert info.route == "assignment"
    assert abs(value - best) <= info.error_bound <= 1e-11 * value


def test_prices_that_mislead_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = randn(40, 3), randn(40, 3, seed=1)
    expected = wasserstein_distance(x, y)
    monkeypatch.setattr(wasserstein_module, "_PRICED_FROM", 2)
    asked = []

    def misleading(costs: np.ndarray) -> np.ndarray:
        asked.append(len(costs))
        return 1e18 * np.arange(len(costs))  # of which the costs are rounding

    monkeypatch.setattr(wasserstein_module, "_column_prices", misleading)
    value, info = wasserstein_distance(x, y, return_info=True)
    assert asked
    assert value == pytest.approx(expected, rel=1e-14)
    assert info.route == "assignment"


def test_prices_to_begin_with_are_finite() -> None:
    costs = np.abs(randn(30, 30).numpy(force=True))
    assert (wasserstein_module._column_prices(np.zeros((3, 3))) == 0).all()
    assert np.ptp(wasserstein_module._column_prices(costs)) > 0
    costs[:, 0] = 1e6  # beyond what float32 tells from never
    assert np.isfinite(wasserstein_module._column_prices(costs)).all()


# ---- far groups and high orders ----

GRID = 2.0**-20


def on_a_grid(*shape: int, seed: int = 0) -> Tensor:
    """Points whose coordinates are whole multiples of 2^-20, so that squares of distances are exact as integers."""
    return (randn(*shape, seed=seed) / GRID).round() * GRID


def two_groups(n: int, gap: float, seed: int, share: float = 0.5) -> Tensor:
    x = on_a_grid(n, 2, seed=seed)
    x[: round(share * n), 0] += gap
    return x


def least_sum(costs: list[list[int]]) -> int:
    """The least sum of an assignment, in integers of any size: the Hungarian method, row by row."""
    n = len(costs)
    u, v, match = [0] * (n + 1), [0] * (n + 1), [0] * (n + 1)
    for i in range(1, n + 1):
        match[0], j0 = i, 0
        least: list[int | None] = [None] * (n + 1)
        way, used = [0] * (n + 1), [False] * (n + 1)
        while match[j0]:
            used[j0] = True
            i0 = match[j0]
            delta, j1 = None, 0
            for j in range(1, n + 1):
                if used[j]:
                    continue
                slack = costs[i0 - 1][j - 1] - u[i0] - v[j]
                if least[j] is None or slack < least[j]:
                    least[j], way[j] = slack, j0
                if delta is None or least[j] < delta:
                    delta, j1 = least[j], j
            for j in range(n + 1):
                if used[j]:
                    u[match[j]] += delta
                    v[j] -= delta
                elif least[j] is not None:
                    least[j] -= delta
            j0 = j1
        while j0:
            match[j0] = match[way[j0]]
            j0 = way[j0]
    return sum(costs[match[j] - 1][j - 1] for j in range(1, n + 1))


def exact_sum(x: Tensor, y: Tensor, p: int, units: int) -> int:
    """The least ``sum |x_i - y_j|^p`` in units of ``2^(-20 p - 64)``, of samples repeated to ``units`` of them."""
    a, b = ([[int(v) for v in row] for row in (rows / GRID).tolist()] for rows in (x, y))
    assert torch.equal(torch.tensor(a, dtype=torch.float64) * GRID, x)
    costs = [[math.isqrt(sum((s - t) ** 2 for s, t in zip(v, w, strict=True)) ** p << 128) for w in b] for v in a]
    return least_sum([[costs[i * len(a) // units][j * len(b) // units] for j in range(units)] for i in range(units)])


def exact(sums: int, units: int, p: int) -> mpmath.mpf:
    with mpmath.workprec(200):
        return mpmath.root(mpmath.mpf(sums) / units / mpmath.mpf(2) ** 64, p) * GRID


@pytest.mark.parametrize("p", [1, 2, 3, 32, 64, 128])
@pytest.mark.parametrize(
    ("m", "n", "gap"), [(6, 4, 2e5), (60, 40, 3e5), (12, 8, 1e9), (8, 12, 1e9), (12, 12, 1e9), (20, 20, 1e7)]
)
def test_far_groups_of_equal_shares(m: int, n: int, gap: float, p: int) -> None:
    x, y = two_groups(m, gap, seed=1), two_groups(n, gap, seed=2)
    # No mass crosses, so that each group is a problem of its own, of half of the units.
    units = math.lcm(m, n)
    sides = ((x[: m // 2], y[: n // 2]), (x[m // 2 :], y[n // 2 :]))
    sums = sum(exact_sum(a, b, p, units // 2) for a, b in sides)
    truth = exact(sums, units, p)
    value, info = wasserstein_distance(x, y, p, return_info=True)
    assert abs(value - truth) <= info.error_bound <= 1e-11 * value
    assert info.route == ("assignment" if m == n else "primal-dual")
    assert wasserstein_distance(y, x, p) == pytest.approx(value, rel=1e-13)


@pytest.mark.parametrize("p", [1, 2, 31, 128])
@pytest.mark.parametrize(("m", "n", "share"), [(9, 6, 0.3), (5, 7, 0.5), (8, 6, 0.25), (10, 10, 0.3)])
@pytest.mark.parametrize("gap", [10.0, 1e5, 1e9])
def test_some_mass_crosses(m: int, n: int, share: float, gap: float, p: int) -> None:
    x, y = two_groups(m, gap, seed=3), two_groups(n, gap, seed=4, share=share)
    units = math.lcm(m, n)
    truth = exact(exact_sum(x, y, p, units), units, p)
    value, info = wasserstein_distance(x, y, p, return_info=True)
    assert abs(value - truth) <= info.error_bound <= 1e-11 * value
    assert 0 <= info.gap <= info.error_bound


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, st.integers(1, 3), st.floats(0, 9), st.sampled_from([0.25, 0.5, 0.75]), st.integers(0, 99))
def test_no_fall_with_the_order(m: int, n: int, d: int, magnitude: float, share: float, seed: int) -> None:
    x, y = randn(m, d, seed=seed), randn(n, d, seed=seed + 1)
    x[: round(share * m)] += 10**magnitude
    y[: n // 2] += 10**magnitude
    orders = [1, 1.5, 2, 7, 32, 64, 128, 1000]
    values = [wasserstein_distance(x, y, p) for p in orders]
    for before, after in itertools.pairwise(values):
        assert after >= before * (1 - 1e-11)
    # The share of mass that goes the longest way is at least 1 / lcm.
    assert values[-1] <= values[2] * math.lcm(m, n) ** (1 / 2) * (1 + 1e-11)
    for p, value in zip(orders, values, strict=True):
        assert wasserstein_distance(y, x, p) == pytest.approx(value, rel=1e-11)


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, st.sampled_from([1, 2, 5, 64, 128]), st.sampled_from([0.0, 1.0, 1e5, 1e9]), st.integers(0, 99))
def test_quantiles_in_fractions(m: int, n: int, p: int, gap: float, seed: int) -> None:
    x, y = randn(m, seed=seed), randn(n, seed=seed + 1)
    x[: m // 2] += gap
    y[: n // 2] += gap
    a, b = (sorted(map(Fraction, rows.tolist())) for rows in (x, y))
    units = math.lcm(m, n)
    mean = sum(abs(a[k * m // units] - b[k * n // units]) ** p for k in range(units)) / units
    with mpmath.workprec(200):
        truth = mpmath.root(mpmath.mpf(mean.numerator) / mean.denominator, p)
    # On the line, and on a line in the plane, whose plan is looked for.
    for points in ((x, y), (torch.stack([x, 0 * x], 1), torch.stack([y, 0 * y], 1))):
        value, info = wasserstein_distance(*points, p, return_info=True)
        assert abs(value - truth) <= info.error_bound <= 1e-11 * value
        assert info.route == "sort" or points[0].ndim == 2
    sliced = sliced_wasserstein_distance(x, y, p, projections=3)
    assert sliced == pytest.approx(float(truth), rel=1e-11)


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("distance", [1e-150, 1e-170, 1e-250])
def test_distances_whose_squares_vanish(distance: float, n: int) -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([[0.6 * distance, 0.8 * distance], [1.0, 0.0]], dtype=torch.float64).repeat_interleave(n // 2, 0)
    assert wasserstein_distance(x, y) == pytest.approx(distance / 2, rel=1e-14)
    assert wasserstein_distance(x, y, 128) == pytest.approx(distance / 2 ** (1 / 128), rel=1e-14)


@pytest.mark.parametrize("shapes", [((4,), (6,)), ((4, 2), (6, 2)), ((4, 2), (4, 2))])
def test_at_the_largest_numbers(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    x, y = (
        torch.full(shape, value, dtype=torch.float64) for shape, value in zip(shapes, (1.7e308, 1.6e308), strict=True)
    )
    side = math.sqrt(x[0].numel())
    assert wasserstein_distance(x, y, 128) == pytest.approx(1e307 * side, rel=1e-13)


def test_a_wrong_assignment_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = two_groups(12, 1e6, seed=1), two_groups(12, 1e6, seed=2)
    value = wasserstein_distance(x, y, 2)
    monkeypatch.setattr(scipy.optimize, "linear_sum_assignment", lambda costs: (np.arange(12), np.arange(12)[::-1]))
    again, info = wasserstein_distance(x, y, 2, return_info=True)
    assert again == pytest.approx(value, rel=1e-13)
    assert info.route == "primal-dual"


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


def test_sizes_without_a_small_common_multiple() -> None:
    x, y = torch.zeros(46342, 2), torch.zeros(46341, 2)
    with pytest.raises(ValueError, match=r"least common multiple is below 2\^31, got 46342 and 46341"):
        wasserstein_distance(x, y)
    assert wasserstein_distance(x[:, 0], y[:, 0] + 1) == pytest.approx(1)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda plan, reduced: (plan, reduced + 1), None),
        (lambda plan, reduced: (plan, reduced - 1), "its prices prove nothing"),
        (lambda plan, reduced: (plan, reduced + np.eye(*reduced.shape, dtype=np.int64)), "its prices prove nothing"),
        (
            lambda plan, reduced: (type(plan)(plan.rows, plan.columns, plan.units * 2), reduced),
            "its prices prove nothing",
        ),
        # Every sample of one side gives to every sample of the other.
        (
            lambda plan, reduced: (
                type(plan)(*np.indices(reduced.shape).reshape(2, -1), np.ones(reduced.size, np.int64)),
                reduced,
            ),
            "its cost is proven only to",
        ),
        (lambda plan, reduced: (plan, reduced + (1 << 57)), "its cost is proven only to"),
    ],
)
def test_what_is_not_proven_is_an_error(fault: type, message: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["lipgan.metrics.wasserstein"]
    solve = module._primal_dual

    def faulty(*args: object) -> object:
        plan, reduced, iterations = solve(*args)
        return *fault(plan, reduced), iterations

    monkeypatch.setattr(module, "_primal_dual", faulty)
    x, y = randn(5, 2), randn(4, 2, seed=1)
    if message is None:
        # Prices that are lower by one unit prove nearly as much.
        assert wasserstein_distance(x, y) == pytest.approx(repeated(x, y, 1), rel=1e-12)
    else:
        with pytest.raises(RuntimeError, match=rf"the transport of 4 to 5 samples was not solved: {message}"):
            wasserstein_distance(x, y)
