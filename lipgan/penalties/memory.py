"""What was found out about critics, for as long as what it depends on stays the same."""

from __future__ import annotations

import types
from collections.abc import Hashable, Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lipgan.penalties.critic_call import CriticCall
from lipgan.penalties.known import is_constant
from lipgan.penalties.reach import form, owner, reached

# Of one critic: enough for the states that a training program goes through, such as training and evaluation.
_STATES = 32


class CriticMemory:
    """Findings about modules and functions of them, each for one state of the modules and one kind of arguments.

    A function is known by its code, by the constants in its closure and defaults, and by the modules that it may use; a
    finding goes with the first of them. No number may depend on a finding: it says which of two ways is faster.

    A state is: the modules within with their classes, modes, hooks and flags (attributes that are a bool or a string);
    classes, dtypes and ``requires_grad`` of the parameters; classes, dtypes and dimensions of the arguments; autocast.
    A finding is forgotten with its module.
    """

    def __init__(self) -> None:
        self._findings: WeakKeyDictionary[nn.Module, dict[Hashable, str]] = WeakKeyDictionary()

    def get(self, call: CriticCall, x: Tensor) -> str | None:
        """What was found about a critic in the state that it is in, or None."""
        module = owner(call.critic)
        findings = None if module is None else self._findings.get(module)
        return None if findings is None else findings.get(_state(call.critic, call, x))

    def set(self, call: CriticCall, x: Tensor, finding: str) -> None:
        """Remember what was found about a critic."""
        module = owner(call.critic)
        # A mode such as a counter of operations may be the reason.
        if module is not None and torch._C._len_torch_dispatch_stack() == 0:
            findings = self._findings.setdefault(module, {})
            findings[_state(call.critic, call, x)] = finding
            if len(findings) > _STATES:
                del findings[next(iter(findings))]


def _state(critic: Any, call: CriticCall, x: Tensor) -> Hashable:
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    output = id(call.output) if callable(call.output) else call.output
    around = autocast, bool(_has_any_global_hook()), output, call.parts  # type: ignore[no-untyped-call]
    tops = [critic] if isinstance(critic, nn.Module) else [top for top in reached(critic) if isinstance(top, nn.Module)]
    modules = tuple(_of_module(module) for top in tops for module in top.modules())
    return around, form(critic), _constants(critic), _kind(x), tuple(map(_kind, call.args)), modules


def _constants(critic: Any) -> Hashable:
    """Those in the closure and the defaults of a function."""
    function = getattr(critic, "__func__", critic)
    if not isinstance(function, types.FunctionType):
        return None
    held = [*(function.__defaults__ or ()), *(cell.cell_contents for cell in _filled(function.__closure__ or ()))]
    return tuple((type(value), value) for value in held if is_constant(value))


def _filled(cells: Iterable[types.CellType]) -> Iterator[types.CellType]:
    for cell in cells:
        try:
            cell.cell_contents  # noqa: B018
        except ValueError:  # nothing is in it yet
            continue
        yield cell


def _kind(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return type(argument), argument.dtype, argument.device.type, argument.ndim, argument.requires_grad
    if isinstance(argument, (bool, str)):
        return argument
    return type(argument)


def _of_module(module: nn.Module) -> Hashable:
    attributes = module.__dict__
    return (
        *(id(module), type(module), id(attributes.get("forward"))),
        tuple((name, value) for name, value in attributes.items() if isinstance(value, (bool, str))),
        tuple(
            tuple(hooks or ())
            for hooks in (
                *(module._forward_pre_hooks, module._forward_hooks),
                *(module._backward_pre_hooks, module._backward_hooks),
            )
        ),
        tuple(None if p is None else (type(p), p.dtype, p.requires_grad) for p in module._parameters.values()),
    )
