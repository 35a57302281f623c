"""Pickling of parametrized modules, which torch.nn.utils.parametrize refuses.

``parametrize`` gives a module a class of its own, made at run time, that pickle cannot find. Such a module is pickled
as its original class and its state, and the class is made again on loading. Modules that torch's own functions
parametrize are left alone.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize


def make_picklable(module: nn.Module) -> None:
    """Let the parametrized ``module`` be pickled and saved whole."""
    cls = type(module)
    if "parametrizations" in module._modules and cls.__reduce_ex__ is not _reduce:
        cls.__reduce_ex__ = _reduce  # type: ignore[method-assign, assignment]


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    original_class = type(module).__bases__[0]
    if not parametrize.is_parametrized(module):
        return object.__reduce_ex__(module, protocol)  # type: ignore[return-value]
    return _rebuild, (original_class,), dict(module.__dict__), None, None, _restore


def _rebuild(original_class: type[nn.Module]) -> nn.Module:
    return original_class.__new__(original_class)


def _restore(module: nn.Module, state: dict[str, Any]) -> None:
    module.__dict__.update(state)
    parametrize._inject_new_class(module)
    parametrizations: nn.ModuleDict = module.parametrizations  # type: ignore[assignment]
    for name in parametrizations:
        parametrize._inject_property(module, name)
    make_picklable(module)
