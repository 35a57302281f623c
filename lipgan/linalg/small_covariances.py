r"""``tr (S1 S2)^(1/2)`` of small covariances that are far from singular, by a few calls of LAPACK.

At some dozen features a distance is arithmetic of microseconds, and what costs is the number of calls around it. This
is the route "cholesky" of `trace_sqrt_product`, with the same conditions and bounds; what does not meet them at once
is left to that. Derivations: docs/numerics/matrix_sqrt.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lipgan.linalg.covariance_factor import EPS
from lipgan.linalg.trace_sqrt_product import ACCEPTED, ACCEPTED_RESOLVED, CLEAR, GRADED, first_order

__all__ = ["SMALL", "small_trace"]

#: Rows of a covariance up to which calls count beside arithmetic. NumPy's sums over larger ones use its own threads.
SMALL = 96

# Rows up to which LAPACK is called directly. PyTorch's way to it is longer, but SciPy's threads are not PyTorch's.
_DIRECT = 64

Matrix = np.ndarray[Any, np.dtype[np.float64]]


@functools.cache
def _lapack() -> tuple[Callable[..., Any], ...]:
    """Cholesky, eigenvalues, inverse of a triangular matrix, singular values."""
    from scipy.linalg import lapack  # loads for a tenth of a second

    return lapack.dpotrf, lapack.dsyevd, lapack.dtrtri, lapack.dgesdd


class _Direct:
    """The routines for matrices of up to `_DIRECT` rows. None stands for a matrix that is not definite."""

    @staticmethod
    def cholesky(a: Matrix) -> Matrix | None:
        factor, info = _lapack()[0](a, lower=1)
        return None if info else factor

    @staticmethod
    def congruence(factor: Matrix, s: Matrix) -> Matrix:
        product: Matrix = factor.T.dot(s.dot(factor))
        return product

    @staticmethod
    def eigenvalues(a: Matrix) -> Matrix | None:
        values, _, info = _lapack()[1](a, compute_v=0, lower=1)
        return None if info else values

    @staticmethod
    def inverse(factor: Matrix) -> Matrix:
        result: Matrix = _lapack()[2](factor, lower=1)[0]
        return result

    @staticmethod
    def roots(factor: Matrix) -> Matrix | None:
        """The singular values, ascending."""
        _, values, _, info = _lapack()[3](factor, compute_uv=0)
        return None if info else values[::-1]


class _ByTorch:
    """The same for larger ones."""

    @staticmethod
    def cholesky(a: Matrix) -> Matrix | None:
        factor, info = torch.linalg.cholesky_ex(torch.from_numpy(a))
        result: Matrix = factor.numpy()
        return None if info.item() else result

    @staticmethod
    def congruence(factor: Matrix, s: Matrix) -> Matrix:
        left = torch.from_numpy(factor)
        product: Matrix = torch.mm(left.T, torch.mm(torch.from_numpy(s), left)).numpy()
        return product

    @staticmethod
    def eigenvalues(a: Matrix) -> Matrix | None:
        values: Matrix = torch.linalg.eigvalsh(torch.from_numpy(a)).numpy()
        return values

    @staticmethod
    def inverse(factor: Matrix) -> Matrix:
        eye = torch.eye(len(factor), dtype=torch.float64, device="cpu")
        result: Matrix = torch.linalg.solve_triangular(torch.from_numpy(factor), eye, upper=False).numpy()
        return result

    @staticmethod
    def roots(factor: Matrix) -> Matrix | None:
        values: Matrix = torch.linalg.svdvals(torch.from_numpy(factor)).numpy()[::-1]
        return values


Routines = type[_Direct] | type[_ByTorch]


def small_trace(s1: Matrix, s2: Matrix, *, bounded: bool) -> tuple[float, float] | None:
    """The trace, and a bound on its error.

    Args:
        s1, s2: ``[d, d]``, finite, exactly symmetric, of ordinary size: no product of four entries leaves float64.
        bounded: whether a sharp bound is asked for; else it is inf. The trace does not depend on it.

    Returns:
        None where a matrix may be singular or indefinite, or the eigenvalues are not accepted as they are.
    """
    routines = _Direct if len(s1) <= _DIRECT else _ByTorch
    unit = 4.0 * math.sqrt(len(s1)) * EPS  # resolution(d, float64)
    factor = routines.cholesky(s1)
    if factor is None or not min(factor.diagonal().tolist()) ** 2 > unit * max(s1.diagonal().tolist()):
        return None
    gram = routines.congruence(factor, s2)
    sizes = s2.diagonal().dot(factor * factor)
    least = math.inf
    for entry in gram.diagonal().tolist():
        least = min(least, entry)
        if entry > GRADED * least:
            # As trace_sqrt_product puts a matrix in order.
            order = np.argsort(-gram.diagonal(), kind="stable")
            gram, sizes = gram[order][:, order], sizes[order]
            break
    values = routines.eigenvalues(gram)
    if values is None:
        return None
    squares = values.tolist()
    smallest, error = squares[0], unit * max(squares[-1], max(sizes.tolist()))
    if not smallest > error:
        return None
    roots = [math.sqrt(square) for square in squares]
    trace = sum(roots)
    reciprocals = sum([1 / root for root in roots])
    bound = 0.25 * error * reciprocals / math.sqrt(1 - 0.5 * error / smallest) + 4 * EPS * trace
    if not bound <= (ACCEPTED_RESOLVED if smallest > CLEAR * error else ACCEPTED) * trace:
        return None
    if not bounded:
        return trace, math.inf
    bound = min(bound, _sharp(gram, sizes, np.sqrt(values), unit, routines) + 4 * EPS * trace)
    return trace, bound + _factor_error(s1, factor, s2.diagonal(), unit, routines)


def _sharp(gram: Matrix, sizes: Matrix, roots: Matrix, unit: float, routines: Routines) -> float:
    """A bound on the error of the sum of the ``roots`` of a matrix B, by the singular values of its Cholesky factor."""
    factor = routines.cholesky(gram)
    others = None if factor is None else routines.roots(factor)
    if factor is None or others is None:
        return math.inf
    noise = 0.25 * unit
    scale, inverse = np.maximum(gram.diagonal(), sizes), np.square(routines.inverse(factor)).sum(0)
    bound = first_order(float(scale.dot(np.sqrt(inverse))), float(scale.dot(inverse)), noise)
    return bound + noise * math.sqrt(len(roots)) * float(others[-1]) + float(np.abs(roots - others).sum())


def _factor_error(s: Matrix, factor: Matrix, other: Matrix, unit: float, routines: Routines) -> float:
    """How far ``S - L L^T`` can move the trace, ``other`` being the diagonal of the other covariance."""
    inverse = np.square(routines.inverse(factor)).sum(0)
    diagonal, other = s.diagonal(), np.maximum(other, 0)
    slope, share = float(diagonal.dot(np.sqrt(inverse * other))), float(diagonal.dot(inverse))
    in_any_case = math.sqrt(unit * math.sqrt(np.vdot(s, s)) * float(other.sum()))
    return min(in_any_case, first_order(slope, share, 0.25 * unit))
