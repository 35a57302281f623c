"""The derivative of spectral normalization, and of that derivative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lipgan.ops import _backend
from lipgan.ops.spectral_norm.backends import bwd, fwd, join_vectors, split_vectors
from lipgan.reference import spectral_norm as reference


class _Backward(torch.autograd.Function):
    """dW as a function of (dY, dsigma, Y, sigma), for the second order: a gradient penalty goes through it."""

    @staticmethod
    def forward(
        dims: Sequence[int],
        backend: str | None,
        uv: Tensor,
        grad_sigma: Tensor | None,
        sigma: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        grad_ys, ys = tensors[: len(dims)], tensors[len(dims) :]
        return tuple(torch.ops.lipgan.spectral_norm_bwd.default(grad_ys, grad_sigma, ys, sigma, uv, dims, backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.dims, _, uv, grad_sigma, sigma, *tensors = inputs
        ctx.has_grad_sigma = grad_sigma is not None
        ctx.save_for_backward(uv, sigma, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # With G the incoming gradient, q = u^T G v, s = <dY, Y>, r = 1 / sigma:
        #   to dY: r (G - q Y)    to Y: -r q dY    to sigma: -r^2 (<G, dY> - s q)    to dsigma: q
        # Plain differentiable PyTorch, so that every higher order follows.
        uv, sigma, *tensors = ctx.saved_tensors
        grad_ys, ys = tensors[: len(ctx.dims)], tensors[len(ctx.dims) :]
        us, vs = split_vectors(uv, ys, ctx.dims)
        scale = reference.scale_of(sigma)
        zero = sigma.abs() < torch.finfo(sigma.dtype).tiny  # there the scale is the constant 1
        to_grad_ys, to_ys, to_sigma, to_grad_sigma = [], [], [], []
        rows = zip(grads, grad_ys, ys, us, vs, ctx.dims, strict=True)
        for layer, (grad, grad_y, y, u, v, dim) in enumerate(rows):
            wide = sigma.dtype
            g, dy, y_wide = grad.to(wide), grad_y.to(wide), y.to(wide)
            q = u.to(wide) @ (reference.to_matrix(g, dim) @ v.to(wide))
            r = scale[layer]
            to_grad_ys.append((r * (g - q * y_wide)).to(grad_y.dtype))
            to_ys.append((-r * q * dy).to(y.dtype))
            towards = -r * r * ((g * dy).sum() - (dy * y_wide).sum() * q)
            to_sigma.append(torch.where(zero[layer], 0.0, towards))
            to_grad_sigma.append(q)
        to_dsigma = torch.stack(to_grad_sigma) if ctx.has_grad_sigma else None
        return None, None, None, to_dsigma, torch.stack(to_sigma), *to_grad_ys, *to_ys


def _run(
    dims: Sequence[int],
    backend: str | None,
    n_power_iterations: int,
    eps: float,
    vectors: tuple[Sequence[Tensor], Sequence[Tensor]],
    *weights: Tensor,
) -> tuple[Tensor, ...]:
    function = fwd if _backend.is_plain(weights) else torch.ops.lipgan.spectral_norm_fwd.default
    ys, sigma, uv = function(weights, vectors[0], vectors[1], n_power_iterations, eps, dims, backend)
    return (uv, sigma, *ys)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dims, ctx.backend = inputs[:2]
    ctx.mark_non_differentiable(output[0])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output)


class _SpectralNorm(torch.autograd.Function):
    """weights -> (uv, sigma, ys); u and v are constants of the differentiation."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _run(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, _: None, grad_sigma: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dims = ctx.dims
        uv, sigma, *ys = ctx.saved_tensors
        result: list[Tensor | None] = [None] * len(dims)
        # A layer that the loss does not reach costs nothing.
        reached = [layer for layer, grad in enumerate(grads) if grad is not None or grad_sigma is not None]
        if reached:
            if len(reached) < len(dims):
                us, vs = split_vectors(uv, ys, dims)
                uv = join_vectors([us[layer] for layer in reached], [vs[layer] for layer in reached])
                ys = [ys[layer] for layer in reached]
                dims = [dims[layer] for layer in reached]
                sigma = sigma[reached]
            grad_ys = []
            for layer, y in zip(reached, ys, strict=True):
                grad = grads[layer]
                grad_ys.append(torch.zeros_like(y) if grad is None else grad)
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
                inner = _Backward.apply(dims, ctx.backend, uv, grad_sigma, sigma, *grad_ys, *ys)  # type: ignore[no-untyped-call]
            else:
                function = bwd if _backend.is_plain(grad_ys) else torch.ops.lipgan.spectral_norm_bwd.default
                inner = function(grad_ys, grad_sigma, ys, sigma, uv, dims, ctx.backend)
            for layer, grad in zip(reached, inner, strict=True):
                result[layer] = grad
        return (None, None, None, None, None, *result)


class _SpectralNormUnderTransforms(_SpectralNorm):
    """The form that torch.func asks for. Elsewhere it costs three times as much a call as the other."""

    forward = staticmethod(_run)  # type: ignore[assignment]
    setup_context = staticmethod(_save)


def normalize(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    n_power_iterations: int,
    eps: float,
    dims: Sequence[int],
    backend: str | None = None,
) -> tuple[Sequence[Tensor], Tensor, Tensor]:
    """:func:`spectral_norm_group` for callers whose arguments are known to be good, as those of a layer are.

    Returns:
        ``(ys, sigma, uv)``; :func:`split_vectors` takes uv apart.
    """
    under_transforms = torch._C._are_functorch_transforms_active()
    function = _SpectralNormUnderTransforms if under_transforms else _SpectralNorm
    uv, sigma, *ys = function.apply(dims, backend, n_power_iterations, eps, (us, vs), *weights)  # type: ignore[no-untyped-call]
    return ys, sigma, uv
