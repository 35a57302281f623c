"""The kinds of derivative that the operations on a tape have: one class each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lipgan.penalties.tape import Node, ParameterGradient, ScoreGradients, Unsupported, Value

Map = Callable[[Tensor], Tensor]


def sum_to(tensor: Tensor, shape: torch.Size) -> Tensor:
    """``tensor`` summed over the dimensions along which ``shape`` was broadcast."""
    return tensor if tensor.shape == shape else tensor.sum_to_size(shape)


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
    """``y = s(a)`` elementwise, smooth: the tangent is ``s'(a) t``, the adjoint ``s''(a) delta t``.

    Args:
        value: that of a.
        first: multiplies by s'(a).
        second: multiplies by s''(a); or, where ``by_first``, by s''(a) / s'(a).
    """

    needs_delta = True
    curved = True

    def __init__(self, value: Value, first: Map, second: Map, *, by_first: bool = False) -> None:
        self.inputs = (value,)
        self._first, self._second, self._by_first = first, second, by_first

    def backward(self, delta: Tensor) -> Sequence[Tensor | None]:
        return (self._first(delta),)

    def tangent(self, tangents: Sequence[Tensor | None], delta: Tensor | None) -> Tensor | None:
        tangent = tangents[0]
        assert tangent is not None
        along = self._first(tangent)
        if delta is not None and self.inputs[0].trainable:
            self.inputs[0].add_adjoint(self._second(delta * (along if self._by_first else tangent)))
        return along


class Sum(Node):
    """``y = sum_k A_k a_k`` up to a constant, of values and parameter_gradients.

    Args:
        operands: a value or a parameter_gradient each.
        push: the tangents of the operands, None for zeros -> that of y.
        pulls: for each operand the transpose of A_k.
    """

    def __init__(
        self,
        operands: Sequence[Value | ParameterGradient],
        push: Callable[[Sequence[Tensor | None]], Tensor],
        pulls: Sequence[Map],
    ) -> None:
        self._operands, self._push, self._pulls = operands, push, pulls
        self.inputs = [operand for operand in operands if isinstance(operand, Value)]
        self.parameter_gradients = [operand for operand in operands if isinstance(operand, ParameterGradient)]

    def backward(self, delta: Tensor) -> Sequence[Tensor | None]:
        pairs = zip(self._operands, self._pulls, strict=True)
        return [pull(delta) for operand, pull in pairs if isinstance(operand, Value)]

    def parameters(self, delta: Tensor) -> None:
        for operand, pull in zip(self._operands, self._pulls, strict=True):
            if isinstance(operand, ParameterGradient):
                operand.add(pull(delta))

    def tangent(self, tangents: Sequence[Tensor | None], delta: Tensor | None) -> Tensor | None:
        given = iter(tangents)
        return self._push([next(given) if isinstance(operand, Value) else None for operand in self._operands])


class Bilinear(Node):
    """``y = <a, b> + bias`` for a product that is linear in a and in b: convolutions, matrix products, elementwise.

    Each of a and b is a value, a parameter_gradient, or a constant.

    Args:
        a, b: the operands.
        values: the values among them, None for others.
        parameter_gradients: the parameter_gradients among them, None for others; and that of the bias.
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
        parameter_gradients: tuple[ParameterGradient | None, ParameterGradient | None, ParameterGradient | None],
        product: Callable[[Any, Any], Tensor],
        pull_a: Callable[[Tensor, Any, Any], Tensor],
        pull_b: Callable[[Tensor, Any, Any], Tensor],
        pull_bias: Map | None = None,
    ) -> None:
        self._a, self._b, self._values, self._sinks = a, b, values, parameter_gradients
        self.parameter_gradients = [
            parameter_gradient for parameter_gradient in parameter_gradients if parameter_gradient is not None
        ]
        self._product, self._pull_a, self._pull_b, self._pull_bias = product, pull_a, pull_b, pull_bias
        self.inputs = [value for value in values if value is not None]
        self.curved = len(self.inputs) == 2
        self.needs_delta = self.curved or parameter_gradients[0] is not None or parameter_gradients[1] is not None

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

    def tangent_with_loss(
        self, tangents: Sequence[Tensor | None], delta: Tensor | None, loss: ScoreGradients
    ) -> Tensor | None:
        # The operand's own derivative times w joins its tangent: one product gives both shares.
        k = 0 if self._values[0] is not None else 1
        value, operand, other = self._values[k], (self._a, self._b)[k], self._sinks[1 - k]
        (tangent,) = tangents
        _, _, of_bias = self._sinks
        assert value is not None
        if delta is not None and other is not None:
            assert value.rows is not None
            assert operand is not None
            along = loss.along(value.rows, operand)
            joined = operand * along if tangent is None else torch.addcmul(tangent, operand, along)
            other.add(self._pull_b(delta, joined, self._b) if k == 0 else self._pull_a(delta, self._a, joined))
        if delta is not None and of_bias is not None:
            assert self._pull_bias is not None
            assert self.output.rows is not None
            of_bias.add(self._pull_bias(delta * loss.along(self.output.rows, delta)))
        if tangent is None:
            return None
        return self._product(tangent, self._b) if k == 0 else self._product(self._a, tangent)

    def _mixed(self, which: int, pull: Callable[[Tensor, Any, Any], Tensor], delta: Tensor, a: Any, b: Any) -> None:
        """The derivative of ``<delta, product(a, b)>`` with respect to the operand that is not a tangent."""
        value, parameter_gradient = self._values[which], self._sinks[which]
        if value is not None:
            if value.trainable:
                value.add_adjoint(pull(delta, a, b))
        elif parameter_gradient is not None:
            parameter_gradient.add(pull(delta, a, b))

    def release(self) -> None:
        if self._values[1] is None:
            self._a = None
        if self._values[0] is None:
            self._b = None


