"""What the tape knows of the operations of ATen: one rule for each family, one class for each kind of derivative.

A rule runs the operation and records a node. It returns NotImplemented where it does not apply, and the operation is
then run as one outside of the tape, or as one of which only autograd knows the derivative.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lipgan.penalties.tape import RULES, Node, Rule, Sink, Tape, Unsupported, Value, mutates, tensors_of

aten = torch.ops.aten

Map = Callable[[Tensor], Tensor]


def rule(*funcs: Any) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for func in funcs:
            RULES[func] = function
        return function

    return register


def _sum_to(tensor: Tensor, shape: torch.Size) -> Tensor:
    return tensor if tensor.shape == shape else tensor.sum_to_size(shape)


# ---- kinds of derivative ----


class Linear(Node):
    """``y = A a`` up to a constant: A for the tangent, its transpose for delta; for piecewise-linear operations too."""

    def __init__(self, value: Value, push: Map, pull: Map) -> None:
        self.inputs = (value,)
        self.push, self.pull = push, pull

    def backward(self, delta: Tensor) -> Sequence[Tensor | None]:
        return (self.pull(delta),)

    def tangent(self, tangents: Sequence[Tensor | None], delta: Tensor | None) -> Tensor | None:
        assert tangents[0] is not None
        return self.push(tangents[0])


class Pointwise(Node):
    """``y = s(a)`` elementwise, smooth: the tangent is ``s'(a) t``, the seed ``s''(a) delta t``.

    Args:
        value: that of a.
        first: multiplies by s'(a).
        second: multiplies by s''(a).
    """

    needs_delta = True
    curved = True

    def __init__(self, value: Value, first: Map, second: Map) -> None:
        self.inputs = (value,)
        self._first, self._second = first, second

    def backward(self, delta: Tensor) -> Sequence[Tensor | None]:
        return (self._first(delta),)

    def tangent(self, tangents: Sequence[Tensor | None], delta: Tensor | None) -> Tensor | None:
        tangent = tangents[0]
        assert tangent is not None
        if delta is not None and self.inputs[0].trainable:
            self.inputs[0].add_seed(self._second(delta * tangent))
        return self._first(tangent)


class Sum(Node):
    """``y = sum_k A_k a_k`` up to a constant, of values and sinks.

    Args:
        operands: a value or a sink each.
        push: the tangents of the operands, None for zeros -> that of y.
        pulls: for each operand the transpose of A_k.
    """

    def __init__(
        self,
        operands: Sequence[Value | Sink],
        push: Callable[[Sequence[Tensor | None]], Tensor],
        pulls: Sequence[Map],
    ) -> None:
        self._operands, self._push, self._pulls = operands, push, pulls
        self.inputs = [operand for operand in operands if isinstance(operand, Value)]
        self.sinks = [operand for operand in operands if isinstance(operand, Sink)]

    def backward(self, delta: Tensor) -> Sequence[Tensor | None]:
        pairs = zip(self._operands, self._pulls, strict=True)
        return [pull(delta) for operand, pull in pairs if isinstance(operand, Value)]

    def parameters(self, delta: Tensor) -> None:
        for operand, pull in zip(self._operands, self._pulls, strict=True):
            if isinstance(operand, Sink):
                operand.add(pull(delta))

    def tangent(self, tangents: Sequence[Tensor | None], delta: Tensor | None) -> Tensor | None:
        given = iter(tangents)
        return self._push([next(given) if isinstance(operand, Value) else None for operand in self._operands])


class Bilinear(Node):
    """``y = <a, b> + bias`` for a product that is linear in a and in b: convolutions, matrix products, elementwise.

    Each of a and b is a value, a sink, or a constant.

    Args:
        a, b: the operands.
        values: the values among them, None for others.
        sinks: the sinks among them, None for others; and that of the bias.
        product: ``(a, b)`` -> y without the bias.
        pull_a: ``(delta, a, b)`` -> the derivative with respect to a; a tells its shape only.
        pull_b: ``(delta, a, b)`` -> that with respect to b; b tells its shape only.
        pull_bias: ``delta`` -> that with respect to the bias.
    """

    def __init__(
        self,
        a: Tensor | None,
        b: Tensor | None,
        values: tuple[Value | None, Value | None],
        sinks: tuple[Sink | None, Sink | None, Sink | None],
        product: Callable[[Any, Any], Tensor],
        pull_a: Callable[[Tensor, Any, Any], Tensor],
        pull_b: Callable[[Tensor, Any, Any], Tensor],
        pull_bias: Map | None = None,
    ) -> None:
        self._a, self._b, self._values, self._sinks = a, b, values, sinks
        self.sinks = [sink for sink in sinks if sink is not None]
        self._product, self._pull_a, self._pull_b, self._pull_bias = product, pull_a, pull_b, pull_bias
        self.inputs = [value for value in values if value is not None]
        self.curved = len(self.inputs) == 2
        self.needs_delta = self.curved or sinks[0] is not None or sinks[1] is not None

    def backward(self, delta: Tensor) -> Sequence[Tensor | None]:
        grads = []
        if self._values[0] is not None:
            grads.append(self._pull_a(delta, self._a, self._b))
        if self._values[1] is not None:
            grads.append(self._pull_b(delta, self._a, self._b))
        return grads

    def parameters(self, delta: Tensor) -> None:
        of_a, of_b, of_bias = self._sinks
        if of_a is not None:
            of_a.add(self._pull_a(delta, self._a, self._b))
        if of_b is not None:
            of_b.add(self._pull_b(delta, self._a, self._b))
        if of_bias is not None:
            assert self._pull_bias is not None
            of_bias.add(self._pull_bias(delta))

    def tangent(self, tangents: Sequence[Tensor | None], delta: Tensor | None) -> Tensor | None:
        a, b = self._a, self._b
        remaining = list(tangents)
        tangent_a = remaining.pop(0) if self._values[0] is not None else None
        tangent_b = remaining.pop(0) if self._values[1] is not None else None
        result = None
        if tangent_a is not None:
            result = self._product(tangent_a, b)
            if delta is not None:
                self._mixed(1, self._pull_b, delta, tangent_a, b)
        if tangent_b is not None:
            along_b = self._product(a, tangent_b)
            result = along_b if result is None else result + along_b
            if delta is not None:
                self._mixed(0, self._pull_a, delta, a, tangent_b)
        return result

    def _mixed(self, which: int, pull: Callable[[Tensor, Any, Any], Tensor], delta: Tensor, a: Any, b: Any) -> None:
        """The derivative of ``<delta, product(a, b)>`` with respect to the operand that is not a tangent."""
        value, sink = self._values[which], self._sinks[which]
        if value is not None:
            if value.trainable:
                value.add_seed(pull(delta, a, b))
        elif sink is not None:
            sink.add(pull(delta, a, b))

    def release(self) -> None:
        if self._values[1] is None:
            self._a = None
        if self._values[0] is None:
            self._b = None


class Normalization(Node):
    """``y = weight * z + bias`` with ``z = (a - mean a) / sqrt(var a + eps)`` over some dimensions of a view of a.

    With P the projection ``P t = t - mean t - z mean(z t)`` and ``r = 1 / sqrt(var a + eps)`` the tangent of z is
    ``r P t``, and P is its own transpose: PyTorch's backward kernel serves as both. The seed is the derivative of
    ``<u, r P t>`` with respect to a, for ``u = weight * delta``:
    ``-r (z mean(u r P t) + mean(z t) r P u + mean(z u) r P t)``.

    Args:
        value: that of a.
        a: in the dtype of the statistics.
        view: the shape of a in which ``dims`` are averaged over.
        dims: of the view.
        statistics: mean and r, broadcastable to the view.
        project: ``t -> r P t``, in the shape of a.
        weight: broadcastable to a, or None.
        sinks: of weight and bias.
        affine: the shape of both, made broadcastable to a.
    """

    needs_delta = True
    curved = True

    def __init__(
        self,
        value: Value,
        a: Tensor,
        view: tuple[int, ...],
        dims: list[int],
        statistics: tuple[Tensor, Tensor],
        project: Map,
        weight: Tensor | None,
        sinks: tuple[Sink | None, Sink | None],
        affine: torch.Size,
    ) -> None:
        self.inputs = (value,)
        self.sinks = [sink for sink in sinks if sink is not None]
        self._a, self._view, self._dims = a, view, dims
        self._mean_of_a, self._r = statistics
        self._project, self._weight, self._sinks, self._affine = project, weight, sinks, affine

    def _z(self) -> Tensor:
        """In the view; computed where it is needed, rather than held."""
        return (self._a.reshape(self._view) - self._mean_of_a).mul_(self._r)

    def _mean(self, one: Tensor, other: Tensor) -> Tensor:
        return (one * other).mean(self._dims, keepdim=True)

    def _weighted(self, delta: Tensor) -> Tensor:
        return (delta if self._weight is None else delta * self._weight).to(self._a.dtype)

    def backward(self, delta: Tensor) -> Sequence[Tensor | None]:
        return (self._project(self._weighted(delta)),)

    def parameters(self, delta: Tensor) -> None:
        weight, bias = self._sinks
        if weight is not None:
            self._add(weight, delta * self._z().reshape(self._a.shape))
        if bias is not None:
            self._add(bias, delta)

    def _add(self, sink: Sink, contribution: Tensor) -> None:
        summed = contribution.sum_to_size(self._affine)
        sink.add(summed.reshape(sink.tensor.shape))

    def tangent(self, tangents: Sequence[Tensor | None], delta: Tensor | None) -> Tensor | None:
        assert tangents[0] is not None
        t = tangents[0].to(self._a.dtype)
        projected = self._project(t)
        if delta is not None:
            if self.inputs[0].trainable:
                self.inputs[0].add_seed(self._seed(t, projected, self._weighted(delta)))
            if self._sinks[0] is not None:
                self._add(self._sinks[0], delta * projected)
        return projected if self._weight is None else projected * self._weight

    def _seed(self, t: Tensor, projected: Tensor, u: Tensor) -> Tensor:
        projected_u = self._project(u).reshape(self._view)
        t, projected, u = (x.reshape(self._view) for x in (t, projected, u))
        z = self._z()
        along_t, along_u = self._mean(z, t), self._mean(z, u)
        seed = z.mul_(self._mean(u, projected)).addcmul_(projected_u, along_t).addcmul_(projected, along_u)
        return seed.mul_(-self._r).reshape(self._a.shape)


class Local(Node):
    """An operation of which autograd knows the derivatives: it is run again, alone, and differentiated twice."""

    curved = True

    def __init__(
        self, values: list[Value], sinks: list[Sink], call: Callable[[list[Tensor]], Tensor], arguments: list[Tensor]
    ) -> None:
        # call: the operands that are values or sinks, in this order -> the output that counts.
        self.inputs, self.sinks, self._call, self._arguments = values, sinks, call, arguments
        self._result: Tensor | None = None
        self._leaves: list[Tensor] = []
        self._gradient: Sequence[Tensor | None] = ()
        self._delta: Tensor | None = None

    def _run(self) -> None:
        if self._leaves:
            return
        with torch.enable_grad():
            self._leaves = [tensor.detach().requires_grad_() for tensor in self._arguments]
            self._result = self._call(self._leaves)
        self._arguments = []

    def backward(self, delta: Tensor) -> Sequence[Tensor | None]:
        first = not self._leaves
        self._run()
        result = self._result
        assert result is not None
        if not result.requires_grad:
            return [None] * len(self.inputs)
        leaves = self._leaves[: len(self.inputs)]
        with torch.enable_grad(), self._explained():
            if not first:
                return torch.autograd.grad(result, leaves, delta, retain_graph=True, allow_unused=True)
            self._delta = delta.detach().requires_grad_()
            self._gradient = torch.autograd.grad(result, leaves, self._delta, create_graph=True, allow_unused=True)
            return [None if grad is None else grad.detach() for grad in self._gradient]

    def parameters(self, delta: Tensor) -> None:
        result = self._result
        if self.sinks and result is not None and result.requires_grad:
            leaves = self._leaves[len(self.inputs) :]
            with torch.enable_grad(), self._explained():
                grads = torch.autograd.grad(result, leaves, delta, retain_graph=True, allow_unused=True)
            for sink, grad in zip(self.sinks, grads, strict=True):
                sink.add(grad)

    def tangent(self, tangents: Sequence[Tensor | None], delta: Tensor | None) -> Tensor | None:
        pairs = [
            (grad, tangent)
            for grad, tangent in zip(self._gradient, tangents, strict=True)
            if grad is not None and tangent is not None and grad.requires_grad
        ]
        if not pairs:
            return None
        grads, along = zip(*pairs, strict=True)
        wrt = self._delta
        assert wrt is not None
        with torch.enable_grad(), self._explained():
            # <gradient, tangents> is linear in delta with the tangent of the output as its derivative.
            derivatives = torch.autograd.grad(grads, [wrt, *self._leaves], along, retain_graph=True, allow_unused=True)
        self._gradient, self._delta = (), None
        k = len(self.inputs)
        for value, seed in zip(self.inputs, derivatives[1 : 1 + k], strict=True):
            value.add_seed(seed)
        for sink, grad in zip(self.sinks, derivatives[1 + k :], strict=True):
            sink.add(grad)
        return derivatives[0]

    def _explained(self) -> _Explained:
        return _Explained(self.name)


class _Explained:
    """Turns autograd's complaint about a missing second derivative into `Unsupported`."""

    def __init__(self, name: Any) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            raise Unsupported(f"{self._name} cannot be differentiated twice: {str(error).splitlines()[0]}") from error


