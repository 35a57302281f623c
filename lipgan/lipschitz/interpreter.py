"""One forward pass, followed operation by operation: the Lipschitz constant of every intermediate tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten

# Changes in place that have the rules of what they do.
IN_PLACE = {
    aten.relu_.default: aten.relu.default,
    aten.leaky_relu_.default: aten.leaky_relu.default,
    aten.elu_.default: aten.elu.default,
    aten.tanh_.default: aten.tanh.default,
    aten.sigmoid_.default: aten.sigmoid.default,
    aten.hardtanh_.default: aten.hardtanh.default,
    aten.neg_.default: aten.neg.default,
    aten.add_.Tensor: aten.add.Tensor,
    aten.sub_.Tensor: aten.sub.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.div_.Tensor: aten.div.Tensor,
}


class Unknown(Exception):
    """An operation without a rule; the text says which."""


Rule = Callable[["Interpreter", Any, Sequence[Any], dict[str, Any], Any], float]

RULES: dict[Any, Rule] = {}


def rule(*funcs: Any) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for func in funcs:
            RULES[func] = function
        return function

    return register


class Interpreter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes for each tensor an upper bound on the Lipschitz constant of the map from the input to it.

    Tensors count as vectors of all their entries, the batch included, so an operation may mix what it likes.
    """

    def __init__(self, x: Tensor, n_iterations: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.constants: Any = WeakIdKeyDictionary()
        self.constants[x] = 1.0
        self.n_iterations = n_iterations
        self.suspended = False
        self.modules: list[str] = []

    def constant(self, item: Any) -> float:
        """That of a tensor; 0 for what does not depend on the input."""
        return float(self.constants.get(item, 0.0)) if isinstance(item, Tensor) else 0.0

    def depends(self, item: Any) -> bool:
        return isinstance(item, Tensor) and item in self.constants

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.suspended or not any(self.depends(item) for item in tensors_of((args, kwargs))):
            return func(*args, **kwargs)
        if func in IN_PLACE:
            return self._in_place(func, args, kwargs)
        rule = RULES.get(func)
        if rule is None:
            raise self.unknown(f"operation {func}")
        result = func(*args, **kwargs)
        try:
            constant = rule(self, func, args, kwargs, result)
        except Unknown as error:
            raise self.unknown(str(error)) from None
        self.note(constant, result)
        return result

    def note(self, constant: float, result: Any) -> None:
        for output in tensors_of(result):
            if not output.is_floating_point():
                # Indices and masks have no Lipschitz constant.
                self.constants[output] = math.inf
            elif math.isfinite(constant):
                self.constants[output] = constant
            else:
                raise ValueError(
                    f"no finite Lipschitz bound in {self.where()}: weights or divisors are zero or not finite"
                )

    def _in_place(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if not self.depends(args[0]):
            raise self.unknown(f"operation {func} on a tensor that does not depend on the samples")
        rule, storage = IN_PLACE[func], args[0].untyped_storage().data_ptr()
        # Other tensors in this memory change in some of their entries, by the map of the operation.
        sharing = [t for t in self.constants if t.untyped_storage().data_ptr() == storage]
        new = {id(t): RULES[rule](self, rule, [t, *args[1:]], kwargs, args[0]) for t in sharing}
        result = func(*args, **kwargs)
        for t in sharing:
            self.note(new[id(t)] if t is args[0] else max(self.constant(t), new[id(t)]), t)
        self.note(self.constant(args[0]), result)
        return result

    def where(self) -> str:
        return f"module {self.modules[-1]}" if self.modules else "the critic"

    def unknown(self, what: str) -> ValueError:
        return ValueError(f"no Lipschitz bound is known for {what}, in {self.where()}")


def tensors_of(item: Any) -> list[Tensor]:
    if isinstance(item, Tensor):
        return [item]
    if isinstance(item, dict):
        item = list(item.values())
    return [t for inner in item for t in tensors_of(inner)] if isinstance(item, (list, tuple)) else []