class Normalization(Node):
    """``y = weight * z + bias`` with ``z = (a - mean a) / sqrt(var a + eps)`` over some dimensions of a view of a.

    With P the projection ``P t = t - mean t - z mean(z t)`` and ``r = 1 / sqrt(var a + eps)`` the tangent of z is
    ``r P t``, and P is its own transpose: PyTorch's backward kernel serves as both. The adjoint is the derivative of
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
        parameter_gradients: of weight and bias.
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
        parameter_gradients: tuple[ParameterGradient | None, ParameterGradient | None],
        affine: torch.Size,
    ) -> None:
        self.inputs = (value,)
        self.parameter_gradients = [
            parameter_gradient for parameter_gradient in parameter_gradients if parameter_gradient is not None
        ]
        self._a, self._view, self._dims = a, view, dims
        self._mean_of_a, self._r = statistics
        self._project, self._weight, self._sinks, self._affine = project, weight, parameter_gradients, affine

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

    def _add(self, parameter_gradient: ParameterGradient, contribution: Tensor) -> None:
        summed = contribution.sum_to_size(self._affine)
        parameter_gradient.add(summed.reshape(parameter_gradient.tensor.shape))

    def tangent(self, tangents: Sequence[Tensor | None], delta: Tensor | None) -> Tensor | None:
        assert tangents[0] is not None
        t = tangents[0].to(self._a.dtype)
        projected = self._project(t)
        if delta is not None:
            if self.inputs[0].trainable:
                self.inputs[0].add_adjoint(self._seed(t, projected, self._weighted(delta)))
            if self._sinks[0] is not None:
                self._add(self._sinks[0], delta * projected)
        return projected if self._weight is None else projected * self._weight

    def _seed(self, t: Tensor, projected: Tensor, u: Tensor) -> Tensor:
        projected_u = self._project(u).reshape(self._view)
        t, projected, u = (x.reshape(self._view) for x in (t, projected, u))
        z = self._z()
        along_t, along_u = self._mean(z, t), self._mean(z, u)
        adjoint = z.mul_(self._mean(u, projected)).addcmul_(projected_u, along_t).addcmul_(projected, along_u)
        return adjoint.mul_(-self._r).reshape(self._a.shape)


class Local(Node):
    """An operation of which autograd knows the derivatives: it is run again, alone, and differentiated twice."""

    curved = True

    def __init__(
        self,
        values: list[Value],
        parameter_gradients: list[ParameterGradient],
        call: Callable[[list[Tensor]], Tensor],
        arguments: list[Tensor],
    ) -> None:
        # call: the operands that are values or parameter_gradients, in this order -> the output that counts.
        self.inputs, self.parameter_gradients, self._call, self._arguments = (
            values,
            parameter_gradients,
            call,
            arguments,
        )
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
        if self.parameter_gradients and result is not None and result.requires_grad:
            leaves = self._leaves[len(self.inputs) :]
            with torch.enable_grad(), self._explained():
                grads = torch.autograd.grad(result, leaves, delta, retain_graph=True, allow_unused=True)
            for parameter_gradient, grad in zip(self.parameter_gradients, grads, strict=True):
                parameter_gradient.add(grad)

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
        for value, adjoint in zip(self.inputs, derivatives[1 : 1 + k], strict=True):
            value.add_adjoint(adjoint)
        for parameter_gradient, grad in zip(self.parameter_gradients, derivatives[1 + k :], strict=True):
            parameter_gradient.add(grad)
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
