"""The operations of a penalty as a program: recorded once, run again without the critic's Python code and the tape.

A `Recorder` lies below the tape and notes every operation that the first computation runs: those of the critic, of the
passes, and of the penalty. `Recorder.program` makes a function of them (program.py).

What cannot be run again is refused: numbers that leave a tensor, shapes that depend on numbers, tensors that are
neither inputs nor results. Random draws are drawn anew, buffers are changed anew.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lipgan.nn.spectral_norm_group import SpectralNormGroup
from lipgan.penalties.mode import Mode
from lipgan.penalties.program import Code, Program
from lipgan.penalties.steps import Slot, Stage, Step, needed
from lipgan.penalties.undo import changed, is_random, mutates, tensors_of
from lipgan.penalties.watch import Watch

aten = torch.ops.aten


class Unrepeatable(Exception):
    """An operation that cannot be run again; the message says why."""


class Recorder(Mode):  # type: ignore[no-untyped-call]
    """Notes what is run while it is active; it may be entered several times.

    Args:
        inputs: tensors that a later run is given anew.
        changing: those among them that may be changed in place, as buffers are.
        groups: of spectral norms, whose hooks run with the critic.
        watch: of the lines of the critic, which is to be entered around it.
        rehearsal: whether to stop with `Unrepeatable` before anything is changed that would have to be undone.

    Attributes:
        watch: the same.
        inputs: the first.
        received: what `stage` was given in the place of what a run waits for.
        coarsest: floating-point dtype of a result.
        norms: of weights, as each group tells of them.
        refusal: why there can be no plan, None while there can.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor],
        changing: Sequence[Tensor] = (),
        groups: Sequence[SpectralNormGroup] = (),
        *,
        watch: Watch,
        rehearsal: bool = False,
    ) -> None:
        super().__init__()
        self.watch = watch
        self._rehearsal = rehearsal
        self._owner = object()
        allowed = {id(tensor) for tensor in changing}
        self._fixed = {tensor.untyped_storage()._cdata for tensor in inputs if id(tensor) not in allowed}
        self.inputs = [*inputs]  # which keeps their ids
        self._slots = {id(tensor): Slot(k) for k, tensor in enumerate(inputs)}
        self._n_inputs = self._n = len(inputs)
        self._constants: dict[Slot, Tensor] = {}
        self._made: dict[int, torch.UntypedStorage] = {}  # of tensors that follow from Python's numbers, by their ids
        self.steps: list[Step | Stage] = []
        self.received: Tensor | None = None
        self.coarsest = inputs[0].dtype
        self.norms = [(group, group.last_sigmas) for group in groups]
        self.refusal: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "profiler":  # a name for what a profiler shows
            return func(*args, **kwargs)
        if func in _READS and all(map(self._is_made, tensors_of(args))):  # what is read is the same at every run
            return func(*args, **kwargs)
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
            self._note_made(func, args, kwargs, result)
            self._note(func, args, kwargs, *inputs, result)
        return result

    def _is_made(self, tensor: Tensor) -> bool:
        """Whether a tensor follows from Python's numbers alone, and has not been changed."""
        return tensor.untyped_storage()._cdata in self._made

    def _note_made(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        for tensor in changed(func, args, kwargs):
            self._made.pop(tensor.untyped_storage()._cdata, None)
        if mutates(func) or is_random(func):
            return
        operands = tensors_of([*args, *kwargs.values()])
        if func is aten.lift_fresh.default:
            made = self.slot(operands[0]) in self._constants
        elif operands:
            made = func.namespace == "aten" and "empty" not in str(func) and all(map(self._is_made, operands))
        else:
            made = func in _FACTORIES
        for tensor in tensors_of(result) if made else ():
            storage = tensor.untyped_storage()
            self._made[storage._cdata] = storage

    def _described(self, item: Any, func: Any) -> Any:
        """Arguments with slots in the place of tensors."""
        if isinstance(item, Tensor):
            slot = self.slot(item)
            if slot is None:
                if func is not aten.lift_fresh.default or type(item) is not Tensor:
                    self.refusal = f"{func} reads a tensor that is neither an input nor a result"
                    return None
                given = self.watch.unseen.given
                # One number that PyTorch itself makes a tensor of is looked at by no call.
                if given is False or (given is None and item.ndim > 0):
                    self.refusal = "a tensor is made of what may hold numbers of tensors, which are read unseen"
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
        if tensor.dtype is not self.coarsest and tensor.is_floating_point():
            self.coarsest = max(self.coarsest, tensor.dtype, key=_eps)
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

    def note_critic(self) -> None:
        """The critic has run: it is known which of its lines did, and its groups know the norms of its weights."""
        self.refusal = self.refusal or self.watch.refusal
        self.norms = [(group, group.last_sigmas) for group, _ in self.norms]

    def stage(self, scores: Tensor, by_score: Tensor | None) -> None:
        """A place at which a run hands out ``scores`` and `norms`, and waits for what stands for ``by_score``."""
        slots = [self.slot(tensor) for tensor in (scores, *(sigma for _, calls in self.norms for _, sigma in calls))]
        out = [slot for slot in slots if slot is not None]
        if len(out) < len(slots):
            self.refusal = self.refusal or "the scores are no result of an operation"
            return
        self.received = by_score
        self.steps.append(Stage(out, [] if by_score is None else [self._new(by_score)]))

    @property
    def has_stage(self) -> bool:
        """Whether a run hands out scores on the way."""
        return any(isinstance(step, Stage) for step in self.steps)

    def program(self, results: Sequence[Tensor | None], compile: bool | str = False) -> Program | None:
        """The steps as a generator function of the inputs; None if there can be none, with the reason in `refusal`.

        Args:
            compile: whether by a compiler; "cudagraph": captured as well.
        """
        slots: list[Slot | None] = []
        for tensor in results:
            slot = None if tensor is None else self.slot(tensor)
            if tensor is not None and slot is None:
                self.refusal = self.refusal or "a result was computed unseen"
            slots.append(slot)
        if self.refusal is not None:
            return None
        code = Code(self.steps, self._n_inputs, self._constants, slots)
        return code.by_inductor(captured=compile == "cudagraph") if compile else code.as_written()

    def needed_for(self, result: Tensor) -> list[Step] | None:
        """The operations without which there is no ``result``, and those that do more than make one."""
        slot = self.slot(result)
        if slot is None or self.refusal is not None:
            return None
        return [step for step in reversed(needed(self.steps, {slot})[0]) if isinstance(step, Step)]

    def input_of(self, slot: Any) -> Tensor | None:
        """The input that a slot stands for, None for other slots."""
        return self.inputs[slot] if isinstance(slot, Slot) and slot < self._n_inputs else None

    def input(self, tensor: Tensor) -> int | None:
        """Which of the inputs a tensor is, None if it is none."""
        slot = self._slots.get(id(tensor))
        return None if slot is None else int(slot)


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _is_transpose(func: Any, args: tuple[Any, ...]) -> bool:
    if func is aten.t.default:
        return bool(args[0].ndim == 2)
    return func is aten.transpose.int and args[0].ndim == 2 and args[1] % 2 != args[2] % 2


# Operations that hand out the numbers of tensors.
_READS = {aten._local_scalar_dense.default, aten.equal.default}
# Operations that make a tensor of numbers.
_FACTORIES = {aten.zeros.default, aten.ones.default, aten.full.default, aten.scalar_tensor.default}
_FACTORIES |= {aten.arange.default, aten.arange.start, aten.arange.start_step}

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
