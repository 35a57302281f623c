r"""Wasserstein distances of two samples: exact, and sliced.

``W_p^p = min sum_ij f_ij |x_i - y_j|^p`` over the transport plans f that give every ``x_i`` the mass ``1 / m`` and
every ``y_j`` the mass ``1 / n``. On a line the optimal plan matches the sorted samples. Samples of one size have an
optimal plan that is a permutation, found as an assignment. Otherwise it is a linear program, whose corners are whole
multiples of ``1 / (m n)``: a solution is rounded to them, so that the tolerances of the solver do not enter its cost.

Source: Peyre and Cuturi, "Computational Optimal Transport" (2019), ch. 2 and 3; Rabin, Peyre, Delon, Bernot,
"Wasserstein Barycenter and its Application to Texture Mixing" (2011), for the sliced distance.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.optimize
import scipy.sparse
import torch
from torch import Tensor

from lipgan._checks import check_count
from lipgan.metrics._inputs import Array, as_pair, as_real_tensor

__all__ = ["sliced_wasserstein_distance", "wasserstein_distance"]

# Entries of the projections that are sorted at a time: 32 MiB of float64.
_CHUNK_ENTRIES = 1 << 22

# The smallest that HiGHS takes.
_SOLVER_TOLERANCE = 1e-10


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
    """``W_p^p`` of ``x [m, k]`` and ``y [n, k]``, column by column: ``[k]``."""
    x, y = x.sort(0).values, y.sort(0).values
    m, n = len(x), len(y)
    if m == n:
        return (x - y).abs().pow(p).mean(0)
    # Both quantile functions are constant between neighbouring multiples of n and m, in units of 1 / (m n).
    ends = torch.cat([torch.arange(1, m + 1) * n, torch.arange(1, n) * m]).sort().values
    steps = torch.diff(ends, prepend=torch.zeros(1, dtype=ends.dtype)).to(x.device)
    i, j = ((ends - 1) // n).to(x.device), ((ends - 1) // m).to(x.device)
    return ((x[i] - y[j]).abs().pow(p) * steps[:, None]).sum(0) / (m * n)


def _plan_cost(costs: np.ndarray[Any, Any]) -> float:
    """The least cost of a plan between uniform masses. ``costs [m, n]``."""
    m, n = costs.shape
    if m == n:
        rows, columns = scipy.optimize.linear_sum_assignment(costs)
        return float(costs[rows, columns].mean())
    given = scipy.sparse.kron(scipy.sparse.eye_array(m), np.ones((1, n)))
    taken = scipy.sparse.kron(np.ones((1, m)), scipy.sparse.eye_array(n))
    # In units of 1 / (m n): every x gives n, every y takes m.
    masses = np.concatenate([np.full(m, n), np.full(n, m)])
    result = scipy.optimize.linprog(
        costs.ravel(),
        A_eq=scipy.sparse.vstack([given, taken], format="csr"),
        b_eq=masses,
        method="highs-ds",
        options={
            "primal_feasibility_tolerance": _SOLVER_TOLERANCE,
            "dual_feasibility_tolerance": _SOLVER_TOLERANCE,
        },
    )
    if result.status != 0:
        raise RuntimeError(f"the transport of {m} to {n} samples was not solved: {result.message}")
    plan = np.rint(result.x).reshape(m, n)
    if not (np.array_equal(plan.sum(1), masses[:m]) and np.array_equal(plan.sum(0), masses[m:])):
        raise RuntimeError(f"the transport of {m} to {n} samples was solved too inaccurately to be rounded to a corner")
    return float((plan * costs).sum() / (m * n))


def wasserstein_distance(x: Array, y: Array, p: float = 1) -> float:
    """The exact p-Wasserstein distance of two samples, all of one weight, with Euclidean distances.

    On a line it costs a sort. In more dimensions it holds the matrix of all distances, and takes time with the cube of
    the number of samples if there are as many of each, and a linear program of their product otherwise: some thousand
    samples of each, or some hundred.

    Args:
        x: ``[m]`` or ``[m, d]``, NumPy array or tensor; float64, float32 or a half type, computed in float64.
        y: ``[n]`` or ``[n, d]``.
        p: order, at least 1.

    Returns:
        ``(min sum f_ij |x_i - y_j|^p)^(1/p)``.

    Raises:
        TypeError: an argument is not an array or tensor of real floating-point numbers; ``p`` is not a number.
        ValueError: shapes that do not fit, no samples, a NaN or an infinity, ``p`` below 1 or infinite.
        RuntimeError: the linear program was not solved.

    Example::

        >>> wasserstein_distance(torch.tensor([0.0, 1.0]), torch.tensor([3.0]))
        2.5
    """
    _check_p(p)
    a, b = _samples(x, y)
    # A power must neither overflow nor vanish, and the tolerances of the solver are absolute.
    scale = _spread(a, b)
    a, b = a / scale, b / scale
    if a.shape[1] == 1:
        return scale * math.pow(_on_lines(a, b, p), 1 / p)
    distances = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    largest = float(distances.max()) or 1.0
    return scale * largest * math.pow(_plan_cost((distances / largest).pow(p).cpu().numpy()), 1 / p)


def _spread(x: Tensor, y: Tensor) -> float:
    """A power of two near the largest coordinate, by which division is exact; 1 if all are 0."""
    largest = max(float(x.abs().max()), float(y.abs().max()))
    return math.ldexp(1.0, max(-1000, math.frexp(largest)[1])) if largest else 1.0


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
    a, b = _samples(x, y)
    device = "cpu" if generator is None else generator.device
    directions = torch.randn(a.shape[1], projections, dtype=torch.float64, generator=generator, device=device)
    directions = (directions / torch.linalg.vector_norm(directions, dim=0)).to(a.device)
    scale = _spread(a, b)
    a, b = a / scale, b / scale
    at_a_time = max(1, _CHUNK_ENTRIES // (len(a) + len(b)))
    powers = [_on_lines(a @ chunk, b @ chunk, p) for chunk in directions.split(at_a_time, 1)]
    return scale * math.pow(torch.cat(powers).mean(), 1 / p)
