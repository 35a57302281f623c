"""The op ``gradient_penalty`` at the boundary of PyTorch's dispatcher.

``lipgan::gradient_penalty_interpolate`` mixes real and generated samples; ``lipgan::gradient_penalty_fwd`` takes the
gradients of a critic at them to the penalty and to the penalty's own gradient. Both are functional.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lipgan._checks import as_number, check_choice, check_samples
from lipgan._dtypes import accumulation_dtype
from lipgan.ops import _backend
from lipgan.ops._address import DTYPE_NUMBERS, address, materialized
from lipgan.reference import gradient_penalty as reference

KINDS = ("two-sided", "one-sided", "squared", "max")
NORMS = ("sample", "pixel")

# (penalty, norms, cotangent)
Penalty = tuple[Tensor, Tensor, Tensor]

_library = torch.library.Library("lipgan", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "gradient_penalty_interpolate(Tensor real, Tensor fake, Tensor mix, str? backend) -> Tensor"
)
_library.define(  # type: ignore[no-untyped-call]
    "gradient_penalty_fwd(Tensor grads, str kind, float weight, float target, str norm, str? backend) "
    "-> (Tensor penalty, Tensor norms, Tensor cotangent)"
)


# ---- layout ----


def _is_dense(tensor: Tensor, dims: list[int]) -> bool:
    """Whether ``dims``, the outermost first, walk over the memory of the tensor without a gap."""
    expected = 1
    for dim in reversed(dims):
        if tensor.shape[dim] != 1:
            if tensor.stride(dim) != expected:
                return False
            expected *= tensor.shape[dim]
    return True


def _is_flat(tensor: Tensor) -> bool:
    """Whether the samples lie one behind the other, each without a gap: contiguous, channels_last, ..."""
    inner = sorted(range(1, tensor.ndim), key=lambda dim: (tensor.stride()[dim], tensor.shape[dim]), reverse=True)
    return _is_dense(tensor, [0, *inner])


def _is_channels_last(tensor: Tensor) -> bool:
    return _is_dense(tensor, [0, *range(2, tensor.ndim), 1])


def _is_channels_last_image(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def _keeps_strides(grads: Tensor, norm: str) -> bool:
    """Whether a kernel serves the gradients as they lie; otherwise it gets a contiguous copy."""
    if norm == "pixel":
        return grads.is_contiguous() or _is_channels_last(grads)
    return _is_flat(grads)


def _served(grads: Tensor, norm: str) -> Tensor:
    return grads if grads.is_contiguous() or _keeps_strides(grads, norm) else grads.contiguous()


def _served_pair(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    if real.stride() == fake.stride() and _is_flat(real):
        return real, fake
    return real.contiguous(), fake.contiguous()


def _as_lying(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` with the strides of ``like``."""
    if tensor.stride() == like.stride():
        return tensor
    return torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _sizes(grads: Tensor, norm: str) -> tuple[int, int, int]:
    """Of gradients that a kernel serves as they lie: the array of their memory, whose norms go over dimension 1."""
    if norm == "sample":
        return grads.shape[0], grads.numel() // grads.shape[0], 1
    outer, length, inner = grads.shape[0], grads.shape[1], math.prod(grads.shape[2:])
    # channels_last: every pixel is a sample of its channels
    return (outer, length, inner) if grads.is_contiguous() else (outer * inner, length, 1)


def _norms_shape(grads: Tensor, norm: str) -> list[int]:
    return [grads.shape[0], *(grads.shape[2:] if norm == "pixel" else ())]


# ---- reference: PyTorch, everywhere ----


