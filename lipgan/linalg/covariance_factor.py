"""A covariance as ``S = L L^T``, with what its rounding may hide.

Derivations and bounds: docs/numerics/matrix_sqrt.md.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lipgan._checks import check_square, refuse_indefinite
from lipgan.ops._memory import empty_matrix
from lipgan.ops.symmetrize import symmetrize
from lipgan.reference.matrix_sqrt import resolution

EPS = torch.finfo(torch.float64).eps
BLOCK = 192  # columns of a triangular factor, whose zeros above the block a product leaves out
LOW_RANK = 0.9  # share of d from which on a factor of that rank is no cheaper than one of full rank


@dataclass(frozen=True)
class Rounding:
    """What negative eigenvalues of a covariance in float64 may come from."""

    dtype: torch.dtype  # that its entries had, or were summed in
    subtracted: float = 0.0  # size of what may have been subtracted for them, such as squares of means


@dataclass(frozen=True)
class Factor:
    """``S = L L^T`` up to rounding; made by :func:`factorize`, or of a known L by :meth:`of`."""

    matrix: Tensor  # L [d, r], float64
    triangular: bool  # a Cholesky factor, r = d
    clipped: float = 0.0  # trace of what was set to 0: negative and unresolved eigenvalues, by magnitude
    error: float = 0.0  # bound on the spectral norm of S - L L^T
    inverse: float = math.inf  # trace of S^-1; inf where r < d, or where it has not been computed
    cholesky: bool = False  # the plain Cholesky factor of a rounded S, whose error is that of S's entries
    order: Tensor | None = None  # [d]: L's rows in an order in which all above the diagonal are zeros, if one is known

    @property
    def rank(self) -> int:
        """The number of columns."""
        return self.matrix.shape[1]

    @classmethod
    def of(cls, matrix: Tensor) -> "Factor":
        """The factor ``L [d, r]``, such as one saved before, or centred features divided by ``(n - 1)^(1/2)``."""
        matrix = matrix.detach().double()
        return cls(matrix, matrix.shape[0] == matrix.shape[1] and _is_lower_triangular(matrix))


def _is_lower_triangular(matrix: Tensor) -> bool:
    d = matrix.shape[0]
    return not any(bool(matrix[begin : begin + BLOCK, begin:].triu(1).any()) for begin in range(0, d, BLOCK))


def factorize(s: Tensor, *, name: str = "s", method: str = "cholesky", rounding: Rounding | None = None) -> Factor:
    """A factor of a covariance ``s [d, d]``, in float64.

    Args:
        s: finite, symmetric and positive semi-definite up to rounding.
        name: what the errors call it.
        method: "cholesky": Cholesky's; where a pivot is not resolved, one with pivoting, or eigenvalues. "eigh":
            eigenvalues at once.
        rounding: what passes for rounding, if it does not follow from the dtype of s.

    Raises:
        TypeError: not a real floating-point tensor.
        ValueError: not square, not finite, not symmetric, or clearly indefinite.
    """
    check_square(name, s)
    return factorize_covariance(as_covariance(name, s), name, method, rounding or Rounding(s.dtype))


def as_covariance(name: str, s: Tensor) -> Tensor:
    """``s`` in float64, symmetric; the errors of :func:`factorize`."""
    return symmetrize(name, s.detach())[0]


def factorize_covariance(s: Tensor, name: str, method: str, rounding: Rounding) -> Factor:
    """:func:`factorize` of what `as_covariance` made."""
    d = s.shape[0]
    if d == 0:
        return Factor(s, True)
    unit = resolution(d, s.dtype)
    if method == "cholesky":
        plain, largest, norm = _plain_cholesky(s)
        if plain is not None:
            return plain
        pivoted = _pivoted_cholesky(s, 4 * unit * largest) if largest > 0 else None
        if pivoted is not None:
            return pivoted
    else:
        norm = float(torch.linalg.matrix_norm(s))
    values, vectors = torch.linalg.eigh(s)
    refuse_indefinite(name, values[0], values[-1], rounding.dtype, rounding.subtracted)
    keep = values > unit * float(values[-1].clamp_min(0))
    matrix, clipped = vectors[:, keep] * values[keep].sqrt(), float(values[~keep].abs().sum())
    return Factor(matrix, False, clipped, unit * norm, float((1 / values).sum()) if bool(keep.all()) else math.inf)


def definite_factor(s: Tensor) -> Factor | None:
    """The plain Cholesky factor of what `as_covariance` made, or None where that is singular to rounding."""
    return _plain_cholesky(s)[0] if len(s) else Factor(s, True)


def _plain_cholesky(s: Tensor) -> tuple[Factor | None, float, float]:
    """The factor, if each pivot is resolved; the largest entry of the diagonal; and the Frobenius norm."""
    # The largest eigenvalue of a definite matrix lies between the largest entry and the Frobenius norm.
    factor, info = _cholesky(s)
    numbers = [s.diagonal().max(), torch.linalg.matrix_norm(s), factor.diagonal().square().min(), info.to(s.dtype)]
    # Read together: the host waits for a GPU each time.
    largest, norm, smallest, failed = torch.stack(numbers).tolist()
    unit = resolution(len(s), s.dtype)
    if failed or not smallest > unit * largest:
        return None, largest, norm
    return Factor(factor, True, 0.0, unit * norm, cholesky=True), largest, norm


def _cholesky(s: Tensor) -> tuple[Tensor, Tensor]:
    """As `torch.linalg.cholesky_ex`; where there is no factor, what is returned for one has nothing to say."""
    d = len(s)
    if s.device.type != "cpu" or d <= BLOCK:
        factor, info = torch.linalg.cholesky_ex(s)
        return factor, info
    # By block rows of L^T, in place: PyTorch's function copies the matrix, and again the factor for its zeros.
    upper = empty_matrix(d, d, s)
    for begin in range(0, d, BLOCK):
        end = min(d, begin + BLOCK)
        rows, above = upper[begin:end, begin:], upper[:begin, begin:]
        if begin == 0:
            rows.copy_(s[:end])
        else:
            torch.addmm(s[begin:end, begin:], above[:, : end - begin].mT, above, alpha=-1, out=rows)
            upper[begin:end, :begin] = 0
        block, info = torch.linalg.cholesky_ex(rows[:, : end - begin], upper=True)
        if int(info) != 0:
            break
        rows[:, : end - begin] = block
        rest = rows[:, end - begin :]
        rest.copy_(torch.linalg.solve_triangular(block.mT, rest, upper=False))
    return upper.mT, info


def permuted(s: Tensor, order: Tensor) -> Tensor:
    """``s[order][:, order]`` of ``s [d, d]``."""
    d = len(s)
    rows, result = empty_matrix(d, d, s), empty_matrix(d, d, s)
    torch.index_select(s, 0, order, out=rows)
    return torch.gather(rows, 1, order.expand(d, d), out=result)


def _pivoted_cholesky(s: Tensor, smallest: float) -> Factor | None:
    """A factor of low rank, or None where eigenvalues serve better: on a GPU, of large rank, or not definite."""
    if s.device.type != "cpu":
        return None
    from scipy.linalg.lapack import dpstrf

    d = s.shape[0]
    c, pivots, rank, _ = dpstrf(s.numpy().T, tol=smallest, lower=1)  # the transpose is in LAPACK's order, and is s
    if rank == 0 or rank > LOW_RANK * d:
        return None
    order = torch.from_numpy(pivots).long() - 1
    lower = torch.from_numpy(c[:, :rank]).tril()
    largest, squares, clipped = _rest(permuted(s, order), lower)
    # What is left of a definite matrix is definite: no entry is larger than the largest one on the diagonal.
    if largest > 2 * smallest:
        return None
    # Where nothing is left to be seen, something may be in the rounding of the entries.
    error = math.sqrt(squares) + EPS * float(s.diagonal().sum())
    factor = torch.empty_like(lower).index_copy_(0, order, lower)
    return Factor(factor, False, clipped, error, order=order)


def _rest(s: Tensor, lower: Tensor) -> tuple[float, float, float]:
    """Of ``R = S - L L^T`` with ``L [d, r]``, zeros above its diagonal: ``max|R|``, ``|R|_F^2`` and ``sum |R_ii|``."""
    d, rank = lower.shape
    largest, squares, clipped = 0.0, 0.0, 0.0
    for begin in range(0, d, BLOCK):
        end = min(d, begin + BLOCK)
        known = min(end, rank)
        rest = torch.addmm(s[begin:end, :end], lower[begin:end, :known], lower[:end, :known].mT, alpha=-1)
        largest = max(largest, float(torch.linalg.vector_norm(rest, math.inf)))
        beside, corner = rest[:, :begin], rest[:, begin:]
        squares += 2 * float(beside.square().sum()) + float(corner.square().sum())
        clipped += float(corner.diagonal().abs().sum())
    return largest, squares, clipped
