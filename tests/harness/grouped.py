"""The Triton launchers of spectral_norm with u and v as lists, a vector of each layer; inputs of its second order."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from lipgan.kernels import spectral_norm as kernels
from tolerance import assert_as_accurate
from torch import Tensor

from lipgan.reference import spectral_norm as reference


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


def spectral_norm_double_bwd(
    grads: Sequence[Tensor],
    grad_ys: Sequence[Tensor],
    ys: Sequence[Tensor],
    sigma: Tensor,
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """(to_grad_ys, to_ys, to_sigma, to_grad_sigma)."""
    uv = torch.cat([x for pair in zip(us, vs, strict=True) for x in pair])
    return kernels.spectral_norm_double_bwd(grads, grad_ys, ys, sigma, uv)


# What a call of the double backward takes: G, dY, Y of each weight, sigma, u and v of each weight.
Double = tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, list[Tensor], list[Tensor]]


def double_inputs(shapes: Sequence[tuple[int, ...]], dims: Sequence[int], dtype: torch.dtype) -> Double:
    """Random ones, with unit vectors."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    hs = [shape[dim] for shape, dim in zip(shapes, dims, strict=True)]
    sizes = [(h, math.prod(shape) // h) for shape, h in zip(shapes, hs, strict=True)]
    us, vs = ([torch.nn.functional.normalize(random(size[k]), dim=0).to(dtype) for size in sizes] for k in (0, 1))
    grads, grad_ys, ys = ([random(*shape).to(dtype) for shape in shapes] for _ in range(3))
    sigma = torch.rand(len(shapes), dtype=torch.float64 if dtype == torch.float64 else torch.float32) + 0.5
    return grads, grad_ys, ys, sigma, us, vs


def assert_double_accurate(
    results: tuple[Sequence[Tensor], Sequence[Tensor], Tensor, Tensor],
    inputs: Double,
    dims: Sequence[int],
    roundings: float = 8.0,
) -> None:
    """Against the reference in float64, and against itself in the dtypes given."""
    exact = reference.spectral_norm_double_bwd(*map(_widened, inputs), dims)
    peer = reference.spectral_norm_double_bwd(*inputs, dims)
    grads, grad_ys, ys, sigma, us, vs = map(_widened, inputs)
    for i, dim in enumerate(dims):
        narrow = torch.finfo(inputs[3].dtype).eps / torch.finfo(inputs[2][i].dtype).eps
        # What the terms of the sums amount to: they cancel, and the results with them.
        along = float(us[i].abs() @ reference.to_matrix(grads[i].abs(), dim) @ vs[i].abs())
        dot = float((grad_ys[i] * ys[i]).abs().sum())
        r = 1 / float(sigma[i])
        largest = [float(x.abs().max()) for x in (grads[i], grad_ys[i], ys[i])]
        of_sums = r * r * (float((grads[i] * grad_ys[i]).abs().sum()) + 2 * dot * along)
        for mine, theirs, true, terms in (
            (results[0][i], peer[0][i], exact[0][i], r * (largest[0] + along * largest[2])),
            (results[1][i], peer[1][i], exact[1][i], r * along * largest[1]),
        ):
            assert mine.dtype == inputs[2][i].dtype
            assert mine.shape == ys[i].shape
            assert_as_accurate(mine, theirs, true, roundings=roundings, scale=float(true.abs().max()) + narrow * terms)
        assert_as_accurate(results[2][i], peer[2][i], exact[2][i], roundings=roundings, scale=of_sums)
        assert_as_accurate(results[3][i], peer[3][i], exact[3][i], roundings=roundings, scale=along)


def _widened(values: Tensor | list[Tensor]) -> Any:
    return values.double() if isinstance(values, Tensor) else [value.double() for value in values]
