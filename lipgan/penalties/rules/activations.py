"""Activations, piecewise linear and smooth."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lipgan.penalties.derivatives import Bilinear, Linear, Pointwise, sum_to
from lipgan.penalties.rules._table import rule
from lipgan.penalties.tape import Tape
from lipgan.penalties.undo import mutates

aten = torch.ops.aten


@rule(aten.relu.default, aten.relu_.default)
def _relu(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value = tape.value(args[0])
    if value is None:
        return NotImplemented
    y = func(*args)
    result = tape.keep(y, func, changing=mutates(func))

    def apply(d: Tensor) -> Tensor:
        return aten.threshold_backward.default(d, result, 0)  # type: ignore[no-any-return]

    return tape.record(Linear(value, apply, apply), func, y, args[0])


@rule(aten.leaky_relu.default, aten.leaky_relu_.default)
def _leaky_relu(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a = args[0]
    value = tape.value(a)
    if value is None:
        return NotImplemented
    slope = args[1] if len(args) > 1 else kwargs.get("negative_slope", 0.01)
    # The sign of the result tells the branch: one tensor less to hold than with the operand.
    from_result = slope > 0
    operand = None if from_result else a.clone() if mutates(func) else tape.keep(a, func)
    y = func(*args, **kwargs)
    held = tape.keep(y, func, changing=mutates(func)) if operand is None else operand

    def apply(d: Tensor) -> Tensor:
        return aten.leaky_relu_backward.default(d, held, slope, from_result)  # type: ignore[no-any-return]

    return tape.record(Linear(value, apply, apply), func, y, a)


@rule(aten.rrelu_with_noise.default, aten.rrelu_with_noise_.default)
def _randomized_relu(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Negative numbers are multiplied by slopes that are drawn in training, and fixed in evaluation."""
    a, noise, lower, upper, training = [*args, *[0.125, 1 / 3, False][len(args) - 2 :]][:5]
    value = tape.value(a)
    if value is None or (mutates(func) and a._base is not None):
        return NotImplemented
    tape.undo.keep_random_state(args[5] if len(args) > 5 else kwargs.get("generator"))
    operand = a.clone() if mutates(func) else tape.keep(a, func)
    y = func(*args, **kwargs)

    def apply(d: Tensor) -> Tensor:
        return aten.rrelu_with_noise_backward.default(d, operand, noise, lower, upper, training, False)  # type: ignore[no-any-return]

    return tape.record(Linear(value, apply, apply), func, y, a)


@rule(aten._prelu_kernel.default)
def _prelu(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a, weight = args
    value = tape.value(a)
    if value is None or tape.value(weight) is not None:
        return NotImplemented
    of_weight, shape = tape.parameter_gradient(weight), weight.shape
    a = tape.keep(a, func)

    def scale(t: Tensor, w: Tensor) -> Tensor:
        return torch.where(a > 0, t, w * t)

    # Where a <= 0 the output is the product of weight and a, elsewhere weight has no part in it.
    node = Bilinear(
        a,
        tape.keep(weight, func),
        (value, None),
        (None, of_weight, None),
        scale,
        lambda d, _, w: scale(d, w),
        lambda d, t, _: sum_to(torch.where(a > 0, 0.0, d * t), shape),
    )
    return tape.record(node, func, func(*args))


# ---- smooth activations ----


@rule(aten.tanh.default, aten.tanh_.default, aten.sigmoid.default, aten.sigmoid_.default)
def _of_the_result(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Activations whose derivatives are functions of the result: ``1 - y^2`` and ``y (1 - y)``."""
    value = tape.value(args[0])
    if value is None:
        return NotImplemented
    output = func(*args)
    y = tape.keep(output, func, changing=mutates(func))
    if func in (aten.tanh.default, aten.tanh_.default):

        def first(d: Tensor) -> Tensor:
            return aten.tanh_backward.default(d, y)  # type: ignore[no-any-return]

        def second(p: Tensor) -> Tensor:
            return p * y * -2
    else:

        def first(d: Tensor) -> Tensor:
            return aten.sigmoid_backward.default(d, y)  # type: ignore[no-any-return]

        def second(p: Tensor) -> Tensor:
            return p * (1 - 2 * y)

    return tape.record(Pointwise(value, first, second, by_first=True), func, output, args[0])


@rule(aten.silu.default, aten.silu_.default, aten.gelu.default, aten.gelu_.default, aten.softplus.default)
def _of_the_operand(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Activations whose derivatives are functions of the operand."""
    value = tape.value(args[0])
    if value is None or kwargs.get("approximate", "none") != "none":
        return NotImplemented
    a = args[0].detach().clone() if mutates(func) else tape.keep(args[0], func)
    if func in (aten.silu.default, aten.silu_.default):

        def first(d: Tensor) -> Tensor:
            return aten.silu_backward.default(d, a)  # type: ignore[no-any-return]

        def second(p: Tensor) -> Tensor:
            s = torch.sigmoid(a)
            return aten.sigmoid_backward.default(p, s) * (2 + a * (1 - 2 * s))  # type: ignore[no-any-return]
    elif func in (aten.gelu.default, aten.gelu_.default):

        def first(d: Tensor) -> Tensor:
            return aten.gelu_backward.default(d, a)  # type: ignore[no-any-return]

        def second(p: Tensor) -> Tensor:
            square = a.square()
            return p * (2 - square) * torch.exp(-0.5 * square) / math.sqrt(2 * math.pi)
    else:
        options: list[Any] = [*args[1:], *[1, 20][len(args) - 1 :]]
        beta, threshold = options

        def first(d: Tensor) -> Tensor:
            return aten.softplus_backward.default(d, a, beta, threshold)  # type: ignore[no-any-return]

        def second(p: Tensor) -> Tensor:
            curvature = beta * aten.sigmoid_backward.default(p, torch.sigmoid(beta * a))
            return torch.where(beta * a > threshold, 0.0, curvature)

    return tape.record(Pointwise(value, first, second), func, func(*args, **kwargs), args[0])
