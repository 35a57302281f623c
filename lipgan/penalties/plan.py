"""The operations of a penalty as a program: recorded once, run again without the critic's Python code and the tape.

A `Recorder` lies below the tape and notes every operation that the first computation runs: those of the critic, of the
passes, and of the penalty. `Recorder.plan` makes of them a Python function of straight-line code, each line a call of
PyTorch, in which nothing is computed that no result needs and nothing is held longer than it is needed.

What cannot be run again is refused: numbers that leave a tensor, shapes that depend on numbers, tensors that are
neither inputs nor results. Random draws are drawn anew, buffers are changed anew.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from lipgan.ops.gradient_penalty import undispatched as _penalty
from lipgan.penalties.mode import Mode
from lipgan.penalties.undo import changed, is_random, mutates, tensors_of

aten = torch.ops.aten


class Unrepeatable(Exception):
    """An operation that cannot be run again; the message says why."""


class Slot(int):
    """The place of a tensor in a plan: an input, or a result of a step."""


class Stage:
    """A step at which the plan hands out tensors and is given others."""

    def __init__(self, out: list[Slot], received: list[Slot]) -> None:
        self.out, self.received = out, received


class Step:
    """One operation.

    Attributes:
        args, kwargs: with slots in the place of tensors.
        results: likewise, None for those that are no new tensors.
        kept: whether it does more than make its results.
        is_transpose: whether it is a view of a matrix with its dimensions exchanged.
    """

    def __init__(
        self, func: Any, args: Any, kwargs: dict[str, Any], results: Any, kept: bool, is_transpose: bool
    ) -> None:
        self.func, self.args, self.kwargs, self.results = func, args, kwargs, results
        self.kept, self.is_transpose = kept, is_transpose


Program = Callable[..., Generator[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor | None, ...]]]


class Recorder(Mode):  # type: ignore[no-untyped-call]
    """Notes what is run while it is active; it may be entered several times.

    Args:
        inputs: tensors that a later run is given anew.
        changing: those among them that may be changed in place, as buffers are.
        rehearsal: whether to stop with `Unrepeatable` before anything is changed that would have to be undone.

    Attributes:
        inputs: the first.
        received: what `stage` was given in the place of what a run waits for.
        refusal: why there can be no plan, None while there can.
    """

    def __init__(self, inputs: Sequence[Tensor], changing: Sequence[Tensor] = (), *, rehearsal: bool = False) -> None:
        super().__init__()
        self._rehearsal = rehearsal
        self._owner = object()
        allowed = {id(tensor) for tensor in changing}
        self._fixed = {tensor.untyped_storage()._cdata for tensor in inputs if id(tensor) not in allowed}
        self.inputs = [*inputs]  # which keeps their ids
        self._slots = {id(tensor): Slot(k) for k, tensor in enumerate(inputs)}
        self._n_inputs = self._n = len(inputs)
        self._constants: dict[Slot, Tensor] = {}
        self.steps: list[Step | Stage] = []
        self.received: Tensor | None = None
        self.refusal: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs: tuple[Any, dict[str, Any]] = [], {}
        if self.refusal is None:
            self.refusal = _unrepeatable(func, args, kwargs)
            if any(tensor.untyped_storage()._cdata in self._fixed for tensor in changed(func, args, kwargs)):
                self.refusal = "a parameter or an argument is changed in place"
            inputs = self._described([*args], func), {name: self._described(a, func) for name, a in kwargs.items()}
        if self.refusal is not None and self._rehearsal:
            raise Unrepeatable(self.refusal)
        result = func(*args, **kwargs)
        if self.refusal is None:
            self._note(func, args, kwargs, *inputs, result)
        return result

    def _described(self, item: Any, func: Any) -> Any:
        """Arguments with slots in the place of tensors."""
        if isinstance(item, Tensor):
            slot = self.slot(item)
            if slot is None:
                if func is not aten.lift_fresh.default or type(item) is not Tensor:
                    self.refusal = f"{func} reads a tensor that is neither an input nor a result"
                    return None
                # A tensor made of Python's numbers.
                slot = self._new(item)
                self._constants[slot] = item.detach().clone()
            return slot
        if isinstance(item, (list, tuple)):
            return [self._described(inner, func) for inner in item]
        return item

    def slot(self, tensor: Tensor) -> Slot | None:
        """That of a tensor, None for one from elsewhere."""
        slot = self._slots.get(id(tensor))
        if slot is None:
            owner, slot = getattr(tensor, "_lipgan_slot", (None, None))
            if owner is not self._owner:
                return None
        return slot

    def _new(self, tensor: Tensor) -> Slot:
        slot = Slot(self._n)
        self._n += 1
        tensor._lipgan_slot = self._owner, slot  # type: ignore[attr-defined]
        return slot

    def _note(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: Any, named: dict[str, Any], result: Any
    ) -> None:
        if isinstance(result, Tensor) and func in _SAME and isinstance(inputs[0], Slot):
            # The same numbers in the same memory, for autograd alone another tensor.
            if result is not args[0]:
                result._lipgan_slot = self._owner, inputs[0]  # type: ignore[attr-defined]
            return
        operands = {id(tensor) for tensor in tensors_of([*args, *kwargs.values()])}

        def noted(item: Any) -> Any:
            if isinstance(item, Tensor):
                # An operation in place returns its operand, which keeps its slot.
                return None if id(item) in operands else self._new(item)
            if isinstance(item, (list, tuple)):
                return [noted(inner) for inner in item]
            if item is not None:
                self.refusal = f"{func} makes a number of a tensor"
            return None

        if func is aten.lift_fresh.default:
            func = aten.clone.default  # the constant stays, whatever is done to the tensor
        kept = mutates(func) or is_random(func) or bool(changed(func, args, kwargs))
        self.steps.append(Step(func, inputs, named, noted(result), kept, _is_transpose(func, args)))

    def stage(self, scores: Tensor, by_score: Tensor | None) -> None:
        """A place at which a run hands out ``scores`` and waits for what stands for ``by_score``."""
        slot = self.slot(scores)
        if slot is None:
            self.refusal = self.refusal or "the scores are no result of an operation"
            return
        self.received = by_score
        self.steps.append(Stage([slot], [] if by_score is None else [self._new(by_score)]))

    @property
    def has_stage(self) -> bool:
        """Whether a run hands out scores on the way."""
        return any(isinstance(step, Stage) for step in self.steps)

    def program(self, results: Sequence[Tensor | None]) -> Program | None:
        """The steps as a generator function of the inputs; None if there can be none, with the reason in `refusal`."""
        slots: list[Slot | None] = []
        for tensor in results:
            slot = None if tensor is None else self.slot(tensor)
            if tensor is not None and slot is None:
                self.refusal = self.refusal or "a result was computed unseen"
            slots.append(slot)
        if self.refusal is not None:
            return None
        return _compiled(self.steps, self._n_inputs, self._constants, slots)

    def needed_for(self, result: Tensor) -> list[Step] | None:
        """The operations without which there is no ``result``, and those that do more than make one."""
        slot = self.slot(result)
        if slot is None or self.refusal is not None:
            return None
        return [step for step in reversed(_needed(self.steps, {slot})[0]) if isinstance(step, Step)]

    def input_of(self, slot: Any) -> Tensor | None:
        """The input that a slot stands for, None for other slots."""
        return self.inputs[slot] if isinstance(slot, Slot) and slot < self._n_inputs else None

    def input(self, tensor: Tensor) -> int | None:
        """Which of the inputs a tensor is, None if it is none."""
        slot = self._slots.get(id(tensor))
        return None if slot is None else int(slot)


def _is_transpose(func: Any, args: tuple[Any, ...]) -> bool:
    if func is aten.t.default:
        return bool(args[0].ndim == 2)
    return func is aten.transpose.int and args[0].ndim == 2 and args[1] % 2 != args[2] % 2


# Operations that autograd alone tells from their operand.
_SAME = {aten.detach.default, aten.alias.default}


def _unrepeatable(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why an operation may not be run again as it was, or None."""
    if func.namespace not in ("aten", "lipgan", "prim", "prims"):
        return f"{func} is not one of PyTorch's operations"
    if _depends_on_numbers(func):
        indexed = func is aten.index.Tensor or func is aten._unsafe_index.Tensor
        if not indexed or any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]):
            return f"the outcome of {func} decides what is computed"
    if any(place >= len(args) or args[place] is None for place in _required_tensors(func)):
        return f"{func} is given an undefined tensor"
    if kwargs.get("generator") is not None or any(isinstance(item, torch.Generator) for item in args):
        return f"{func} draws from a generator of its own"
    return None


