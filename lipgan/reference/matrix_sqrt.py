"""Square roots, polar factors, nuclear norms, tr (S1 S2)^(1/2), and odd polynomials that take numbers to 1.

Symmetric matrices are ``a [..., n, n]``; only their symmetric part counts. Derivations: docs/numerics/matrix_sqrt.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor


def resolution(n: int, dtype: torch.dtype) -> float:
    """Share of the largest eigenvalue below which the eigenvalues of a rounded ``n x n`` matrix say nothing."""
    return 4.0 * math.sqrt(n) * torch.finfo(dtype).eps


def symmetric_part(a: Tensor) -> Tensor:
    """``(a + a^T) / 2``."""
    return 0.5 * (a + a.mT)


# ---- square roots by eigenvalues ----


def matrix_sqrt_fwd(a: Tensor, inverse: bool, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(a + eps I)^(1/2)`` or its inverse, by eigenvalues; negative ones count as 0.

    Returns:
        ``root [..., n, n]``; ``roots [..., n]``, the square roots of the eigenvalues, 0 where unresolved; and the
        eigenvectors ``vectors [..., n, n]``, as columns. :func:`lyapunov` takes the last two.
    """
    values, vectors = torch.linalg.eigh(symmetric_part(a))
    return from_eigenvalues(values + eps, vectors, inverse)