# ---- shapes ----


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


@rule(aten.expand.default)
def _expand(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a = args[0]
    value = tape.value(a)
    if value is None:
        return NotImplemented
    y = func(*args, **kwargs)
    before, after = a.shape, y.shape
    node = Linear(value, lambda t: t.expand(after), lambda d: _sum_to(d, before))
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


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)
def _split(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a = args[0]
    value = tape.value(a)
    if value is None:
        return NotImplemented
    shape = a.shape
    parts = list(func(*args, **kwargs))
    for position, part in enumerate(parts):

        def push(t: Tensor, position: int = position) -> Tensor:
            return func(t, *args[1:], **kwargs)[position]  # type: ignore[no-any-return]

        def pull(d: Tensor, position: int = position) -> Tensor:
            whole = d.new_zeros(shape)
            func(whole, *args[1:], **kwargs)[position].copy_(d)
            return whole

        tape.record(Linear(value, push, pull), func, part, a)
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
    sources = [value or tape.sink(t) for t, value in zip(tensors, values, strict=True)]
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
    operand = value or tape.sink(source)
    before, after = source.shape, target.shape
    operands, pulls = ([], []) if operand is None else ([operand], [lambda d: _sum_to(d, before)])
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


# ---- sums and products ----


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
    operands: list[Value | Sink] = []
    terms: list[tuple[Any, torch.Size]] = []
    for tensor, value, factor in zip((a, b), values, factors, strict=True):
        operand = value or tape.sink(tensor)
        if operand is not None:
            operands.append(operand)
            terms.append((factor, tensor.shape))
    y = func(*args, **kwargs)
    dtype, after = y.dtype, y.shape

    def push(tangents: Sequence[Tensor | None]) -> Tensor:
        parts = [t if k == 1 else t * k for t, (k, _) in zip(tangents, terms, strict=True) if t is not None]
        return functools.reduce(torch.add, parts).to(dtype).expand(after)

    def pull(d: Tensor, factor: Any, shape: torch.Size) -> Tensor:
        return _sum_to(d if factor == 1 else d * factor, shape)

    pulls = [functools.partial(pull, factor=factor, shape=shape) for factor, shape in terms]
    return tape.record(Sum(operands, push, pulls), func, y, a)


@rule(aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar, aten.mul_.Scalar)
def _mul(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a, b = args
    values = tape.value(a), tape.value(b)
    if values == (None, None):
        return NotImplemented
    of_a = tape.sink(a) if values[0] is None else None
    of_b = tape.sink(b) if values[1] is None else None
    if isinstance(b, Tensor):
        b = tape.keep(b, func)
    if values[1] is None and of_b is None:
        shape = a.shape
        assert values[0] is not None
        node: Node = Linear(values[0], lambda t: t * b, lambda d: _sum_to(d * b, shape))
    else:
        shapes = a.shape, b.shape
        node = Bilinear(
            a.clone() if mutates(func) else tape.keep(a, func),
            b,
            values,
            (of_a, of_b, None),
            torch.mul,
            lambda d, a, b: _sum_to(d * b, shapes[0]),
            lambda d, a, b: _sum_to(d * a, shapes[1]),
        )
    return tape.record(node, func, func(*args), a)


@rule(aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar, aten.div_.Scalar)
def _div(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a, b = args
    value = tape.value(a)
    if value is None or tape.value(b) is not None or tape.sink(b) is not None:
        return NotImplemented
    if isinstance(b, Tensor):
        b = tape.keep(b, func)
    shape = a.shape
    node = Linear(value, lambda t: t / b, lambda d: _sum_to(d / b, shape))
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
    tape.save_random_state()
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
    of_a = tape.sink(a) if values[0] is None else None
    of_b = tape.sink(b if original is None else original) if values[1] is None else None
    of_bias = tape.sink(bias)
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
        None if of_bias is None else lambda d: _sum_to(d, bias.shape),
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


def _wants_channels_last(a: Tensor) -> bool:
    # oneDNN on a CPU: 1.2 to 1.5 times as fast in this layout, and its results stay in it.
    return a.ndim == 4 and a.device.type == "cpu" and a.dtype in (torch.float32, torch.bfloat16, torch.float16)


@rule(aten.convolution.default)
def _convolution(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a, weight, bias, *geometry = args
    value = tape.value(a)
    if value is None or tape.value(weight) is not None or tape.value(bias) is not None:
        return NotImplemented
    of_weight, of_bias = tape.sink(weight), tape.sink(bias)
    w = tape.keep(weight, func)
    if _wants_channels_last(a):
        a = a.contiguous(memory_format=torch.channels_last)
        if id(weight) not in tape.cache:
            # With the weight itself in the entry, so that its id stays taken.
            tape.cache[id(weight)] = weight, w.contiguous(memory_format=torch.channels_last)
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


# ---- piecewise-linear activations ----


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


@rule(aten._prelu_kernel.default)
def _prelu(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a, weight = args
    value = tape.value(a)
    if value is None or tape.value(weight) is not None:
        return NotImplemented
    of_weight, shape = tape.sink(weight), weight.shape
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
        lambda d, t, _: _sum_to(torch.where(a > 0, 0.0, d * t), shape),
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
            return -2 * y * first(p)
    else:

        def first(d: Tensor) -> Tensor:
            return aten.sigmoid_backward.default(d, y)  # type: ignore[no-any-return]

        def second(p: Tensor) -> Tensor:
            return first(p) * (1 - 2 * y)

    return tape.record(Pointwise(value, first, second), func, output, args[0])


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


# ---- pooling, and other operations that are linear in the samples ----


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
    backward = aten.avg_pool2d_backward if func is aten.avg_pool2d.default else aten.avg_pool3d_backward
    defaults: list[Any] = [[], [0], False, True, None]
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


# ---- normalization ----


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
    sinks = tape.sink(weight), tape.sink(bias)
    node = Normalization(value, wide, view, dims, statistics, in_layout, w, sinks, torch.Size(affine))
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
            (None, tape.sink(weight), tape.sink(bias)),
            lambda t, w: t * (w * factor),
            lambda d, _, w: d * (w * factor),
            lambda d, t, _: _sum_to(d * t * factor, shape).flatten(),
            lambda d: _sum_to(d, shape).flatten(),
        )
        tape.record(node, func, y)
    return (y, *rest)


# ---- what has no derivative, and what only autograd knows ----

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
        tape.save_random_state(kwargs.get("generator"))
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
    sinks: list[tuple[Sink, Tensor, list[int]]] = []

    def note(item: Tensor, place: list[int]) -> Tensor:
        value, sink = tape.value(item), None
        if value is None:
            sink = tape.sink(item)
        item = item.clone() if mutates(func) and place == [0] else tape.keep(item, func)
        if value is not None:
            values.append((value, item, place))
        elif sink is not None:
            sinks.append((sink, item, place))
        return item

    names, n = list(kwargs), len(args)
    frozen = _mapped(note, [*args, *kwargs.values()], [])
    places = [place for *_, place in (*values, *sinks)]

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
                [sink for sink, *_ in sinks],
                functools.partial(run, which=which if several else None),
                [tensor for _, tensor, _ in (*values, *sinks)],
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
    before = tape.value(base) or tape.sink(base)
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
    operands: list[Value | Sink] = [y._lipgan_value] if before is None else [y._lipgan_value, before]
    pulls = [read, lambda d: replaced(d, None)][: len(operands)]
    push: Any = lambda tangents: replaced(*reversed([*tangents, None][:2]))  # noqa: E731
    tape.record(Sum(operands, push, pulls), func, base, base)
    return y


RULES["local"] = _local
RULES["view changed"] = _view_changed