@functools.cache
def _depends_on_numbers(func: Any) -> bool:
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


@functools.cache
def _required_tensors(func: Any) -> list[int]:
    """The places of arguments that cannot be None."""
    return [k for k, a in enumerate(func._schema.arguments) if str(a.type) == "Tensor" and not a.kwarg_only]


# ---- the program ----

# The same functions by their shorter way in.
_DIRECT: dict[Any, Any] = {
    torch.ops.lipgan.gradient_penalty_fwd.default: _penalty,
    aten.addmm.default: torch.addmm,
    aten.mm.default: torch.mm,
    aten.bmm.default: torch.bmm,
    aten.t.default: torch.t,
    aten.transpose.int: torch.transpose,
    aten.permute.default: torch.permute,
    aten.mul.Tensor: torch.mul,
    aten.div.Tensor: torch.div,
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.neg.default: torch.neg,
    aten.relu.default: torch.relu,
    aten.relu_.default: torch.relu_,
    aten.tanh.default: torch.tanh,
    aten.sigmoid.default: torch.sigmoid,
    aten.exp.default: torch.exp,
    aten.square.default: torch.square,
    aten.addcmul.default: torch.addcmul,
    aten.view.default: Tensor.view,
    aten._unsafe_view.default: Tensor.view,
    aten.expand.default: Tensor.expand,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.leaky_relu.default: torch._C._nn.leaky_relu,
    aten.leaky_relu_.default: torch._C._nn.leaky_relu_,
}


