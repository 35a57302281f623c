"""What is known of the things that a critic's code may use: constants, functions of PyTorch, its layers."""

from __future__ import annotations

import contextlib
import enum
import functools
import math
import re
import sys
import types
import warnings
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm as SpectralNormHook
from torch.nn.utils.weight_norm import WeightNorm as WeightNormHook

from lipgan.nn.spectral_norm import Parametrizations, SpectralNorm
from lipgan.nn.spectral_norm_group import SpectralNormGroup


class NotRepeatable(Exception):
    """The code of a critic cannot be shown to do the same at every call."""


# Whose values never change, and compare by their values.
CONSTANTS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format, type(...))

BUILTINS = {
    *("abs", "all", "any", "bool", "callable", "dict", "divmod", "enumerate", "float", "int", "isinstance"),
    *("issubclass", "len", "list", "map", "max", "min", "pow", "range", "reversed", "round", "set", "slice", "sorted"),
    *("str", "sum", "super", "tuple", "type", "zip", "AssertionError", "AttributeError", "IndexError", "KeyError"),
    *("NotImplementedError", "RuntimeError", "TypeError", "ValueError"),
}

# Number of things in a list or dict that code may use.
LARGEST = 256

# Attributes of a tensor by which its numbers leave it, or by which it is changed unseen; and what functions consist of.
HIDING = {
    *("item", "tolist", "numpy", "data", "data_ptr", "storage", "untyped_storage", "apply_", "map_", "map2_", "set_"),
    *("grad", "grad_fn", "_version", "_base", "register_hook", "requires_grad_", "retain_grad", "backward", "is_leaf"),
    *("__dict__", "__class__", "__array__", "__setattr__", "share_memory_", "_make_subclass", "as_subclass"),
    *("storage_offset", "is_set_to", "__dlpack__", "__cuda_array_interface__", "__delattr__"),
    *("__code__", "__closure__", "__globals__", "__defaults__", "__kwdefaults__", "__wrapped__", "__func__"),
}

# Operations that read the numbers of tensors unseen, such as the places at which they split.
_UNSEEN = {"tensor_split", "ctc_loss", "tensordot"}
HIDING |= _UNSEEN

# What a module may be asked for while it runs.
OF_MODULES = {"children", "modules", "named_children", "named_modules", "named_parameters", "parameters", "forward"}
OF_MODULES |= {"buffers", "named_buffers", "get_submodule", "get_parameter", "get_buffer", "training"}
# Methods of tensors as well. What they change of a module is compared.
OF_MODULES |= {"to", "type", "float", "double", "half", "bfloat16"}

# Methods that no forward pass calls by an operator or a statement.
UNCALLED = {"__init__", "__repr__", "__str__", "__setstate__", "__getstate__", "__reduce__", "__del__", "__dir__"}
UNCALLED |= {"__deepcopy__", "__copy__", "__new__", "__setattr__", "__delattr__"}

# Classes of tensors whose operations are PyTorch's.
TENSORS = {Tensor, nn.Parameter}

