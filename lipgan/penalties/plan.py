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
import operator
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lipgan.nn.spectral_norm_group import SpectralNormGroup
from lipgan.ops.gradient_penalty import undispatched as _penalty
from lipgan.penalties.compiled import Compiled
from lipgan.penalties.mode import Mode
from lipgan.penalties.undo import changed, changed_arguments, is_random, mutates, tensors_of
from lipgan.penalties.watch import Watch

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
                if item.ndim > 0:  # `torch.tensor` reads the numbers in a list unseen, those of tensors, too
                    self.refusal = "a tensor is made of a list, in which numbers of tensors may be"
                    return None
                # A tensor made of one of Python's numbers.
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
        code = _Code(self.steps, self._n_inputs, self._constants, slots)
        return code.by_inductor(captured=compile == "cudagraph") if compile else code.as_written()

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


class _Code:
    """Steps as code.

    Args:
        steps: as they were run.
        n_inputs: how many slots are inputs, the first.
        constants: slots of tensors that are the same at every run.
        results: slots of what is returned.
    """

    def __init__(
        self,
        steps: Sequence[Step | Stage],
        n_inputs: int,
        constants: dict[Slot, Tensor],
        results: Sequence[Slot | None],
    ) -> None:
        steps, results = _without_transposes(steps, results)
        kept, self._needed, self._last = _needed(steps, {slot for slot in results if slot is not None})
        self._steps = kept[::-1]
        self._results = results
        self._inputs = [Slot(k) for k in range(n_inputs)]
        self._constants = constants
        self._scope: dict[str, Any] = {f"s{slot}": tensor for slot, tensor in constants.items()}
        self._names: dict[Any, str] = {}

    def as_written(self) -> Program:
        """Each step as a call of PyTorch, in one function."""
        freed: dict[int, list[Slot]] = {}
        for slot, place in self._last.items():
            if slot >= len(self._inputs) and slot not in self._constants:
                freed.setdefault(place, []).append(Slot(slot))
        lines: list[str] = []
        for place, step in zip(reversed(range(len(self._steps))), self._steps, strict=True):
            if isinstance(step, Stage):
                lines.append(f"{_tuple(step.received) if step.received else '_'} = yield {_tuple(step.out)}")
            else:
                lines.append(self._line(step, _DIRECT.get(step.func) or getattr(step.func, "_op", step.func)))
            if place in freed:
                lines.append(f"del {', '.join(map(_name, freed[place]))}")
        lines.append(f"return {_tuple(self._results)}")
        if not any(isinstance(step, Stage) for step in self._steps):
            lines.append("yield ()")  # which is never reached: it makes a generator of the function
        return self._function(self._inputs, lines)

    def by_inductor(self, *, captured: bool) -> Program:
        """The steps before and behind the place at which a run waits as a compiled function each.

        Args:
            captured: whether in CUDA graphs, whose results are overwritten by the next run.
        """

        def compiled(
            steps: Sequence[Step | Stage], arguments: list[Slot], results: Sequence[Slot | None]
        ) -> Callable[..., Any]:
            operations = [step for step in steps if isinstance(step, Step)]
            constants = [slot for slot in self._constants if any(slot in _operands(step) for step in operations)]
            given = [*constants, *arguments]
            changed, unseen = _changes(operations)
            function = Compiled(
                _graph(operations, given, results),
                changing=[place for place, slot in enumerate(given) if slot in changed],
                unseen=[place for place, slot in enumerate(given) if slot in unseen],
                captured=captured,
            )
            return (
                functools.partial(function, *(self._constants[slot] for slot in constants)) if constants else function
            )

        def own(results: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
            return tuple(None if t is None else t.clone() for t in results) if captured else results

        places = [place for place, step in enumerate(self._steps) if isinstance(step, Stage)]
        if not places:
            whole = compiled(self._steps, self._inputs, self._results)

            def run(*inputs: Tensor) -> Generator[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor | None, ...]]:
                return own(whole(*inputs))
                yield ()

            return run
        (place,) = places
        stage, behind = self._steps[place], self._steps[place + 1 :]
        assert isinstance(stage, Stage)
        made = {slot for step in self._steps[:place] if isinstance(step, Step) for slot in _slots(step.results)}
        wanted = {slot for step in behind if isinstance(step, Step) for slot in _operands(step)}
        carried = sorted(made & (wanted | {slot for slot in self._results if slot is not None}))
        first = compiled(self._steps[:place], self._inputs, [*stage.out, *carried])
        second = compiled(behind, [*self._inputs, *carried, *stage.received], self._results)
        n = len(stage.out)

        def run_twice(*inputs: Tensor) -> Generator[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor | None, ...]]:
            results = first(*inputs)
            received = yield own(results[:n])
            return own(second(*inputs, *results[n:], *(received or ())))

        return run_twice

    def _function(self, arguments: Sequence[Slot], lines: Sequence[str]) -> Callable[..., Any]:
        body = "\n    ".join(lines)
        exec(f"def run({', '.join(map(_name, arguments))}):\n    {body}\n", self._scope)
        return self._scope.pop("run")  # type: ignore[no-any-return]

    def _line(self, step: Step, function: Any) -> str:
        arguments = [self._text(item) for item in step.args]
        arguments += [f"{name}={self._text(item)}" for name, item in step.kwargs.items()]
        call = f"{self._constant(function)}({', '.join(arguments)})"
        return f"{self._target(step.results)} = {call}" if _slots(step.results) else call

    def _text(self, item: Any) -> str:
        if isinstance(item, Slot):
            return _name(item)
        if isinstance(item, list):
            return f"[{', '.join(map(self._text, item))}]"
        if type(item) in (int, bool, type(None), str) or (type(item) is float and math.isfinite(item)):
            return repr(item)
        return self._constant(item)

    def _target(self, item: Any) -> str:
        if isinstance(item, Slot):
            return _name(item) if item in self._needed else "_"
        if isinstance(item, list):
            return f"({', '.join(map(self._target, item))},)" if item else "_"
        return "_"

    def _constant(self, value: Any) -> str:
        """A name for what is no tensor of a run."""
        try:
            key = type(value), value
            if key not in self._names:
                self._names[key] = f"c{len(self._scope)}"
                self._scope[self._names[key]] = value
            return self._names[key]
        except TypeError:  # cannot be hashed
            name = f"c{len(self._scope)}"
            self._scope[name] = value
            return name