def _compiled(
    steps: Sequence[Step | Stage], n_inputs: int, constants: dict[Slot, Tensor], results: Sequence[Slot | None]
) -> Program:
    """The steps as code."""
    steps, results = _without_transposes(steps, results)
    kept, needed, last = _needed(steps, {slot for slot in results if slot is not None})
    freed: dict[int, list[int]] = {}
    for slot, place in last.items():
        if slot >= n_inputs and slot not in constants:
            freed.setdefault(place, []).append(slot)

    scope: dict[str, Any] = {f"s{slot}": tensor for slot, tensor in constants.items()}
    values: dict[Any, str] = {}

    def named(value: Any) -> str:
        try:
            key = type(value), value
            if key not in values:
                values[key] = f"c{len(scope)}"
                scope[values[key]] = value
            return values[key]
        except TypeError:  # cannot be hashed
            name = f"c{len(scope)}"
            scope[name] = value
            return name

    def text(item: Any) -> str:
        if isinstance(item, Slot):
            return f"s{int(item)}"
        if isinstance(item, list):
            return f"[{', '.join(map(text, item))}]"
        if type(item) in (int, bool, type(None), str) or (type(item) is float and math.isfinite(item)):
            return repr(item)
        return named(item)

    def target(item: Any) -> str:
        if isinstance(item, Slot):
            return f"s{int(item)}" if item in needed else "_"
        if isinstance(item, list):
            return f"({', '.join(map(target, item))},)" if item else "_"
        return "_"

    lines: list[str] = []
    place = len(kept)
    for step in reversed(kept):
        place -= 1
        if isinstance(step, Stage):
            received = "".join(f"s{int(slot)}, " for slot in step.received) or "_"
            lines.append(f"{received} = yield ({''.join(f's{int(slot)}, ' for slot in step.out)})")
        else:
            direct = _DIRECT.get(step.func)
            function = named(getattr(step.func, "_op", step.func) if direct is None else direct)
            arguments = [text(item) for item in step.args]
            arguments += [f"{name}={text(item)}" for name, item in step.kwargs.items()]
            call = f"{function}({', '.join(arguments)})"
            lines.append(f"{target(step.results)} = {call}" if _slots(step.results) else call)
        if place in freed:
            lines.append(f"del {', '.join(f's{slot}' for slot in freed[place])}")
    lines.append(f"return ({''.join('None, ' if slot is None else f's{int(slot)}, ' for slot in results)})")
    if not any(isinstance(step, Stage) for step in kept):
        lines.append("yield ()")  # which is never reached: it makes a generator of the function
    inputs = ", ".join(f"s{k}" for k in range(n_inputs))
    body = "\n    ".join(lines)
    exec(f"def run({inputs}):\n    {body}\n", scope)
    return scope.pop("run")  # type: ignore[no-any-return]


def _needed(steps: Sequence[Step | Stage], results: set[int]) -> tuple[list[Step | Stage], set[int], dict[int, int]]:
    """The steps that something needs, the last first; the slots that are needed; and who needs each of them last."""
    needed, last = {*results}, dict[int, int]()
    kept: list[Step | Stage] = []
    for step in reversed(steps):
        if isinstance(step, Stage):
            used = set(step.out)
        elif step.kept or not needed.isdisjoint(_slots(step.results)):
            used = {*_slots(step.args), *_slots([*step.kwargs.values()])}
        else:
            continue
        for slot in used - needed:
            last[slot] = len(kept)
        needed |= used
        kept.append(step)
    return kept, needed, last


def _without_transposes(
    steps: Sequence[Step | Stage], results: Sequence[Slot | None]
) -> tuple[list[Step | Stage], list[Slot | None]]:
    """The steps with one transpose of each matrix, and the matrix itself in the place of its transpose's transpose."""
    same: dict[Slot, Slot] = {}
    transposes: dict[Slot, Slot] = {}

    def renamed(item: Any) -> Any:
        if isinstance(item, Slot):
            return same.get(item, item)
        return [renamed(inner) for inner in item] if isinstance(item, list) else item

    left: list[Step | Stage] = []
    for step in steps:
        if isinstance(step, Stage):
            left.append(Stage([renamed(slot) for slot in step.out], step.received))
            continue
        args, kwargs = renamed(step.args), {name: renamed(item) for name, item in step.kwargs.items()}
        if step.is_transpose:
            matrix = args[0]
            if matrix in transposes:
                same[step.results] = transposes[matrix]
                continue
            transposes[matrix], transposes[step.results] = step.results, matrix
        left.append(Step(step.func, args, kwargs, step.results, step.kept, step.is_transpose))
    return left, [None if slot is None else renamed(slot) for slot in results]


def _slots(item: Any) -> list[Slot]:
    if isinstance(item, Slot):
        return [item]
    return [slot for inner in item for slot in _slots(inner)] if isinstance(item, (list, tuple)) else []
