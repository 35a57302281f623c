"""The op ``polar_factor`` at the boundary of PyTorch's dispatcher: matrices to the nearest ones that are orthogonal.

Its steps end when they have converged, which a tracer must not see: it meets one operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lipgan._checks import check_finite
from lipgan._dtypes import without_autocast
from lipgan.ops import _backend
from lipgan.ops.matrix_sqrt import lyapunov
from lipgan.reference import matrix_sqrt as by_spectrum
from lipgan.reference import polar_factor as by_products

_library = torch.library.Library("lipgan", "FRAGMENT")  # type: ignore[no-untyped-call]
# Whether the steps have converged is read by the host.
_UNSAFE = (torch.Tag.cudagraph_unsafe,)
_library.define("polar_factor_fwd(Tensor a) -> Tensor", tags=_UNSAFE)  # type: ignore[no-untyped-call]
_library.define("polar_factor_bwd(Tensor grad, Tensor u, Tensor a) -> Tensor", tags=_UNSAFE)  # type: ignore[no-untyped-call]


# The largest n that the C++ form serves (csrc/include/lipgan/polar_factor.h): beyond it a BLAS has the better order.
NATIVE_LIMIT = 1024


# ---- the forms: None where a loses rank or nearly so ----


def _native_fwd(a: Tensor) -> Tensor | None:
    if a.numel() == 0 or a.shape[-1] > NATIVE_LIMIT:
        return by_products.polar_factor_fwd(a)
    u: Tensor | None = _backend.serving_native().polar_factor_fwd(
        a, by_products.levels(a.dtype), by_products.schedule(), by_products.FURTHER, torch.get_num_threads()
    )
    return u


def _native_bwd(grad: Tensor, u: Tensor, a: Tensor) -> Tensor | None:
    if a.numel() == 0 or a.shape[-1] > NATIVE_LIMIT:
        return by_products.polar_factor_bwd(grad, u, a)
    tolerance = by_products.RESIDUAL * torch.finfo(a.dtype).eps
    result: Tensor | None = _backend.serving_native().polar_factor_bwd(
        grad, u, a, by_products.MOST_ITERATIONS, tolerance, torch.get_num_threads()
    )
    return result


_FORWARD: dict[str, Callable[[Tensor], Tensor | None]] = {
    "reference": by_products.polar_factor_fwd,
    "native": _native_fwd,
}
_BACKWARD: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor | None]] = {
    "reference": by_products.polar_factor_bwd,
    "native": _native_bwd,
}


def _serving(a: Tensor) -> str:
    """The backend; a chosen one that has no form of this op is meant for others."""
    if not _backend.serves("polar_factor", a.device.type):
        return "reference"
    return _backend.resolve("polar_factor", None, a.device.type)


def _exactly(a: Tensor, n: int) -> Tensor:
    """``a`` in a dtype in which products have its precision: float64 where PyTorch's of float32 have less.

    Args:
        a: of the size of a factor, or a factor.
        n: columns of the factor.
    """
    if torch.get_float32_matmul_precision() == "highest" or (_serving(a) == "native" and n <= NATIVE_LIMIT):
        return a
    return a.double()


def _fwd(a: Tensor) -> Tensor:
    dtype, a = a.dtype, _exactly(a, a.shape[-1])
    u = _FORWARD[_serving(a)](a)
    if u is None:
        check_finite("a", a)
        u = by_spectrum.polar_fwd(a)[0]
    return u.to(dtype).contiguous()


def _bwd(grad: Tensor, u: Tensor, a: Tensor) -> Tensor:
    dtype, (grad, u, a) = a.dtype, (_exactly(x, a.shape[-1]) for x in (grad, u, a))
    result = _BACKWARD[_serving(a)](grad, u, a)
    if result is None:
        roots, vectors = _spectrum(u, a)
        result = by_spectrum.polar_bwd(grad, torch.zeros_like(vectors), u, roots, vectors)
    return result.to(dtype).contiguous()


def _spectrum(u: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, 0 where unresolved, and eigenvectors of ``h = u^T a``."""
    values, vectors = torch.linalg.eigh(by_spectrum.symmetric_part(u.mT @ a))
    return by_spectrum.resolved_singular(values.clamp_min(0), a.shape[-2]), vectors


for _key in ("CPU", "CUDA"):
    _library.impl("polar_factor_fwd", _fwd, _key)  # type: ignore[no-untyped-call]
    _library.impl("polar_factor_bwd", _bwd, _key)  # type: ignore[no-untyped-call]


@torch.library.register_fake("lipgan::polar_factor_fwd", lib=_library)  # type: ignore[untyped-decorator]
def _fwd_fake(a: Tensor) -> Tensor:
    return a.new_empty(a.shape)


@torch.library.register_fake("lipgan::polar_factor_bwd", lib=_library)  # type: ignore[untyped-decorator]
def _bwd_fake(grad: Tensor, u: Tensor, a: Tensor) -> Tensor:
    return a.new_empty(a.shape)


class _PolarFactor(torch.autograd.Function):
    """``a [..., m, n] -> u`` with ``m >= n``."""

    @staticmethod
    def forward(a: Tensor) -> Tensor:
        if _backend.is_plain((a,)):
            return _fwd(a)
        u: Tensor = torch.ops.lipgan.polar_factor_fwd.default(a)
        return u

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        a, u = ctx.saved_tensors
        if not torch.is_grad_enabled() and _backend.is_plain((grad, u, a)):
            return _bwd(grad, u, a)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            result: Tensor = torch.ops.lipgan.polar_factor_bwd.default(grad, u, a)
            return result
        # create_graph=True: by Lyapunov equations, whose derivatives are Lyapunov equations again.
        with torch.no_grad():
            roots, vectors = _spectrum(u, a)
        inner, h = u.mT @ grad, by_spectrum.symmetric_part(u.mT @ a)
        total = u @ lyapunov(inner - inner.mT, h, roots, vectors)
        if a.shape[-2] > a.shape[-1]:
            twice = 2 * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(h)
            total = total + (grad - u @ inner) @ lyapunov(twice, h, roots, vectors)
        gradient: Tensor = total
        return gradient


@without_autocast
def polar_factor(a: Tensor) -> Tensor:
    """The orthogonal matrix nearest to ``a [..., m, n]``, float32 or float64, in the Frobenius norm.

    Orthonormal columns where ``m >= n``, orthonormal rows where ``m <= n``: ``u`` of :func:`lipgan.linalg.polar`, by
    products of matrices where a is far from losing rank. Differentiable any number of times.

    Raises:
        ValueError: ``a`` is not finite.
    """
    dtype = a.dtype
    if not torch.compiler.is_compiling():  # which cannot ask for the precision: the op widens by itself
        a = _exactly(a, min(a.shape[-2:]))
    tall = a if a.shape[-2] >= a.shape[-1] else a.mT
    u: Tensor = _PolarFactor.apply(tall)  # type: ignore[no-untyped-call]
    return (u if tall is a else u.mT).to(dtype)