def _reference_interpolate(real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    real, fake = _served_pair(real, fake)
    return _as_lying(reference.interpolate(real, fake, mix), real)


def _reference_fwd(grads: Tensor, kind: str, weight: float, target: float, norm: str) -> Penalty:
    grads = _served(grads, norm)
    penalty, norms, cotangent = reference.gradient_penalty_fwd(grads, kind, weight, target, norm)
    return penalty, norms.contiguous(), _as_lying(cotangent, grads)


# ---- native: C++ on CPU tensors ----


def _native_interpolate(real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    module = _backend.serving_native()
    x_hat: Tensor = module.gradient_penalty_interpolate(real, fake, mix, torch.get_num_threads())
    return x_hat


def _native_fwd(grads: Tensor, kind: str, weight: float, target: float, norm: str) -> Penalty:
    module = _backend.serving_native()
    result: Penalty = module.gradient_penalty_fwd(grads, kind, weight, target, norm, torch.get_num_threads())
    return result


# ---- triton: GPU tensors, or CPU tensors in Triton's interpreter; contiguous [B, M] and [B, C, S] ----


def _triton_interpolate(real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    from lipgan.kernels import gradient_penalty as kernels

    real, fake = _served_pair(real, fake)
    flat = (real.shape[0], real.numel() // real.shape[0])
    strides = (flat[1], 1)
    x_hat: Tensor = kernels.gradient_penalty_interpolate(
        real.as_strided(flat, strides), fake.as_strided(flat, strides), mix.contiguous()
    )
    return x_hat.as_strided(real.shape, real.stride())


def _triton_fwd(grads: Tensor, kind: str, weight: float, target: float, norm: str) -> Penalty:
    from lipgan.kernels import gradient_penalty as kernels

    if norm == "sample" and (grads.is_contiguous() or _is_channels_last_image(grads)):
        b = grads.shape[0]
        penalty, norms, cotangent = kernels.gradient_penalty_fwd(
            grads, kind, weight, target, (b, grads.numel() // b, 1)
        )
        return penalty, norms.squeeze(1), cotangent
    grads = _served(grads, norm)
    outer, length, inner = _sizes(grads, norm)
    flat = grads.as_strided((outer, length, inner), (length * inner, inner, 1))
    penalty, norms, cotangent = kernels.gradient_penalty_fwd(flat, kind, weight, target)
    return penalty, norms.view(_norms_shape(grads, norm)), cotangent.as_strided(grads.shape, grads.stride())


# ---- cuda: one launch ----


def _in_memory(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor as they lie."""
    return tensor if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def _cuda_interpolate(real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    module = _backend.cuda()
    assert module is not None
    device, dtype, batch, numel = real.device, real.dtype, real.shape[0], real.numel()
    real, fake = (materialized(tensor) for tensor in _served_pair(real, fake))
    mix = materialized(mix.contiguous())
    x_hat = torch.empty_strided(real.shape, real.stride(), dtype=dtype, device=device)
    with torch.cuda.device(device):
        module.gradient_penalty_interpolate(
            DTYPE_NUMBERS[dtype],
            address(_in_memory(real), dtype, numel, device.type),
            address(_in_memory(fake), dtype, numel, device.type),
            address(mix, accumulation_dtype(dtype), batch, device.type),
            x_hat.data_ptr(),
            batch,
            numel // batch,
            torch.cuda.current_stream(device).cuda_stream,
        )
    return x_hat


def _cuda_fwd(grads: Tensor, kind: str, weight: float, target: float, norm: str) -> Penalty:
    module = _backend.cuda()
    assert module is not None
    grads = materialized(_served(grads, norm))
    device, dtype, wide = grads.device, grads.dtype, accumulation_dtype(grads.dtype)
    number, sizes = DTYPE_NUMBERS[dtype], _sizes(grads, norm)
    norms = torch.empty(_norms_shape(grads, norm), dtype=wide, device=device)
    penalty = torch.empty((), dtype=wide, device=device)
    cotangent = torch.empty_strided(grads.shape, grads.stride(), dtype=dtype, device=device)
    size = module.gradient_penalty_fwd_workspace(number, *sizes)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    with torch.cuda.device(device):
        # Of what was made here the addresses need no check.
        module.gradient_penalty_fwd(
            number,
            KINDS.index(kind),
            address(_in_memory(grads), dtype, math.prod(sizes), device.type),
            penalty.data_ptr(),
            norms.data_ptr(),
            cotangent.data_ptr(),
            *sizes,
            weight,
            target,
            workspace.data_ptr(),
            torch.cuda.current_stream(device).cuda_stream,
        )
    return penalty, norms, cotangent


_INTERPOLATE: dict[str, Callable[..., Tensor]] = {
    "reference": _reference_interpolate,
    "native": _native_interpolate,
    "triton": _triton_interpolate,
    "cuda": _cuda_interpolate,
}
_FORWARD: dict[str, Callable[..., Penalty]] = {
    "reference": _reference_fwd,
    "native": _native_fwd,
    "triton": _triton_fwd,
    "cuda": _cuda_fwd,
}


# Of a row, in float32 or float64: what one of Triton's programs holds (kernels/config.py, `longest_row`).
_BYTES_OF_ONE_PROGRAM = 65536


def _first(grads: Tensor, kind: str, norm: str) -> str | None:
    """The backend to be tried first: CUDA where it has one launch and Triton two, if a GPU is soon done with them.

    That is where all blocks need what they find together: the maximum, or the norm of a row that several of them share.
    """
    if not grads.is_cuda or grads.numel() * grads.element_size() > _backend.BYTES_OF_ONE_LAUNCH:
        return None
    if kind == "max" or _sizes(grads, norm)[1] * max(grads.element_size(), 4) > _BYTES_OF_ONE_PROGRAM:
        return "cuda"
    return None


def _interpolate(real: Tensor, fake: Tensor, mix: Tensor, backend: str | None) -> Tensor:
    return _INTERPOLATE[_backend.resolve("interpolate", backend, real.device.type)](real, fake, mix)


def undispatched(grads: Tensor, kind: str, weight: float, target: float, norm: str, backend: str | None) -> Penalty:
    """``lipgan::gradient_penalty_fwd`` of plain tensors, without the way through the dispatcher and back."""
    serving = _backend.resolve("gradient_penalty", backend, grads.device.type, _first(grads, kind, norm))
    return _FORWARD[serving](grads, kind, weight, target, norm)


# Numbers of which the way to the op and back takes a compiled graph longer than a form that is not our own.
_FUSED_BY_COMPILERS = 2**14


def fusible(grads: Tensor, kind: str, weight: float, target: float, norm: str, backend: str | None) -> Penalty:
    """``lipgan::gradient_penalty_fwd`` for a compiler's graph: few numbers on a CPU as PyTorch's operations, which it
    fuses with those around; otherwise, and where a backend was named, the op."""
    unnamed = backend is None and _backend.serves_unnamed()
    if unnamed and grads.device.type == "cpu" and grads.numel() <= _FUSED_BY_COMPILERS:
        return _reference_fwd(grads, kind, weight, target, norm)
    result: Penalty = torch.ops.lipgan.gradient_penalty_fwd.default(grads, kind, weight, target, norm, backend)
    return result


for _key in ("CPU", "CUDA"):
    _library.impl("gradient_penalty_interpolate", _interpolate, _key)  # type: ignore[no-untyped-call]
    _library.impl("gradient_penalty_fwd", undispatched, _key)  # type: ignore[no-untyped-call]


@torch.library.register_fake("lipgan::gradient_penalty_interpolate", lib=_library)  # type: ignore[untyped-decorator]
def _interpolate_fake(real: Tensor, fake: Tensor, mix: Tensor, backend: str | None) -> Tensor:
    real, _ = _served_pair(real, fake)
    return real.new_empty_strided(real.shape, real.stride())


@torch.library.register_fake("lipgan::gradient_penalty_fwd", lib=_library)  # type: ignore[untyped-decorator]
def _fwd_fake(grads: Tensor, kind: str, weight: float, target: float, norm: str, backend: str | None) -> Penalty:
    grads = _served(grads, norm)
    dtype = accumulation_dtype(grads.dtype)
    norms = grads.new_empty(_norms_shape(grads, norm), dtype=dtype)
    return grads.new_empty((), dtype=dtype), norms, grads.new_empty_strided(grads.shape, grads.stride())


# ---- without autograd, for callers whose arguments are known to be good ----


def _mixed(real: Tensor, fake: Tensor, mix: Tensor, backend: str | None) -> Tensor:
    plain = _backend.is_plain((real, fake, mix))
    function = _interpolate if plain else torch.ops.lipgan.gradient_penalty_interpolate.default
    x_hat: Tensor = function(real, fake, mix, backend)
    return x_hat


def penalize(
    grads: Tensor, kind: str, weight: float, target: float, norm: str, *, backend: str | None = None
) -> Penalty:
    """:func:`gradient_penalty` for callers whose arguments are known to be good, and without autograd.

    Returns:
        ``(penalty, norms, cotangent)`` with ``cotangent = d penalty / d grads``, like ``grads``.
    """
    function = undispatched if _backend.is_plain((grads,)) else torch.ops.lipgan.gradient_penalty_fwd.default
    result: Penalty = function(grads, kind, weight, target, norm, backend)
    return result


# ---- autograd ----


def _save_mix(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


class _Interpolate(torch.autograd.Function):
    """(real, fake) -> x_hat, with the mix constant."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save_mix(ctx, inputs, inputs[0])
        return _mixed(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (mix,) = ctx.saved_tensors
        m = mix.view(-1, *[1] * (grad.ndim - 1))
        to_real = (grad * m).to(grad.dtype) if ctx.needs_input_grad[0] else None
        to_fake = (grad * (1 - m)).to(grad.dtype) if ctx.needs_input_grad[1] else None
        return to_real, to_fake, None, None


class _InterpolateUnderTransforms(_Interpolate):
    """The form that torch.func asks for, as in lipgan.ops.spectral_norm."""

    forward = staticmethod(_mixed)  # type: ignore[assignment]
    setup_context = staticmethod(_save_mix)


def _run(grads: Tensor, kind: str, weight: float, target: float, norm: str, backend: str | None) -> Penalty:
    return penalize(grads, kind, weight, target, norm, backend=backend)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Penalty) -> None:
    grads, ctx.kind, ctx.weight, ctx.target, ctx.norm, _ = inputs
    _, norms, cotangent = output
    ctx.mark_non_differentiable(norms, cotangent)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grads, cotangent)


class _GradientPenalty(torch.autograd.Function):
    """grads -> (penalty, norms, cotangent); only the penalty is differentiable."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Penalty:
        output = _run(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_penalty: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_penalty is None:
            return None, None, None, None, None, None
        grads, cotangent = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            # Plain differentiable PyTorch, so that every higher order follows.
            norms = reference.gradient_norms(grads, ctx.norm).to(grad_penalty.dtype)
            cotangent = reference.gradient_cotangent(grads, norms, ctx.kind, ctx.weight, ctx.target)
        return (cotangent * grad_penalty).to(grads.dtype), None, None, None, None, None


class _GradientPenaltyUnderTransforms(_GradientPenalty):
    """The form that torch.func asks for, as in lipgan.ops.spectral_norm."""

    forward = staticmethod(_run)  # type: ignore[assignment]
    setup_context = staticmethod(_save)


# ---- the public functions ----


def interpolate(real: Tensor, fake: Tensor, mix: Tensor, *, backend: str | None = None) -> Tensor:
    """Samples between real and generated ones: ``mix_i real_i + (1 - mix_i) fake_i`` (Gulrajani et al. 2017, Alg. 1).

    Args:
        real: ``[B, ...]``; float32, float64, float16 or bfloat16.
        fake: of the shape, dtype and device of ``real``.
        mix: ``[B]``, float32; float64 for float64 samples. Held constant. Where it is 1 or 0 the result is bit by bit
            the real or the fake sample.
        backend: "reference", "native", "triton" or "cuda"; None for the best available.

    Returns:
        Fresh samples, rounded once; with the strides of ``real`` where ``fake`` shares them and the batch is outermost
        (contiguous, channels_last), else contiguous. Differentiable any number of times in ``real`` and ``fake``.

    Raises:
        ValueError: shapes or devices that differ, no samples, an unknown backend.
        TypeError: integer or complex samples, dtypes that do not fit.
        UnavailableError: the backend asked for cannot serve here.
    """
    shape, dtype, device = real.shape, real.dtype, real.device
    check_samples("real", real)
    if fake.shape != shape:
        raise ValueError(f"fake must have the shape of real, {tuple(shape)}, got {tuple(fake.shape)}")
    if fake.dtype != dtype:
        raise TypeError(f"fake must have the dtype of real, {dtype}, got {fake.dtype}")
    if mix.shape != shape[:1]:
        raise ValueError(f"mix must have shape ({shape[0]},), one number a sample, got {tuple(mix.shape)}")
    if mix.dtype != accumulation_dtype(dtype):
        raise TypeError(f"mix must be {accumulation_dtype(dtype)} for samples of {dtype}, got {mix.dtype}")
    if fake.device != device:
        raise ValueError(f"fake must be on the device of real, {device}, got {fake.device}")
    if mix.device != device:
        raise ValueError(f"mix must be on the device of real, {device}, got {mix.device}")
    return mixtures(real, fake, mix, _backend.check(backend))


def mixtures(real: Tensor, fake: Tensor, mix: Tensor, backend: str | None = None) -> Tensor:
    """:func:`interpolate` for callers whose arguments are known to be good."""
    if torch._C._are_functorch_transforms_active():
        function: Any = _InterpolateUnderTransforms.apply
    elif torch.is_grad_enabled() and (real.requires_grad or fake.requires_grad):
        function = _Interpolate.apply
    else:
        function = _mixed
    x_hat: Tensor = function(real, fake, mix, backend)
    return x_hat


def gradient_penalty(
    grads: Tensor,
    kind: str = "two-sided",
    *,
    weight: float = 1.0,
    target: float = 1.0,
    norm: str = "sample",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The penalty on the norms of gradients; its formulas stand in :mod:`lipgan.reference.gradient_penalty`.

    Args:
        grads: ``[B, ...]``, the gradient of a critic at each sample; float32, float64, float16 or bfloat16.
        kind: "two-sided" (WGAN-GP, DRAGAN), "one-sided" (WGAN-LP), "squared" (R1, R2) or "max".
        weight: factor of the penalty.
        target: what the norms are compared with; "squared" has none.
        norm: "sample" for one norm over a whole sample, "pixel" for one over dimension 1 at each position of a sample.
        backend: "reference", "native", "triton" or "cuda"; None for the best available.

    Returns:
        ``(penalty, norms)``, float32 or (for float64) float64: ``penalty`` 0-dim, differentiable any number of times;
        ``norms`` ``[B]`` or ``[B, *grads.shape[2:]]``, not differentiable. The gradient of a norm at 0 is 0. A NaN
        among the gradients makes the penalty NaN.

    Raises:
        ValueError: an unknown kind, norm or backend, no samples, a weight that is not finite, a target that is negative
            or not finite.
        TypeError: integer or complex gradients.
        UnavailableError: the backend asked for cannot serve here.
    """
    check_choice("kind", kind, KINDS)
    check_choice("norm", norm, NORMS)
    weight, target = as_number("weight", weight), as_number("target", target, minimum=0.0)
    check_samples("grads", grads)
    if norm == "pixel" and grads.ndim < 2:
        raise ValueError(f"grads must have at least 2 dimensions for norm='pixel', got shape {tuple(grads.shape)}")
    under_transforms = torch._C._are_functorch_transforms_active()
    function = _GradientPenaltyUnderTransforms if under_transforms else _GradientPenalty
    penalty, norms, _ = function.apply(grads, kind, weight, target, norm, _backend.check(backend))  # type: ignore[no-untyped-call]
    return penalty, norms
