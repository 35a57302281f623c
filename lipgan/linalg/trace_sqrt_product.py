r"""``tr (S1 S2)^(1/2)``, by factors: with ``S = L L^T`` it is the sum of the singular values of ``L1^T L2``.

No square root of a product is formed, so nothing is complex, and a deficient rank is no special case. Derivations,
routes and bounds: docs/numerics/matrix_sqrt.md.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lipgan._checks import check_choice, check_square
from lipgan.linalg.covariance_factor import (
    BLOCK,
    EPS,
    LOW_RANK,
    Factor,
    Rounding,
    as_covariance,
    definite_factor,
    factorize_covariance,
    permuted,
)
from lipgan.ops._memory import empty_matrix
from lipgan.ops.matrix_sqrt import polar_trace
from lipgan.reference.matrix_sqrt import resolution

METHODS = ("auto", "cholesky", "eigh", "svd", "polar")

# "auto" takes the eigenvalues where a bound on their error is below this share of the trace. The bound that the
# eigenvalues alone give is tried first, and with the second share where the smallest eigenvalue stands clear of the
# rounding of the largest: the bound that a factor of the Gram matrix gives was then a thousandth of it and less.
ACCEPTED, ACCEPTED_RESOLVED = 1e-9, 1e-6
CLEAR = 16  # times the bound on the error of an eigenvalue
_SHARE = 0.5  # of the smallest eigenvalue, that rounding may take for its effect to be one of first order
GRADED = 16  # times an entry of the diagonal, that a later one may be before the matrix is put in order
_SMALL = 256  # rows of a matrix up to which its singular values take no time that counts
_SAFETY = 8  # times the noise that two computations of the same eigenvalues show
_INVERSE_BLOCK = 256  # rows of a triangular matrix that is inverted by substitution


@dataclass(frozen=True)
class TraceInfo:
    """How a trace was computed, and how far off it may be."""

    route: str  # "cholesky", "eigh", "svd" or "polar"
    iterations: int  # of the polar route, else 0
    error_bound: float  # absolute, on the trace
    rank: tuple[int, int]  # of the two covariances; full for one that no factor was needed of
    clipped: float  # as in Factor, of both
    undetermined: float = 0.0  # part of the bound: what eigenvalues may add that are lost in a covariance's rounding


# ---- one pair ----


class _Pair:
    """The two covariances of a call, and their factors once they are asked for."""

    def __init__(
        self,
        sides: tuple[Tensor | Factor, Tensor | Factor],
        names: tuple[str, str],
        method: str,
        roundings: tuple[Rounding, Rounding],
        checked: bool,
    ) -> None:
        self.names, self.roundings = names, roundings
        self.how = "eigh" if method == "eigh" else "cholesky"
        self.factors = [side if isinstance(side, Factor) else None for side in sides]
        self.given = [
            None if isinstance(s, Factor) else s.detach().double() if checked else as_covariance(name, s)
            for name, s in zip(names, sides, strict=True)
        ]
        self.wanted = [isinstance(side, Tensor) and side.requires_grad for side in sides]
        self.on_gpu = all((s.matrix if isinstance(s, Factor) else s).device.type != "cpu" for s in sides)

    def factor(self, k: int) -> Factor:
        factor = self.factors[k]
        if factor is None:
            factor = self.factors[k] = factorize_covariance(
                self.covariance(k), self.names[k], self.how, self.roundings[k]
            )
        return factor

    def has_factor(self, k: int) -> bool:
        """Whether a factor is known or found by Cholesky alone."""
        if self.factors[k] is None:
            self.factors[k] = definite_factor(self.covariance(k))
        return self.factors[k] is not None

    def covariance(self, k: int) -> Tensor:
        given = self.given[k]
        if given is None:
            given = self.given[k] = self.factor(k).matrix @ self.factor(k).matrix.mT
        return given

    def rank(self, k: int) -> int:
        factor = self.factors[k]
        return self.covariance(k).shape[0] if factor is None else factor.rank

    def trace(self, k: int) -> float:
        given = self.given[k]
        return float(self.factor(k).matrix.square().sum() if given is None else given.diagonal().sum())


@dataclass(frozen=True)
class _TraceResult:
    """A trace, a bound on the error of its spectrum, and ``gradient_factors``: ``d tr / d S_k = F_k F_k^T / 2``."""

    route: str
    trace: float
    bound: float  # without the error of the factors
    gradient_factors: tuple[Tensor | None, Tensor | None] = (None, None)
    iterations: int = 0
    resolved: bool = False

    @property
    def accepted(self) -> bool:
        return self.bound <= (ACCEPTED_RESOLVED if self.resolved else ACCEPTED) * self.trace


def _by_eigenvalues(pair: _Pair, k: int, route: str, sharp: bool) -> _TraceResult:
    """By the eigenvalues of ``L_k^T S_j L_k``, the squares of the singular values of ``L_k^T L_j``.

    The bound is that of the eigenvalues alone where it is accepted and no sharp one is asked for.
    """
    factor, j = pair.factor(k), 1 - k
    if factor.rank == 0:
        return _nothing(pair, route)
    gram, sizes = _congruence(factor, pair.covariance(j))
    gram, order = _in_descending_order(gram)
    if any(pair.wanted):
        values, vectors = torch.linalg.eigh(gram)
    else:
        values, vectors = torch.linalg.eigvalsh(gram), None
    error = resolution(factor.rank, values.dtype) * max(float(values[-1]), float(sizes.max()))
    if float(values[0]) < -error and pair.factors[j] is None:
        # S_j has negative eigenvalues. Clear ones are refused by its factor, small ones are set to 0 there.
        pair.factor(j)
        pair.given[j] = None
        return _by_eigenvalues(pair, k, route, sharp)
    roots = values.clamp_min(0).sqrt()
    trace = float(roots.sum())
    gradient_factors: list[Tensor | None] = [None, None]
    if vectors is not None:
        if order is not None:
            vectors = torch.empty_like(vectors).index_copy_(0, order, vectors)
        keep = values > error
        roots_kept, kept = roots[keep], vectors[:, keep]
        if pair.wanted[j]:
            gradient_factors[j] = factor.matrix @ (kept * roots_kept.rsqrt())
        if pair.wanted[k] and factor.triangular:
            gradient_factors[k] = torch.linalg.solve_triangular(factor.matrix.mT, kept * roots_kept.sqrt(), upper=True)
        elif pair.wanted[k]:
            gradient_factors[k] = pair.covariance(j) @ (factor.matrix @ (kept * roots_kept.pow(-1.5)))
    resolved = factor.rank == factor.matrix.shape[0] and float(values[0]) > CLEAR * error
    result = _TraceResult(
        route,
        trace,
        _bound_by_values(values, roots, error) + 4 * EPS * trace,
        (gradient_factors[0], gradient_factors[1]),
        resolved=resolved,
    )
    if result.accepted and not sharp:
        return result
    again = _again(gram, sizes if order is None else sizes[order], roots)
    if again is None or again[1] + 4 * EPS * trace >= result.bound:
        return result
    # A result does not depend on whether its bound is asked for.
    value = trace if result.accepted else again[0]
    return replace(result, trace=value, bound=again[1] + 4 * EPS * trace)


def _bound_by_values(values: Tensor, roots: Tensor, error: float) -> float:
    """How far the sum of the ``roots`` of eigenvalues may be off, of the ``error`` that each of these may have."""
    if error == 0:
        return 0.0
    smallest = float(values[0])
    if smallest > error:
        # Half of the error is what noise takes from a sum, by the trace of B^(-1/2) / 2.
        return 0.25 * error * float(roots.reciprocal().sum()) / math.sqrt(1 - 0.5 * error / smallest)
    # |sqrt(x + e) - sqrt(x)| <= min(e / sqrt(x), sqrt(e))
    return float((error / roots.clamp_min(math.sqrt(error))).sum())


def _again(gram: Tensor, sizes: Tensor, roots: Tensor) -> tuple[float, float] | None:
    """The sum of the roots of a Gram matrix B once more, and a sharp bound on it and on the sum of ``roots``.

    The singular values of the Cholesky factor K of B are these roots, too; if it is large, the eigenvalues of
    ``K^T K`` serve for them. None where noise takes the smallest.
    """
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info) != 0:
        return None
    n = len(roots)
    scale, inverse = gram.diagonal().maximum(sizes), _diagonal_of_inverse(factor)
    bound = first_order(float((scale * inverse.sqrt()).sum()), float((scale * inverse).sum()), _noise(n))
    if bound == math.inf:
        return None
    if n <= _SMALL:
        others = torch.linalg.svdvals(factor).flip(0)
        bound += _noise(n) * math.sqrt(n) * float(others[-1]) + float((roots - others).abs().sum())
        return float(others.sum()), bound
    squares = torch.linalg.eigvalsh(_gram_of_triangular(factor))
    if not float(squares[0]) > 0:
        return None
    others = squares.sqrt()
    # One difference may be small by chance, its neighbours with it hardly.
    largest = torch.nn.functional.max_pool1d((roots.square() - squares).abs()[None], 9, 1, 4)[0]
    return float(others.sum()), bound + _SAFETY * float((largest / (roots + others)).sum())


def _noise(n: int) -> float:
    """By what share of their size entries of an ``n x n`` matrix may be off, as far as a sum over n of them goes."""
    return 0.25 * resolution(n, torch.float64)


def _gram_of_triangular(factor: Tensor) -> Tensor:
    """The lower triangle of ``L^T L``."""
    d = factor.shape[0]
    if d <= BLOCK:
        return factor.mT @ factor
    result = factor.new_zeros(d, d)
    for begin in range(0, d, BLOCK):
        end = min(d, begin + BLOCK)
        torch.mm(factor[begin:, begin:end].mT, factor[begin:, :end], out=result[begin:end, :end])
    return result


def first_order(slope: float, share: float, noise: float) -> float:
    """``noise slope / 2``, widened for the second order; inf where ``noise share`` of the matrix is not small."""
    if not noise * share <= _SHARE:
        return math.inf
    return 0.5 * noise * slope / math.sqrt(1 - noise * share)


def _diagonal_of_inverse(factor: Tensor) -> Tensor:
    """The diagonal of ``(L L^T)^-1``, of a lower triangular L."""
    inverse = factor.new_zeros(factor.shape)
    _invert(factor, inverse)
    return inverse.square_().sum(0)


def _invert(factor: Tensor, inverse: Tensor) -> None:
    """Write the inverse of a lower triangular matrix into ``inverse``, which is 0."""
    n = factor.shape[0]
    if n <= _INVERSE_BLOCK:
        eye = torch.eye(n, dtype=factor.dtype, device=factor.device)
        inverse.copy_(torch.linalg.solve_triangular(factor, eye, upper=False))
        return
    m = n // 2
    _invert(factor[:m, :m], inverse[:m, :m])
    _invert(factor[m:, m:], inverse[m:, m:])
    torch.mm(inverse[m:, m:], factor[m:, :m] @ inverse[:m, :m], out=inverse[m:, :m]).neg_()


def _congruence(factor: Factor, s: Tensor) -> tuple[Tensor, Tensor]:
    """``L^T S L``, only its lower triangle where it is large; and the diagonal of ``L^T diag(S) L``.

    The second, ``[r]``, is what the rounding of the products is in proportion to.
    """
    left, order = factor.matrix, factor.order
    d, rank = left.shape
    if order is not None:
        left, s = left[order], permuted(s, order)
    elif not factor.triangular and rank > BLOCK:
        return _lower_product(left.mT @ s, left), s.diagonal() @ left.square()
    diagonal = s.diagonal()
    if rank <= BLOCK:
        return left.mT @ (s @ left), diagonal @ left.square()
    # L^T S, block row by block row: a product of few rows takes less time than one of few columns.
    product, result, sizes = empty_matrix(rank, d, s), empty_matrix(rank, rank, s), left.new_empty(rank)
    for begin in range(0, rank, BLOCK):
        end = min(rank, begin + BLOCK)
        columns = left[begin:, begin:end]
        torch.mm(columns.mT, s[begin:], out=product[begin:end])
        torch.mm(columns.mT, product[:end, begin:].mT, out=result[begin:end, :end])
        sizes[begin:end] = diagonal[begin:] @ columns.square()
    return result, sizes


def _lower_product(a: Tensor, b: Tensor) -> Tensor:
    """The lower triangle of ``A B``, ``A [r, d]`` and ``B [d, r]``."""
    rank = len(a)
    result = empty_matrix(rank, rank, a)
    for begin in range(0, rank, BLOCK):
        end = min(rank, begin + BLOCK)
        torch.mm(a[begin:end], b[:, :end], out=result[begin:end, :end])
    return result


def _in_descending_order(gram: Tensor) -> tuple[Tensor, Tensor | None]:
    """A symmetric matrix, of which the lower triangle is read, with its large rows and columns first; and their order.

    LAPACK's reduction to tridiagonal form keeps the digits of small eigenvalues where small rows come last. A matrix
    that is nearly in that order is left as it is, with None. Else the given one is overwritten.
    """
    diagonal = gram.diagonal()
    if bool((diagonal <= GRADED * diagonal.cummin(0).values).all()):
        return gram, None
    order = diagonal.argsort(descending=True)
    for begin in range(0, len(gram), BLOCK):
        end = begin + BLOCK
        corner = gram[begin:end, begin:end]
        corner.copy_(corner.tril() + corner.tril(-1).mT)
        gram[:begin, begin:end] = gram[begin:end, :begin].mT
    return permuted(gram, order), order


def _by_singular_values(pair: _Pair) -> _TraceResult:
    first, second = pair.factor(0).matrix, pair.factor(1).matrix
    if 0 in (first.shape[1], second.shape[1]):
        return _nothing(pair, "svd")
    product = first.mT @ second
    if not any(pair.wanted):
        values = torch.linalg.svdvals(product)
        return _TraceResult("svd", float(values.sum()), _bound_by_singular_values(pair, values))
    left, values, right = torch.linalg.svd(product, full_matrices=False)
    keep = values > resolution(max(product.shape), product.dtype) * values[0]
    scales = values[keep].rsqrt()
    gradient_factors = second @ (right[keep].mT * scales), first @ (left[:, keep] * scales)
    return _TraceResult("svd", float(values.sum()), _bound_by_singular_values(pair, values), gradient_factors)


def _bound_by_singular_values(pair: _Pair, values: Tensor) -> float:
    """How far their sum may be off: noise of the product, of the decomposition, and of the sum itself."""
    of_product = math.sqrt(pair.trace(0) * pair.trace(1))
    of_values = math.sqrt(len(values)) * float(values[0])
    d = pair.factor(0).matrix.shape[0]
    return _noise(d) * (of_product + of_values) + 4 * EPS * float(values.sum())


def _by_polar_iteration(pair: _Pair) -> _TraceResult:
    first, second = pair.factor(0).matrix, pair.factor(1).matrix
    if 0 in (first.shape[1], second.shape[1]):
        return _nothing(pair, "polar")
    trace, bound, iterations = polar_trace(first.mT @ second)
    bound += _noise(first.shape[0]) * math.sqrt(pair.trace(0) * pair.trace(1))
    # The derivatives need singular vectors.
    gradient_factors = _by_singular_values(pair).gradient_factors if any(pair.wanted) else (None, None)
    return _TraceResult("polar", trace, bound, gradient_factors, iterations)


def _nothing(pair: _Pair, route: str) -> _TraceResult:
    """Where a covariance is 0."""
    gradient_factors = [pair.covariance(k)[:, :0] for k in (0, 1)]
    return _TraceResult(route, 0.0, 0.0, (gradient_factors[0], gradient_factors[1]))


def _auto(pair: _Pair, sharp: bool) -> _TraceResult:
    known = [k for k in (0, 1) if pair.factors[k] is not None]
    # A GPU is made for products of matrices. Factors by eigenvalues would take longer than all of them, and so do the
    # singular vectors that derivatives need.
    if pair.on_gpu and not any(pair.wanted) and all(pair.has_factor(k) for k in (0, 1)):
        outcome = _by_polar_iteration(pair)
        if outcome.accepted:
            return outcome
    if len(known) == 2:
        return _by_singular_values(pair)
    k = known[0] if known else 0
    outcome = _by_eigenvalues(pair, k, "cholesky", sharp)
    if outcome.accepted:
        return outcome
    if pair.factor(1 - k).rank <= LOW_RANK * pair.factor(k).rank:
        # What the eigenvalues do not resolve are zeros, which the factor of the smaller rank leaves out.
        outcome = _by_eigenvalues(pair, 1 - k, "cholesky", sharp)
        if outcome.accepted:
            return outcome
    return _by_singular_values(pair)


def _solve(pair: _Pair, method: str, sharp: bool) -> _TraceResult:
    if method == "svd":
        return _by_singular_values(pair)
    if method == "polar":
        return _by_polar_iteration(pair)
    if method == "auto":
        return _auto(pair, sharp)
    known = [k for k in (0, 1) if pair.factors[k] is not None]
    return _by_eigenvalues(pair, known[0] if known else 0, method, sharp)


def _factor_error(pair: _Pair, k: int) -> tuple[float, float]:
    """How far ``E = S - L L^T`` of one side can move the trace; and how much of that S itself does not determine.

    In any case by ``|E^(1/2) L2|_* <= (tr E tr S2)^(1/2)``. Where L has an inverse, by ``tr (|E| G)`` with G the
    derivative, whose diagonal is at most ``((S1^-1)_ii (S2)_ii)^(1/2) / 2``.
    """
    factor = pair.factor(k)
    if factor.clipped + factor.error == 0:
        return 0.0, 0.0
    other_trace = max(0.0, pair.trace(1 - k))
    bound = math.sqrt((factor.clipped + factor.error) * other_trace)
    if factor.rank < factor.matrix.shape[0]:
        return bound, bound
    if factor.cholesky:
        diagonal, other = pair.covariance(k).diagonal(), pair.covariance(1 - k).diagonal().clamp_min(0)
        inverse = _diagonal_of_inverse(factor.matrix)
        slope, share = float((diagonal * (inverse * other).sqrt()).sum()), float((diagonal * inverse).sum())
        bound = min(bound, first_order(slope, share, _noise(len(diagonal))))
    elif math.isfinite(factor.inverse):
        bound = min(bound, first_order(math.sqrt(factor.inverse * other_trace), factor.inverse, factor.error))
    return bound, 0.0


class _TraceSqrtProduct(torch.autograd.Function):
    """The tensors among the two sides -> the trace."""

    @staticmethod
    def forward(
        ctx: Any,
        sides: tuple[Tensor | Factor, Tensor | Factor],
        names: tuple[str, str],
        method: str,
        roundings: tuple[Rounding, Rounding],
        bounded: bool,
        checked: bool,
        infos: list[TraceInfo],
        *tensors: Tensor,
    ) -> Tensor:
        pair = _Pair(sides, names, method, roundings, checked)
        outcome = _solve(pair, method, bounded)
        used = [k for k in (0, 1) if pair.factors[k] is not None]
        errors = [_factor_error(pair, k) if bounded else (math.inf, math.inf) for k in used]
        bound = outcome.bound + sum(error for error, _ in errors)
        undetermined = sum(part for _, part in errors)
        clipped = sum(pair.factor(k).clipped for k in used)
        ranks = pair.rank(0), pair.rank(1)
        infos.append(TraceInfo(outcome.route, outcome.iterations, bound, ranks, clipped, undetermined))
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.save_for_backward(*(outcome.gradient_factors[k] for k in (0, 1) if isinstance(sides[k], Tensor)))
        device = pair.covariance(0).device if isinstance(sides[0], Tensor) else pair.factor(0).matrix.device
        return torch.tensor(outcome.trace, dtype=torch.float64, device=device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable sees only whether grad depends on something, and the factors depend on the arguments too.
        if torch.is_grad_enabled():
            raise RuntimeError("trace_sqrt_product is differentiable once, and create_graph=True asks for twice")
        result: list[Tensor | None] = [None] * 7  # of what are no tensors
        for factor, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            result.append(None if factor is None else (0.5 * grad * (factor @ factor.mT)).to(dtype))
        return tuple(result)


def trace_sqrt_product_info(
    first: Tensor | Factor,
    second: Tensor | Factor,
    *,
    method: str = "auto",
    names: tuple[str, str] = ("s1", "s2"),
    roundings: tuple[Rounding, Rounding] | None = None,
    bounded: bool = True,
    checked: bool = False,
) -> tuple[Tensor, TraceInfo]:
    """:func:`trace_sqrt_product` of one pair, with what is known of its error; a side may be a :class:`Factor`.

    Args:
        first, second: covariances ``[d, d]`` of any real dtype, or factors of them, which saves their factorization.
        method: as in :func:`trace_sqrt_product`.
        names: what the errors call the two.
        roundings: what passes for rounding in each, if it does not follow from their dtypes.
        bounded: whether ``error_bound`` is asked for, which takes inverses of the factors; else it may be inf.
        checked: whether covariances are known to be finite and exactly symmetric.

    Returns:
        The trace, 0-dim float64, differentiable once in those arguments that are tensors; and a :class:`TraceInfo`.

    Raises:
        As :func:`trace_sqrt_product`.
    """
    check_choice("method", method, METHODS)
    sides = (first, second)
    sizes = []
    for name, side in zip(names, sides, strict=True):
        if not isinstance(side, Factor):
            check_square(name, side)
            if side.ndim != 2:
                raise ValueError(f"{name} must have two dimensions, got shape {tuple(side.shape)}")
        sizes.append(side.matrix.shape[0] if isinstance(side, Factor) else side.shape[0])
    if sizes[0] != sizes[1]:
        raise ValueError(f"{names[1]} must have the size of {names[0]}, {sizes[0]}, got {sizes[1]}")
    infos: list[TraceInfo] = []
    tensors = [side for side in sides if isinstance(side, Tensor)]
    if roundings is None:
        first_rounding, second_rounding = (Rounding((s.matrix if isinstance(s, Factor) else s).dtype) for s in sides)
        roundings = first_rounding, second_rounding
    trace = _TraceSqrtProduct.apply(sides, names, method, roundings, bounded, checked, infos, *tensors)  # type: ignore[no-untyped-call]
    return trace, infos[0]


def trace_sqrt_product(s1: Tensor, s2: Tensor, *, method: str = "auto") -> Tensor:
    r"""``tr (S1 S2)^(1/2)`` of symmetric positive semi-definite matrices, the cross term of the Frechet distance.

    Computed in float64 whatever the dtype, as the nuclear norm of ``L1^T L2`` with ``S = L L^T``. The derivative is
    ``L2 P^T L1^+ / 2`` in S1, with P the polar factor of ``L1^T L2``. Where S1 is singular and S2 is not so in the same
    directions, the trace has no derivative in those: this one is then that along matrices of the same rank.

    Args:
        s1, s2: ``(..., d, d)``, real; their leading dimensions broadcast. Pairs are taken one at a time: it is
            meant for large matrices.
        method: "cholesky": Cholesky of S1 (pivoted, or by eigenvalues, where it is singular to rounding), then the
            eigenvalues of ``L1^T S2 L1``. "eigh": the same with ``L1`` by eigenvalues. "svd": factors of both, then the
            singular values of ``L1^T L2``: the most accurate. "polar": factors of both, then an iteration of matrix
            products only. "auto": on a GPU "polar", where both are definite beyond rounding, no derivative is wanted,
            and the bound on its error is below 1e-9 of the trace. Else "cholesky" where the bound on its error is below
            1e-9 of the trace, or below 1e-6 and all eigenvalues are resolved, if need be by a second computation of its
            eigenvalues; else "svd".

    Returns:
        ``(...)``, float64 for float64 and float32 for float32 and half types. Differentiable once.

    Raises:
        TypeError: an argument is not a real floating-point tensor.
        ValueError: an argument is not square, not finite, not symmetric beyond rounding, or clearly indefinite; the
            sizes differ; no method has that name.

    Example::

        >>> trace_sqrt_product(torch.diag(torch.tensor([4.0, 1.0])), torch.diag(torch.tensor([9.0, 1.0])))
        tensor(7.)
    """
    check_square("s1", s1)
    check_square("s2", s2)
    dtype = torch.float64 if torch.float64 in (s1.dtype, s2.dtype) else torch.float32
    if s1.shape[-1] != s2.shape[-1]:
        raise ValueError(f"s2 must have the size of s1, {s1.shape[-1]}, got {s2.shape[-1]}")
    try:
        batch = torch.broadcast_shapes(s1.shape[:-2], s2.shape[:-2])  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise ValueError(
            f"s2 must have leading dimensions that broadcast with those of s1, {tuple(s1.shape[:-2])}, "
            f"got {tuple(s2.shape[:-2])}"
        ) from None
    firsts, seconds = (s.expand(*batch, *s.shape[-2:]).reshape(math.prod(batch), *s.shape[-2:]) for s in (s1, s2))
    traces = [
        trace_sqrt_product_info(a, b, method=method, bounded=False)[0] for a, b in zip(firsts, seconds, strict=True)
    ]
    stacked = torch.stack(traces) if traces else s1.new_zeros(0, dtype=torch.float64)
    return stacked.reshape(batch).to(dtype)
