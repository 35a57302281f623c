"""What a plan consists of: operations, with places in the stead of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


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


def slots(item: Any) -> list[Slot]:
    """The slots in an argument or a result."""
    if isinstance(item, Slot):
        return [item]
    return [slot for inner in item for slot in slots(inner)] if isinstance(item, (list, tuple)) else []


def operands(step: Step) -> list[Slot]:
    """The slots that an operation reads."""
    return [*slots(step.args), *slots([*step.kwargs.values()])]


def needed(steps: Sequence[Step | Stage], results: set[int]) -> tuple[list[Step | Stage], set[int], dict[int, int]]:
    """The steps that something needs, the last first; the slots that are needed; and who needs each of them last."""
    wanted, last = {*results}, dict[int, int]()
    kept: list[Step | Stage] = []
    for step in reversed(steps):
        if isinstance(step, Stage):
            used = set(step.out)
        elif step.kept or not wanted.isdisjoint(slots(step.results)):
            used = {*operands(step)}
        else:
            continue
        for slot in used - wanted:
            last[slot] = len(kept)
        wanted |= used
        kept.append(step)
    return kept, wanted, last
