"""A certified upper bound on the largest singular value, by Gram iteration."""

import torch
from torch import Tensor

from lipgan._checks import check_count, check_matrix
from lipgan._dtypes import accumulation_dtype

__all__ = ["gram_bound", "power_of_two", "round_up", "spectral_norm_bound"]


def power_of_two(x: Tensor) -> Tensor:
    """The power of two in (x/2, x]; 1 where x is 0 or NaN. Dividing by it is exact."""
    mantissa, _ = torch.frexp(x)
    return torch.where(x > 0, x / (2 * mantissa), 1.0)


def gram_bound(x: Tensor, n_iterations: int) -> Tensor:
    """Upper bound on the largest singular value of each ``x [..., p, n]``, ``p <= n``, float64 or complex128.

    The names are those of docs/numerics/spectral_norm_bound.md: ``scale`` is ``s_i``, ``error`` is ``e_i``.
    """
    # A complex product is four real ones, so its error is that of twice as many terms times sqrt(2).
    eps = torch.finfo(torch.float64).eps * (4 if x.is_complex() else 1)
    largest = x.detach().abs().amax((-2, -1))
    first_scale = power_of_two(largest)
    x = x / first_scale[..., None, None]
    norm = torch.linalg.vector_norm(x.detach(), dim=(-2, -1))
    scales: list[Tensor] = []
    errors: list[Tensor] = []
    for _ in range(n_iterations):
        error = (x.shape[-1] + 4) * eps * norm.detach().square()
        x = x @ x.mH
        norm = torch.linalg.vector_norm(x, dim=(-2, -1))
        scale = power_of_two(norm.detach())
        x, norm = x / scale[..., None, None], norm / scale
        scales.append(scale)
        errors.append(error / scale)
    # The square roots below have no finite derivative at 0, so a zero matrix goes through them as 1.
    is_zero = largest == 0
    bound = norm.masked_fill(is_zero, 1.0) * (1 + (x.shape[-2] * x.shape[-1] + 4) * eps)
    for scale, error in zip(reversed(scales), reversed(errors), strict=True):
        bound = torch.sqrt(scale * (bound + error))
    bound = (bound * (1 + 4 * eps)).masked_fill(is_zero, 0.0) * first_scale
    return torch.where(largest.isfinite(), bound, largest)


def round_up(bound: Tensor, is_zero: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a float64 bound to ``dtype`` without going below it; 0 stays 0 where ``is_zero``."""
    info = torch.finfo(dtype)
    if dtype != torch.float64:
        bound = (bound * (1 + info.eps)).to(dtype)
    # Where the result is subnormal a rounding is absolute, at most half of the smallest positive number.
    return torch.where(is_zero, bound, bound + info.smallest_normal * info.eps)


def spectral_norm_bound(a: Tensor, *, n_iterations: int = 10) -> Tensor:
    r"""Certified upper bound on the largest singular value, by Gram iteration.

    With ``t = n_iterations`` and ``q = 2**(t + 1)`` the result is the Schatten norm
    ``(sum_i sigma_i**q)**(1/q)``, inflated by a bound on every rounding error made, so that

        ``sigma <= spectral_norm_bound(a) <= rank**(1/q) * sigma * (1 + rounding)``

    holds for the floating-point numbers returned: rank 1000 and 10 iterations give a factor of 1.0034.
    It costs ``t`` products of matrices of the smaller side, in float64; no singular vectors, no iteration to
    converge. The derivative is ``U diag((sigma_i / bound)**(q - 1)) V^T``, which tends to ``u v^T``.

    Args:
        a: ``(..., m, n)``, real. Computed in float64 whatever the dtype.
        n_iterations: number of Gram products, at least 1.

    Returns:
        ``(...)``; float64 for float64 and float32 for float32, float16 and bfloat16. 0 for a zero or empty
        matrix, NaN where ``a`` has a NaN, inf where it has an infinity and no NaN.

    Raises:
        TypeError: ``a`` is not a real floating-point tensor, or ``n_iterations`` is not an int.
        ValueError: ``a`` has fewer than two dimensions, or ``n_iterations < 1``.

    Source: Delattre, Barthelemy, Araujo, Allauzen, "Efficient Bound of Lipschitz Constant for Convolutional
    Layers by Gram Iteration" (ICML 2023), Algorithm 1; the rounding-error terms are derived in
    docs/numerics/spectral_norm_bound.md.

    Example::

        >>> spectral_norm_bound(torch.diag(torch.tensor([3.0, 4.0])))
        tensor(4.0000)
    """
    check_matrix("a", a)
    check_count("n_iterations", n_iterations)
    dtype = accumulation_dtype(a.dtype)
    wide = a.double()
    if wide.shape[-2] > wide.shape[-1]:
        wide = wide.mT
    if wide.shape[-2] == 0:
        return wide.sum((-2, -1)).to(dtype)
    is_zero = (wide.detach() == 0).all(-1).all(-1)
    return round_up(gram_bound(wide, n_iterations), is_zero, dtype)