def _changes(steps: Sequence[Step]) -> tuple[set[Slot], set[Slot]]:
    """What is changed in place, and what of that without a word in a schema: changes that autograd does not count."""
    source: dict[Slot, Slot] = {}  # what a view is a view of
    changed, unseen = set[Slot](), set[Slot]()
    for step in steps:
        changing = {source.get(slot, slot) for slot in _slots(changed_arguments(step.func, step.args, step.kwargs))}
        changed |= changing
        if not mutates(step.func):
            unseen |= changing
        if any(result.alias_info is not None for result in step.func._schema.returns):
            source |= {slot: source.get(own, own) for slot in _slots(step.results) for own in _operands(step)[:1]}
    return changed, unseen


def _graph(steps: Sequence[Step], arguments: Sequence[Slot], results: Sequence[Slot | None]) -> fx.GraphModule:
    """The steps as a graph of the operations."""
    graph = fx.Graph()
    nodes = {slot: graph.placeholder(_name(slot)) for slot in arguments}

    def read(item: Any) -> Any:
        if isinstance(item, Slot):
            return nodes[item]
        return [read(inner) for inner in item] if isinstance(item, list) else item

    def note(item: Any, node: fx.Node) -> None:
        if isinstance(item, Slot):
            nodes[item] = node
        for place, inner in enumerate(item if isinstance(item, list) else ()):
            if _slots(inner):
                note(inner, graph.call_function(operator.getitem, (node, place)))

    for step in steps:
        inputs = tuple(map(read, step.args)), {name: read(item) for name, item in step.kwargs.items()}
        note(step.results, graph.call_function(step.func, *inputs))
    graph.output(tuple(None if slot is None else nodes[slot] for slot in results))
    return fx.GraphModule({}, graph)


def _name(slot: Slot) -> str:
    return f"s{int(slot)}"


def _tuple(slots: Sequence[Slot | None]) -> str:
    return f"({''.join('None, ' if slot is None else f'{_name(slot)}, ' for slot in slots)})"


def _operands(step: Step) -> list[Slot]:
    return [*_slots(step.args), *_slots([*step.kwargs.values()])]


def _needed(steps: Sequence[Step | Stage], results: set[int]) -> tuple[list[Step | Stage], set[int], dict[int, int]]:
    """The steps that something needs, the last first; the slots that are needed; and who needs each of them last."""
    needed, last = {*results}, dict[int, int]()
    kept: list[Step | Stage] = []
    for step in reversed(steps):
        if isinstance(step, Stage):
            used = set(step.out)
        elif step.kept or not needed.isdisjoint(_slots(step.results)):
            used = {*_operands(step)}
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
