"""Layer, group, instance and batch norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lipgan.penalties.derivatives import Bilinear, Normalization, sum_to
from lipgan.penalties.rules._table import rule
from lipgan.penalties.tape import Tape, Unsupported
from lipgan.penalties.undo import tensors_of

aten = torch.ops.aten


def _record_normalization(
    tape: Tape,
    func: Any,
    y: Tensor,
    a: Tensor,
    view: tuple[int, ...],
    dims: list[int],
    statistics: tuple[Tensor, Tensor],
    project: Callable[[Tensor, Tensor], Tensor],
    parameters: tuple[Tensor | None, Tensor | None],
    affine: tuple[int, ...],
) -> None:
    """Record ``y``.

    Args:
        view: the shape of a in which ``dims`` are averaged over.
        statistics: mean and ``1 / sqrt(var + eps)``, as the operation returns them, broadcastable to the view.
        project: ``(t, a) -> r P t``, see `Normalization`.
        parameters: weight and bias, or None.
        affine: their shape, made broadcastable to a.
    """
    value = tape.value(a)
    assert value is not None
    weight, bias = parameters
    wide = tape.keep(a, func).to(statistics[1].dtype)
    layout = torch.channels_last if a.ndim == 4 and a.is_contiguous(memory_format=torch.channels_last) else None

    def in_layout(t: Tensor) -> Tensor:
        # The kernels of PyTorch take both operands in one layout.
        t = t.contiguous() if layout is None else t.contiguous(memory_format=layout)
        return project(t, wide)

    wide = wide.contiguous() if layout is None else wide
    w = None if weight is None else weight.detach().reshape(affine)
    parameter_gradients = tape.parameter_gradient(weight), tape.parameter_gradient(bias)
    node = Normalization(value, wide, view, dims, statistics, in_layout, w, parameter_gradients, torch.Size(affine))
    tape.record(node, func, y)


def _outside(tape: Tape, tensors: Sequence[Any]) -> bool:
    return all(tape.value(tensor) is None for tensor in tensors)


@rule(aten.native_layer_norm.default)
def _layer_norm(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a, normalized, weight, bias, _ = args
    if tape.value(a) is None or not _outside(tape, (weight, bias)):
        return NotImplemented
    y, mean, rstd = func(*args)
    dims = list(range(a.ndim - len(normalized), a.ndim))

    def project(t: Tensor, a: Tensor) -> Tensor:
        backward = aten.native_layer_norm_backward.default
        return backward(t, a, normalized, mean, rstd, None, None, [True, False, False])[0]  # type: ignore[no-any-return]

    affine = tuple(normalized)
    _record_normalization(tape, func, y, a, a.shape, dims, (mean, rstd), project, (weight, bias), affine)
    return y, mean, rstd


@rule(aten.native_group_norm.default)
def _group_norm(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a, weight, bias, n, c, hw, groups, _ = args
    if tape.value(a) is None or not _outside(tape, (weight, bias)):
        return NotImplemented
    y, mean, rstd = func(*args)
    # Of these dimensions a view exists in every layout.
    view, dims = (n, groups, c // groups, *a.shape[2:]), list(range(2, a.ndim + 1))
    by_group = (n, groups, *[1] * (a.ndim - 1))
    statistics, affine = (mean.reshape(by_group), rstd.reshape(by_group)), (c, *[1] * (a.ndim - 2))

    def project(t: Tensor, a: Tensor) -> Tensor:
        backward = aten.native_group_norm_backward.default
        return backward(t, a, mean, rstd, None, n, c, hw, groups, [True, False, False])[0]  # type: ignore[no-any-return]

    _record_normalization(tape, func, y, a, view, dims, statistics, project, (weight, bias), affine)
    return y, mean, rstd


@rule(
    aten.native_batch_norm.default,
    aten._native_batch_norm_legit.default,
    aten._native_batch_norm_legit.no_stats,
    aten.cudnn_batch_norm.default,
    aten.miopen_batch_norm.default,
)
def _batch_norm(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a, weight, bias = args[:3]
    value = tape.value(a)
    has_buffers = func is not aten._native_batch_norm_legit.no_stats
    training = args[5] if has_buffers else args[3]
    changed = tensors_of(args[3:5]) if has_buffers and training else []
    if value is None or not _outside(tape, (weight, bias)):
        if changed and not _outside(tape, (a, weight, bias)):
            raise Unsupported(f"{func} would count the batch twice in its running statistics when it is run again")
        return NotImplemented
    affine = (a.shape[1], *[1] * (a.ndim - 2))
    for buffer in changed:
        tape.keep_for_undo(buffer)
    y, *rest = func(*args)
    if training:
        mean, rstd = rest[0], rest[1]
        statistics = mean.reshape(affine), rstd.reshape(affine)

        def project(t: Tensor, a: Tensor) -> Tensor:
            backward = aten.native_batch_norm_backward.default
            unused = 0.0  # eps: r is given
            return backward(t, a, None, None, None, mean, rstd, True, unused, [True, False, False])[0]  # type: ignore[no-any-return]

        dims = [0, *range(2, a.ndim)]
        _record_normalization(tape, func, y, a, a.shape, dims, statistics, project, (weight, bias), affine)
    else:
        # A fixed affine map of every channel.
        shift, factor = args[3].reshape(affine), (args[4] + args[7]).rsqrt().reshape(affine)
        shape = torch.Size((1, *affine))
        node = Bilinear(
            a.detach() - shift,
            torch.ones(affine, dtype=a.dtype, device=a.device) if weight is None else weight.detach().reshape(affine),
            (value, None),
            (None, tape.parameter_gradient(weight), tape.parameter_gradient(bias)),
            lambda t, w: t * (w * factor),
            lambda d, _, w: d * (w * factor),
            lambda d, t, _: sum_to(d * t * factor, shape).flatten(),
            lambda d: sum_to(d, shape).flatten(),
        )
        tape.record(node, func, y)
    return (y, *rest)
