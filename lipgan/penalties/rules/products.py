"""Sums and products: elementwise, of matrices, and convolutions; dropout."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lipgan.penalties.derivatives import Bilinear, Linear, Sum, sum_to
from lipgan.penalties.rules._table import rule
from lipgan.penalties.tape import Node, ParameterGradient, Tape, Value
from lipgan.penalties.undo import mutates

aten = torch.ops.aten


@rule(aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor, aten.rsub.Tensor, aten.rsub.Scalar)
def _add(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a, b = args[0], args[1]
    values = tape.value(a), tape.value(b)
    if values == (None, None):
        return NotImplemented
    alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
    if func in (aten.add.Tensor, aten.add_.Tensor):
        factors = (1, alpha)
    elif func in (aten.sub.Tensor, aten.sub_.Tensor):
        factors = (1, -alpha)
    else:
        factors = (-alpha, 1)
    operands: list[Value | ParameterGradient] = []
    terms: list[tuple[Any, torch.Size]] = []
    for tensor, value, factor in zip((a, b), values, factors, strict=True):
        operand = value or tape.parameter_gradient(tensor)
        if operand is not None:
            operands.append(operand)
            terms.append((factor, tensor.shape))
    y = func(*args, **kwargs)
    dtype, after = y.dtype, y.shape

    def push(tangents: Sequence[Tensor | None]) -> Tensor:
        parts = [t if k == 1 else t * k for t, (k, _) in zip(tangents, terms, strict=True) if t is not None]
        return functools.reduce(torch.add, parts).to(dtype).expand(after)

    def pull(d: Tensor, factor: Any, shape: torch.Size) -> Tensor:
        return sum_to(d if factor == 1 else d * factor, shape)

    pulls = [functools.partial(pull, factor=factor, shape=shape) for factor, shape in terms]
    return tape.record(Sum(operands, push, pulls), func, y, a)


@rule(aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar, aten.mul_.Scalar)
def _mul(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a, b = args
    values = tape.value(a), tape.value(b)
    if values == (None, None):
        return NotImplemented
    of_a = tape.parameter_gradient(a) if values[0] is None else None
    of_b = tape.parameter_gradient(b) if values[1] is None else None
    if isinstance(b, Tensor):
        b = tape.keep(b, func)
    if values[1] is None and of_b is None:
        shape = a.shape
        assert values[0] is not None
        node: Node = Linear(values[0], lambda t: t * b, lambda d: sum_to(d * b, shape))
    else:
        shapes = a.shape, b.shape
        node = Bilinear(
            a.clone() if mutates(func) else tape.keep(a, func),
            b,
            values,
            (of_a, of_b, None),
            torch.mul,
            lambda d, a, b: sum_to(d * b, shapes[0]),
            lambda d, a, b: sum_to(d * a, shapes[1]),
        )
    return tape.record(node, func, func(*args), a)


@rule(aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar, aten.div_.Scalar)
def _div(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a, b = args
    value = tape.value(a)
    if value is None or tape.value(b) is not None or tape.parameter_gradient(b) is not None:
        return NotImplemented
    if isinstance(b, Tensor):
        b = tape.keep(b, func)
    shape = a.shape
    node = Linear(value, lambda t: t / b, lambda d: sum_to(d / b, shape))
    return tape.record(node, func, func(*args), a)


@rule(aten.neg.default)
def _neg(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value = tape.value(args[0])
    if value is None:
        return NotImplemented
    return tape.record(Linear(value, torch.neg, torch.neg), func, func(*args))


@rule(aten.native_dropout.default)
def _dropout(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a, p, train = args
    value = tape.value(a)
    if value is None:
        return NotImplemented
    tape.undo.keep_random_state()
    y, mask = func(*args)
    scale = 0.0 if p == 1 else 1 / (1 - p)

    def apply(d: Tensor) -> Tensor:
        return aten.native_dropout_backward.default(d, mask, scale) if train else d

    tape.record(Linear(value, apply, apply), func, y)
    return y, mask


# ---- matrix products and convolutions ----


def _matrix_product(tape: Tape, func: Any, y: Tensor, a: Tensor, b: Tensor, product: Any, bias: Any = None) -> Tensor:
    """Record ``y = a b + bias`` for matrices, or stacks of them."""
    values = tape.value(a), tape.value(b)
    original = getattr(b, "_lipgan_transposed", None) if values[1] is None else None
    of_a = tape.parameter_gradient(a) if values[0] is None else None
    of_b = tape.parameter_gradient(b if original is None else original) if values[1] is None else None
    of_bias = tape.parameter_gradient(bias)
    a, b = tape.keep(a, func), tape.keep(b, func)

    def pull_b(d: Tensor, a: Tensor, b: Any) -> Tensor:
        return product(a.mT, d) if original is None else product(d.mT, a)  # type: ignore[no-any-return]

    node = Bilinear(
        a,
        b,
        values,
        (of_a, of_b, of_bias),
        product,
        lambda d, a, b: product(d, b.mT),
        pull_b,
        None if of_bias is None else lambda d: sum_to(d, bias.shape),
    )
    return tape.record(node, func, y)


@rule(aten.addmm.default)
def _addmm(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    bias, a, b = args
    if kwargs or tape.value(bias) is not None or (tape.value(a) is None and tape.value(b) is None):
        return NotImplemented
    return _matrix_product(tape, func, func(bias, a, b), a, b, torch.mm, bias)


@rule(aten.mm.default, aten.bmm.default)
def _mm(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a, b = args
    if tape.value(a) is None and tape.value(b) is None:
        return NotImplemented
    return _matrix_product(tape, func, func(a, b), a, b, func)


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _layout(a: Tensor, weight: Tensor) -> torch.memory_format | None:
    """In which of these a convolution and its derivatives are computed, and their results lie; None: as they come."""
    layout = _CHANNELS_LAST.get(a.ndim)
    if layout is None:
        return None
    if a.device.type == "cpu" and a.ndim == 4 and a.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return layout  # oneDNN: 1.2 to 1.5 times as fast
    # cuDNN takes what either of the two has. The derivative by the input is not given the input, so the weight has to
    # tell: or that pass, and all behind it, would go back to the other layout.
    for x in (a, weight):
        if x.is_contiguous(memory_format=layout) and not x.is_contiguous():
            return layout
    return None


@rule(aten.convolution.default)
def _convolution(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a, weight, bias, *geometry = args
    value = tape.value(a)
    if value is None or tape.value(weight) is not None or tape.value(bias) is not None:
        return NotImplemented
    of_weight, of_bias = tape.parameter_gradient(weight), tape.parameter_gradient(bias)
    w = tape.keep(weight, func)
    layout = _layout(a, w)
    if layout is not None:
        a = a.contiguous(memory_format=layout)
        if id(weight) not in tape.cache:
            # With the weight itself in the entry, so that its id stays taken.
            tape.cache[id(weight)] = weight, w.contiguous(memory_format=layout)
        w = tape.cache[id(weight)][1]
    a = tape.keep(a, func)
    y = func(a, w, bias, *geometry)
    shape = a.shape

    def pull_a(d: Tensor, a: Tensor | None, w: Tensor) -> Tensor:
        a = d.new_empty(()).expand(shape) if a is None else a  # it only tells the shape
        return aten.convolution_backward.default(d, a, w, None, *geometry, [True, False, False])[0]  # type: ignore[no-any-return]

    def pull_w(d: Tensor, a: Tensor, w: Tensor) -> Tensor:
        return aten.convolution_backward.default(d, a, w, None, *geometry, [False, True, False])[1]  # type: ignore[no-any-return]

    over = [0, *range(2, y.ndim)]
    node = Bilinear(
        a,
        w,
        (value, None),
        (None, of_weight, of_bias),
        lambda a, w: func(a, w, None, *geometry),
        pull_a,
        pull_w,
        lambda d: d.sum(over),
    )
    return tape.record(node, func, y)
