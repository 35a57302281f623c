"""The ops ``lipgan::spectral_norm_fwd`` and ``_bwd`` as each backend serves them, and their fake implementations.

They are functional: they return fresh tensors and change none. They take a group of weights, and a single weight is a
group of one. Y and dW have the memory format of the weight, the strides that ``torch.empty_like`` gives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lipgan._dtypes import accumulation_dtype
from lipgan.ops import _backend, _transforms
from lipgan.ops._address import DTYPE_NUMBERS, materialized
from lipgan.ops.spectral_norm import cuda
from lipgan.ops.spectral_norm.layout import Layouts, are_contiguous, as_lying, laid_alike, layouts_of
from lipgan.reference import spectral_norm as reference

# (ys, sigma, uv): uv holds u and v of the first weight, u and v of the second, ... in one tensor of one dimension.
Forward = tuple[list[Tensor], Tensor, Tensor]
# The gradients by dY and Y, of each weight, by sigma and by dsigma.
DoubleBackward = tuple[list[Tensor], list[Tensor], Tensor, Tensor]

_library = torch.library.Library("lipgan", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "spectral_norm_fwd(Tensor[] weights, Tensor[] us, Tensor[] vs, int n_power_iterations, float eps, int[] dims, "
    "str? backend) -> (Tensor[], Tensor, Tensor)"
)
_library.define(  # type: ignore[no-untyped-call]
    "spectral_norm_bwd(Tensor[] grad_ys, Tensor? grad_sigma, Tensor[] ys, Tensor sigma, Tensor uv, int[] dims, "
    "str? backend) -> Tensor[]"
)


def _vector_sizes(weights: Sequence[Tensor], dims: Sequence[int]) -> list[int]:
    """The sizes of u and v of every weight, in the order of uv."""
    sizes = []
    for weight, dim in zip(weights, dims, strict=True):
        h = weight.shape[dim]
        sizes += [h, weight.numel() // h]
    return sizes


def split_vectors(uv: Tensor, weights: Sequence[Tensor], dims: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """The vectors u and the vectors v in uv, as views."""
    views = torch.split_with_sizes(uv, _vector_sizes(weights, dims))
    return list(views[::2]), list(views[1::2])


def join_vectors(us: Sequence[Tensor], vs: Sequence[Tensor]) -> Tensor:
    return torch.cat([vector for pair in zip(us, vs, strict=True) for vector in pair])


def _as_formatted(results: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous results in the memory format of ``like``."""
    return [
        result if tensor.is_contiguous() else torch.empty_like(tensor).copy_(result)
        for result, tensor in zip(results, like, strict=True)
    ]


def move_vectors(uv: Tensor, vectors: Sequence[Tensor]) -> bool:
    """Copy uv into the ``vectors`` u, v, u, v, ... by one call of C++; False, and nothing done, where that can't be."""
    if not _backend.is_plain((uv, *vectors)) or _transforms.active() or torch._C._get_tracing_state() is not None:
        return False
    if uv.device.type != "cpu" or uv.dtype not in DTYPE_NUMBERS or torch.is_inference_mode_enabled():
        return False
    if _backend.resolve("spectral_norm", None, "cpu") != "native":
        return False
    moved: bool = _backend.serving_native().spectral_norm_move(uv, vectors)
    if moved:
        torch.autograd.graph.increment_version(vectors)
    return moved


# ---- reference: PyTorch, everywhere ----


def _reference_fwd(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    n_power_iterations: int,
    eps: float,
    dims: Sequence[int],
) -> Forward:
    ys, sigma, us, vs = reference.spectral_norm_fwd(weights, us, vs, n_power_iterations, eps, dims)
    return _as_formatted(ys, weights), sigma, join_vectors(us, vs)


