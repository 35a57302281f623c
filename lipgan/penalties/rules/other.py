"""What has no derivative, what only autograd knows, and changes of a part of a tensor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lipgan.penalties.derivatives import Local, Sum
from lipgan.penalties.rules._table import RULES, rule
from lipgan.penalties.tape import Node, ParameterGradient, Tape, Unsupported, Value
from lipgan.penalties.undo import mutates, tensors_of

aten = torch.ops.aten


_DRAWS = {aten.bernoulli.default, aten.bernoulli.p}
_RANDOM = {aten.rand_like.default, aten.randn_like.default, *_DRAWS}


@rule(
    *_RANDOM,
    aten.detach.default,
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.new_empty.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.empty.memory_format,
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
)
def _constant(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func in _RANDOM:
        tape.undo.keep_random_state(kwargs.get("generator"))
    y = func(*args, **kwargs)
    if func in _DRAWS and tape.value(args[0]) is not None:
        # To autograd the outcome depends on the probabilities, with a derivative of zero.
        tape.record(Node(), func, y)
    if func is not aten.detach.default:
        y._lipgan_new = True
    return y


@functools.cache
def _functional(func: Any) -> Any:
    """The form of an in-place operation that returns a new tensor."""
    if not mutates(func):
        return func
    packet = getattr(getattr(torch.ops, func.namespace), func._schema.name.split("::")[1].removesuffix("_"), None)
    for overload in packet.overloads() if packet is not None else ():
        candidate = getattr(packet, overload)
        if not mutates(candidate) and _signature(candidate) == _signature(func):
            return candidate
    raise Unsupported(f"{func} has no form that returns a new tensor")


def _signature(func: Any) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in func._schema.arguments]


def _local(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any other operation: record it with its operands, to be run again under autograd."""
    if torch.Tag.nondeterministic_seeded in func.tags:
        raise Unsupported(f"{func} would draw other random numbers when it is run again")
    call = _functional(func)
    # Before a change in place its operands are noted, otherwise only where the result may have derivatives.
    result = None if mutates(func) else func(*args, **kwargs)
    if not mutates(func) and not any(t.is_floating_point() or t.is_complex() for t in tensors_of(result)):
        return result
    values: list[tuple[Value, Tensor, list[int]]] = []
    parameter_gradients: list[tuple[ParameterGradient, Tensor, list[int]]] = []

    def note(item: Tensor, place: list[int]) -> Tensor:
        value, parameter_gradient = tape.value(item), None
        if value is None:
            parameter_gradient = tape.parameter_gradient(item)
        item = item.clone() if mutates(func) and place == [0] else tape.keep(item, func)
        if value is not None:
            values.append((value, item, place))
        elif parameter_gradient is not None:
            parameter_gradients.append((parameter_gradient, item, place))
        return item

    names, n = list(kwargs), len(args)
    frozen = _mapped(note, [*args, *kwargs.values()], [])
    places = [place for *_, place in (*values, *parameter_gradients)]

    def run(tensors: Sequence[Tensor], which: int | None) -> Tensor:
        filled = _copied(frozen)
        for tensor, place in zip(tensors, places, strict=True):
            target = filled
            for k in place[:-1]:
                target = target[k]
            target[place[-1]] = tensor
        result = call(*filled[:n], **dict(zip(names, filled[n:], strict=True)))
        return result if which is None else result[which]  # type: ignore[no-any-return]

    if mutates(func):
        result = func(*args, **kwargs)
    several = isinstance(result, (list, tuple))
    outputs: Any = result if several else [result]
    for which, output in enumerate(outputs):
        if isinstance(output, Tensor) and (output.is_floating_point() or output.is_complex()):
            node = Local(
                [value for value, *_ in values],
                [parameter_gradient for parameter_gradient, *_ in parameter_gradients],
                functools.partial(run, which=which if several else None),
                [tensor for _, tensor, _ in (*values, *parameter_gradients)],
            )
            tape.record(node, func, output, args[0] if args and isinstance(args[0], Tensor) else None)
    return result


def _mapped(function: Callable[[Tensor, list[int]], Tensor], item: Any, place: list[int]) -> Any:
    """``item`` with every tensor replaced by the function's result; ``place`` tells the way to it, by indices."""
    # A closure that called itself would be a reference cycle, and hold the tensors until the next collection.
    if isinstance(item, (list, tuple)):
        return [_mapped(function, inner, [*place, k]) for k, inner in enumerate(item)]
    return function(item, place) if isinstance(item, Tensor) else item


def _copied(item: Any) -> Any:
    return [_copied(inner) for inner in item] if isinstance(item, list) else item


def _view_changed(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A change in place of a view: it is recorded as any other, and then its result takes its place in the base."""
    target, base = args[0], args[0]._base
    before = tape.value(base) or tape.parameter_gradient(base)
    shape, strides = base.shape, base.stride()
    place = target.shape, target.stride(), target.storage_offset() - base.storage_offset()
    rule = RULES.get(func, _local)
    y = rule(tape, func, args, kwargs)
    if y is NotImplemented:
        y = _local(tape, func, args, kwargs)

    def replaced(whole: Tensor | None, part: Tensor | None) -> Tensor:
        """``whole`` with ``part`` in its place, None for zeros."""
        like = whole if part is None else part
        assert like is not None
        result = torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device)
        result.zero_() if whole is None else result.copy_(whole)
        region = result.as_strided(*place)
        region.zero_() if part is None else region.copy_(part)
        return result

    def read(whole: Tensor) -> Tensor:
        laid = torch.empty_strided(shape, strides, dtype=whole.dtype, device=whole.device)
        return laid.copy_(whole).as_strided(*place)

    if base.untyped_storage().data_ptr() != y.untyped_storage().data_ptr():
        return y  # a copy where the critic asked for a view, see _reshape: the base keeps a value that is out of date
    operands: list[Value | ParameterGradient] = [y._lipgan_value] if before is None else [y._lipgan_value, before]
    pulls = [read, lambda d: replaced(d, None)][: len(operands)]
    push: Any = lambda tangents: replaced(*reversed([*tangents, None][:2]))  # noqa: E731
    tape.record(Sum(operands, push, pulls), func, base, base)
    return y


RULES["local"] = _local
RULES["view changed"] = _view_changed
