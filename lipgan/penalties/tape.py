"""The gradient of a gradient penalty without a second backward pass through autograd.

With the critic's outputs summed to ``f(x)``, its gradient ``g`` and the cotangent ``v = dP/dg`` held constant, the
parameter gradients of the penalty are ``d/dtheta <v, g> = d/dtheta (d/ds f(x + s v))``: the derivative of a directional
derivative. `Tape` records the operations of one forward pass of any critic and then takes

1. a backward pass: ``delta``, the derivative of f with respect to every intermediate value; it ends in ``g``;
2. a tangent pass: ``tangent``, the change of every intermediate value along ``v``. Each operation also hands out what
   only it knows: the derivative of ``<delta, its tangent>`` with respect to its parameters, which belongs to the
   result, and with respect to its inputs, called ``adjoint``; piecewise-linear operations have none;
3. where there are adjoints, a second backward pass that carries them to the parameters.

A loss of the same scores comes along (`Tape.differentiate`): as an adjoint of the scores in pass 3, or, where the score
of a sample depends on that sample only and there are no other adjoints, within the products of pass 2.

Derivation: docs/numerics/gradient_penalty.md. The operations are those of PyTorch's dispatcher (ATen), below autograd:
how a module spells them does not matter. `lipgan.penalties.rules` knows their derivatives; for an operation that it
does not know, autograd is asked for those of that operation alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.multiprocessing.reductions import StorageWeakRef

from lipgan.penalties.conditions import NO_FORWARD_MODE, hooks_may_change
from lipgan.penalties.coupling import Ancestry, Rows, SampleTracker
from lipgan.penalties.mode import Mode
from lipgan.penalties.undo import Undo, is_random, mutated, mutated_arguments, mutates, tensors_of

aten = torch.ops.aten


HOOKS_ON_SAVED = (
    "hooks on saved tensors (torch.autograd.graph.saved_tensors_hooks) may change what autograd computes from"
)


class Unsupported(Exception):
    """The tape cannot follow an operation; ``module`` is the name of the module that called it, where known."""

    def __init__(self, reason: str, module: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.module = module


class Value:
    """What the passes know of one intermediate tensor.

    It hangs on the tensor, in an attribute: a tensor that is freed takes its value along, and no identity of an object
    is taken for that of another.
    """

    __slots__ = ("adjoint", "delta", "dtype", "owner", "rows", "tangent", "trainable", "uses", "version")

    def __init__(self, owner: object, dtype: torch.dtype, version: int) -> None:
        self.owner = owner
        self.dtype = dtype
        # Where the samples lie in the tensor, where the tape was asked to note it.
        self.rows: Rows | None = None
        # Of the tensor, which counts the changes in place of the memory that it shares with its views.
        self.version = version
        # Whether a parameter_gradient has a part in it: otherwise nobody asks for its adjoint.
        self.trainable = False
        self.delta: Tensor | None = None
        self.tangent: Tensor | None = None
        self.adjoint: Tensor | None = None
        self.uses = 0

    def add_delta(self, delta: Tensor | None) -> None:
        if delta is not None:
            delta = delta.to(self.dtype)
            self.delta = delta if self.delta is None else self.delta + delta

    def add_adjoint(self, adjoint: Tensor | None) -> None:
        if adjoint is not None and self.trainable:
            adjoint = adjoint.to(self.dtype)
            self.adjoint = adjoint if self.adjoint is None else self.adjoint + adjoint


class ParameterGradient:
    """A tensor outside of the tape that requires a gradient: a parameter, or what was computed from parameters.

    Attributes:
        tensor: stands for it in autograd's graph.
        grad: the derivative of ``<cotangent, gradient>`` with respect to it, None for zeros.
    """

    __slots__ = ("_source", "grad", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self._source = tensor  # which keeps its id
        self.tensor: Tensor = tensor if tensor.is_leaf else _AutogradHandle.apply(tensor)  # type: ignore[no-untyped-call]
        self.grad: Tensor | None = None

    def add(self, grad: Tensor | None) -> None:
        if grad is not None:
            self.grad = grad if self.grad is None else self.grad + grad


class _AutogradHandle(torch.autograd.Function):
    """A tensor as autograd knows it now, whatever changes it in place later; without its content."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.new_zeros(()).expand(tensor.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(NO_FORWARD_MODE)


