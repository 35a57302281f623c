"""The op ``spectral_norm``: its public functions.

backends.py  schema, one implementation per backend, fake implementations
cuda.py      that of CUDA C++
layout.py    how weights lie in memory
autograd.py  first and second order
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lipgan._checks import check_floating, check_positive
from lipgan.ops import _backend
from lipgan.ops.spectral_norm.autograd import normalize
from lipgan.ops.spectral_norm.backends import move_vectors, split_vectors

__all__ = ["move_vectors", "normalize", "spectral_norm", "spectral_norm_group", "split_vectors"]


def _check(weight: Tensor, u: Tensor, v: Tensor, dim: int) -> None:
    if weight.ndim < 2:
        raise ValueError(f"weight must have at least 2 dimensions, got shape {tuple(weight.shape)}")
    check_floating("weight", weight)
    if weight.numel() == 0:
        raise ValueError(f"weight must not be empty, got shape {tuple(weight.shape)}")
    h = weight.shape[dim]
    for name, vector, size in (("u", u, h), ("v", v, weight.numel() // h)):
        if vector.shape != (size,):
            raise ValueError(
                f"{name} must have shape ({size},) for a weight of shape {tuple(weight.shape)} and dim {dim}, "
                f"got {tuple(vector.shape)}"
            )
        if vector.dtype != weight.dtype:
            raise TypeError(f"{name} must have the dtype of weight, {weight.dtype}, got {vector.dtype}")
        if vector.device != weight.device:
            raise ValueError(f"{name} must be on the device of weight, {weight.device}, got {vector.device}")


def spectral_norm_group(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dims: Sequence[int] | None = None,
    *,
    backend: str | None = None,
) -> tuple[list[Tensor], Tensor, list[Tensor], list[Tensor]]:
    """Normalize several weights by one call: :func:`spectral_norm` for each of them.

    Args:
        weights: tensors of one dtype on one device.
        us: ``[h]`` each.
        vs: ``[w]`` each.
        n_power_iterations: as in :func:`spectral_norm`.
        eps: as in :func:`spectral_norm`.
        dims: one per weight; None for 0 everywhere.
        backend: as in :func:`spectral_norm`.

    Returns:
        ``(ys, sigma, us, vs)``: lists, and ``sigma`` of shape ``[len(weights)]``.

    Raises:
        As :func:`spectral_norm`; ValueError if the lists differ in length or the weights in dtype or device.
    """
    if len(weights) == 0:
        raise ValueError("weights must hold at least one tensor, got none")
    dims = [0] * len(weights) if dims is None else list(dims)
    if not len(weights) == len(us) == len(vs) == len(dims):
        raise ValueError(
            "weights, us, vs and dims must have the same length, "
            f"got {len(weights)}, {len(us)}, {len(vs)} and {len(dims)}"
        )
    if n_power_iterations < 0:
        raise ValueError(f"n_power_iterations must not be negative, got {n_power_iterations}")
    check_positive("eps", eps)
    first = weights[0]
    for layer, weight in enumerate(weights):
        if not -weight.ndim <= dims[layer] < max(weight.ndim, 1):
            raise IndexError(
                f"dim must be in [{-weight.ndim}, {weight.ndim - 1}] for a weight of shape {tuple(weight.shape)}, "
                f"got {dims[layer]}"
            )
        dims[layer] %= max(weight.ndim, 1)
        _check(weight, us[layer], vs[layer], dims[layer])
        if weight.dtype != first.dtype or weight.device != first.device:
            raise ValueError(
                "weights must share one dtype and device, "
                f"got {first.dtype} on {first.device} and {weight.dtype} on {weight.device}"
            )
    ys, sigma, uv = normalize(weights, us, vs, n_power_iterations, eps, dims, _backend.check(backend))
    new_us, new_vs = split_vectors(uv, weights, dims)
    return list(ys), sigma, new_us, new_vs


def spectral_norm(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int = 0,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Power iteration, sigma and ``weight / sigma``, as a function without side effects.

    The matrix of the weight is ``weight.movedim(dim, 0).flatten(1)``, ``[h, w]``. An iteration is ``u = W v / |W v|``,
    ``v = W^T u / |W^T u|``; then ``sigma = u^T W v``. Differentiable any number of times in ``weight``, with u and v
    held constant, as in Miyato et al. 2018 (Algorithm 1, eq. 20-22). The transforms of torch.func, forward-mode
    differentiation, and tracers and exporters see PyTorch's own operations, whatever the backend.

    Args:
        weight: two or more dimensions; float32, float64, float16 or bfloat16 (sums of half types are float32).
        u: ``[h]``, in the dtype of ``weight``.
        v: ``[w]``, likewise.
        n_power_iterations: 0 takes sigma of the u and v given.
        eps: lower bound on a norm that is divided by.
        dim: the dimension that becomes the rows.
        backend: "reference", "native", "triton" or "cuda"; None for the best available.

    Returns:
        ``(y, sigma, u, v)``, all fresh: ``y`` shaped as ``weight``, in its memory format; ``sigma`` 0-dim, float32 or
        (for float64) float64; the new u and v. A zero matrix gives zeros, with finite gradients.

    Raises:
        ValueError: a wrong shape or device of u or v, an empty weight, ``eps <= 0``, ``n_power_iterations < 0``, an
            unknown backend.
        TypeError: an integer or complex weight, or u or v of another dtype.
        IndexError: ``dim`` out of range.
        UnavailableError: the backend asked for cannot serve here.
    """
    (y,), sigma, (u,), (v,) = spectral_norm_group([weight], [u], [v], n_power_iterations, eps, [dim], backend=backend)
    return y, sigma[0], u, v
