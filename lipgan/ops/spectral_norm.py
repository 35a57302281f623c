"""The op ``spectral_norm`` at the boundary of PyTorch's dispatcher.

``lipgan::spectral_norm_fwd`` and ``lipgan::spectral_norm_bwd`` are functional: they return fresh tensors and change
none. They take a group of weights, and a single weight is a group of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lipgan._checks import check_floating
from lipgan._dtypes import accumulation_dtype
from lipgan.ops import _backend
from lipgan.ops._address import DTYPE_NUMBERS, address
from lipgan.reference import spectral_norm as reference

# (ys, sigma, uv): uv holds u and v of the first weight, u and v of the second, ... in one tensor of one dimension.
Forward = tuple[list[Tensor], Tensor, Tensor]

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


def _join_vectors(us: Sequence[Tensor], vs: Sequence[Tensor]) -> Tensor:
    return torch.cat([vector for pair in zip(us, vs, strict=True) for vector in pair])


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
    return ys, sigma, _join_vectors(us, vs)


def _reference_bwd(
    grad_ys: Sequence[Tensor],
    grad_sigma: Tensor | None,
    ys: Sequence[Tensor],
    sigma: Tensor,
    uv: Tensor,
    dims: Sequence[int],
) -> list[Tensor]:
    us, vs = split_vectors(uv, ys, dims)
    return reference.spectral_norm_bwd(grad_ys, grad_sigma, ys, sigma, us, vs, dims)


# ---- native: C++ on CPU tensors ----


def _native_fwd(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    n_power_iterations: int,
    eps: float,
    dims: Sequence[int],
) -> Forward:
    module: Any = _backend.native()
    ys, sigma, uv = module.spectral_norm_fwd(weights, us, vs, n_power_iterations, eps, dims, torch.get_num_threads())
    return ys, sigma, uv


def _native_bwd(
    grad_ys: Sequence[Tensor],
    grad_sigma: Tensor | None,
    ys: Sequence[Tensor],
    sigma: Tensor,
    uv: Tensor,
    dims: Sequence[int],
) -> list[Tensor]:
    module: Any = _backend.native()
    grads: list[Tensor] = module.spectral_norm_bwd(grad_ys, grad_sigma, ys, sigma, uv, dims, torch.get_num_threads())
    return grads


def _matrices(tensors: Sequence[Tensor], dims: Sequence[int]) -> list[Tensor]:
    return [reference.to_matrix(tensor, dim).contiguous() for tensor, dim in zip(tensors, dims, strict=True)]


def _weights(matrices: Sequence[Tensor], like: Sequence[Tensor], dims: Sequence[int]) -> list[Tensor]:
    return [
        reference.from_matrix(matrix, tensor, dim).contiguous()
        for matrix, tensor, dim in zip(matrices, like, dims, strict=True)
    ]


# ---- triton: GPU tensors, or CPU tensors in Triton's interpreter; matrices [h, w] ----


def _triton_fwd(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    n_power_iterations: int,
    eps: float,
    dims: Sequence[int],
) -> Forward:
    from lipgan.kernels import spectral_norm as kernels

    us, vs = [u.contiguous() for u in us], [v.contiguous() for v in vs]
    ys, sigma, us, vs = kernels.spectral_norm_fwd(_matrices(weights, dims), us, vs, n_power_iterations, eps)
    return _weights(ys, weights, dims), sigma, _join_vectors(us, vs)


def _triton_bwd(
    grad_ys: Sequence[Tensor],
    grad_sigma: Tensor | None,
    ys: Sequence[Tensor],
    sigma: Tensor,
    uv: Tensor,
    dims: Sequence[int],
) -> list[Tensor]:
    from lipgan.kernels import spectral_norm as kernels

    us, vs = split_vectors(uv.contiguous(), ys, dims)
    grads = kernels.spectral_norm_bwd(
        _matrices(grad_ys, dims),
        None if grad_sigma is None else grad_sigma.contiguous(),
        _matrices(ys, dims),
        sigma.contiguous(),
        us,
        vs,
    )
    return _weights(grads, ys, dims)


# ---- cuda: the grouped forward as one cooperative launch; its backward is Triton's ----


def _cuda_fwd(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    n_power_iterations: int,
    eps: float,
    dims: Sequence[int],
) -> Forward:
    module = _backend.cuda()
    assert module is not None
    device, dtype = weights[0].device, weights[0].dtype
    matrices = _matrices(weights, dims)
    us, vs = [u.contiguous() for u in us], [v.contiguous() for v in vs]
    ys = [torch.empty_like(matrix) for matrix in matrices]
    uv = torch.empty(sum(_vector_sizes(weights, dims)), dtype=dtype, device=device)
    new_us, new_vs = split_vectors(uv, weights, dims)
    sigma = torch.empty(len(weights), dtype=accumulation_dtype(dtype), device=device)
    layers = []
    for matrix, u, v, y, new_u, new_v in zip(matrices, us, vs, ys, new_us, new_vs, strict=True):
        h, w = matrix.shape
        row = ((matrix, h * w), (u, h), (v, w), (y, h * w), (new_u, h), (new_v, w))
        layers.append((*(address(tensor, dtype, numel, device.type) for tensor, numel in row), h, w))
    workspace_size = module.spectral_norm_fwd_workspace(layers)
    table_size = module.spectral_norm_fwd_table_size(len(layers))
    workspace = torch.empty(workspace_size, dtype=torch.uint8, device=device)
    table = torch.empty(table_size, dtype=torch.uint8, device=device)
    with torch.cuda.device(device):
        module.spectral_norm_fwd(
            DTYPE_NUMBERS[dtype],
            layers,
            address(sigma, sigma.dtype, len(layers), device.type),
            n_power_iterations,
            eps,
            address(workspace, torch.uint8, workspace_size, device.type),
            address(table, torch.uint8, table_size, device.type),
            torch.cuda.current_stream(device).cuda_stream,
        )
    return _weights(ys, weights, dims), sigma, uv


_FORWARD: dict[str, Callable[..., Forward]] = {
    "reference": _reference_fwd,
    "native": _native_fwd,
    "triton": _triton_fwd,
    "cuda": _cuda_fwd,
}
_BACKWARD: dict[str, Callable[..., list[Tensor]]] = {
    "reference": _reference_bwd,
    "native": _native_bwd,
    "triton": _triton_bwd,
    "cuda": _triton_bwd,
}


def _fwd(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    n_power_iterations: int,
    eps: float,
    dims: Sequence[int],
    backend: str | None,
) -> Forward:
    return _FORWARD[_backend.resolve(backend, weights[0].device.type)](weights, us, vs, n_power_iterations, eps, dims)


def _bwd(
    grad_ys: Sequence[Tensor],
    grad_sigma: Tensor | None,
    ys: Sequence[Tensor],
    sigma: Tensor,
    uv: Tensor,
    dims: Sequence[int],
    backend: str | None,
) -> list[Tensor]:
    return _BACKWARD[_backend.resolve(backend, ys[0].device.type)](grad_ys, grad_sigma, ys, sigma, uv, dims)


for _key in ("CPU", "CUDA"):
    _library.impl("spectral_norm_fwd", _fwd, _key)  # type: ignore[no-untyped-call]
    _library.impl("spectral_norm_bwd", _bwd, _key)  # type: ignore[no-untyped-call]


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
    return [weight.new_empty(weight.shape) for weight in weights], sigma, uv


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
    return [y.new_empty(y.shape) for y in ys]


# ---- autograd ----


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
    function = _fwd if _backend.is_plain(weights) else torch.ops.lipgan.spectral_norm_fwd.default
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
                uv = _join_vectors([us[layer] for layer in reached], [vs[layer] for layer in reached])
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
                function = _bwd if _backend.is_plain(grad_ys) else torch.ops.lipgan.spectral_norm_bwd.default
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


# ---- the public functions ----


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
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
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
    held constant, as in Miyato et al. 2018 (Algorithm 1, eq. 20-22).

    Args:
        weight: two or more dimensions; float32, float64, float16 or bfloat16 (sums of half types are float32).
        u: ``[h]``, in the dtype of ``weight``.
        v: ``[w]``, likewise.
        n_power_iterations: 0 takes sigma of the u and v given.
        eps: lower bound on a norm that is divided by.
        dim: the dimension that becomes the rows.
        backend: "reference", "native", "triton" or "cuda"; None for the best available.

    Returns:
        ``(y, sigma, u, v)``, all fresh: ``y`` shaped as ``weight`` and contiguous; ``sigma`` 0-dim, float32 or
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