class ScoreGradients:
    """The derivative of a loss with respect to the score of each sample: as many numbers as there are samples.

    Args:
        weights: ``[B]``.
    """

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights
        self._laid: dict[Any, Tensor] = {}

    def along(self, rows: Rows, like: Tensor) -> Tensor:
        """The number of the sample to which each part of a tensor belongs, broadcastable to the tensor.

        Args:
            rows: where the samples lie in it.
            like: the tensor.
        """
        size = like.shape[rows.dim]
        key = rows, size, like.ndim, like.dtype
        if key not in self._laid:
            weights = self._weights
            if rows.inner != 1 or size != len(weights):
                weights = weights[(torch.arange(size, device=weights.device) // rows.inner) % len(weights)]
            shape = [1] * like.ndim
            shape[rows.dim] = size
            self._laid[key] = weights.to(like.dtype).view(shape)
        return self._laid[key]


class Node:
    """One recorded operation, with one output; as it stands, one whose derivative is zero.

    Attributes:
        inputs: the values among its operands.
        parameter_gradients: those of the parameters among its operands.
        output: its value.
        needs_delta: whether `tangent` reads the output's delta.
        curved: whether `tangent` may give adjoints.
        name: of the operation.
        module: the name of the module that called it, where the tape was asked to note it.
    """

    inputs: Sequence[Value] = ()
    parameter_gradients: Sequence[ParameterGradient] = ()
    output: Value
    needs_delta = False
    curved = False
    name = ""
    module: str | None = None

    def backward(self, delta: Tensor) -> Sequence[Tensor | None]:
        """The derivatives with respect to the inputs, in their order, given that with respect to the output."""
        return ()

    def parameters(self, delta: Tensor) -> None:
        """Add the derivatives with respect to the parameters to their gradients."""

    def tangent(self, tangents: Sequence[Tensor | None], delta: Tensor | None) -> Tensor | None:
        """The tangent of the output; adjoints and the parameters' share are added on the way."""
        return None

    def tangent_with_loss(
        self, tangents: Sequence[Tensor | None], delta: Tensor | None, loss: ScoreGradients
    ) -> Tensor | None:
        """As `tangent`, and the parameters' share in a loss: with ``delta`` times the loss's derivative by the score.

        For nodes that are not curved, in critics that do not couple samples.
        """
        if delta is not None and self.parameter_gradients:
            assert self.output.rows is not None
            self.parameters(delta * loss.along(self.output.rows, delta))
        return self.tangent(tangents, delta) if any(tangent is not None for tangent in tangents) else None

    def release(self) -> None:
        """Forget what only a second backward pass would need."""


Rule = Callable[["Tape", Any, tuple[Any, ...], dict[str, Any]], Any]
RULES: dict[Any, Rule] = {}


@functools.cache
def _shares(func: Any) -> bool:
    """Whether the result of an operation shares the memory of its first argument: views, and changes in place."""
    returns = func._schema.returns
    return bool(returns) and returns[0].alias_info is not None


class Tape(Mode):  # type: ignore[no-untyped-call]
    """Records what is computed from ``x`` while it is active, and differentiates it.

    Args:
        x: ``[B, ...]``, a leaf that requires a gradient.
        names: a function that tells the name of the module that runs; slow, for messages.
        samples: told of every operation.
        until_curved: whether ``samples`` need not hear of operations after the first one that may give adjoints.
    """

    def __init__(
        self,
        x: Tensor,
        names: Callable[[], str] | None = None,
        samples: SampleTracker | None = None,
        *,
        until_curved: bool = False,
    ) -> None:
        super().__init__()
        self._owner = object()
        self._names = names
        self.samples, self._until_curved = samples, until_curved
        self._kept: list[tuple[Tensor, int, Any]] = []
        # The memory of values, and of what the passes read. The reference keeps the address taken.
        self._memory: dict[int, StorageWeakRef] = {}
        self.undo = Undo(x)
        self._ancestry = Ancestry(x)
        self._refusal: tuple[str, str | None] | None = None
        self.nodes: list[Node] = []
        self.parameter_gradients: dict[tuple[int, int], ParameterGradient] = {}
        # Whether an operation was recorded that may give adjoints.
        self.curved = False
        # Per operation, for the rules: such as a weight in the layout that suits the convolutions.
        self.cache: dict[Any, Any] = {}
        self.x = self._track(x, x._version)
        if samples is not None:
            self.x.rows = samples.given(x)

    # ---- recording ----

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = self._run(func, args, kwargs)
        if self.samples is not None and not (self.curved and self._until_curved):
            self.samples.follow(func, args, kwargs, result)
            for tensor in tensors_of(result):
                if self._owns(tensor):
                    tensor._lipgan_value.rows = self.samples.given(tensor)  # type: ignore[attr-defined]
        return result

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operation, with what the passes need to know of it."""
        if torch.is_grad_enabled():
            try:
                if hooks_may_change():
                    raise Unsupported(HOOKS_ON_SAVED)
                if self._names is not None:  # sooner than `parameter_gradient` would: the module is still known
                    for tensor in tensors_of((args, *kwargs.values())):
                        if isinstance(tensor.grad_fn, BackwardCFunction):
                            self._check_independent(tensor)
                rule = RULES.get(func)
                if mutates(func) and self._changes_a_view(func, args, kwargs):
                    rule = RULES["view changed"]
                if rule is not None:
                    result = rule(self, func, args, kwargs)
                    if result is not NotImplemented:
                        return result
                if self._any_value(args) or (kwargs and self._any_value(kwargs.values())):
                    return RULES["local"](self, func, args, kwargs)
            except Unsupported as error:
                error.module = error.module or (self._names() if self._names else None)
                self._refusal = error.reason, error.module  # the exception itself holds the frames, and this tape
                raise
        if is_random(func):
            self.undo.keep_random_state(kwargs.get("generator"))
        if mutates(func):
            for tensor in mutated(func, args, kwargs):
                self._check_foreign(tensor)
                self.keep_for_undo(tensor)
                mark: Any = getattr(tensor, "_lipgan_value", None)
                if self._owns(tensor) and not torch.is_grad_enabled() and mark.version == tensor._version:
                    mark.version += 1  # as autograd has it: another content, the same derivative
        result = func(*args, **kwargs)
        if self._names is not None and not torch.is_grad_enabled():
            for tensor in tensors_of(result):
                tensor._lipgan_module = self._names()  # type: ignore[attr-defined]
        return result

    def value(self, tensor: Any) -> Value | None:
        """The value of a tensor that depends on x, or None for anything else."""
        if not self._owns(tensor) or not tensor.requires_grad:
            return None
        value = tensor._lipgan_value
        if isinstance(tensor.grad_fn, BackwardCFunction):
            raise _hidden(tensor.grad_fn, tensor)
        if tensor._version != value.version:
            raise Unsupported("a tensor is used after its memory was changed in place by another name")
        if tensor._backward_hooks:
            raise Unsupported("a hook on a tensor waits for its gradient")
        return value  # type: ignore[no-any-return]

    def _owns(self, tensor: Any) -> bool:
        value = getattr(tensor, "_lipgan_value", None)
        return value is not None and value.owner is self._owner

    def score(self, tensor: Tensor) -> Value | None:
        """The value of what the critic returned, None where it does not depend on x."""
        if self._refusal is not None:  # the critic has caught it
            raise Unsupported(*self._refusal)
        value = self.value(tensor)
        if value is None:
            self._check_independent(tensor)
        return value

    def _track(self, tensor: Tensor, version: int) -> Value:
        self._note_memory(tensor)
        value = tensor._lipgan_value = Value(self._owner, tensor.dtype, version)  # type: ignore[attr-defined]
        return value

    def record(self, node: Node, func: Any, output: Tensor, operand: Tensor | None = None) -> Tensor:
        """Put a node on the tape; ``node.inputs`` is set, ``node.output`` becomes the value of ``output``.

        Args:
            operand: the first of ``func``; the output shares its memory if ``func`` makes a view or changes it.
        """
        if output.is_complex():
            raise Unsupported(f"{func} returns complex numbers")
        # Autograd counts the change, and gives a view the counter of its base, after this.
        version = output._version if operand is None or not _shares(func) else operand._version + mutates(func)
        self.record_value(node, func, self._track(output, version))
        return output

    def record_value(self, node: Node, func: Any, output: Value) -> Value:
        """Put a node on the tape whose output may be no tensor, such as the parts of one."""
        for value in node.inputs:
            value.uses += 1
        node.output = output
        output.trainable = bool(node.parameter_gradients) or any(value.trainable for value in node.inputs)
        node.name = func
        if self._names is not None:
            node.module = self._names()
        self.curved = self.curved or node.curved
        self.nodes.append(node)
        return output

    def keep(self, tensor: Tensor, func: Any, changing: bool = False) -> Tensor:
        """The tensor without its history, which must not change any more; ``changing`` if ``func`` changes it."""
        self._kept.append((tensor, tensor._version + changing, func))
        self._note_memory(tensor)
        return tensor.detach()

    def _note_memory(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._memory:
            self._memory[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]

    def _check_foreign(self, tensor: Tensor) -> None:
        """Refuse to change the tape's memory by a name that hides the change from it and from autograd: ``.data``."""
        if not self._owns(tensor) and tensor.untyped_storage()._cdata in self._memory:
            reason = "memory that the derivatives are computed from is changed in place by another name, such as .data"
            self._refusal = reason, self._names() if self._names else None
            raise Unsupported(*self._refusal)

    def parameter_gradient(self, tensor: Any) -> ParameterGradient | None:
        """The parameter_gradient of a tensor outside of the tape, or None where it requires no gradient."""
        if not isinstance(tensor, Tensor) or not tensor.requires_grad:
            return None
        key = id(tensor), 0 if tensor.is_leaf else tensor._version
        parameter_gradient = self.parameter_gradients.get(key)
        if parameter_gradient is None:
            self._check_independent(tensor)
            parameter_gradient = self.parameter_gradients[key] = ParameterGradient(tensor)
        return parameter_gradient

    def _check_independent(self, tensor: Tensor) -> None:
        """Refuse a tensor that autograd knows to depend on x, though the tape does not."""
        function = self._ancestry.hiding(tensor)
        if function is not None:
            raise _hidden(function, tensor)

    def _any_value(self, items: Any) -> bool:
        for item in items:
            if isinstance(item, Tensor):
                if self.value(item) is not None:
                    return True
            elif isinstance(item, (list, tuple)) and self._any_value(item):
                return True
        return False

    def _changes_a_view(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a change in place, that the passes have to know of, is one of a view."""
        if not (self._any_value(args) or self._any_value(kwargs.values())):
            return False
        if mutated_arguments(func) != [(0, "self")] or not isinstance(args[0], Tensor):
            if func in RULES:
                return False
            raise Unsupported(f"{func} writes into an argument")
        target, base = args[0], args[0]._base
        self.keep_for_undo(target if base is None else base)
        return base is not None

    # ---- undoing, so that a fallback starts where this began ----

    def keep_for_undo(self, tensor: Tensor) -> None:
        """Note the content of a tensor outside of the tape that the running operation changes."""
        if not hasattr(tensor, "_lipgan_new") and not self._owns(tensor):
            self.undo.keep(tensor)

    # ---- the passes; autograd is off ----

    def backward(self, output: Value, ones: Tensor, *, loss: bool = False) -> Tensor | None:
        """The derivative of the sum of the output with respect to x: the first pass.

        Args:
            ones: shaped as the output.
            loss: whether `differentiate` will be given a loss.
        """
        for tensor, version, func in self._kept:
            if tensor._version != version:
                raise Unsupported(f"a result or an operand of {func} is changed in place afterwards")
        self._kept.clear()
        self._memory.clear()
        output.delta = ones
        reached = []
        for node in reversed(self.nodes):
            delta = node.output.delta
            if delta is None:  # an output that does not count depends on it, or nothing does
                for value in node.inputs:
                    value.uses -= 1
                continue
            reached.append(node)
            with _named(node):
                for value, grad in zip(node.inputs, node.backward(delta), strict=True):
                    value.add_delta(grad)
            if not node.needs_delta and not (loss and node.parameter_gradients):
                node.output.delta = None
            if not self.curved and not loss:
                node.release()
        self.nodes = reached[::-1]
        gradient, self.x.delta = self.x.delta, None
        return gradient

    def differentiate(self, cotangent: Tensor, output: Value | None = None, loss: Tensor | None = None) -> None:
        """Add the derivatives of ``<cotangent, gradient>`` to the parameters: the tangent pass and what follows it.

        Args:
            cotangent: shaped as x.
            output: the value of the scores.
            loss: the derivative of a loss with respect to them, shaped as they are: the derivatives of that loss with
                respect to the parameters are added as well.
        """
        riding = None
        if loss is not None and output is not None:
            riding = self._riding(output, loss)
            if riding is None:
                output.add_adjoint(loss)
        self.x.tangent = cotangent
        for node in self.nodes:
            delta = node.output.delta
            node.output.delta = None
            tangents = [value.tangent for value in node.inputs]
            tangent = None
            with _named(node):
                if riding is not None:
                    tangent = node.tangent_with_loss(tangents, delta, riding)
                elif any(tangent is not None for tangent in tangents):
                    tangent = node.tangent(tangents, delta)
            node.output.tangent = None if tangent is None else tangent.to(node.output.dtype)
            for value in node.inputs:
                value.uses -= 1
                if value.uses == 0:
                    value.tangent = None
        if self.curved or (loss is not None and riding is None):
            for node in reversed(self.nodes):
                adjoint, node.output.adjoint = node.output.adjoint, None
                if adjoint is not None:
                    with _named(node):
                        node.parameters(adjoint)
                        if any(value.trainable for value in node.inputs):
                            for value, grad in zip(node.inputs, node.backward(adjoint), strict=True):
                                value.add_adjoint(grad)
        self.nodes.clear()

    def _riding(self, output: Value, loss: Tensor) -> ScoreGradients | None:
        """The loss for the tangent pass, or None where it needs a backward pass of its own.

        The pass that gave delta began with a derivative of 1 by every score. The loss's own would begin with its
        derivative by the score, w_i, and where every value belongs to one sample it is w_i delta.
        """
        rows, batch = output.rows, loss.numel()
        if self.curved or self.samples is None or rows is None or rows.inner != 1 or loss.shape[rows.dim] != batch:
            return None
        if not self.samples.is_batch(batch) or not self.samples.uncoupled(rows):
            return None
        for node in self.nodes:
            if node.parameter_gradients and any(
                value.rows is None or not self.samples.uncoupled(value.rows) for value in (node.output, *node.inputs)
            ):
                return None
        return ScoreGradients(loss.flatten())


class _named:
    """Says which node cannot be differentiated."""

    __slots__ = ("_node",)

    def __init__(self, node: Node) -> None:
        self._node = node

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Unsupported):
            error.module = error.module or self._node.module


def _hidden(function: Any, tensor: Tensor) -> Unsupported:
    module = getattr(tensor, "_lipgan_module", None)
    if isinstance(function, BackwardCFunction):
        return Unsupported(f"{type(function).__name__}, a torch.autograd.Function, hides what it computes", module)
    return Unsupported(f"the operation behind {function.name()} hides what it computes", module)
