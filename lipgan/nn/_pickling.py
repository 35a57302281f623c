"""Pickling of parametrized modules, which torch.nn.utils.parametrize refuses, and copies that stand alone.

``parametrize`` gives a module a class of its own, made at run time, that pickle cannot find. Such a module is pickled
as its original class and its state, and the class is made again on loading. A copy gets a class of its own, too:
``remove_parametrizations`` of a copy would otherwise take the property from the class of both. Modules that torch's own
functions parametrize are left alone.

Recurrent layers hold the weights of their last forward too, and weak references to them: results of a computation,
which neither pickle nor deepcopy takes. They are left out, and the first forward of the copy computes them anew.
"""

from __future__ import annotations

import copy
import copyreg
import weakref
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

_FLAT = ("_flat_weights", "_flat_weight_refs")


def make_picklable(module: nn.Module) -> None:
    """Let the parametrized ``module`` be pickled, saved whole and copied."""
    cls = type(module)
    if "parametrizations" in module._modules and cls.__reduce_ex__ is not _reduce:
        cls.__reduce_ex__ = _reduce  # type: ignore[method-assign, assignment]
        # Not in the place of one that the module's own class has.
        if "__deepcopy__" in cls.__dict__ or isinstance(module, nn.RNNBase):
            cls.__deepcopy__ = _deepcopy  # type: ignore[attr-defined]


def _state(module: nn.Module) -> dict[str, Any]:
    state = dict(module.__dict__)
    if isinstance(module, nn.RNNBase):
        for name in _FLAT:
            state.pop(name, None)
    return state


def _forget_flat_weights(module: nn.RNNBase) -> None:
    # As after an access of a normalized weight whose tensor is gone: the next forward collects all weights.
    gone = weakref.ref(torch.empty(0))
    names = module._flat_weights_names
    flat = [None if parametrize.is_parametrized(module, name) else getattr(module, name, None) for name in names]
    module.__dict__["_flat_weights"] = flat
    module.__dict__["_flat_weight_refs"] = [gone if weight is None else weakref.ref(weight) for weight in flat]


def _deepcopy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    replica = _rebuild(type(module).__bases__[0])
    memo[id(module)] = replica
    _restore(replica, copy.deepcopy(_state(module), memo))
    for slot in copyreg._slotnames(type(module)):  # type: ignore[attr-defined]
        if hasattr(module, slot):
            setattr(replica, slot, copy.deepcopy(getattr(module, slot), memo))
    return replica


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    original_class = type(module).__bases__[0]
    if not parametrize.is_parametrized(module):
        return object.__reduce_ex__(module, protocol)  # type: ignore[return-value]
    return _rebuild, (original_class,), _state(module), None, None, _restore


def _rebuild(original_class: type[nn.Module]) -> nn.Module:
    return original_class.__new__(original_class)


def _restore(module: nn.Module, state: dict[str, Any]) -> None:
    module.__dict__.update(state)
    parametrize._inject_new_class(module)
    parametrizations: nn.ModuleDict = module.parametrizations  # type: ignore[assignment]
    for name in parametrizations:
        parametrize._inject_property(module, name)
    if isinstance(module, nn.RNNBase):
        _forget_flat_weights(module)
    make_picklable(module)