def from_eigenvalues(values: Tensor, vectors: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`matrix_sqrt_fwd` returns, of the matrix with these eigenvalues and eigenvectors."""
    roots = values.clamp_min(0).sqrt()
    root = (vectors * (1 / roots if inverse else roots).unsqueeze(-2)) @ vectors.mT
    return symmetric_part(root), resolved(roots), vectors


def resolved(roots: Tensor) -> Tensor:
    """``roots [..., n]`` with those set to 0 whose squares lie below the :func:`resolution`."""
    n = roots.shape[-1]
    if n == 0:
        return roots
    smallest = math.sqrt(resolution(n, roots.dtype)) * roots.amax(-1, keepdim=True)
    return torch.where(roots > smallest, roots, 0.0)


def lyapunov(g: Tensor, roots: Tensor, vectors: Tensor) -> Tensor:
    """T of ``X T + T X = G`` for ``X = vectors diag(roots) vectors^T``, without a part in the kernel of X.

    It is the derivative of ``X = A^(1/2)`` along G, and its own adjoint.
    """
    total = roots.unsqueeze(-1) + roots.unsqueeze(-2)
    inner = vectors.mT @ g @ vectors
    return vectors @ torch.where(total > 0, inner / total, 0.0) @ vectors.mT


# ---- polar factors by singular values ----


def polar_fwd(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``a = u h`` for ``a [..., m, n]``, ``m >= n``: ``u`` with orthonormal columns, ``h`` positive semi-definite.

    Returns:
        ``u``, ``h [..., n, n]``, the singular values ``[..., n]``, 0 where unresolved, and the right singular vectors
        as columns ``[..., n, n]``.
    """
    left, values, right = torch.linalg.svd(a, full_matrices=False)
    h = symmetric_part((right.mT * values.unsqueeze(-2)) @ right)
    return left @ right, h, resolved_singular(values, a.shape[-2]), right.mT.contiguous()


def polar_bwd(grad_u: Tensor, grad_h: Tensor, u: Tensor, roots: Tensor, vectors: Tensor) -> Tensor:
    """The gradient to a of what :func:`polar_fwd` returned; where ``s_i + s_j = 0`` quotients count as 0.

    With ``G = V^T u^T dU V`` and the symmetric ``H = V^T dH V``: ``u V [(G - G^T + 2 s_i H) / (s_i + s_j)] V^T``, and
    ``(I - u u^T) dU h^-1`` beside the columns of u.
    """
    inner = u.mT @ grad_u
    total = roots.unsqueeze(-1) + roots.unsqueeze(-2)
    middle = vectors.mT @ (inner - inner.mT) @ vectors
    middle = middle + 2 * roots.unsqueeze(-1) * (vectors.mT @ symmetric_part(grad_h) @ vectors)
    grad = u @ (vectors @ torch.where(total > 0, middle / total, 0.0) @ vectors.mT)
    if u.shape[-2] > u.shape[-1]:
        inverse = torch.where(roots > 0, 1 / roots, 0.0).unsqueeze(-2)
        grad = grad + ((grad_u - u @ inner) @ vectors * inverse) @ vectors.mT
    return grad


def resolved_singular(values: Tensor, m: int) -> Tensor:
    """Singular values of a matrix with ``m`` rows, with those set to 0 that rounding does not tell from 0."""
    if values.shape[-1] == 0:
        return values
    smallest = resolution(m, values.dtype) * values.amax(-1, keepdim=True)
    return torch.where(values > smallest, values, 0.0)


def nuclear_norm(a: Tensor) -> Tensor:
    """Sum of the singular values of ``a [..., m, n]``."""
    norm: Tensor = torch.linalg.svdvals(a).sum(-1)
    return norm


def trace_sqrt_product(s1: Tensor, s2: Tensor) -> Tensor:
    """``tr (S1 S2)^(1/2) = |L1^T L2|_*`` with ``S = L L^T``."""
    return nuclear_norm(_factor(s1).mT @ _factor(s2))


def _factor(s: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric_part(s))
    unresolved = resolution(s.shape[-1], s.dtype) * values.abs().amax(-1, keepdim=True)
    factor: Tensor = vectors * torch.where(values > unresolved, values, 0.0).sqrt().unsqueeze(-2)
    return factor


# ---- odd polynomials ----


@functools.lru_cache(maxsize=256)
def optimal_odd_polynomial(lower: float) -> tuple[float, float, float, float]:
    """The odd polynomial of degree 5 nearest to 1 on ``[lower, 1]``, by Remez's exchange.

    Returns:
        ``(a, b, c, error)``: ``p(x) = a x + b x^3 + c x^5`` and ``error = max |1 - p|``, which p takes with alternating
        signs at ``lower``, at its two extrema, and at 1.
    """
    if not 0 < lower < 1:
        raise ValueError(f"lower must lie between 0 and 1, got {lower}")
    inner = [lower + (1 - lower) * share for share in (0.25, 0.75)]
    error = 0.0
    for _ in range(100):
        points = torch.tensor([lower, *inner, 1.0], dtype=torch.float64)
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        rows = torch.stack([points, points**3, points**5, signs], 1)
        a, b, c, new_error = torch.linalg.solve(rows, torch.ones(4, dtype=torch.float64)).tolist()
        # Extrema: a + 3 b y + 5 c y^2 = 0 of y = x^2, with a > 0 > b and c > 0.
        root = math.sqrt(max(0.0, 9 * b * b - 20 * a * c))
        larger = (-3 * b + root) / (10 * c)
        inner = [math.sqrt(a / (5 * c * larger)), math.sqrt(larger)]
        done = abs(new_error - error) <= 1e-15
        error = new_error
        if done:
            break
    return a, b, c, error


# What a step may take a number down to that was near 1 before. Larger, and small numbers grow more slowly; smaller, and
# the rounding of the large ones grows by its inverse.
_CUSHION = 0.02

# The nearest polynomials are steep at 1, with a slope of up to 12 above the cushion. A number that rounding, of their
# coefficients or of products, has taken above 1 would leave it by that factor in each step, and the iteration would end
# in NaN. So their largest value stays below 1, by this share of the error: more than a step's rounding in float32 where
# they are steep, and nothing where they are flat.
_MARGIN = 1e-4

# Near 1 the nearest polynomial is that of Newton and Schulz, which takes 1 - x to 5/2 (1 - x)^3 and is at most 1 on
# [0, 1], and Remez's equations lose their digits.
_NEAR = 0.99
NEWTON_SCHULZ = (15 / 8, -10 / 8, 3 / 8)


@functools.lru_cache(maxsize=256)
def polar_schedule(smallest: float) -> tuple[tuple[float, float, float, float], ...]:
    """Polynomials whose composition takes ``[smallest, 1]`` to 1 within rounding, and never above 1.

    Each is the nearest to 1 on the interval that the one before it has left, scaled so that its largest value is
    slightly below 1.

    Returns:
        ``(a, b, c, reached)`` for each step: after it, numbers from ``reached`` to 1 have come to at least 1/2.
        ``reached`` is 1 while no such number is known.
    """
    if not 0 < smallest < 1:
        raise ValueError(f"smallest must lie between 0 and 1, got {smallest}")
    steps: list[tuple[float, float, float]] = []
    low = smallest
    while 1 - low > 1e-15:
        if low > _NEAR:
            a, b, c = NEWTON_SCHULZ
            low = _value(a, b, c, low)
        else:
            a, b, c, error = optimal_odd_polynomial(max(low, _CUSHION))
            scale = 1 / (1 + (1 + _MARGIN) * error)
            a, b, c = scale * a, scale * b, scale * c
            low = min(_value(a, b, c, low), scale * (1 - error))
        steps.append((a, b, c))
    return tuple((a, b, c, _reached(steps[: k + 1])) for k, (a, b, c) in enumerate(steps))


def _value(a: float, b: float, c: float, x: float) -> float:
    return x * (a + x * x * (b + x * x * c))


def _reached(steps: list[tuple[float, float, float]]) -> float:
    """The least number from which on, up to 1, the composition of ``steps`` is at least 1/2; 1 if there is none."""
    low, reached = 0.5, 1.0
    for a, b, c in reversed(steps):
        # p rises from 0 to its first maximum. Its least value on [x, 1], beyond that, is one of the end points of the
        # oscillation: the second extremum.
        first, second = _extrema(a, b, c)
        if min(_value(a, b, c, second), _value(a, b, c, 1.0)) < low:
            return 1.0
        left, right = 0.0, first
        for _ in range(200):
            middle = 0.5 * (left + right)
            left, right = (left, middle) if _value(a, b, c, middle) >= low else (middle, right)
        low = reached = right
    return reached


def _extrema(a: float, b: float, c: float) -> tuple[float, float]:
    root = math.sqrt(max(0.0, 9 * b * b - 20 * a * c))
    larger = (-3 * b + root) / (10 * c)
    return math.sqrt(a / (5 * c * larger)), math.sqrt(larger)


# ---- products of matrices only ----


def polynomial(x: Tensor, gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """``x (a I + b gram + c gram^2)``, which is ``p(x)`` on the singular values where ``gram = x^T x``."""
    return a * x + x @ (b * gram + c * (gram @ gram))


def norm_bound(gram: Tensor) -> Tensor:
    """At least the largest eigenvalue of each symmetric ``[..., n, n]``, as its Frobenius norm; 1 for a zero matrix."""
    norm: Tensor = torch.linalg.matrix_norm(gram) * (1 + gram.shape[-1] * torch.finfo(gram.dtype).eps)
    return torch.where(norm > 0, norm, 1.0)


def newton_schulz(a: Tensor) -> tuple[Tensor, Tensor]:
    """``a^(1/2)`` and ``a^(-1/2)`` by products: ``y <- y q(z y)``, ``z <- q(z y) z`` from ``y = a``, ``z = I``.

    With ``p(x) = x q(x^2)`` of :func:`polar_schedule`, an eigenvalue t of a follows ``x <- p(x)`` from ``x = t^(1/2)``,
    and y and z are ``x t^(1/2)`` and ``x t^(-1/2)``. Eigenvalues below the resolution are not waited for.
    """
    n = a.shape[-1]
    eye = torch.eye(n, dtype=a.dtype, device=a.device).expand_as(a)
    scale = norm_bound(a @ a).sqrt()[..., None, None]
    y, z = a / scale, eye
    for p, q, r, _ in polar_schedule(math.sqrt(resolution(n, a.dtype))) if n else ():
        square = z @ y
        factor = p * eye + q * square + r * (square @ square)
        y, z = y @ factor, factor @ z
    return symmetric_part(y) * scale.sqrt(), symmetric_part(z) / scale.sqrt()


def lyapunov_by_products(g: Tensor, x: Tensor) -> Tensor:
    """As :func:`lyapunov`, of a definite ``x [..., n, n]``: the block beside the diagonal of the sign of a matrix.

    ``sign [[x, g], [0, -x]] = [[I, 2 T], [0, -I]]``, and an odd polynomial of that matrix is one of its blocks.
    """
    n = x.shape[-1]
    scale = norm_bound(x @ x).sqrt()[..., None, None]
    x, g = x / scale, g / scale
    for p, q, r, _ in polar_schedule(math.sqrt(resolution(n, x.dtype))) if n else ():
        square, commutator = x @ x, x @ g - g @ x
        cube, third = x @ square, x @ commutator + g @ square
        fifth = cube @ commutator + third @ square
        x, g = p * x + q * cube + r * (cube @ square), p * g + q * third + r * fifth
    return 0.5 * g


def gram_of(x: Tensor) -> Tensor:
    """``x^T x``."""
    return x.mT @ x


def polar_trace(
    m: Tensor,
    tolerance: float = 1e-12,
    gram_of: Callable[[Tensor], Tensor] = gram_of,
    polynomial: Callable[[Tensor, Tensor, float, float, float], Tensor] = polynomial,
) -> tuple[float, float, int]:
    """The nuclear norm of ``m [h, w]`` by products: ``|m|_* = tr (u^T m)``, with u the polar factor.

    The iteration ends when a bound on the error of the trace falls below ``tolerance`` of it. The products are those of
    ``gram_of`` and ``polynomial``, which kernels may serve.

    Returns:
        The norm, the bound, and the number of steps.
    """
    if m.shape[0] < m.shape[1]:
        m = m.mT
    n = m.shape[1]
    gram = gram_of(m)
    # Numbers that the host reads come together: for each reading it waits for a GPU.
    square, norm = torch.stack([gram.diagonal().sum(), norm_bound(gram)]).tolist() if n else (0.0, 1.0)
    if square == 0:
        return 0.0, 0.0, 0
    scale = math.sqrt(norm)
    x, gram = m / scale, gram / scale**2
    # |m|_* >= |m|_F^2 / scale: singular values below tolerance |m|_* / n do not matter.
    smallest = min(0.5, max(tolerance * square / scale**2 / n, torch.finfo(m.dtype).eps))
    trace = bound = 0.0
    steps = 0
    for a, b, c, reached in polar_schedule(smallest):
        x = polynomial(x, gram, a, b, c)
        gram = gram_of(x)
        steps += 1
        if reached < 1:
            trace, bound = _trace_and_bound(m, x, gram, reached * scale)
            if bound <= tolerance * trace:
                break
    return trace, bound + resolution(n, m.dtype) * trace, steps


def _trace_and_bound(m: Tensor, x: Tensor, gram: Tensor, largest: float) -> tuple[float, float]:
    """``<x, m>``, and how far it is at most from the nuclear norm of ``m``.

    x has the singular vectors of m and values ``t <= 1``, of at least 1/2 for those ``s > largest`` of m. There
    ``s (1 - t) <= 4/3 s t (1 - t^2)``, which add up to ``<x, m> - <x gram, m>``; of the others there are at most
    ``4/3 sum (1 - t^2)``.
    """
    sums = [(x * m).sum(), ((x @ gram) * m).sum(), gram.diagonal().sum()]
    trace, arrived, count = torch.stack(sums).tolist()
    missing = max(0.0, gram.shape[0] - count)
    return trace, 4 / 3 * (abs(trace - arrived) + largest * missing)
