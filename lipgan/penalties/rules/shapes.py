"""Views, copies, joins and sums: linear, and without arithmetic but for the sums."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lipgan.penalties.derivatives import Linear, Sum, sum_to
from lipgan.penalties.rules._table import rule
from lipgan.penalties.tape import Tape, Unsupported, Value

aten = torch.ops.aten


@rule(
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.alias.default,
)
def _reshape(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a = args[0]
    value = tape.value(a)
    if value is None:
        return NotImplemented
    try:
        y = func(*args)
    except RuntimeError:
        # The tape keeps images as channels_last, where not every view that a critic asks for is one.
        if func is not aten.view.default:
            raise
        y = a.reshape(args[1])
    before, after = a.shape, y.shape
    node = Linear(value, lambda t: t.reshape(after), lambda d: d.reshape(before))
    return tape.record(node, func, y, a)


@rule(aten.as_strided.default, aten.view.dtype)
def _memory(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if tape.value(args[0]) is None:
        return NotImplemented
    raise Unsupported(f"{func} reads a tensor as it lies in memory, where the tape may lay it otherwise")


@rule(aten.permute.default)
def _permute(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value = tape.value(args[0])
    if value is None:
        return NotImplemented
    dims = [dim % len(args[1]) for dim in args[1]]
    inverse = [dims.index(k) for k in range(len(dims))]
    node = Linear(value, lambda t: t.permute(dims), lambda d: d.permute(inverse))
    return tape.record(node, func, func(*args), args[0])


@rule(aten.transpose.int, aten.t.default)
def _transpose(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a = args[0]
    value = tape.value(a)
    y = func(*args)
    if value is None:
        if func is aten.t.default:
            y._lipgan_transposed = a  # so that a product with it is one with the parameter itself
        return y

    def swap(t: Tensor) -> Tensor:
        return func(t, *args[1:])  # type: ignore[no-any-return]

    return tape.record(Linear(value, swap, swap), func, y, a)


@rule(aten.transpose_.default)
def _transpose_in_place(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a, *dims = args
    value = tape.value(a)
    if value is None:
        return NotImplemented
    if a._base is not None:
        raise Unsupported(f"{func} changes the shape of a view in place")

    def swap(t: Tensor) -> Tensor:
        return t.transpose(*dims)

    return tape.record(Linear(value, swap, swap), func, func(a, *dims), a)


@rule(aten.expand.default)
def _expand(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a = args[0]
    value = tape.value(a)
    if value is None:
        return NotImplemented
    y = func(*args, **kwargs)
    before, after = a.shape, y.shape
    node = Linear(value, lambda t: t.expand(after), lambda d: sum_to(d, before))
    return tape.record(node, func, y, a)


@rule(aten.slice.Tensor, aten.select.int)
def _slice(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a = args[0]
    value = tape.value(a)
    if value is None:
        return NotImplemented
    shape = a.shape

    def pull(d: Tensor) -> Tensor:
        whole = d.new_zeros(shape)
        func(whole, *args[1:], **kwargs).copy_(d)
        return whole

    node = Linear(value, lambda t: func(t, *args[1:], **kwargs), pull)
    return tape.record(node, func, func(*args, **kwargs), a)


class _Parts(Value):
    """The parts of one tensor: what is added is a part with its place, and delta and adjoint are dictionaries of those.

    So that the derivative of the whole is put together once, and not for each part among zeros.
    """

    __slots__ = ()

    def add_delta(self, delta: Any) -> None:
        self.delta = _with_part(self.delta, *delta)

    def add_adjoint(self, adjoint: Any) -> None:
        if self.trainable:
            self.adjoint = _with_part(self.adjoint, *adjoint)


def _with_part(parts: Any, place: int, part: Tensor) -> Any:
    parts = {} if parts is None else parts
    assert place not in parts  # every place has one node, which adds once in a pass
    parts[place] = part
    return parts


@rule(
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
    aten.unbind.int,
)
def _split(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a = args[0]
    value = tape.value(a)
    if value is None:
        return NotImplemented
    parts = list(func(*args, **kwargs))
    if not parts:
        return parts
    dtype, unbound = a.dtype, func is aten.unbind.int
    before_dim = 1 if unbound else 2
    dim = (args[before_dim] if len(args) > before_dim else kwargs.get("dim", 0)) % a.ndim
    shapes = [part.shape for part in parts]

    def join(given: Any) -> Tensor:
        like = next(iter(given.values()))
        all_parts = [given[k] if k in given else like.new_zeros(shape) for k, shape in enumerate(shapes)]
        return torch.stack(all_parts, dim) if unbound else torch.cat(all_parts, dim)

    whole = tape.record_value(Linear(value, lambda t: t, join), func, _Parts(value.owner, dtype, 0))
    start = 0
    for k, part in enumerate(parts):
        length = 1 if unbound else part.shape[dim]

        def push(t: Tensor, k: int = k, start: int = start, length: int = length) -> Tensor:
            return t.select(dim, k) if unbound else t.narrow(dim, start, length)

        def pull(d: Tensor, k: int = k) -> Any:
            return k, d.to(dtype)

        tape.record(Linear(whole, push, pull), func, part, a)
        start += length
    return parts


@rule(aten.cat.default, aten.stack.default)
def _join(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = args[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    values = [tape.value(t) for t in tensors]
    if not any(value is not None for value in values):
        return NotImplemented
    y = func(*args, **kwargs)
    shapes = [t.shape for t in tensors]
    sizes = [t.shape[dim] for t in tensors] if func is aten.cat.default else None
    sources = [value or tape.parameter_gradient(t) for t, value in zip(tensors, values, strict=True)]
    places = [k for k, source in enumerate(sources) if source is not None]

    def part(d: Tensor, k: int) -> Tensor:
        return d.select(dim, k) if sizes is None else d.split_with_sizes(sizes, dim)[k]

    def push(tangents: Sequence[Tensor | None]) -> Tensor:
        given = dict(zip(places, tangents, strict=True))
        like = next(t for t in tangents if t is not None)
        zero = like.new_zeros(())
        parts = [zero.expand(shape) if given.get(k) is None else given[k] for k, shape in enumerate(shapes)]
        return func(parts, dim)  # type: ignore[no-any-return]

    operands = [source for source in sources if source is not None]
    return tape.record(Sum(operands, push, [functools.partial(part, k=k) for k in places]), func, y)


@rule(aten.clone.default, aten._to_copy.default)
def _copy(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a = args[0]
    value = tape.value(a)
    y = func(*args, **kwargs)
    if value is None or not y.is_floating_point():
        return y
    dtype, device = a.dtype, a.device
    return tape.record(Linear(value, lambda t: func(t, **kwargs), lambda d: d.to(device, dtype)), func, y)


@rule(aten.copy_.default)
def _overwrite(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target, source = args[0], args[1]
    value = tape.value(source)
    if value is None and tape.value(target) is None:
        return NotImplemented
    operand = value or tape.parameter_gradient(source)
    before, after = source.shape, target.shape
    operands, pulls = ([], []) if operand is None else ([operand], [lambda d: sum_to(d, before)])
    node = Sum(operands, lambda tangents: tangents[0].expand(after), pulls)  # type: ignore[union-attr]
    return tape.record(node, func, func(*args, **kwargs), target)


@rule(aten.constant_pad_nd.default)
def _pad(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value = tape.value(args[0])
    if value is None:
        return NotImplemented
    pad = list(args[1])
    cut = [-width for width in pad]
    return tape.record(Linear(value, lambda t: func(t, pad), lambda d: func(d, cut)), func, func(*args, **kwargs))


@rule(aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default)
def _sum(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a = args[0]
    value = tape.value(a)
    if value is None:
        return NotImplemented
    y = func(*args, **kwargs)
    shape, dtype = a.shape, a.dtype
    over = args[1] if len(args) > 1 else kwargs.get("dim")
    dims = sorted({dim % max(a.ndim, 1) for dim in over}) if over else list(range(a.ndim))
    kept = y.ndim == a.ndim
    scale = y.numel() / max(a.numel(), 1) if func in (aten.mean.dim, aten.mean.default) else 1.0

    def pull(d: Tensor) -> Tensor:
        if not kept:
            for dim in dims:
                d = d.unsqueeze(dim)
        return (d * scale if scale != 1.0 else d).to(dtype).expand(shape)

    return tape.record(Linear(value, lambda t: func(t, *args[1:], **kwargs), pull), func, y)
