"""Power iteration, sigma and W / sigma (Miyato et al. 2018, Algorithm 1, eq. 20-22), and its backward.

The matrix of a weight is ``weight.permute(dim, ...).flatten(1)``, ``[h, w]``. The half steps of the iteration are
taken in the order of :func:`torch.nn.utils.parametrizations.spectral_norm`, ``u`` first: the sequence u, v, u, v, ...
is that of Algorithm 1, begun half a step later (docs/numerics/spectral_norm.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lipgan._dtypes import accumulation_dtype, without_autocast


def to_matrix(weight: Tensor, dim: int) -> Tensor:
    """``weight`` with ``dim`` in front and the others flattened: ``[h, w]``."""
    # reshape, not flatten: the vmap of torch.autograd.grad(..., is_grads_batched=True) has a rule for it.
    return weight.movedim(dim, 0).reshape(weight.shape[dim], -1)


def from_matrix(matrix: Tensor, like: Tensor, dim: int) -> Tensor:
    """The inverse of :func:`to_matrix` for a weight shaped as ``like``."""
    return matrix.reshape(like.movedim(dim, 0).shape).movedim(0, dim)


def scale_of(sigma: Tensor) -> Tensor:
    """``1 / sigma``; 1 where sigma is below the smallest normal number, so that a zero matrix stays zero."""
    zero = sigma.abs() < torch.finfo(sigma.dtype).tiny
    return torch.where(zero, 1.0, 1.0 / torch.where(zero, 1.0, sigma))


def _normalize(x: Tensor, eps: Tensor) -> Tensor:
    # The norm in float64: a float32 sum of squares leaves its range at entries of 1e19.
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.complex128 if x.is_complex() else torch.float64)
    return (x / torch.maximum(norm, eps)).to(x.dtype)


def unit_of(matrix: Tensor) -> Tensor:
    """A power of two that brings the largest entry near 1, where squares or sums could leave the range; else 1.

    Where the largest entry is beyond the range that is left, or not a number, nothing can be mended: 1.
    """
    largest = matrix.detach().abs().amax()
    if largest.dtype == torch.float64:
        outside = ((largest > 2.0**450) | (largest < 2.0**-450)) & (largest > 0)
        limit = 1000.0
    else:
        outside, limit = largest > 2.0**64, 120.0
    exponent = torch.where(outside & largest.isfinite(), largest, 1.0).log2().floor().clamp(-limit, limit)
    return torch.exp2(-exponent)


@without_autocast
def spectral_norm_fwd(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    n_power_iterations: int,
    eps: float,
    dims: Sequence[int],
    *,
    scaled: bool = True,
) -> tuple[list[Tensor], Tensor, list[Tensor], list[Tensor]]:
    """Normalize a group of weights.

    It is differentiable in the weights, in every mode of differentiation that PyTorch has, with u and v constant.

    Args:
        weights: floating or complex, two or more dimensions each. The transpose is the conjugate one, and sigma is
            then complex, as in PyTorch.
        us: ``[h]`` each, in the dtype of the weight.
        vs: ``[w]`` each, likewise.
        n_power_iterations: 0 takes ``sigma = u^T W v`` of the vectors given.
        eps: lower bound on a norm that is divided by.
        dims: the dimension of each weight that becomes the rows of its matrix.
        scaled: False leaves out the powers of two that keep weights near the ends of the range within it, for graphs
            of few operations, which exporters know.

    Returns:
        ``ys`` shaped as the weights; ``sigma`` ``[len(weights)]`` in the accumulation dtype; new ``us`` and ``vs``.
    """
    ys, sigmas, new_us, new_vs = [], [], [], []
    for weight, u, v, dim in zip(weights, us, vs, dims, strict=True):
        wide = accumulation_dtype(weight.dtype)
        matrix = to_matrix(weight, dim).to(wide)
        unit = None
        scaled_eps = torch.tensor(eps, dtype=torch.float64, device=weight.device)
        if scaled:
            unit = unit_of(matrix)
            matrix = matrix * unit
            scaled_eps = (eps * unit.double()).clamp_min(torch.finfo(torch.float64).tiny)
        constant, u_wide, v_wide = matrix.detach(), u.detach().to(wide), v.detach().to(wide)
        for _ in range(n_power_iterations):
            u_wide = _normalize(constant @ v_wide, scaled_eps)
            v_wide = _normalize(constant.mH @ u_wide, scaled_eps)
        sigma = u_wide.conj() @ (matrix @ v_wide)
        sigmas.append(sigma if unit is None else sigma / unit)
        # sigma may have no number where the quotient has one, so that both are taken in the unit.
        is_zero = sigmas[-1].abs() < torch.finfo(wide).tiny
        y = torch.where(is_zero, to_matrix(weight, dim).to(wide), matrix / torch.where(is_zero, 1.0, sigma))
        ys.append(from_matrix(y.to(weight.dtype), weight, dim).contiguous())
        new_us.append(u_wide.to(u.dtype, copy=True))
        new_vs.append(v_wide.to(v.dtype, copy=True))
    return ys, torch.stack(sigmas), new_us, new_vs


def spectral_norm_bwd(
    grad_ys: Sequence[Tensor],
    grad_sigma: Tensor | None,
    ys: Sequence[Tensor],
    sigma: Tensor,
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    dims: Sequence[int],
) -> list[Tensor]:
    """``dW = dY / sigma - (<dY, Y> / sigma - dsigma) u v^T`` for each weight, u and v held constant.

    Args:
        grad_ys: dY, shaped as the weights.
        grad_sigma: dsigma, ``[len(ys)]``, or None for zeros.
        ys, sigma, us, vs: what :func:`spectral_norm_fwd` returned.
        dims: as there.
    """
    scale = scale_of(sigma)
    grads = []
    for layer, (grad_y, y, u, v, dim) in enumerate(zip(grad_ys, ys, us, vs, dims, strict=True)):
        wide = sigma.dtype
        dy = to_matrix(grad_y, dim).to(wide)
        along = (dy * to_matrix(y, dim).to(wide)).sum() * scale[layer]
        if grad_sigma is not None:
            along = along - grad_sigma[layer]
        grad = dy * scale[layer] - along * torch.outer(u.to(wide), v.to(wide))
        grads.append(from_matrix(grad.to(y.dtype), y, dim).contiguous())
    return grads


@without_autocast
def spectral_norm_double_bwd(
    grads: Sequence[Tensor],
    grad_ys: Sequence[Tensor],
    ys: Sequence[Tensor],
    sigma: Tensor,
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    dims: Sequence[int],
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """The derivative of :func:`spectral_norm_bwd`. It is differentiable itself, so that every higher order follows.

    With G the gradient of a number by dW, ``q = u^T G v`` and ``r = 1 / sigma``, the gradients of that number are
    ``r (G - q Y)`` by dY, ``-r q dY`` by Y, ``-r^2 (<G, dY> - <dY, Y> q)`` by sigma and ``q`` by dsigma.

    Args:
        grads: G, shaped as the weights.
        grad_ys, ys, sigma, us, vs, dims: of the call.

    Returns:
        The gradients by dY and by Y, in their dtypes, and by sigma and dsigma, ``[len(ys)]``.
    """
    scale = scale_of(sigma)
    zero = sigma.abs() < torch.finfo(sigma.dtype).tiny  # there the scale is the constant 1
    to_grad_ys, to_ys, to_sigma, to_grad_sigma = [], [], [], []
    for layer, (grad, grad_y, y, u, v, dim) in enumerate(zip(grads, grad_ys, ys, us, vs, dims, strict=True)):
        wide = sigma.dtype
        g, dy, y_wide = grad.to(wide), grad_y.to(wide), y.to(wide)
        q = u.to(wide) @ (to_matrix(g, dim) @ v.to(wide))
        r = scale[layer]
        to_grad_ys.append((r * (g - q * y_wide)).to(grad_y.dtype))
        to_ys.append((-r * q * dy).to(y.dtype))
        towards = -r * r * ((g * dy).sum() - (dy * y_wide).sum() * q)
        to_sigma.append(torch.where(zero[layer], 0.0, towards))
        to_grad_sigma.append(q)
    return to_grad_ys, to_ys, torch.stack(to_sigma), torch.stack(to_grad_sigma)
