"""What was found out about critics, for as long as what it depends on stays the same."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lipgan.penalties.critic_call import CriticCall

# Of one critic: enough for the states that a training program goes through, such as training and evaluation.
_STATES = 32


class CriticMemory:
    """Findings about modules, each for one state of the module and one kind of arguments.

    A state is: the modules within with their classes, modes, hooks and flags (attributes that are a bool or a string);
    classes, dtypes and ``requires_grad`` of the parameters; classes, dtypes and dimensions of the arguments; autocast.
    A finding is forgotten with its module.
    """

    def __init__(self) -> None:
        self._findings: WeakKeyDictionary[nn.Module, dict[Hashable, str]] = WeakKeyDictionary()

    def get(self, call: CriticCall, x: Tensor) -> str | None:
        """What was found about a critic in the state that it is in, or None."""
        critic = call.critic
        findings = self._findings.get(critic) if isinstance(critic, nn.Module) else None
        return None if findings is None else findings.get(_state(critic, call, x))

    def set(self, call: CriticCall, x: Tensor, finding: str) -> None:
        """Remember what was found about a critic that is a module; of a function nothing is known but its name."""
        critic = call.critic
        # A mode such as a counter of operations may be the reason.
        if isinstance(critic, nn.Module) and torch._C._len_torch_dispatch_stack() == 0:
            findings = self._findings.setdefault(critic, {})
            findings[_state(critic, call, x)] = finding
            if len(findings) > _STATES:
                del findings[next(iter(findings))]


def _state(critic: Any, call: CriticCall, x: Tensor) -> Hashable:
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    output = id(call.output) if callable(call.output) else call.output
    around = autocast, bool(_has_any_global_hook()), output, call.parts  # type: ignore[no-untyped-call]
    return around, _kind(x), tuple(map(_kind, call.args)), tuple(map(_of_module, critic.modules()))


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