NAMESPACES = {torch, torch.nn, torch.nn.functional, torch.fft, torch.linalg, torch.special, torch.compiler, math}
NAMESPACES |= {torch.autograd, torch.autograd.profiler, torch.jit, warnings}
# Modules of functions that are written in Python, and of those that are not.
_TRUSTED = {"torch.functional", "torch.nn.functional", "torch._jit_internal", "warnings"}
_COMPILED = {"math", "torch", "torch._C._nn", "torch._C._special", "torch._C._fft", "torch._C._linalg", "_warnings"}
# Settings of the process that are compared, or that the engines make.
_SETTINGS = {"is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "get_default_dtype"}
_CONTEXTS = {torch.no_grad, torch.enable_grad, torch.Tensor, torch.Size, torch.autograd.profiler.record_function}
_CONTEXTS |= {warnings.catch_warnings, contextlib._GeneratorContextManager}

# The code of every function that `contextlib.contextmanager` has made of a generator.
_MANAGER = contextlib.contextmanager(lambda: iter(())).__code__

# Layers of PyTorch whose code does more than compute: parts of other processes, parameters that come late, numbers of
# tensors that are read unseen.
REFUSED_CLASSES = (nn.SyncBatchNorm, nn.modules.lazy.LazyModuleMixin, nn.CTCLoss)

# What makes a weight of others: as read, they compute from their attributes and tensors alone.
PARAMETRIZATIONS = {
    *(SpectralNorm, Parametrizations, parametrize.ParametrizationList),
    *(parametrizations._SpectralNorm, parametrizations._WeightNorm),
}

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKS_OF_GROUPS = {SpectralNormGroup._before, SpectralNormGroup._after}
# The older form of a parametrization: a hook that makes a weight before its module runs, and leaves it in the module.
WEIGHT_HOOKS = (SpectralNormHook, WeightNormHook)

CONTAINERS = {*HOOKS, "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_is_full_backward_hook"}
CONTAINERS |= {"_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"}
CONTAINERS |= {"_load_state_dict_post_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"}
CONTAINERS |= {"_forward_pre_hooks_with_kwargs", "_compiled_call_impl"}


def is_constant(value: Any) -> bool:
    """Whether a value never changes, and compares by its value."""
    if type(value) is tuple or type(value) is torch.Size or type(value) is frozenset:
        return all(map(is_constant, value))
    return type(value) in CONSTANTS


def is_fixed(value: Any) -> bool:
    """Whether an object never changes, other than a constant: numbers of NumPy, members of a plain enumeration."""
    if isinstance(value, (np.number, np.bool_)):
        return True
    if not isinstance(value, enum.Enum) or not is_constant(value.value):
        return False
    # What a program has added to it may read anything.
    own = {name for cls in type(value).__mro__ for name in vars(cls) if cls.__module__ not in ("enum", "builtins")}
    return value.__dict__.keys() <= _OF_MEMBERS and all(
        name.startswith("_") or name in type(value).__members__ for name in own
    )


# The attributes of every member of an enumeration.
_OF_MEMBERS = {"_value_", "_name_", "__objclass__", "_sort_order_"}


def as_tuples(value: Any) -> Any:
    """Lists, and lists in them, as tuples."""
    return tuple(map(as_tuples, value)) if type(value) in (list, tuple) else value


def alike(one: Any, other: Any) -> bool:
    """Whether two constants, or lists of constants, are equal and of the same types: 1 == 1.0 == True, 0.0 == -0.0."""
    if type(one) is not type(other):
        return False
    if type(one) in (list, tuple, torch.Size, frozenset):
        return len(one) == len(other) and all(map(alike, one, other))
    if type(one) is float and one == 0.0:
        return other == 0.0 and math.copysign(1.0, one) == math.copysign(1.0, other)
    return bool(one == other) or (one != one and other != other)


def is_trusted(value: Any) -> bool:
    """Whether an object of PyTorch, or of ``math``, computes from its arguments alone."""
    if isinstance(value, (types.BuiltinFunctionType, types.FunctionType)) and value.__name__ in _UNSEEN:
        return False
    if isinstance(value, types.BuiltinFunctionType):
        if value.__module__ not in _COMPILED or value.__name__ in ("from_numpy", "frombuffer", "from_file"):
            return False
        # Beside its operations the module torch has the settings of the process.
        return value.__self__ is not torch._C or value.__name__ in _SETTINGS
    if isinstance(value, types.FunctionType):
        return value.__module__ in _TRUSTED or value is torch.compiler.is_compiling
    if isinstance(value, type):
        return value in _CONTEXTS or is_class_of_torch(value) or (issubclass(value, Warning))
    return is_constant(value) or isinstance(value, np.ufunc)


def managed(function: types.FunctionType) -> Any:
    """The generator function of which `contextlib.contextmanager` has made a function, None for other functions."""
    if function.__code__ is not _MANAGER:
        return None
    return function.__closure__[_MANAGER.co_freevars.index("func")].cell_contents  # type: ignore[index]


def are_plain_filters(filters: Any) -> TypeGuard[list[Any]]:
    """Whether filters of warnings are tuples of what compares by its value."""
    return type(filters) is list and all(
        type(entry) is tuple and all(type(part) is re.Pattern or is_trusted(part) for part in entry)
        for entry in filters
    )


def is_class_of_torch(cls: type) -> bool:
    """Whether a class is one of PyTorch's layers."""
    return issubclass(cls, nn.Module) and is_of_torch(cls)


def is_record(cls: type) -> bool:
    """Whether a class is a named tuple, and no more than that."""
    if cls.__bases__ != (tuple,) or not hasattr(cls, "_fields"):
        return False
    made = {"__new__", "__repr__", "_replace", "__replace__", "_asdict", "__getnewargs__"}
    return all(name in made or not isinstance(value, types.FunctionType) for name, value in cls.__dict__.items())


def is_parametrized(cls: type) -> bool:
    """Whether `torch.nn.utils.parametrize` has made the class for one module."""
    return cls.__module__ == parametrize.__name__ and cls not in PARAMETRIZATIONS


def is_foreign_hook(hook: Any) -> bool:
    """Whether a hook is another than those that make weights."""
    return getattr(hook, "__func__", None) not in _HOOKS_OF_GROUPS and type(hook) not in WEIGHT_HOOKS


def made_by_hooks(module: nn.Module) -> set[str]:
    """The attributes that hooks make before the module runs."""
    return {str(getattr(hook, "name", "")) for hook in module._forward_pre_hooks.values() if type(hook) in WEIGHT_HOOKS}


def check_is_of_a_program(thing: Any, what: str) -> None:
    """NotRepeatable for functions and classes of Python, and of PyTorch beside its layers: it would take long to read
    them, to no use."""
    top = str(thing.__module__).partition(".")[0]
    if top in sys.stdlib_module_names and thing not in (object, dict, list, tuple):
        raise NotRepeatable(f"{what} is of the standard library")
    if top == "torch" and not (isinstance(thing, type) and issubclass(thing, nn.Module)):
        raise NotRepeatable(f"{what} is of PyTorch, and not known")


def is_of_torch(cls: type) -> bool:
    """Whether a class is written in PyTorch's modules of layers."""
    return cls.__module__.startswith("torch.nn.modules.")


def is_layer(cls: type) -> bool:
    """Whether code of PyTorch reads the attributes of such a module."""
    return any(map(is_of_torch, cls.__mro__[: cls.__mro__.index(nn.Module)]))


@functools.cache
def functions_called(layer: type) -> list[str]:
    """The names in `torch.nn.functional` that a layer of PyTorch reads."""
    methods = [value for cls in layer.__mro__ if is_of_torch(cls) for value in vars(cls).values()]
    read = {name for method in methods if type(method) is types.FunctionType for name in method.__code__.co_names}
    return sorted(name for name in read if callable(vars(nn.functional).get(name)))
