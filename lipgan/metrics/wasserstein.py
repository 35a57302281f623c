r"""Wasserstein distances of two samples: exact, and sliced.

``W_p^p = min sum_ij f_ij |x_i - y_j|^p`` over the transport plans f that give every ``x_i`` the mass ``1 / m`` and
every ``y_j`` the mass ``1 / n``. On a line the optimal plan matches the sorted samples. Otherwise some optimal plan is
made of whole units of ``1 / lcm(m, n)``, and is found among those: as an assignment where ``m = n``, else by the
primal-dual method in integers. Either way integer prices prove it optimal. Scaling and bounds:
docs/numerics/wasserstein.md.

Source: Peyre and Cuturi, "Computational Optimal Transport" (2019), ch. 2 and 3; Ahuja, Magnanti, Orlin, "Network
Flows" (1993), section 9.8, for the primal-dual method; Rabin, Peyre, Delon, Bernot, "Wasserstein Barycenter and its
Application to Texture Mixing" (2011), for the sliced distance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, overload

import numpy as np
import scipy.optimize
import scipy.sparse
import scipy.sparse.csgraph
import scipy.spatial.distance
import torch
from torch import Tensor

from lipgan._checks import check_count, check_generator
from lipgan.metrics._inputs import Array, as_pair, as_real_tensor

__all__ = ["WassersteinInfo", "sliced_wasserstein_distance", "wasserstein_distance"]

EPS = torch.finfo(torch.float64).eps

# Entries of the projections that are sorted at a time: 32 MiB of float64.
_CHUNK_ENTRIES = 1 << 22

# Costs are integers up to 2 to this power. Reduced costs stay within twice the largest cost, and so do the lengths of
# shortest paths over them: their sum does not leave int64.
_COST_BITS = 59
_FAR = 1 << 62  # longer than every path

# Relative errors of the distance: what is aimed at by solving once more, and what is an error.
_AIM, _PROMISE = 1e-12, 1e-9

# Steps towards the prices that an assignment starts from, their temperature as a share of the mean cost, and the number
# of samples from which on that pays.
_STEPS, _TEMPERATURE, _PRICED_FROM = 10, 0.05, 256

_FEW = 8  # units that a column takes at first; 1 and 16 took longer for 401 and 500 samples

_CLOSE = 2.0**-400  # a distance below it loses digits as a sum of squares
_UP = 2.0**500

# From this many coordinates on, distances come from products, but of pairs whose squared distance is below this share
# of the square of the sum of their norms; and all from differences where so large a share of the pairs is as near.
_PRODUCTS_FROM, _FAR_SHARE, _MOST_NEAR = 32, 0.25, 1 / 16
_MANY_DIFFERENCES = 1 << 22  # that products save, and less is not worth their calls
_NEAR_ENTRIES = 1 << 20  # coordinates of near pairs at a time

Integers: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"
Floats: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"


@dataclass(frozen=True)
class WassersteinInfo:
    """How a distance was computed, and how far off it may be."""

    route: str  # "sort", "assignment" or "primal-dual"
    iterations: int  # of the primal-dual method: maximum flows, else 0
    gap: float  # the distance less the lower bound that the prices prove; 0 on a line
    error_bound: float  # absolute, on the distance: the gap and the rounding


def _check_p(p: float) -> None:
    if not isinstance(p, (int, float)) or isinstance(p, bool):
        raise TypeError(f"p must be a number, got {p!r}")
    if not 1 <= p < math.inf:
        raise ValueError(f"p must be at least 1 and finite, got {p}")


def _samples(x: Array, y: Array) -> tuple[Tensor, Tensor]:
    """Two samples ``[n, d]`` in float64; numbers ``[n]`` are points of a line."""
    x, y = (rows[:, None] if rows.ndim == 1 else rows for rows in (as_real_tensor("x", x), as_real_tensor("y", y)))
    a, b = as_pair("x", x, "y", y)
    return a.double(), b.double()


def _on_lines(x: Tensor, y: Tensor, p: float) -> Tensor:
    """``W_p`` of ``x [m, k]`` and ``y [n, k]``, column by column: ``[k]``."""
    x, y = x.sort(0).values, y.sort(0).values
    m, n = len(x), len(y)
    if m == n:
        distances, shares = (x - y).abs(), torch.full((m, 1), 1 / m, dtype=x.dtype, device=x.device)
    else:
        # Both quantile functions are constant between neighbouring multiples of n and m, in units of 1 / (m n).
        ends = torch.cat([torch.arange(1, m + 1) * n, torch.arange(1, n) * m]).sort().values
        steps = torch.diff(ends, prepend=torch.zeros(1, dtype=ends.dtype)).to(x.device)
        i, j = ((ends - 1) // n).to(x.device), ((ends - 1) // m).to(x.device)
        # Two multiples that agree leave a step of no mass.
        i, j, steps = i[steps > 0], j[steps > 0], steps[steps > 0]
        distances, shares = (x[i] - y[j]).abs(), steps[:, None].to(x.dtype) / (m * n)
    return _power_mean(distances, shares, p)


def _power_mean(distances: Tensor, shares: Tensor | float, p: float) -> Tensor:
    """``(sum_i shares_i distances_i^p)^(1/p)`` of the columns of ``distances [n, k]``, by their largest: ``[k]``."""
    largest = distances.amax(0)
    # The largest becomes 1, so the sum neither overflows nor vanishes, whatever p.
    ratios = distances / largest.where(largest > 0, 1.0)
    return largest * (ratios.pow(p) * shares).sum(0).pow(1 / p)


# ---- plans of whole units ----


@dataclass(frozen=True)
class _Plan:
    """``units[k]`` go from ``rows[k]`` to ``columns[k]``."""

    rows: Integers
    columns: Integers
    units: Integers

    def cost(self, costs: Floats) -> float:
        return math.fsum((costs[self.rows, self.columns] * self.units).tolist())


def _units(m: int, n: int) -> tuple[int, int]:
    """What every row gives and every column takes, for plans of whole numbers."""
    return n // math.gcd(m, n), m // math.gcd(m, n)


def _largest_flow(allowed: np.ndarray[Any, Any], given: int, taken: int) -> _Plan:
    """As many units as can go over the pairs ``allowed [m, n]``."""
    m, n = allowed.shape
    i, j = np.nonzero(allowed)
    source, sink = m + n, m + n + 1
    tails = np.concatenate([np.full(m, source), i, m + np.arange(n)])
    heads = np.concatenate([np.arange(m), m + j, np.full(n, sink)])
    capacities = np.repeat(np.array([given, min(given, taken), taken], np.int32), [m, len(i), n])
    graph = scipy.sparse.csr_array((capacities, (tails, heads)), shape=(m + n + 2, m + n + 2))
    flow = scipy.sparse.csgraph.maximum_flow(graph, source, sink).flow.tocoo()
    pairs = (flow.row < m) & (flow.data > 0)
    rows, heads, units = (part[pairs].astype(np.int64) for part in (flow.row, flow.col, flow.data))
    return _Plan(rows, heads - m, units)


def _shortest(reduced: Integers, plan: _Plan, near: Integers, sweeps: int, enough: float) -> tuple[Integers, Integers]:
    """Lengths of the shortest paths to rows ``[m]`` and columns ``[n]``, by label correction.

    A path goes from a row to any column at the reduced cost, and back where units flow at its negative.

    Args:
        reduced: ``[m, n]``.
        plan: what flows.
        near: ``[m]``, lengths to the rows to begin with.
        sweeps: when to stop.
        enough: stop too where ``sum f (reduced + near - far)`` is no larger.
    """
    far = np.full(reduced.shape[1], _FAR, np.int64)
    back = reduced[plan.rows, plan.columns]
    changed = np.flatnonzero(near < _FAR)
    for sweep in range(sweeps):
        np.minimum(far, (reduced[changed] + near[changed, None]).min(0), out=far)
        new = near.copy()
        np.minimum.at(new, plan.rows, far[plan.columns] - back)
        changed = np.flatnonzero(new < near)
        left = float(((near - new)[plan.rows] * plan.units.astype(float)).sum())
        # Paths shorter than all costs could make them go round a negative cycle, and have no end.
        if not len(changed) or left <= enough or sweep == sweeps - 1 or int(new.min()) < -_FAR // 4:
            break  # with lengths to the columns that belong to those to the rows
        near = new
    return near, far


def _assignment(costs: Floats, prices: Integers) -> tuple[_Plan, Integers] | None:
    """A permutation of least cost and its reduced costs; None where the prices that prove it are not found.

    Args:
        costs: ``[n, n]``.
        prices: the same in integers.
    """
    n = len(costs)
    for first in (True, False):
        rows, columns = scipy.optimize.linear_sum_assignment(_reduced(costs) if first else costs)
        plan = _Plan(rows.astype(np.int64), columns.astype(np.int64), np.ones(n, np.int64))
        # Where permutations are equal up to the rounding of prices, any of them will do.
        enough = max(float(n), _AIM / 16 * float(prices[rows, columns].astype(float).sum()))
        near, far = _shortest(prices, plan, np.zeros(n, np.int64), n, enough)
        reduced = prices + near[:, None] - far
        if float(reduced[rows, columns].astype(float).sum()) <= enough:
            return plan, reduced
    return None  # reducing costs of very different sizes has rounded small ones away, and was not to blame


def _reduced(costs: Floats) -> Floats:
    """Costs less a price of each row and column, which have the same best permutations, found in less time."""
    reduced: Floats = costs - _column_prices(costs) if len(costs) >= _PRICED_FROM else costs
    reduced = reduced - reduced.min(1, keepdims=True)
    reduced -= reduced.min(0)
    return reduced


def _column_prices(costs: Floats) -> Floats:
    """``[n]``, not far from the best plan's: of one with entropy, by Sinkhorn's iteration in float32. Or zeros."""
    excess = torch.from_numpy(costs - costs.min(1, keepdims=True))
    temperature = _TEMPERATURE * float(excess.mean())
    prices = np.zeros(costs.shape[1])
    if temperature > 0:
        kernel = excess.div_(-temperature).float().exp_()
        column = kernel.new_ones(costs.shape[1])
        for _ in range(_STEPS):
            column = (kernel.mT @ (kernel @ column).reciprocal_()).reciprocal_()
        logarithms = column.double().log_()
        if bool(logarithms.isfinite().all()):  # else the kernel has left the range of float32
            prices = temperature * logarithms.numpy()
    return prices


def _primal_dual(prices: Integers, given: int, taken: int) -> tuple[_Plan, Integers, int]:
    """A plan of least cost, its reduced costs, and the number of maximum flows.

    Large numbers of units take many flows. Where the columns could take few units each, of rows that give nearly as
    many, the prices of that plan are near the wanted ones.

    Args:
        prices: ``[m, n]``, ``m <= n``, the costs, from 0 to ``2^_COST_BITS``.
        given, taken: units of every row and of every column.
    """
    m, n = prices.shape
    reduced = prices - prices.min(1, keepdims=True)
    iterations = 0
    if taken > _FEW:
        roughly = min(range(1, _FEW + 1), key=lambda units: (n * units % m) / units)
        _, reduced, iterations = _send_all(reduced, n * roughly // m, roughly)
    plan, reduced, more = _send_all(reduced, given, taken)
    return plan, reduced, iterations + more


def _send_all(reduced: Integers, given: int, taken: int) -> tuple[_Plan, Integers, int]:
    """A plan of least cost where columns may take fewer units, its reduced costs, and the number of maximum flows.

    Units flow only where the reduced cost is 0, as many as can. Then the lengths of the shortest paths from the rows
    that have units left change the prices of rows and columns, which opens a way for at least one unit more.
    """
    m, n = reduced.shape
    iterations = 0
    while True:
        # Every row and column gets a pair of reduced cost 0: this bounds all others.
        reduced = reduced - reduced.min(0)
        reduced -= reduced.min(1, keepdims=True)
        plan = _largest_flow(reduced == 0, given, taken)
        iterations += 1
        sent = np.bincount(plan.rows, plan.units, m)
        if int(plan.units.sum()) == m * given:
            return plan, reduced, iterations
        near, far = _shortest(reduced, plan, np.where(sent < given, 0, _FAR), m + n, -1.0)
        reduced += near[:, None]
        reduced -= far


def _proven(prices: Integers, reduced: Integers, plan: _Plan, given: int, taken: int) -> int:
    """A lower bound on the cost of every plan, of which nothing is believed but that integers add up.

    Raises:
        RuntimeError: ``plan`` is no plan, or ``reduced`` is not the costs less a price of each row and column, or
            somewhere negative.
    """
    m, n = prices.shape
    both = prices - reduced
    of_rows = both[:, 0]
    of_columns = both[0] - of_rows[0]
    sent, come = (np.bincount(k, plan.units, size) for k, size in ((plan.rows, m), (plan.columns, n)))
    if (
        not np.array_equal(both, of_rows[:, None] + of_columns)
        or reduced.min() < 0
        or plan.units.min() < 0
        or (sent != given).any()
        or (come != taken).any()
    ):
        raise RuntimeError(f"the transport of {m} to {n} samples was not solved: its prices prove nothing")
    # Python's integers do not overflow.
    return int(given * sum(of_rows.tolist()) + taken * sum(of_columns.tolist()))


def _bottleneck(distances: Floats, p: float) -> float:
    """A distance that suffices for some plan, where the smallest such to the power p is at most 2^20 times less.

    0 where that is the smallest.
    """
    m, n = distances.shape
    given, taken = _units(m, n)

    def suffices(distance: float) -> bool:
        return bool(_largest_flow(distances <= distance, given, taken).units.sum() == m * given)

    # Every row and every column needs a partner.
    least, largest = float(max(distances.min(1).max(), distances.min(0).max())), float(distances.max())
    if least == 0:
        if suffices(0):
            return 0.0
        least = float(distances[distances > 0].min())
    while p * (math.log2(largest) - math.log2(least)) > 20:
        middle = math.sqrt(least) * math.sqrt(largest)
        if not least <= middle < largest:
            middle = least
        if suffices(middle):
            largest = float(distances[distances <= middle].max())
        else:
            least = float(distances[distances > middle].min())
    return largest


def _transport(distances: Floats, p: float) -> tuple[float, WassersteinInfo]:
    """The distance and how it was found, of the matrix of all distances ``[m, n]``, in units of any size."""
    if distances.shape[0] > distances.shape[1]:
        # The same answer for swapped sides; and few rows to many columns took as little as a third of the time.
        distances = np.ascontiguousarray(distances.T)
    m, n = distances.shape
    given, taken = _units(m, n)
    total = m * given
    route, iterations = "assignment" if m == n else "primal-dual", 0
    unit = _bottleneck(distances, p)
    if unit == 0:
        return 0.0, WassersteinInfo(route, 0, 0.0, 0.0)
    with np.errstate(over="ignore", under="ignore"):
        costs = (distances / unit) ** p
    # A plan over distances up to the unit costs no more than this, so no better one has a larger cost anywhere.
    largest = min(float(costs.max()), float(total))
    while True:
        costs = np.minimum(costs, largest)
        bits = _COST_BITS - math.frexp(largest)[1]
        prices = np.rint(np.ldexp(costs, bits)).astype(np.int64)
        solved = _assignment(costs, prices) if m == n else None
        if solved is None:
            route = "primal-dual"
            plan, reduced, steps = _primal_dual(prices, given, taken)
            iterations += steps
        else:
            plan, reduced = solved
        cost = plan.cost(costs)
        # A price is off by at most one half.
        proven = math.ldexp(max(0.0, _proven(prices, reduced, plan, given, taken) - total / 2), -bits)
        mean, below = ((value / total) ** (1 / p) for value in (cost, min(cost, proven)))
        gap = mean - below
        # The plan found bounds the costs of the best one, so its own prices can be told finer.
        if gap <= _AIM * mean or cost >= largest / 2:
            break
        largest = cost
    if gap > _PROMISE * mean:
        raise RuntimeError(
            f"the transport of {m} to {n} samples was not solved: its cost is proven only to {gap / mean:.1e}"
        )
    return unit * mean, WassersteinInfo(route, iterations, unit * gap, unit * gap)


@overload
def wasserstein_distance(x: Array, y: Array, p: float = 1, *, return_info: Literal[False] = False) -> float: ...


@overload
def wasserstein_distance(
    x: Array, y: Array, p: float = 1, *, return_info: Literal[True]
) -> tuple[float, WassersteinInfo]: ...


def wasserstein_distance(
    x: Array, y: Array, p: float = 1, *, return_info: bool = False
) -> float | tuple[float, WassersteinInfo]:
    """The exact p-Wasserstein distance of two samples, all of one weight, with Euclidean distances.

    The relative error is below 1e-9, and near rounding in fact, whatever p and however far apart the samples lie; where
    that cannot be proven, it is an error. On a line it costs a sort. In more dimensions it holds the matrix of all
    distances, a few times, and takes time with the cube of the number of samples if there are as many of each, and more
    otherwise: some thousand samples of each, or some hundred.

    Args:
        x: ``[m]`` or ``[m, d]``, NumPy array or tensor; float64, float32 or a half type, computed in float64.
        y: ``[n]`` or ``[n, d]``.
        p: order, at least 1.
        return_info: return a :class:`WassersteinInfo` too: the route, its iterations, the duality gap, and a bound on
            the error.

    Returns:
        ``(min sum f_ij |x_i - y_j|^p)^(1/p)``; with ``return_info``, a pair of that and the info.

    Raises:
        TypeError: an argument is not an array or tensor of real floating-point numbers; ``p`` is not a number.
        ValueError: shapes that do not fit, no samples, a NaN or an infinity, ``p`` below 1 or infinite; in more
            dimensions, sizes whose least common multiple is 2^31 or more.
        RuntimeError: the plan that was found is not proven to be the best.

    Example::

        >>> wasserstein_distance(torch.tensor([0.0, 1.0]), torch.tensor([3.0]))
        2.5
    """
    _check_p(p)
    p = float(p)
    a, b = _samples(x, y)
    # No square of a difference may overflow.
    scale = _spread(a, b)
    a, b = a / scale, b / scale
    if a.shape[1] == 1:
        value, info = float(_on_lines(a, b, p)), WassersteinInfo("sort", 0, 0.0, 0.0)
    else:
        if math.lcm(len(a), len(b)) >= 1 << 31:
            raise ValueError(
                f"x and y must have sizes whose least common multiple is below 2^31, got {len(a)} and {len(b)}"
            )
        value, info = _transport(_distances(a, b).cpu().numpy(), p)
    # A distance by differences is off by less than half as much; docs/numerics/wasserstein.md
    rounding = EPS * (a.shape[1] * (1 if _pay_products(a, b) else 0.5) + 8 + math.log2(len(a) + len(b)) / p)
    info = WassersteinInfo(info.route, info.iterations, scale * info.gap, scale * (info.gap + rounding * value))
    return (scale * value, info) if return_info else scale * value


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """``[m, n]`` for coordinates up to 2 in magnitude, to full precision down to 2^-980."""
    distances = _by_products(a, b) if _pay_products(a, b) else None
    if distances is not None:
        return distances
    distances = _sums_of_squares(a, b)
    if float(distances.min()) < _CLOSE:
        finer = _sums_of_squares(a * _UP, b * _UP) / _UP
        distances = finer.where(distances < _CLOSE, distances)
    return distances


def _pay_products(a: Tensor, b: Tensor) -> bool:
    d = a.shape[1]
    return a.device.type == "cpu" and d >= _PRODUCTS_FROM and len(a) * len(b) * d >= _MANY_DIFFERENCES


def _by_products(a: Tensor, b: Tensor) -> Tensor | None:
    """The same by ``|x|^2 + |y|^2 - 2 x y`` about the mean of all, which keeps the digits of pairs that are not near.

    Those that are, by differences; None where there are many of them.
    """
    center = (a.sum(0) + b.sum(0)) / (len(a) + len(b))
    centered_a, centered_b = a - center, b - center
    squares_a, squares_b = centered_a.square().sum(1), centered_b.square().sum(1)
    squares = torch.addmm(squares_b, centered_a, centered_b.mT, alpha=-2).add_(squares_a[:, None])
    least = (squares_a.sqrt()[:, None] + squares_b.sqrt()).square_().mul_(_FAR_SHARE).clamp_min_(_CLOSE**2)
    rows, columns = torch.nonzero(squares < least, as_tuple=True)
    if len(rows) > _MOST_NEAR * squares.numel():
        return None
    distances = squares.clamp_min_(0).sqrt_()
    step = max(1, _NEAR_ENTRIES // a.shape[1])
    for i, j in zip(torch.split(rows, step), torch.split(columns, step), strict=True):
        differences = a[i] - b[j]
        lengths = torch.linalg.vector_norm(differences, dim=1)
        finer = torch.linalg.vector_norm(differences * _UP, dim=1) / _UP
        distances[i, j] = finer.where(lengths < _CLOSE, lengths)
    return distances


def _sums_of_squares(a: Tensor, b: Tensor) -> Tensor:
    """Roots of the sums of squared differences, not of products, whose differences lose digits."""
    if a.device.type == "cpu":  # one thread of SciPy is faster than two of PyTorch
        return torch.from_numpy(scipy.spatial.distance.cdist(a.numpy(), b.numpy()))
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _spread(x: Tensor, y: Tensor) -> float:
    """A power of two near the largest coordinate, by which division is exact; 1 if all are 0."""
    largest = max(float(x.abs().max()), float(y.abs().max()))
    return math.ldexp(1.0, min(1023, max(-1000, math.frexp(largest)[1]))) if largest else 1.0


def sliced_wasserstein_distance(
    x: Array, y: Array, p: float = 2, *, projections: int = 100, generator: torch.Generator | None = None
) -> float:
    """The p-th root of the mean of ``W_p^p`` of two samples projected onto random directions.

    It grows with the exact distance and is no larger, and costs a sort for every direction.

    Args:
        x: ``[m]`` or ``[m, d]``, NumPy array or tensor; float64, float32 or a half type, computed in float64.
        y: ``[n]`` or ``[n, d]``.
        p: order, at least 1.
        projections: number of directions, uniform on the sphere.
        generator: draws the directions.

    Raises:
        TypeError: an argument is not an array or tensor of real floating-point numbers; ``p`` is not a number,
            ``projections`` not an int.
        ValueError: shapes that do not fit, no samples, a NaN or an infinity, ``p`` below 1 or infinite.

    Example::

        >>> sliced_wasserstein_distance(torch.zeros(3, 1), torch.full((5, 1), 2.0))
        2.0
    """
    _check_p(p)
    check_count("projections", projections)
    check_generator(generator)
    a, b = _samples(x, y)
    device = "cpu" if generator is None else generator.device
    directions = torch.randn(a.shape[1], projections, dtype=torch.float64, generator=generator, device=device)
    directions = (directions / torch.linalg.vector_norm(directions, dim=0)).to(a.device)
    scale = _spread(a, b)
    a, b = a / scale, b / scale
    at_a_time = max(1, _CHUNK_ENTRIES // (len(a) + len(b)))
    values = torch.cat([_on_lines(a @ chunk, b @ chunk, p) for chunk in directions.split(at_a_time, 1)])
    return scale * float(_power_mean(values[:, None], 1 / projections, p))