def _reference_bwd(
    grad_ys: Sequence[Tensor],
    grad_sigma: Tensor | None,
    ys: Sequence[Tensor],
    sigma: Tensor,
    uv: Tensor,
    dims: Sequence[int],
) -> list[Tensor]:
    us, vs = split_vectors(uv, ys, dims)
    return _as_formatted(reference.spectral_norm_bwd(grad_ys, grad_sigma, ys, sigma, us, vs, dims), ys)


def _reference_double_bwd(
    grads: Sequence[Tensor],
    grad_ys: Sequence[Tensor],
    ys: Sequence[Tensor],
    sigma: Tensor,
    uv: Tensor,
    dims: Sequence[int],
) -> DoubleBackward:
    us, vs = split_vectors(uv, ys, dims)
    return reference.spectral_norm_double_bwd(grads, grad_ys, ys, sigma, us, vs, dims)


# ---- native: C++ on CPU tensors, arrays [outer, h, inner], as which it reads whatever layout.py describes ----


def _arrays(tensors: Sequence[Tensor], layouts: Layouts) -> list[Tensor]:
    """The memory of tensors, ``[outer, h, inner]`` each."""
    arrays = []
    for tensor, (dim, inner, _) in zip(tensors, layouts or (), strict=True):
        h = tensor.shape[dim]
        size = (tensor.numel() // (h * inner), h, inner)
        arrays.append(materialized(tensor).as_strided(size, (h * inner, inner, 1)))
    return arrays


def _in_memory_order(vs: Sequence[Tensor], layouts: Layouts) -> list[Tensor]:
    return [
        v.reshape(channels, -1).t().reshape(-1) if channels < v.numel() else v
        for v, (_, _, channels) in zip(vs, layouts or (), strict=True)
    ]


def _like(arrays: list[Tensor], lying: Sequence[Tensor]) -> list[Tensor]:
    """Arrays that are nobody's yet, as tensors that lie as ``lying``; in place, lest they be views."""
    return [array.as_strided_(tensor.shape, tensor.stride()) for array, tensor in zip(arrays, lying, strict=True)]


def _native_fwd(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    n_power_iterations: int,
    eps: float,
    dims: Sequence[int],
) -> Forward:
    module, threads = _backend.serving_native(), torch.get_num_threads()
    ys: list[Tensor]
    if are_contiguous(weights):
        ys, sigma, uv = module.spectral_norm_fwd(weights, us, vs, n_power_iterations, eps, dims, threads)
        return ys, sigma, uv
    lying, layouts = layouts_of(weights, dims)
    arrays, columns, ones = _arrays(lying, layouts), _in_memory_order(vs, layouts), [1] * len(weights)
    ys, sigma, uv = module.spectral_norm_fwd(arrays, us, columns, n_power_iterations, eps, ones, threads)
    for v, (_, _, channels) in zip(split_vectors(uv, weights, dims)[1], layouts or (), strict=True):
        if channels < v.numel():
            v.view(channels, -1).copy_(v.view(-1, channels).t().clone())
    return as_lying(_like(ys, lying), weights, lying), sigma, uv


def _native_bwd(
    grad_ys: Sequence[Tensor],
    grad_sigma: Tensor | None,
    ys: Sequence[Tensor],
    sigma: Tensor,
    uv: Tensor,
    dims: Sequence[int],
    spent: Sequence[bool] | None = None,
) -> list[Tensor]:
    module, threads = _backend.serving_native(), torch.get_num_threads()
    grads: list[Tensor]
    spent = spent or [False] * len(ys)
    if are_contiguous(ys):
        grads = module.spectral_norm_bwd(grad_ys, grad_sigma, ys, sigma, uv, dims, spent, threads)
        return grads
    lying, layouts = layouts_of(ys, dims)
    us, vs = split_vectors(uv, ys, dims)
    vectors = join_vectors(us, _in_memory_order(vs, layouts))
    grad_arrays, ones = _arrays(laid_alike(grad_ys, lying, layouts), layouts), [1] * len(ys)
    grads = module.spectral_norm_bwd(
        grad_arrays, grad_sigma, _arrays(lying, layouts), sigma, vectors, ones, spent, threads
    )
    return as_lying(_like(grads, lying), ys, lying)


def _native_double_bwd(
    grads: Sequence[Tensor],
    grad_ys: Sequence[Tensor],
    ys: Sequence[Tensor],
    sigma: Tensor,
    uv: Tensor,
    dims: Sequence[int],
) -> DoubleBackward:
    module, threads = _backend.serving_native(), torch.get_num_threads()
    result: DoubleBackward
    if are_contiguous(ys):
        result = module.spectral_norm_double_bwd(grads, grad_ys, ys, sigma, uv, dims, threads)
        return result
    lying, layouts = layouts_of(ys, dims)
    us, vs = split_vectors(uv, ys, dims)
    arrays = [_arrays(laid_alike(tensors, lying, layouts), layouts) for tensors in (grads, grad_ys, lying)]
    vectors = join_vectors(us, _in_memory_order(vs, layouts))
    result = module.spectral_norm_double_bwd(*arrays, sigma, vectors, [1] * len(ys), threads)
    return _like(result[0], lying), _like(result[1], lying), result[2], result[3]


# ---- triton: GPU tensors, or CPU tensors in Triton's interpreter; as they lie, where layout.py can say how ----


@functools.cache
def _kernels() -> Any:
    from lipgan.kernels import spectral_norm  # Triton takes a second to import, and only its backend needs it

    return spectral_norm


def _triton_fwd(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    n_power_iterations: int,
    eps: float,
    dims: Sequence[int],
) -> Forward:
    lying, layouts = layouts_of(weights, dims)
    ys, sigma, uv = _kernels().spectral_norm_fwd(
        lying, [u.contiguous() for u in us], [v.contiguous() for v in vs], n_power_iterations, eps, layouts
    )
    return as_lying(ys, weights, lying), sigma, uv


def _triton_bwd(
    grad_ys: Sequence[Tensor],
    grad_sigma: Tensor | None,
    ys: Sequence[Tensor],
    sigma: Tensor,
    uv: Tensor,
    dims: Sequence[int],
) -> list[Tensor]:
    lying, layouts = layouts_of(ys, dims)
    grads = laid_alike(grad_ys, lying, layouts)
    results: list[Tensor] = _kernels().spectral_norm_bwd(grads, grad_sigma, lying, sigma, uv.contiguous(), layouts)
    return as_lying(results, ys, lying)


def _triton_double_bwd(
    grads: Sequence[Tensor],
    grad_ys: Sequence[Tensor],
    ys: Sequence[Tensor],
    sigma: Tensor,
    uv: Tensor,
    dims: Sequence[int],
) -> DoubleBackward:
    lying, layouts = layouts_of(ys, dims)
    results: DoubleBackward = _kernels().spectral_norm_double_bwd(
        laid_alike(grads, lying, layouts),
        laid_alike(grad_ys, lying, layouts),
        lying,
        sigma,
        uv.contiguous(),
        layouts,
    )
    return results


_FORWARD: dict[str, Callable[..., Forward]] = {
    "reference": _reference_fwd,
    "native": _native_fwd,
    "triton": _triton_fwd,
    "cuda": cuda.fwd,
}
_BACKWARD: dict[str, Callable[..., list[Tensor]]] = {
    "reference": _reference_bwd,
    "native": _native_bwd,
    "triton": _triton_bwd,
    "cuda": cuda.bwd,
}
_DOUBLE_BACKWARD: dict[str, Callable[..., DoubleBackward]] = {
    "reference": _reference_double_bwd,
    "native": _native_double_bwd,
    "triton": _triton_double_bwd,
}


def _first(ys: Sequence[Tensor]) -> str | None:
    """The backend to be tried first for a backward: CUDA's one launch where a GPU is done before its host."""
    if not ys[0].is_cuda:
        return None
    size = sum([y.numel() for y in ys]) * ys[0].element_size()
    return "cuda" if size <= _backend.BYTES_OF_ONE_LAUNCH else None


def fwd(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    n_power_iterations: int,
    eps: float,
    dims: Sequence[int],
    backend: str | None,
) -> Forward:
    return _FORWARD[_backend.resolve("spectral_norm", backend, weights[0].device.type)](
        weights, us, vs, n_power_iterations, eps, dims
    )


def bwd(
    grad_ys: Sequence[Tensor],
    grad_sigma: Tensor | None,
    ys: Sequence[Tensor],
    sigma: Tensor,
    uv: Tensor,
    dims: Sequence[int],
    backend: str | None,
) -> list[Tensor]:
    return _BACKWARD[_backend.resolve("spectral_norm", backend, ys[0].device.type, _first(ys))](
        grad_ys, grad_sigma, ys, sigma, uv, dims
    )


def spending_bwd(
    grad_ys: Sequence[Tensor],
    grad_sigma: Tensor | None,
    ys: Sequence[Tensor],
    sigma: Tensor,
    uv: Tensor,
    dims: Sequence[int],
    backend: str | None,
    spent: Sequence[bool],
) -> list[Tensor]:
    """:func:`bwd` that may write the gradients over the ``ys`` that are ``spent``. It is no op: it changes tensors."""
    if _backend.resolve("spectral_norm", backend, ys[0].device.type) == "native":
        grads = _native_bwd(grad_ys, grad_sigma, ys, sigma, uv, dims, spent)
        # A hook on the backward that asks for what was saved gets an error instead of a gradient.
        torch.autograd.graph.increment_version([y for y, over in zip(ys, spent, strict=True) if over])
        return grads
    return bwd(grad_ys, grad_sigma, ys, sigma, uv, dims, backend)


def double_bwd(
    grads: Sequence[Tensor],
    grad_ys: Sequence[Tensor],
    ys: Sequence[Tensor],
    sigma: Tensor,
    uv: Tensor,
    dims: Sequence[int],
    backend: str | None,
) -> DoubleBackward:
    """The derivative of :func:`bwd` for gradients ``grads`` of its results. It is no op: nothing differentiates it."""
    device = ys[0].device.type
    chosen = _backend.resolve("spectral_norm", backend, device)
    return _DOUBLE_BACKWARD[_backend.serving("spectral_norm", "second order", chosen, device)](
        grads, grad_ys, ys, sigma, uv, dims
    )


for _key in ("CPU", "CUDA"):
    _library.impl("spectral_norm_fwd", fwd, _key)  # type: ignore[no-untyped-call]
    _library.impl("spectral_norm_bwd", bwd, _key)  # type: ignore[no-untyped-call]


@torch.library.register_fake("lipgan::spectral_norm_fwd", lib=_library)  # type: ignore[untyped-decorator]
def _fwd_fake(
    weights: list[Tensor],
    us: list[Tensor],
    vs: list[Tensor],
    n_power_iterations: int,
    eps: float,
    dims: list[int],
    backend: str | None,
) -> Forward:
    sigma = weights[0].new_empty(len(weights), dtype=accumulation_dtype(weights[0].dtype))
    uv = us[0].new_empty(sum(_vector_sizes(weights, dims)))
    return [torch.empty_like(weight) for weight in weights], sigma, uv


@torch.library.register_fake("lipgan::spectral_norm_bwd", lib=_library)  # type: ignore[untyped-decorator]
def _bwd_fake(
    grad_ys: list[Tensor],
    grad_sigma: Tensor | None,
    ys: list[Tensor],
    sigma: Tensor,
    uv: Tensor,
    dims: list[int],
    backend: str | None,
) -> list[Tensor]:
    return [torch.empty_like(y) for y in ys]
