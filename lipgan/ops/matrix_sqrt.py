"""The op ``matrix_sqrt`` at the boundary of PyTorch's dispatcher.

``lipgan::matrix_sqrt_fwd`` takes roots of symmetric matrices, ``lipgan::matrix_sqrt_bwd`` solves the Lyapunov equation
that their derivatives of every order need, and ``lipgan::polar_fwd`` is the polar decomposition, whose derivatives need
it too. The values of the arguments are looked at in here, so that a tracer meets no branch on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lipgan import _checks as _arguments
from lipgan._dtypes import without_autocast
from lipgan.ops import _backend
from lipgan.reference import matrix_sqrt as reference

METHODS = ("auto", "eigh", "native", "newton-schulz")

# The largest n that the kernels for small matrices serve: beyond it, the blocks of LAPACK and cuSOLVER pay.
NATIVE_LIMIT = 64

# (root, roots, vectors): as of reference.matrix_sqrt_fwd. The last two, which only derivatives need, are empty where
# `spectrum` is false or no eigenvalues were computed.
Forward = tuple[Tensor, Tensor, Tensor]

_library = torch.library.Library("lipgan", "FRAGMENT")  # type: ignore[no-untyped-call]
# What is refused is read by the host, and so is whether the eigenvalues were found.
_UNSAFE = (torch.Tag.cudagraph_unsafe,)
_library.define(  # type: ignore[no-untyped-call]
    "matrix_sqrt_fwd(Tensor a, bool inverse, float eps, str method, bool spectrum, str? backend) "
    "-> (Tensor, Tensor, Tensor)",
    tags=_UNSAFE,
)
_library.define(  # type: ignore[no-untyped-call]
    "matrix_sqrt_bwd(Tensor g, Tensor root, Tensor roots, Tensor vectors, str? backend) -> Tensor"
)
_library.define("polar_fwd(Tensor a) -> (Tensor, Tensor, Tensor, Tensor)", tags=_UNSAFE)  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "polar_bwd(Tensor grad_u, Tensor grad_h, Tensor u, Tensor roots, Tensor vectors) -> Tensor"
)


# ---- the forms of the forward ----


def _eigh_fwd(a: Tensor, inverse: bool, eps: float, spectrum: bool) -> Forward:
    _arguments.check_symmetric("a", a)
    values, vectors = torch.linalg.eigh(reference.symmetric_part(a))
    if values.numel():
        _check_values(values[..., 0], values[..., -1], inverse, eps, a)
    root, roots, vectors = reference.from_eigenvalues(values + eps, vectors, inverse)
    return (root, roots, vectors.contiguous()) if spectrum else (root, *_no_spectrum(a))


def _no_spectrum(a: Tensor) -> tuple[Tensor, Tensor]:
    return a.new_empty(*a.shape[:-2], 0), a.new_empty(*a.shape[:-2], 0, 0)


def _native_fwd(a: Tensor, inverse: bool, eps: float, spectrum: bool) -> Forward:
    if a.shape[-1] > NATIVE_LIMIT or a.dtype not in (torch.float32, torch.float64) or a.numel() == 0:
        return _eigh_fwd(a, inverse, eps, spectrum)
    module = _backend.serving_native()
    unit = reference.resolution(a.shape[-1], a.dtype)
    root, roots, vectors, seen = module.matrix_sqrt_fwd(a, inverse, eps, unit, spectrum, torch.get_num_threads())
    if seen.numel():
        _check_seen(a, seen, inverse, eps)
    return root, roots, vectors


def _triton_fwd(a: Tensor, inverse: bool, eps: float, spectrum: bool) -> Forward:
    if a.shape[-1] > NATIVE_LIMIT or a.dtype not in (torch.float32, torch.float64) or a.numel() == 0:
        return _eigh_fwd(a, inverse, eps, spectrum)
    from lipgan.kernels import matrix_sqrt as kernels  # Triton takes a second to load

    unit = reference.resolution(a.shape[-1], a.dtype)
    root, roots, vectors, seen = kernels.matrix_sqrt_fwd(a, inverse, eps, unit, spectrum)
    seen = seen.cpu()  # the one time that the host waits
    if bool((seen[4] > 0).any()):  # 40 sweeps were not enough, which no matrix is known to need
        return _eigh_fwd(a, inverse, eps, spectrum)
    _check_seen(a, seen[:4], inverse, eps)
    return root, roots, vectors


def _newton_schulz_fwd(a: Tensor, inverse: bool, eps: float) -> Forward:
    _arguments.check_symmetric("a", a)
    a = reference.symmetric_part(a)
    if eps:
        a = a + eps * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    root, inverse_root = reference.newton_schulz(a)
    return inverse_root if inverse else root, *_no_spectrum(a)


def _check_seen(a: Tensor, seen: Tensor, inverse: bool, eps: float) -> None:
    """Refuses what a kernel has seen: ``[4, matrices]``, max|a|, max|a - a^T|, and the extreme eigenvalues."""
    largest, difference, low, high = seen
    if not bool(largest.isfinite().all()):
        _arguments.check_finite("a", a)
    _arguments.refuse_asymmetry("a", difference, largest, a.dtype)
    _check_values(low, high, inverse, eps, a)


def _check_values(low: Tensor, high: Tensor, inverse: bool, eps: float, a: Tensor) -> None:
    """Refuses eigenvalues, from ``low`` to ``high``, that have no root or no inverse."""
    _arguments.refuse_indefinite("a", low, high, a.dtype)
    if inverse:
        bad = low + eps <= reference.resolution(a.shape[-1], a.dtype) * (high + eps)
        if bool(bad.any()):
            worst = int(bad.flatten().to(torch.uint8).argmax())
            raise ValueError(
                f"a must be positive definite beyond rounding with eps = {eps:g}, got the eigenvalues "
                f"{float(low.flatten()[worst]):.3g} to {float(high.flatten()[worst]):.3g}"
            )


_FORWARD: dict[str, Callable[[Tensor, bool, float, bool], Forward]] = {
    "reference": _eigh_fwd,
    "native": _native_fwd,
    "triton": _triton_fwd,
}


def _fwd(a: Tensor, inverse: bool, eps: float, method: str, spectrum: bool, backend: str | None) -> Forward:
    if method == "newton-schulz":
        return _newton_schulz_fwd(a, inverse, eps)
    if method == "eigh":
        return _eigh_fwd(a, inverse, eps, spectrum)
    serving = _backend.resolve("matrix_sqrt", "native" if method == "native" else backend, a.device.type)
    return _FORWARD[serving](a, inverse, eps, spectrum)


def _bwd(g: Tensor, root: Tensor, roots: Tensor, vectors: Tensor, backend: str | None) -> Tensor:
    if roots.shape[-1] != root.shape[-1]:
        return reference.lyapunov_by_products(g, root)
    return reference.lyapunov(g, roots, vectors)


def _polar_fwd(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _arguments.check_finite("a", a)
    return reference.polar_fwd(a)


for _key in ("CPU", "CUDA"):
    _library.impl("matrix_sqrt_fwd", _fwd, _key)  # type: ignore[no-untyped-call]
    _library.impl("matrix_sqrt_bwd", _bwd, _key)  # type: ignore[no-untyped-call]
    _library.impl("polar_fwd", _polar_fwd, _key)  # type: ignore[no-untyped-call]
    _library.impl("polar_bwd", reference.polar_bwd, _key)  # type: ignore[no-untyped-call]


@torch.library.register_fake("lipgan::matrix_sqrt_fwd", lib=_library)  # type: ignore[untyped-decorator]
def _fwd_fake(a: Tensor, inverse: bool, eps: float, method: str, spectrum: bool, backend: str | None) -> Forward:
    if method == "newton-schulz" or not spectrum:
        return a.new_empty(a.shape), *_no_spectrum(a)
    return a.new_empty(a.shape), a.new_empty(a.shape[:-1]), a.new_empty(a.shape)


@torch.library.register_fake("lipgan::matrix_sqrt_bwd", lib=_library)  # type: ignore[untyped-decorator]
def _bwd_fake(g: Tensor, root: Tensor, roots: Tensor, vectors: Tensor, backend: str | None) -> Tensor:
    return root.new_empty(root.shape)


@torch.library.register_fake("lipgan::polar_fwd", lib=_library)  # type: ignore[untyped-decorator]
def _polar_fake(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    square = (*a.shape[:-2], a.shape[-1], a.shape[-1])
    return a.new_empty(a.shape), a.new_empty(square), a.new_empty(a.shape[:-2] + a.shape[-1:]), a.new_empty(square)


@torch.library.register_fake("lipgan::polar_bwd", lib=_library)  # type: ignore[untyped-decorator]
def _polar_bwd_fake(grad_u: Tensor, grad_h: Tensor, u: Tensor, roots: Tensor, vectors: Tensor) -> Tensor:
    return u.new_empty(u.shape)


# ---- autograd ----


class _Lyapunov(torch.autograd.Function):
    """T of ``X T + T X = G`` as a function of X and G; ``roots`` and ``vectors``, or nothing, are known of X."""

    @staticmethod
    def forward(g: Tensor, x: Tensor, roots: Tensor, vectors: Tensor, backend: str | None) -> Tensor:
        result: Tensor = torch.ops.lipgan.matrix_sqrt_bwd.default(g, x, roots, vectors, backend)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        g, x, roots, vectors, ctx.backend = inputs
        ctx.save_for_backward(output, g, x, roots, vectors)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # X dT + dT X = dG - dX T - T dX, and the solution is its own adjoint.
        t, g, x, roots, vectors = ctx.saved_tensors

        def solve(g: Tensor) -> Tensor:
            result: Tensor = _Lyapunov.apply(g, x, roots, vectors, ctx.backend)  # type: ignore[no-untyped-call]
            return result

        u = solve(grad)
        if not ctx.needs_input_grad[1]:
            return u, None, None, None, None
        to_x = -(u @ t.mT + t.mT @ u)
        if roots.shape[-1] == x.shape[-1]:
            # The kernel of X, to which T and what counts of G have no part, turns with X: dP = -(X^+ dX P + P dX X^+).
            eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand_as(x)
            inverse = solve(2 * eye)
            kernel = eye - x @ inverse
            outer_g, outer_grad = ((kernel @ y @ kernel).mT for y in (g, grad))
            to_x = (
                to_x + inverse @ (u @ outer_g + t.mT @ outer_grad.mT) + (outer_g @ u + outer_grad.mT @ t.mT) @ inverse
            )
        return u, to_x, None, None, None


def lyapunov(g: Tensor, x: Tensor, roots: Tensor, vectors: Tensor) -> Tensor:
    """T of ``X T + T X = G``, differentiable any number of times; eigenvalues and eigenvectors of X are given."""
    result: Tensor = _Lyapunov.apply(g, x, roots, vectors, None)  # type: ignore[no-untyped-call]
    return result


class _Root(torch.autograd.Function):
    """``a -> (root, roots, vectors)``; the last two are constants, and known of the root."""

    @staticmethod
    def forward(a: Tensor, inverse: bool, eps: float, method: str, spectrum: bool, backend: str | None) -> Forward:
        result: Forward = torch.ops.lipgan.matrix_sqrt_fwd.default(a, inverse, eps, method, spectrum, backend)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
        a, ctx.inverse, ctx.eps, _, _, ctx.backend = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(a, *output)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        a, root, roots, vectors = ctx.saved_tensors
        grad = reference.symmetric_part(grad)
        if ctx.inverse:
            # R X = I gives dR = -R dX R.
            grad = -(root @ grad @ root)
            root = reference.symmetric_part(a) @ root + ctx.eps * root
        t = _Lyapunov.apply(grad, root, roots, vectors, ctx.backend)  # type: ignore[no-untyped-call]
        return t, None, None, None, None, None


class _Polar(torch.autograd.Function):
    """``a [..., m, n] -> (u, h, roots, vectors)`` with ``m >= n``; the last two are constants, and known of h."""

    @staticmethod
    def forward(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.lipgan.polar_fwd.default(a)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(inputs[0], *output)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad_u: Tensor, grad_h: Tensor, *_: Tensor) -> Tensor:
        a, u, h, roots, vectors = ctx.saved_tensors
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            result: Tensor = torch.ops.lipgan.polar_bwd.default(grad_u, grad_h, u, roots, vectors)
            return result
        # create_graph=True: the same by Lyapunov equations, whose derivatives are Lyapunov equations again.
        #   u^T du = Y with h Y + Y h = u^T da - da^T u;  h dh + dh h = a^T da + da^T a;  beside u, du = da h^-1.
        inner = u.mT @ grad_u
        skew, even = (lyapunov(g, h, roots, vectors) for g in (inner - inner.mT, 2 * reference.symmetric_part(grad_h)))
        total = u @ skew + a @ even
        if a.shape[-2] > a.shape[-1]:
            twice = 2 * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(h)
            total = total + (grad_u - u @ inner) @ lyapunov(twice, h, roots, vectors)
        gradient: Tensor = total
        return gradient


# ---- for lipgan.linalg: arguments known to be good but for their values ----


@without_autocast
def root(
    a: Tensor, inverse: bool = False, eps: float = 0.0, method: str = "auto", backend: str | None = None
) -> Tensor:
    """``(a + eps I)^(1/2)``, or its inverse, of the symmetric part of ``a [..., n, n]``, float32 or float64."""
    spectrum = torch.is_grad_enabled() and a.requires_grad
    result: Tensor = _Root.apply(a, inverse, eps, method, spectrum, backend)[0]  # type: ignore[no-untyped-call]
    return result


@without_autocast
def polar(a: Tensor) -> tuple[Tensor, Tensor]:
    """``a = u h`` of ``a [..., m, n]``, float32 or float64."""
    if a.shape[-2] >= a.shape[-1]:
        u, h, _, _ = _Polar.apply(a)  # type: ignore[no-untyped-call]
        return u, h
    v, left, _, _ = _Polar.apply(a.mT)  # type: ignore[no-untyped-call]
    return v.mT, reference.symmetric_part(v @ left @ v.mT)


@without_autocast
def nuclear_norm(a: Tensor) -> Tensor:
    """The sum of the singular values of ``a [..., m, n]``, ``m >= n``, float32 or float64."""
    if torch.is_grad_enabled() and a.requires_grad:
        h: Tensor = _Polar.apply(a)[1]  # type: ignore[no-untyped-call]
        norm: Tensor = h.diagonal(dim1=-2, dim2=-1).sum(-1)
        return norm
    _arguments.check_finite("a", a)
    return reference.nuclear_norm(a)


@without_autocast
def polar_trace(m: Tensor, tolerance: float = 1e-12) -> tuple[float, float, int]:
    """The nuclear norm of ``m [h, w]`` by products of matrices only: as :func:`reference.polar_trace`."""
    if _backend.resolve("polar_trace", None, m.device.type) == "triton":
        from lipgan.kernels import matrix_sqrt as kernels

        return reference.polar_trace(m, tolerance, kernels.symmetric_product, kernels.polynomial)
    return reference.polar_trace(m, tolerance)
