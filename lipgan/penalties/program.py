"""The steps of a plan as a function: straight-line code of calls of PyTorch, or generated code."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lipgan.ops.gradient_penalty import fusible
from lipgan.ops.gradient_penalty import undispatched as _penalty
from lipgan.penalties import draws
from lipgan.penalties.compiled import Compiled
from lipgan.penalties.steps import Slot, Stage, Step, needed, operands, slots
from lipgan.penalties.undo import changed_arguments, mutates

aten = torch.ops.aten

Program = Callable[..., Generator[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor | None, ...]]]

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


class Code:
    """Steps as code: nothing is computed that no result needs, nothing is held longer than it is needed.

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
        kept, self._needed, self._last = needed(steps, {slot for slot in results if slot is not None})
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
            constants = [slot for slot in self._constants if any(slot in operands(step) for step in operations)]
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
        made = {slot for step in self._steps[:place] if isinstance(step, Step) for slot in slots(step.results)}
        wanted = {slot for step in behind if isinstance(step, Step) for slot in operands(step)}
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
        return f"{self._target(step.results)} = {call}" if slots(step.results) else call

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
        changing = {source.get(slot, slot) for slot in slots(changed_arguments(step.func, step.args, step.kwargs))}
        changed |= changing
        if not mutates(step.func):
            unseen |= changing
        if any(result.alias_info is not None for result in step.func._schema.returns):
            source |= {slot: source.get(own, own) for slot in slots(step.results) for own in operands(step)[:1]}
    return changed, unseen


# What a compiler is given in their place.
_FUSIBLE: dict[Any, Any] = {torch.ops.lipgan.gradient_penalty_fwd.default: fusible}


def _graph(steps: Sequence[Step], arguments: Sequence[Slot], results: Sequence[Slot | None]) -> fx.GraphModule:
    """The steps as a graph of operations for a compiler."""
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
            if slots(inner):
                note(inner, graph.call_function(operator.getitem, (node, place)))

    fresh = set[Slot]()
    for step in steps:
        drawn = draws.substitute(step.func, step.args, step.kwargs)
        if drawn is not None and draws.overwrites(step.func) and step.args[0] not in fresh:
            drawn = None  # what else lies in the same memory would not see it
        fresh.difference_update(operands(step))
        if drawn is not None:
            function, args = drawn
            made = step.args[0] if draws.overwrites(step.func) else step.results
            note(made, graph.call_function(function, tuple(map(read, args))))
            continue
        inputs = tuple(map(read, step.args)), {name: read(item) for name, item in step.kwargs.items()}
        note(step.results, graph.call_function(_FUSIBLE.get(step.func, step.func), *inputs))
        if step.func in draws.FRESH:
            fresh.add(step.results)
    graph.output(tuple(None if slot is None else nodes[slot] for slot in results))
    return fx.GraphModule({}, graph)


def _name(slot: Slot) -> str:
    return f"s{int(slot)}"


def _tuple(of: Sequence[Slot | None]) -> str:
    return f"({''.join('None, ' if slot is None else f'{_name(slot)}, ' for slot in of)})"


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
