"""The modules, and the parameters, that a critic consists of, whatever it is: a module, or a function of one."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lipgan.penalties.known import LARGEST


def reached(critic: Any) -> Iterator[nn.Module | Tensor]:
    """Modules, and tensors that require a gradient, that a critic may use: in closures, arguments, globals."""
    return _reached(critic, set(), frozenset())


def owner(critic: Any) -> nn.Module | None:
    """A module whose end is that of the critic, None if there is none."""
    if isinstance(critic, nn.Module):
        return critic
    return next((thing for thing in reached(critic) if isinstance(thing, nn.Module)), None)


def form(critic: Any) -> Any:
    """What is the same of functions that are made anew at every call."""
    if isinstance(critic, nn.Module):
        return None
    function = getattr(critic, "__func__", critic)
    return id(function.__code__) if isinstance(function, types.FunctionType) else type(critic)


def _reached(thing: Any, seen: set[int], names: frozenset[str]) -> Iterator[nn.Module | Tensor]:
    if id(thing) in seen or isinstance(thing, (type, types.ModuleType)):
        return
    seen.add(id(thing))
    inner: list[Any] = []
    if isinstance(thing, Tensor):
        if thing.requires_grad and thing.is_leaf:
            yield thing
        return
    if isinstance(thing, nn.Module):
        yield thing
    elif isinstance(thing, types.MethodType):
        names |= _names(thing.__func__.__code__) if isinstance(thing.__func__, types.FunctionType) else frozenset()
        inner = [thing.__self__, thing.__func__]
    elif isinstance(thing, functools.partial):
        inner = [thing.func, *thing.args, *thing.keywords.values()]
    elif isinstance(thing, types.FunctionType):
        names = _names(thing.__code__)
        for cell in thing.__closure__ or ():
            try:
                inner.append(cell.cell_contents)
            except ValueError:  # nothing is in it yet
                continue
        inner += [*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
        inner += [thing.__globals__[name] for name in names if name in thing.__globals__]
    elif isinstance(thing, (dict, list, tuple)):
        inner = [*(thing.values() if isinstance(thing, dict) else thing)] if len(thing) <= LARGEST else []
    else:
        names = _names_of_methods(type(thing), names | {"__call__"})
        inner = [value for name, value in getattr(thing, "__dict__", {}).items() if name in names]
    for value in inner:
        yield from _reached(value, seen, names)


def _names_of_methods(cls: type, names: frozenset[str]) -> frozenset[str]:
    """Names, and what the methods of a class that are among them name, and so on."""
    found: frozenset[str] = frozenset()
    while found != names:
        found = names
        methods = [getattr(cls, name, None) for name in found]
        names = found.union(*(_names(method.__code__) for method in methods if isinstance(method, types.FunctionType)))
    return names


@functools.lru_cache(256)
def _names(code: types.CodeType) -> frozenset[str]:
    """The globals and attributes that some code, and the code within it, names."""
    within = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return frozenset(code.co_names).union(*map(_names, within))
