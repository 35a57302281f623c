"""The Triton launchers of spectral_norm with u and v as lists, a vector of each layer."""

from collections.abc import Sequence

import torch
from lipgan.kernels import spectral_norm as kernels
from torch import Tensor


def spectral_norm_fwd(
    weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], n_power_iterations: int, eps: float
) -> tuple[list[Tensor], Tensor, list[Tensor], list[Tensor]]:
    """(ys, sigma, us, vs)."""
    ys, sigma, uv = kernels.spectral_norm_fwd(weights, us, vs, n_power_iterations, eps)
    views = uv.split([x.numel() for pair in zip(us, vs, strict=True) for x in pair])
    return ys, sigma, list(views[::2]), list(views[1::2])


def spectral_norm_bwd(
    grad_ys: Sequence[Tensor],
    grad_sigma: Tensor | None,
    ys: Sequence[Tensor],
    sigma: Tensor,
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
) -> list[Tensor]:
    """dW of each layer."""
    uv = torch.cat([x for pair in zip(us, vs, strict=True) for x in pair])
    return kernels.spectral_norm_bwd(grad_ys, grad_sigma, ys, sigma, uv)
