"""The derivative of spectral normalization, and of that derivative."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lipgan.ops import _backend, _transforms
from lipgan.ops.spectral_norm.backends import double_bwd, fwd, join_vectors, spending_bwd, split_vectors
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
        ctx.dims, ctx.backend, uv, grad_sigma, sigma, *tensors = inputs
        ctx.has_grad_sigma = grad_sigma is not None
        ctx.save_for_backward(uv, sigma, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        uv, sigma, *tensors = ctx.saved_tensors
        grad_ys, ys = tensors[: len(ctx.dims)], tensors[len(ctx.dims) :]
        if torch.is_grad_enabled() or _transforms.are_batched(grads) or not _backend.is_plain((*grads, *grad_ys)):
            # Plain differentiable PyTorch, so that every higher order follows.
            us, vs = split_vectors(uv, ys, ctx.dims)
            results = reference.spectral_norm_double_bwd(grads, grad_ys, ys, sigma, us, vs, ctx.dims)
        else:
            results = double_bwd(grads, grad_ys, ys, sigma, uv, ctx.dims, ctx.backend)
        to_grad_ys, to_ys, to_sigma, to_grad_sigma = results
        return None, None, None, to_grad_sigma if ctx.has_grad_sigma else None, to_sigma, *to_grad_ys, *to_ys


def _undifferentiated(
    dims: Sequence[int],
    backend: str | None,
    n_power_iterations: int,
    eps: float,
    vectors: tuple[Sequence[Tensor], Sequence[Tensor]],
    weights: Sequence[Tensor],
) -> tuple[Sequence[Tensor], Tensor, Tensor]:
    """``(ys, sigma, uv)``, without a graph."""
    function = fwd if _backend.is_plain(weights) else torch.ops.lipgan.spectral_norm_fwd.default
    ys, sigma, uv = function(weights, vectors[0], vectors[1], n_power_iterations, eps, dims, backend)
    return ys, sigma, uv


def _differentiates(weights: Sequence[Tensor]) -> bool:
    if not torch.is_grad_enabled():
        return False
    for weight in weights:  # noqa: SIM110 -- any() of a generator takes three times as long
        if weight.requires_grad:
            return True
    return False


# Whether the running backward keeps the graph for another one. Torch's compiler asks the same before it writes over
# what was saved.
_keeps_graph: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _saves_as_it_is() -> bool:
    """Whether no hook decides what becomes of tensors that are saved for a backward."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def _holders(tensor: Tensor) -> int:
    """How many hold the memory of a tensor: tensors, and Python's names for its storage, which all are one object."""
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) + sys.getrefcount(storage)


@functools.cache
def _holders_of_saved() -> int:
    """`_holders` in the backward of a function of an output that nothing but this function has saved."""
    counts = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            y = x.clone()
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx: Any, _: Tensor) -> None:
            (y,) = ctx.saved_tensors
            counts.append(_holders(y))

    # A mode of the caller's could keep the tensors that it sees, and its default device is not the one in question.
    with torch._C.DisableTorchFunction(), torch.enable_grad():
        Probe.apply(torch.ones(1, device="cpu", requires_grad=True)).sum().backward()  # type: ignore[no-untyped-call]
    return counts[0]


def _spent(ys: Sequence[Tensor]) -> list[bool]:
    """Which of the outputs that this backward has saved can be read by nobody after it.

    The graph is not kept, and no other tensor has their memory: no normalized weight in the hands of the user, no part
    of another graph, no view; nor another process.
    """
    if _keeps_graph() or not _saves_as_it_is():
        return [False] * len(ys)
    alone = _holders_of_saved()
    return [_holders(y) == alone and not y.untyped_storage().is_shared() for y in ys]


class _SpectralNorm(torch.autograd.Function):
    """weights -> (uv, sigma, ys); u and v are constants of the differentiation."""

    @staticmethod
    def forward(
        ctx: Any,
        dims: Sequence[int],
        backend: str | None,
        n_power_iterations: int,
        eps: float,
        vectors: tuple[Sequence[Tensor], Sequence[Tensor]],
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        ys, sigma, uv = _undifferentiated(dims, backend, n_power_iterations, eps, vectors, weights)
        ctx.dims, ctx.backend = dims, backend
        ctx.spends = not torch.compiler.is_compiling() and _saves_as_it_is()
        ctx.mark_non_differentiable(uv)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(uv, sigma, *ys)
        return (uv, sigma, *ys)

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
            if _transforms.are_batched(grad_ys):
                us, vs = split_vectors(uv, ys, dims)
                inner = reference.spectral_norm_bwd(grad_ys, grad_sigma, ys, sigma, us, vs, dims)
            elif torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
                inner = _Backward.apply(dims, ctx.backend, uv, grad_sigma, sigma, *grad_ys, *ys)  # type: ignore[no-untyped-call]
            elif _backend.is_plain(grad_ys):
                spent = _spent(ys) if ctx.spends else [False] * len(ys)
                inner = spending_bwd(grad_ys, grad_sigma, ys, sigma, uv, dims, ctx.backend, spent)
            else:
                inner = torch.ops.lipgan.spectral_norm_bwd.default(
                    grad_ys, grad_sigma, ys, sigma, uv, dims, ctx.backend
                )
            for layer, grad in zip(reached, inner, strict=True):
                result[layer] = grad
        return (None, None, None, None, None, *result)


def _is_traced() -> bool:
    """Whether a graph is being made for other programs: by torch.jit.trace, torch.onnx.export or torch.export."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch._C._get_tracing_state() is not None


def _composes(weights: Sequence[Tensor]) -> bool:
    """Whether the call has to be made of PyTorch's own operations.

    Transforms of torch.func and forward-mode differentiation have rules for those, at every depth; programs that read
    an exported graph know no others; and complex weights have no kernels.
    """
    if _transforms.active() or weights[0].is_complex():
        return True
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


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

    Under transforms, forward-mode differentiation, tracers and exporters, and for complex weights, it is the reference,
    whatever the backend.

    Returns:
        ``(ys, sigma, uv)``; :func:`split_vectors` takes uv apart.
    """
    traced = _is_traced()
    if traced or _composes(weights):
        ys, sigma, new_us, new_vs = reference.spectral_norm_fwd(
            weights, us, vs, n_power_iterations, eps, dims, scaled=not traced
        )
        return ys, sigma, join_vectors(new_us, new_vs)
    if not torch.compiler.is_compiling() and not _differentiates(weights):
        # The way through an autograd function takes longer than a small layer's arithmetic.
        return _undifferentiated(dims, backend, n_power_iterations, eps, (us, vs), weights)
    uv, sigma, *ys = _SpectralNorm.apply(dims, backend, n_power_iterations, eps, (us, vs), *weights)  # type: ignore[no-untyped-call]
    return ys, sigma, uv
