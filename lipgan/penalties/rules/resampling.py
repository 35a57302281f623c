"""Pooling, interpolation, indexing and others that are linear in the samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lipgan.penalties.derivatives import Linear
from lipgan.penalties.rules._table import rule
from lipgan.penalties.tape import Tape
from lipgan.penalties.undo import tensors_of

aten = torch.ops.aten


@rule(aten.max_pool2d_with_indices.default, aten.adaptive_max_pool2d.default, aten.max_pool3d_with_indices.default)
def _max_pool(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a = args[0]
    value = tape.value(a)
    if value is None:
        return NotImplemented
    y, indices = func(*args, **kwargs)
    # The indices point into the pooled dimensions of a, flattened.
    pooled = 3 if func is aten.max_pool3d_with_indices.default else 2
    shape, after = a.shape, y.shape
    flat = indices.flatten(-pooled)

    def push(t: Tensor) -> Tensor:
        return t.flatten(-pooled).gather(-1, flat).reshape(after)

    def pull(d: Tensor) -> Tensor:
        zeros = d.new_zeros((*shape[:-pooled], shape[-pooled:].numel()))
        return zeros.scatter_add_(-1, flat, d.flatten(-pooled)).reshape(shape)

    tape.record(Linear(value, push, pull), func, y)
    return y, indices


@rule(aten.avg_pool2d.default, aten.avg_pool3d.default)
def _avg_pool(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a, kernel, *rest = args
    value = tape.value(a)
    if value is None or kwargs:
        return NotImplemented
    flat = func is aten.avg_pool2d.default
    backward = aten.avg_pool2d_backward if flat else aten.avg_pool3d_backward
    # All of it is written out: where a compiler lowers the backward it takes no number for a list of them.
    defaults: list[Any] = [kernel, [0, 0] if flat else [0, 0, 0], False, True, None]
    options = [*rest, *defaults[len(rest) :]]
    shape, strides = a.shape, a.stride()

    def pull(d: Tensor) -> Tensor:
        # Only the shape and the layout of the operand count: to hold the operand itself would cost its memory.
        like = d.new_empty_strided(shape, strides)
        return backward.default(d, like, kernel, *options)  # type: ignore[no-any-return]

    return tape.record(Linear(value, lambda t: func(t, *args[1:]), pull), func, func(*args))


@rule(
    aten.grid_sampler_2d.default,
    aten.grid_sampler_3d.default,
    aten.upsample_nearest1d.default,
    aten.upsample_nearest2d.default,
    aten.upsample_nearest3d.default,
    aten.upsample_linear1d.default,
    aten.upsample_bilinear2d.default,
    aten.upsample_bicubic2d.default,
    aten.upsample_trilinear3d.default,
    aten._adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool3d.default,
    aten.reflection_pad1d.default,
    aten.reflection_pad2d.default,
    aten.replication_pad1d.default,
    aten.replication_pad2d.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.index_select.default,
    aten.index.Tensor,
    aten.gather.default,
    aten.flip.default,
    aten.roll.default,
    aten.repeat.default,
    aten.cumsum.default,
    aten.im2col.default,
    aten.col2im.default,
)
def _linear_in_first(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Operations that are linear in their first operand; autograd knows the transpose, needed once, not twice."""
    a = args[0]
    value = tape.value(a)
    if value is None or any(t.requires_grad for t in tensors_of(args[1:])):
        return NotImplemented
    shape, dtype, device = a.shape, a.dtype, a.device
    for tensor in tensors_of(args[1:]):
        tape.keep(tensor, func)

    def push(t: Tensor) -> Tensor:
        return func(t, *args[1:], **kwargs)  # type: ignore[no-any-return]

    def pull(d: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)
            return torch.autograd.grad(push(leaf), leaf, d)[0]

    return tape.record(Linear(value, push, pull), func, push(a))
