"""The rules: operation, arguments, result -> Lipschitz constant of the result. See docs/numerics/lipschitz.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lipgan.linalg import conv_spectral_norm_bound, spectral_norm_bound
from lipgan.lipschitz.interpreter import Interpreter, Unknown, rule
from lipgan.lipschitz.rounding import joint, largest, plus, root, times, up
from lipgan.nn.orthogonal import windows_per_input

aten = torch.ops.aten


# Of matrices: rank^(2^-25) is within 3e-7 of 1 for every rank up to 10^4. The products cost little next to the blocks
# of a convolution.
_MATRIX_ITERATIONS = 24

# Bytes of the frequency blocks of a convolution beyond which only its reshaped kernel is bounded.
_BLOCK_BYTES = 2**30


@rule(
    # Choices and orders of entries, zeros beside them.
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.alias.default,
    aten.detach.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
    aten.flip.default,
    aten.roll.default,
    aten.constant_pad_nd.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    # Extrema over separate sets of entries.
    aten.amax.default,
    aten.amin.default,
    # Activations with slopes of at most 1.
    aten.relu.default,
    aten.tanh.default,
    aten.hardtanh.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.clamp_max.default,
    aten.abs.default,
    aten.neg.default,
    aten.log_sigmoid_forward.default,
    aten.sin.default,
    aten.cos.default,
)
def _same(interpreter: Interpreter, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    return interpreter.constant(args[0])


# The largest slopes: of gelu at 2^(1/2), of its tanh form near it, of silu at 2.3994, rounded up.
_SLOPES = {aten.sigmoid.default: 0.25, aten.gelu.default: 1.13, aten.silu.default: 1.1}


@rule(*_SLOPES)
def _slope(interpreter: Interpreter, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    return times(interpreter.constant(args[0]), _SLOPES[func])


@rule(aten.softplus.default)
def _softplus(interpreter: Interpreter, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    threshold = args[2] if len(args) > 2 else 20
    # There it jumps by log(1 + exp(-threshold)) / beta, which counts as rounding for the default of 20.
    if threshold < 20:
        raise Unknown(f"operation {func} with a threshold below 20, where it jumps")
    return interpreter.constant(args[0])


@rule(aten.leaky_relu.default)
def _leaky_relu(interpreter: Interpreter, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    slope = args[1] if len(args) > 1 else 0.01
    return times(interpreter.constant(args[0]), max(1.0, abs(slope)))


@rule(aten.elu.default)
def _elu(interpreter: Interpreter, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    options: list[float] = [*args[1:], *[1.0, 1.0, 1.0][len(args) - 1 :]]
    alpha, scale, input_scale = options
    # Slope scale on the right, at most scale alpha input_scale on the left.
    return times(interpreter.constant(args[0]), times(abs(scale), max(1.0, times(abs(alpha), abs(input_scale)))))


@rule(aten._prelu_kernel.default)
def _prelu(interpreter: Interpreter, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    if interpreter.depends(args[1]):
        raise Unknown(f"operation {func} with slopes that depend on the samples")
    return times(interpreter.constant(args[0]), max(1.0, largest(args[1])))


def _repeats(item: Any, result: Tensor) -> float:
    """The norm of broadcasting: each entry appears as often as the sizes say."""
    return max(1.0, root(result.numel() / item.numel())) if isinstance(item, Tensor) and item.numel() else 1.0


@rule(aten.expand.default)
def _expand(interpreter: Interpreter, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    return times(interpreter.constant(args[0]), _repeats(args[0], result))


@rule(aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.rsub.Tensor)
def _add(interpreter: Interpreter, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    alpha = abs(kwargs.get("alpha", args[2] if len(args) > 2 else 1))
    factors = (alpha, 1.0) if func in (aten.rsub.Scalar, aten.rsub.Tensor) else (1.0, alpha)
    parts = [
        times(times(interpreter.constant(t), _repeats(t, result)), factor)
        for t, factor in zip(args[:2], factors, strict=True)
    ]
    return plus(*parts)


@rule(aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar)
def _scale(interpreter: Interpreter, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    a, b = args
    divides = func in (aten.div.Tensor, aten.div.Scalar)
    if interpreter.depends(b) and (divides or interpreter.depends(a)):
        raise Unknown(f"operation {func} of two tensors that depend on the samples")
    x, c = (b, a) if interpreter.depends(b) else (a, b)
    if divides:
        smallest = float(c.detach().abs().min()) if isinstance(c, Tensor) else abs(c)
        factor = up(1 / smallest) if smallest else math.inf
    else:
        factor = largest(c) if isinstance(c, Tensor) else abs(c)
    return times(times(interpreter.constant(x), _repeats(x, result)), factor)


@rule(aten.maximum.default, aten.minimum.default)
def _extremum(interpreter: Interpreter, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    return joint(times(interpreter.constant(t), _repeats(t, result)) for t in args[:2])


@rule(aten.cat.default, aten.stack.default)
def _join(interpreter: Interpreter, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    return joint(interpreter.constant(t) for t in args[0])


@rule(aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim)
def _sum(interpreter: Interpreter, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    count = args[0].numel() / max(result.numel(), 1)
    factor = root(count) if func in (aten.sum.default, aten.sum.dim_IntList) else root(up(1 / count))
    return times(interpreter.constant(args[0]), factor)


def _matrix_bound(matrix: Tensor) -> float:
    """Of the largest in a batch of matrices."""
    return largest(spectral_norm_bound(matrix, n_iterations=_MATRIX_ITERATIONS))


@rule(aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default)
def _product(interpreter: Interpreter, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    a, b = args
    if interpreter.depends(a) and interpreter.depends(b):
        raise Unknown(f"operation {func} of two tensors that depend on the samples")
    x, matrix = (a, b) if interpreter.depends(a) else (b, a)
    return times(interpreter.constant(x), _matrix_bound(matrix if matrix.ndim > 1 else matrix[None]))


@rule(aten.addmm.default, aten.addmv.default)
def _add_product(
    interpreter: Interpreter, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any
) -> float:
    term, *operands = args[:3]
    product = times(_product(interpreter, func, operands, {}, result), abs(kwargs.get("alpha", 1)))
    return plus(product, times(times(interpreter.constant(term), _repeats(term, result)), abs(kwargs.get("beta", 1))))


def conv_bound(
    weight: Tensor, size: Sequence[int], n_iterations: int, padding_mode: str = "zeros", **options: Any
) -> float:
    """The smaller one of two bounds: of the frequency blocks, and of the reshaped kernel times its windows."""
    transposed, groups, stride = options["transposed"], options["groups"], options["stride"]
    candidates = []
    windows = 0
    if padding_mode == "zeros":
        # A transposed convolution is the transpose of one whose kernel has the same reshaped matrix.
        blocks = weight.detach().reshape(groups, weight.shape[0] // groups, -1)
        windows = windows_per_input(tuple(weight.shape[2:]), tuple(stride), tuple(options["dilation"]))
        candidates.append(times(_matrix_bound(blocks), root(windows)))
    positions = 1
    for n, k, s, p in zip(size, weight.shape[2:], stride, options["padding"], strict=True):
        positions *= (n * s + k if transposed else n + p) + s
    # With one window for each input the reshaped kernel is the operator.
    if windows != 1 and 8 * weight.shape[0] * weight.shape[1] * positions <= _BLOCK_BYTES:
        bound = conv_spectral_norm_bound(
            weight.detach(), tuple(size), n_iterations=n_iterations, padding_mode=padding_mode, **options
        )
        candidates.append(float(bound))
    if not candidates:
        raise Unknown(f"a convolution with {padding_mode} padding of the size {tuple(size)}")
    return math.nan if any(math.isnan(bound) for bound in candidates) else min(candidates)


@rule(aten.convolution.default)
def _convolution(
    interpreter: Interpreter, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any
) -> float:
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args
    if interpreter.depends(weight) or interpreter.depends(bias):
        raise Unknown(f"operation {func} with a kernel that depends on the samples")
    dims = weight.ndim - 2
    # One number serves all dimensions.
    stride, padding, dilation, output_padding = (
        [*value] * (dims // len(value)) for value in (stride, padding, dilation, output_padding)
    )
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if transposed:
        options["output_padding"] = output_padding
    bound = conv_bound(weight, x.shape[-dims:], interpreter.n_iterations, transposed=transposed, **options)
    return times(interpreter.constant(x), bound)


@rule(aten.native_batch_norm.default, aten._native_batch_norm_legit_no_training.default, aten.cudnn_batch_norm.default)
def _batch_norm(interpreter: Interpreter, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    x, weight, _, _, variance = args[:5]
    legit = func is aten._native_batch_norm_legit_no_training.default
    if not legit and args[5] is not False:
        raise Unknown("batch normalization by the statistics of the batch")
    eps = args[-1]
    factors = 1 / torch.sqrt(variance.detach() + eps)
    if weight is not None:
        factors = factors * weight.detach()
    # A sum, a root, a quotient and a product: four roundings, and as many for what they do to each other.
    return times(interpreter.constant(x), largest(factors) * (1 + 8 * torch.finfo(factors.dtype).eps))


def _windows_of_pool(args: Sequence[Any]) -> tuple[tuple[int, ...], int]:
    """Kernel sizes of a pooling in two dimensions, and the windows that one input lies in."""
    kernel = tuple([*args[1]] * (2 // len(args[1])))
    stride = tuple([*args[2]] * (2 // len(args[2]))) if len(args) > 2 and args[2] else kernel
    dilation = (1, 1)
    if len(args) > 4 and isinstance(args[4], (list, tuple)):
        dilation = tuple([*args[4]] * (2 // len(args[4])))
    return kernel, windows_per_input(kernel, stride, dilation)


@rule(aten.max_pool2d_with_indices.default)
def _max_pool(interpreter: Interpreter, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    return times(interpreter.constant(args[0]), root(_windows_of_pool(args)[1]))


@rule(aten.avg_pool2d.default)
def _avg_pool(interpreter: Interpreter, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    options: list[Any] = [*args[3:], *[[0], False, True, None][max(len(args) - 3, 0) :]]
    padding, ceil_mode, count_include_pad, divisor = options
    if divisor is not None or (any(padding) and (ceil_mode or not count_include_pad)):
        raise Unknown("average pooling with a divisor of its own, or with padding in an unusual mode")
    kernel, windows = _windows_of_pool(args[:3])
    smallest = math.prod(kernel)
    if ceil_mode:
        # The last window may reach beyond the input, and is then the mean of fewer entries.
        strides = [*args[2]] * (2 // len(args[2])) if args[2] else kernel
        last = [n - (m - 1) * s for n, m, s in zip(args[0].shape[-2:], result.shape[-2:], strides, strict=True)]
        smallest = math.prod(min(k, rest) for k, rest in zip(kernel, last, strict=True))
    return times(interpreter.constant(args[0]), root(up(windows / smallest)))


@rule(aten._adaptive_avg_pool2d.default)
def _adaptive_avg_pool(
    interpreter: Interpreter, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any
) -> float:
    x = args[0]
    if any(n % m for n, m in zip(x.shape[-2:], result.shape[-2:], strict=True)):
        raise Unknown("adaptive average pooling to a size that does not divide the input's")
    return times(interpreter.constant(x), root(up(result.numel() / max(x.numel(), 1))))


@rule(aten.upsample_nearest1d.default, aten.upsample_nearest2d.default, aten.upsample_nearest3d.default)
def _upsample(interpreter: Interpreter, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    x = args[0]
    # How many copies an input has follows from the scale factor, which the sizes do not tell, and from rounding: the
    # operation itself says it, of the numbers of the positions.
    positions = torch.arange(x[0, 0].numel(), dtype=torch.float64, device=x.device).reshape(1, 1, *x.shape[2:])
    copies = func(positions, *args[1:], **kwargs).long().flatten().bincount()
    return times(interpreter.constant(x), root(int(copies.max())))
