"""Square roots, polar decompositions and nuclear norms."""

import torch
from torch import Tensor

from lipgan._checks import as_number, check_choice, check_matrix, check_square
from lipgan.ops import _backend
from lipgan.ops import matrix_sqrt as ops

__all__ = ["inv_sqrtm", "nuclear_norm", "polar", "sqrtm"]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def sqrtm(a: Tensor, *, method: str = "auto") -> Tensor:
    r"""The symmetric positive semi-definite square root of symmetric positive semi-definite matrices.

    The error is at most ``min(e^(1/2), e / (2 l^(1/2)))`` in the spectral norm, with l the smallest eigenvalue of a and
    ``e = 4 n^(1/2) eps |a|``: half of the digits where a is singular, in every method. The derivative solves the
    Lyapunov equation ``X dX + dX X = dA``, of which a second and every further derivative follow; where a is singular,
    it is the solution without a part in the kernel of a, and they are those along matrices of the same rank.

    Args:
        a: ``(..., n, n)``, real. Of float16 and bfloat16 the root is computed in float32 and rounded once. Only the
            symmetric part counts, and the gradient is symmetric.
        method: "eigh": eigenvalues, by LAPACK or cuSOLVER. "native": eigenvalues of many matrices at once, in C++, for
            n up to 64 on a CPU. "newton-schulz": products of matrices only, for matrices whose squares stay in
            range; its derivatives are for definite matrices. "auto": "native" where it serves, on a GPU the Triton
            kernel for n up to 64, else "eigh".

    Returns:
        ``(..., n, n)``, in the dtype of a, exactly symmetric.

    Raises:
        TypeError: ``a`` is not a real floating-point tensor.
        ValueError: ``a`` is not square, not finite, not symmetric beyond rounding, or has a negative eigenvalue beyond
            rounding; no method has that name; "native" for n above 64.
        UnavailableError: "native" where there is no C++ module, or not on a CPU.

    Source: Higham, "Functions of Matrices" (2008), Sections 6.2 (bound) and 6.7 (products).

    Example::

        >>> sqrtm(torch.diag(torch.tensor([4.0, 9.0])))
        tensor([[2., 0.],
                [0., 3.]])
    """
    check_square("a", a)
    check_choice("method", method, ops.METHODS)
    if method == "native":
        _backend.resolve("matrix_sqrt", "native", a.device.type)
        if a.shape[-1] > ops.NATIVE_LIMIT:
            raise ValueError(f"method 'native' serves n up to {ops.NATIVE_LIMIT}, got shape {tuple(a.shape)}")
    return ops.root(a.to(_wide(a.dtype)), method=method).to(a.dtype)


def inv_sqrtm(a: Tensor, *, eps: float = 0.0) -> Tensor:
    r"""``(a + eps I)^(-1/2)`` of symmetric positive semi-definite matrices.

    The relative error is at most ``2 n^(1/2) k eps_machine`` in the spectral norm, with k the condition number of
    ``a + eps I``. Differentiable any number of times: ``dR = -R dX R`` with X the square root.

    Args:
        a: ``(..., n, n)``, real, as in :func:`sqrtm`.
        eps: what is added to the diagonal; not negative.

    Returns:
        ``(..., n, n)``, in the dtype of a, exactly symmetric.

    Raises:
        TypeError: ``a`` is not a real floating-point tensor, or ``eps`` not a number.
        ValueError: as :func:`sqrtm`; also where ``a + eps I`` is singular up to rounding, or ``eps`` is negative or not
            finite.

    Example::

        >>> inv_sqrtm(torch.diag(torch.tensor([4.0, 0.0])), eps=0.25)
        tensor([[0.4851, 0.0000],
                [0.0000, 2.0000]])
    """
    check_square("a", a)
    eps = as_number("eps", eps, minimum=0.0)
    return ops.root(a.to(_wide(a.dtype)), inverse=True, eps=eps).to(a.dtype)


def polar(a: Tensor) -> tuple[Tensor, Tensor]:
    r"""The polar decomposition ``a = u @ h``, as ``scipy.linalg.polar`` with ``side="right"``.

    Computed from singular values: ``|a - u h|`` and ``|u^T u - I|`` are at most ``4 m^(1/2) eps`` (times ``|a|``), and
    ``|dh|`` likewise; u moves by ``e / s`` under an error e of a, with s the smallest singular value (or, for a square
    matrix, half of the sum of the two smallest). Differentiable any number of times. Where singular values are 0 up to
    rounding, u is not unique: derivatives within their singular vectors count as 0.

    Args:
        a: ``(..., m, n)``, real. Half types are computed in float32 and rounded once.

    Returns:
        ``(u, h)``: ``u`` like ``a``, with orthonormal columns where ``m >= n`` and orthonormal rows where ``m <= n``;
        ``h (..., n, n)`` symmetric positive semi-definite.

    Raises:
        TypeError: ``a`` is not a real floating-point tensor.
        ValueError: ``a`` has fewer than two dimensions, or is not finite.

    Source: Higham, "Functions of Matrices" (2008), Chapter 8.

    Example::

        >>> polar(torch.tensor([[0.0, -2.0], [3.0, 0.0]]))[1]
        tensor([[3., 0.],
                [0., 2.]])
    """
    check_matrix("a", a)
    u, h = ops.polar(a.to(_wide(a.dtype)))
    return u.to(a.dtype), h.to(a.dtype)


def nuclear_norm(a: Tensor) -> Tensor:
    r"""The sum of the singular values.

    The error is at most ``4 m^(1/2) eps min(m, n)`` times the largest singular value, ``m >= n``. The derivative is the
    polar factor of a, 0 on singular vectors whose values are 0 up to rounding: the subgradient of least norm.

    Args:
        a: ``(..., m, n)``, real.

    Returns:
        ``(...)``; float64 for float64, and float32 for float32 and half types. Differentiable any number of times where
        all singular values are positive.

    Raises:
        TypeError: ``a`` is not a real floating-point tensor.
        ValueError: ``a`` has fewer than two dimensions, or is not finite.

    Example::

        >>> nuclear_norm(torch.diag(torch.tensor([3.0, -4.0])))
        tensor(7.)
    """
    check_matrix("a", a)
    a = a.to(_wide(a.dtype))
    if a.shape[-2] < a.shape[-1]:
        a = a.mT
    return ops.nuclear_norm(a)
