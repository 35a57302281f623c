"""The penalty on the norm of a critic's input gradient (Gulrajani et al. 2017, eq. 3), and the samples it is taken at.

The norm of a sample's gradient g_i is ``n_i = |g_i|``; with ``norm="pixel"`` it is taken over dimension 1 alone, once
per position of a sample. N is the number of norms, t the target:

    two-sided   P = weight / N * sum (n - t)^2              Gulrajani et al. 2017
    one-sided   P = weight / N * sum max(0, n - t)^2        Petzka et al. 2018
    squared     P = weight / N * sum n^2 / 2                R1 and R2, Mescheder et al. 2018
    max         P = weight * (max n - t)^2
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipgan._dtypes import accumulation_dtype


def interpolate(real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    """``mix_i real_i + (1 - mix_i) fake_i`` for each sample, ``mix`` ``[B]`` in the accumulation dtype.

    Bit by bit ``real_i`` where ``mix_i`` is 1, and ``fake_i`` where it is 0.
    """
    m = mix.view(-1, *[1] * (real.ndim - 1))
    mixed = (m * real.to(mix.dtype) + (1 - m) * fake.to(mix.dtype)).to(real.dtype)
    return torch.where(m == 1, real, torch.where(m == 0, fake, mixed))


def gradient_norms(grads: Tensor, norm: str) -> Tensor:
    """The norms in float64, ``[B]`` or ``[B, *grads.shape[2:]]``; differentiable."""
    dims = [1] if norm == "pixel" else list(range(1, grads.ndim))
    wide = grads.to(torch.float64)
    if not dims:
        return wide.abs()
    if grads.dtype != torch.float64:
        norms: Tensor = torch.linalg.vector_norm(wide, dim=dims)
        return norms
    # The squares of float64 may leave their range: a power of two, which rounds nothing, takes them back.
    with torch.no_grad():
        largest = wide.abs().amax(dims, keepdim=True)
        usable = largest.isfinite() & (largest > 0)
        scale = torch.where(usable, 2.0 ** torch.where(usable, largest, 1.0).log2().round().clamp(-1000, 1000), 1.0)
    scaled: Tensor = torch.linalg.vector_norm(wide / scale, dim=dims)
    return scaled * scale.squeeze(dims)


def gradient_cotangent(grads: Tensor, norms: Tensor, kind: str, weight: float, target: float) -> Tensor:
    """``dP / dgrads``, in the dtype of ``norms``; differentiable in ``grads`` and ``norms``.

    The direction of a gradient is ``g / |g|``, and 0 where the norm is below the smallest normal number.
    """
    wide = grads.to(norms.dtype)

    def spread(per_norm: Tensor) -> Tensor:
        if norms.ndim == 1:
            return per_norm.view(-1, *[1] * (grads.ndim - 1))
        return per_norm.unsqueeze(1)

    if kind == "squared":
        return wide * (weight / norms.numel())
    if kind == "two-sided":
        slope = (2 * weight / norms.numel()) * (norms - target)
    elif kind == "one-sided":
        slope = (2 * weight / norms.numel()) * (norms - target).clamp_min(0)
    else:
        # A maximum that several norms share counts evenly; a NaN is the maximum.
        largest = norms.max()
        shared = (norms == largest) | norms.isnan()
        slope = torch.where(shared, 2 * weight / shared.sum().to(norms.dtype) * (largest - target), 0.0)
    zero = norms < torch.finfo(norms.dtype).tiny
    return wide * spread(torch.where(zero, 0.0, 1 / torch.where(zero, 1.0, norms))) * spread(slope)


def gradient_penalty_fwd(
    grads: Tensor, kind: str, weight: float, target: float, norm: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The penalty, the norms, and the gradient of the penalty.

    Args:
        grads: ``[B, ...]``, floating.
        kind: "two-sided", "one-sided", "squared" or "max".
        weight: factor of the penalty.
        target: what the norms are compared with.
        norm: "sample" or "pixel".

    Returns:
        ``penalty`` 0-dim and ``norms``, in the accumulation dtype; ``cotangent = dP / dgrads``, like ``grads``.
    """
    dtype = accumulation_dtype(grads.dtype)
    exact = gradient_norms(grads, norm)
    norms = exact.to(dtype)
    if kind == "two-sided":
        penalty = weight * (exact - target).square().mean()
    elif kind == "one-sided":
        penalty = weight * (exact - target).clamp_min(0).square().mean()
    elif kind == "squared":
        penalty = weight * exact.square().mean() / 2
    else:
        # Norms that are equal in the dtype they are returned in share the maximum.
        penalty = weight * (norms.max().double() - target).square()
    return penalty.to(dtype), norms, gradient_cotangent(grads, norms, kind, weight, target).to(grads.dtype)
