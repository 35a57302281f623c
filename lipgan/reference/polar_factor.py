"""The orthogonal polar factor of matrices by products only, and its derivative: for weights that are to be orthogonal.

Derivation: docs/numerics/matrix_sqrt.md, "Orthogonal weights".
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lipgan.reference.matrix_sqrt import NEWTON_SCHULZ, polar_schedule, symmetric_part

# From a matrix whose singular values reach down to this share of the largest, at the latest, the steps converge fast.
SMALLEST = 0.02
# Steps of Newton and Schulz after the schedule, each of which makes what is small 15/8 times as large.
FURTHER = 8
# Where ``|I - u^T u|`` is below this, every singular value grows or falls towards 1.
_NEAR = 0.8
# Of conjugate gradients, and their residual relative to the right side, in units of the rounding.
MOST_ITERATIONS = 40
RESIDUAL = 4

# Radii and numbers of terms of the polynomials for ``(1 + x)^(-1/2)``, and whether their error is below a 128th of the
# rounding, so that that of ``u^T u`` is below a 64th. Three terms take one product, five two, twelve five.
_LEVELS: dict[torch.dtype, tuple[tuple[float, int, bool], ...]] = {
    torch.float32: ((2.2e-3, 3, True), (0.035, 5, True), (0.36, 12, True), (0.6, 12, False), (0.85, 12, False)),
    torch.float64: (
        (2.8e-6, 3, True),
        (6.4e-4, 5, True),
        (0.072, 12, True),
        (0.36, 12, False),
        (0.6, 12, False),
        (0.85, 12, False),
    ),
}
_TERMS = 12


def polar_factor_fwd(a: Tensor) -> Tensor | None:
    """``u`` of ``a = u h`` for ``a [..., m, n]``, ``m >= n``, with orthonormal columns; None where it is not reached.

    Steps ``u <- u (p I + q u^T u + r (u^T u)^2)`` until the next one changes rounding only; in float32, the last
    correction is of what float64 shows, and is rounded once. Matrices that lose rank, or nearly so, such as are not
    finite, and such as have squares that leave the range of the dtype, are not reached.
    """
    n, eps = a.shape[-1], torch.finfo(a.dtype).eps
    rounding = n**0.5 * eps  # of a product, in the Frobenius norm
    # Scaled so that the mean square of its singular values is 1: what an orthogonal matrix becomes, whatever its scale.
    gram = a.mT @ a
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    # Nearer to the smallest numbers its products have lost their digits. A NaN ends the steps without another look.
    mean = mean.where(mean > a.shape[-2] * torch.finfo(a.dtype).tiny / eps, torch.nan)
    u, gram = a * mean.rsqrt(), gram / mean
    eye = torch.eye(n, dtype=a.dtype, device=a.device)
    near = scaled = False
    schedule = iter(polar_schedule(SMALLEST))
    further = FURTHER
    while True:
        off = gram - eye
        error = _norm(off)
        if u.dtype == torch.float32:
            if 0.3125 * error**3 <= rounding / 64:  # what the correction leaves: its result is rounded once
                return _corrected(u, second_order=0.375 * error**2 > rounding / 64)
        elif 0.375 * error**2 <= rounding:  # what is left of it
            return _step(u, gram, 1.5, -0.5)
        if not error < torch.inf:
            return None
        off_squared = off @ off
        error_squared = _norm(off_squared)
        near = near or error_squared < _NEAR**2
        if near:
            # Newton and Schulz, of third order: the first terms of ``(I + off)^(-1/2)``.
            u = _step(u, off_squared.mul_(0.375).sub_(off, alpha=0.5), 1.0, 1.0)
            # The next ``u^T u - I`` is ``off^3 (5/8 - 15/64 off + 9/64 off^2)``, shorter than off^3.
            left = error_squared**1.5
            if u.dtype == torch.float32 and 0.3125 * left**3 <= rounding / 64:
                return _corrected(u, second_order=0.375 * left**2 > rounding / 64)
            if 0.3125 * left <= rounding:
                return u
            further -= 1
            if further < 0:
                return None
            gram = u.mT @ u
            continue
        square = off_squared.add_(gram).add_(off)
        if not scaled:
            scaled = True
            bound = torch.linalg.matrix_norm(square).sqrt()[..., None, None] * (1 + n * eps)  # of |gram|
            u, gram, square = u * bound.rsqrt(), gram / bound, square / bound.square()
        p, q, r, _ = next(schedule, (*NEWTON_SCHULZ, 0.0))
        if (p, q, r) == NEWTON_SCHULZ:
            further -= 1
            if further < 0:
                return None
        u = _step(u, gram.mul_(q).add_(square, alpha=r), p, 1.0)
        gram = u.mT @ u


def _corrected(u: Tensor, *, second_order: bool) -> Tensor:
    """``u (u^T u)^(-1/2)``, with the rounding of float32 once; to first or second order of ``u^T u - I``."""
    wide = u.double()
    gram = wide.mT @ wide
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    off = gram.float()
    return wide.sub_(u @ (0.5 * off - 0.375 * (off @ off) if second_order else 0.5 * off)).float()


def _norm(x: Tensor) -> float:
    """The largest Frobenius norm among matrices."""
    return float(torch.linalg.matrix_norm(x).amax()) if x.numel() else 0.0


def _step(u: Tensor, factor: Tensor, beta: float, alpha: float) -> Tensor:
    """``beta u + alpha u factor``."""
    add = torch.addmm if u.ndim == 2 else torch.baddbmm
    return add(u, u, factor, beta=beta, alpha=alpha)


def polar_factor_bwd(grad: Tensor, u: Tensor, a: Tensor) -> Tensor | None:
    """The gradient to ``a [..., m, n]`` of its polar factor, from that to ``u``; None where a loses rank or nearly so.

    ``u Y + (I - u u^T) grad h^-1`` with ``h = u^T a`` and ``h Y + Y h = u^T grad - grad^T u``.
    """
    h, inner = symmetric_part(u.mT @ a), u.mT @ grad
    y = _solve_skew(h, inner - inner.mT)
    if y is None:
        return None
    result = u @ y
    if u.shape[-2] > u.shape[-1]:
        factor, info = torch.linalg.cholesky_ex(h)
        if bool(info.any()):
            return None
        result = result + (grad - u @ inner) @ torch.cholesky_inverse(factor)
    return result


def _solve_skew(h: Tensor, s: Tensor) -> Tensor | None:
    """The skew Y of ``h Y + Y h = s``, of a skew s, by conjugate gradients; None if they take long.

    ``Y h = -(h Y)^T``: an iteration is one product. Their number grows with the root of the condition of h; an
    orthogonal weight takes one.
    """

    def apply(y: Tensor) -> Tensor:
        product = h @ y
        return product - product.mT

    def dot(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum((-2, -1), keepdim=True)

    tiny = torch.finfo(h.dtype).tiny
    # The solution where h is a multiple of I.
    y = s / (2 * h.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None])
    residual = s - apply(y)
    direction, length = residual, dot(residual, residual)
    goal = dot(s, s) * (RESIDUAL * torch.finfo(h.dtype).eps) ** 2
    for _ in range(MOST_ITERATIONS):
        if bool((length <= goal).all()):
            return y
        image = apply(direction)
        curvature = dot(direction, image)
        # Of one matrix of several that is solved already, both are 0.
        share = length / curvature.clamp_min(tiny)
        y = y + share * direction
        residual = residual - share * image
        before, length = length, dot(residual, residual)
        direction = residual + (length / before.clamp_min(tiny)) * direction
    return None


# ---- what the form in C++ takes ----


@functools.cache
def levels(dtype: torch.dtype) -> Tensor:
    """Polynomials for ``(1 + x)^(-1/2)``, from the least costly to the widest: ``[levels, 3 + 12]``, in float64.

    A row has the radius of x, the number of terms, 1 where the error is below rounding, else 0, and the coefficients.
    """
    rows = [
        [radius, float(terms), float(is_final), *inverse_root(radius, terms), *[0.0] * (_TERMS - terms)]
        for radius, terms, is_final in _LEVELS[dtype]
    ]
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


@functools.cache
def schedule() -> Tensor:
    """The steps far from orthogonal matrices, ``[steps, 3]`` in float64; the last one goes on."""
    steps = [step[:3] for step in polar_schedule(SMALLEST)]
    return torch.tensor([*steps, NEWTON_SCHULZ], dtype=torch.float64, device="cpu")


def inverse_root(radius: float, terms: int) -> list[float]:
    """Coefficients of powers of x: the first terms of the Chebyshev series of ``(1 + x)^(-1/2)`` for ``|x| <= radius``.

    The error is largest at ``-radius``, where the terms left out are all positive.
    """
    # Of (1 - r t)^(-1/2) = sum_j b_j (r t)^j with positive b_j; t^j = 2^(1 - j) sum_i binom(j, i) T_(j - 2 i)(t).
    powers = [1.0]  # b_j
    while radius ** len(powers) > 1e-20 or len(powers) < 2 * terms:
        powers.append(powers[-1] * (2 * len(powers) - 1) / (2 * len(powers)))
    series = []
    for k in range(terms):
        share = 2 * (radius / 2) ** k  # 2 (r / 2)^j binom(j, i), with j = k + 2 i
        total = 0.0
        for i, b in enumerate(powers[k::2]):
            if i:
                share *= (radius / 2) ** 2 * (k + 2 * i - 1) * (k + 2 * i) / (i * (k + i))
            total += share * b
        series.append(total)
    series[0] /= 2
    # T_k in powers of t, and t = -x / r.
    before, now, sums = [1.0], [0.0, 1.0], [0.0] * terms
    for value in series:
        for j, coefficient in enumerate(before):
            sums[j] += value * coefficient
        after = [0.0, *(2 * coefficient for coefficient in now)]
        for j, coefficient in enumerate(before):
            after[j] -= coefficient
        before, now = now, after
    return [value / (-radius) ** j for j, value in enumerate(sums)]
