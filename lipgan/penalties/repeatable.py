"""Whether a critic runs the same operations at every call, and what that depends on.

A recording of a critic's operations may stand for a later call if nothing that the critic's Python code reads has
changed, and if the code leaves nothing behind but tensors. `Conditions` reads the code of every ``forward`` in a
module, and of what it calls, and notes what has to stay the same; it compares that in about a microsecond for each
module. What the reader does not know is refused: the answer costs time then, and no digit.

Known are PyTorch's own layers and functions, methods of tensors, and code that reads constants and calls those; the
parametrizations of spectral and weight normalization, and the hooks of a `SpectralNormGroup`. Refused are changes of
attributes, closures and globals, values that leave a tensor (``item``, ``numpy``), random numbers of Python, other
hooks and parametrizations, attributes that hold lists or objects, functions of other packages.
"""

from __future__ import annotations

import builtins
import copy
import dis
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrizations, parametrize

from lipgan.nn.spectral_norm import Parametrizations, SpectralNorm
from lipgan.nn.spectral_norm_group import SpectralNormGroup

# Whose values never change, and compare by their values.
_CONSTANTS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format, type(...))

_BUILTINS = {
    *("abs", "all", "any", "bool", "dict", "divmod", "enumerate", "float", "int", "isinstance", "len", "list", "map"),
    *("max", "min", "pow", "range", "reversed", "round", "set", "slice", "sorted", "str", "sum", "super", "tuple"),
    *("type", "zip", "AssertionError", "IndexError", "NotImplementedError", "RuntimeError", "TypeError", "ValueError"),
}

# Attributes of a tensor by which its numbers leave it, or by which it is changed unseen.
_HIDING = {
    *("item", "tolist", "numpy", "data", "data_ptr", "storage", "untyped_storage", "apply_", "map_", "map2_", "set_"),
    *("grad", "grad_fn", "_version", "_base", "register_hook", "requires_grad_", "retain_grad", "backward", "is_leaf"),
    *("__dict__", "__class__", "__array__", "__setattr__", "share_memory_", "_make_subclass", "as_subclass"),
}

# What a module may be asked for while it runs.
_OF_MODULES = {"children", "modules", "named_children", "named_modules", "named_parameters", "parameters", "forward"}
_OF_MODULES |= {"buffers", "named_buffers", "get_submodule", "get_parameter", "get_buffer", "training"}
# Methods of tensors as well. What they change of a module is compared.
_OF_MODULES |= {"to", "type", "float", "double", "half", "bfloat16"}

# Methods that no forward pass calls by an operator or a statement.
_UNCALLED = {"__init__", "__repr__", "__str__", "__setstate__", "__getstate__", "__reduce__", "__del__", "__dir__"}
_UNCALLED |= {"__deepcopy__", "__copy__", "__new__", "__setattr__", "__delattr__"}

# Classes of tensors whose operations are PyTorch's.
_TENSORS = {Tensor, nn.Parameter}

_NAMESPACES = {torch, torch.nn, torch.nn.functional, torch.fft, torch.linalg, torch.special, torch.compiler, math}
# Modules of functions that are written in Python, and of those that are not.
_TRUSTED = {"torch.functional", "torch.nn.functional", "torch._jit_internal"}
_COMPILED = {"math", "torch", "torch._C._nn", "torch._C._special", "torch._C._fft", "torch._C._linalg"}
# Settings of the process that are compared, or that the engines make.
_SETTINGS = {"is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "get_default_dtype"}
_CONTEXTS = {torch.no_grad, torch.enable_grad, torch.Tensor, torch.Size}

# Layers of PyTorch whose code does more than compute: parts of other processes, parameters that come late.
_REFUSED_CLASSES = (nn.SyncBatchNorm, nn.modules.lazy.LazyModuleMixin)

# What makes a weight of others: as read, they compute from their attributes and tensors alone.
_PARAMETRIZATIONS = {
    *(SpectralNorm, Parametrizations, parametrize.ParametrizationList),
    *(parametrizations._SpectralNorm, parametrizations._WeightNorm),
}

_LEAVING = {"STORE_GLOBAL", "DELETE_GLOBAL", "STORE_NAME", "STORE_ATTR", "DELETE_ATTR", "IMPORT_NAME", "IMPORT_STAR"}
_LEAVING |= {"LOAD_BUILD_CLASS", "LOAD_LOCALS", "LOAD_FROM_DICT_OR_GLOBALS", "GET_AWAITABLE", "SETUP_ANNOTATIONS"}

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKS_OF_GROUPS = {SpectralNormGroup._before, SpectralNormGroup._after}
_CONTAINERS = {*_HOOKS, "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_is_full_backward_hook"}
_CONTAINERS |= {"_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"}
_CONTAINERS |= {"_load_state_dict_post_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"}
_CONTAINERS |= {"_forward_pre_hooks_with_kwargs", "_compiled_call_impl"}


class NotRepeatable(Exception):
    """The code of a critic cannot be shown to do the same at every call."""


class Conditions:
    """What has to stay the same for the operations of a critic to be the same.

    Args:
        critic: as it is now.

    Raises:
        NotRepeatable: with the reason.

    Attributes:
        groups: those whose hooks run before and after the critic, or a part of it.
    """

    def __init__(self, critic: nn.Module) -> None:
        self.groups = _groups(critic)
        self._check = _comparison(critic, _read_everything(critic), self.groups)

    def holds(self, critic: nn.Module) -> list[Tensor] | None:
        """The parameters and buffers of the critic, each once, in one order; None if a condition fails."""
        if _has_any_global_hook():  # type: ignore[no-untyped-call]
            return None
        try:
            return self._check(critic)
        except (KeyError, AttributeError, TypeError):  # something is gone
            return None


# ---- what the code reads ----


class _Reader:
    """Reads functions, and refuses those that may do otherwise at another call.

    Attributes:
        names: of all attributes that are read.
        globals: (namespace, name, object) that are read, the namespace of a module or of a class.
        cells: (cell, content) of closures that are read.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.globals: list[tuple[Mapping[str, Any], str, Any]] = []
        self.cells: list[tuple[types.CellType, Any]] = []
        self._seen: set[types.FunctionType] = set()
        self._attributes: set[tuple[type, str]] = set()

    def read_module(self, module: nn.Module) -> None:
        cls = type(module)
        if not all(function.__module__.startswith("torch.nn.") for function in (cls.__call__, cls.__getattr__)):
            raise NotRepeatable(f"{cls.__name__} changes how modules are called or read")
        if cls.__getattribute__ is not object.__getattribute__:
            raise NotRepeatable(f"{cls.__name__} computes its attributes")
        if (
            any(map(_foreign_hooks, (getattr(module, name) for name in _HOOKS)))
            or module._compiled_call_impl is not None
        ):
            raise NotRepeatable(f"{cls.__name__} has hooks")
        if "forward" in module.__dict__:
            raise NotRepeatable(f"{cls.__name__} has a forward of its own in an instance")
        if isinstance(module, _REFUSED_CLASSES):
            raise NotRepeatable(f"{cls.__name__} does more than compute")
        if cls in _PARAMETRIZATIONS:
            return
        if _is_parametrized(cls):
            self._read_parametrized(module)
            cls = cls.__bases__[0]
        if _is_layer(cls):  # whose code may read any attribute
            for name, value in module.__dict__.items():
                if isinstance(value, types.FunctionType):
                    self._read_value(value, f"{cls.__name__}.{name}")
        if _is_of_torch(cls):
            if not cls.forward.__module__.startswith("torch."):
                raise NotRepeatable(f"{cls.__name__}.forward is not PyTorch's")
            return
        self._read_function(cls.forward)
        for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
            for name, value in {} if _is_of_torch(base) else base.__dict__.items():
                if name.startswith("__") and isinstance(value, types.FunctionType) and name not in _UNCALLED:
                    self._read_function(value)

    def _read_parametrized(self, module: nn.Module) -> None:
        """A module whose class computes some of its tensors."""
        self.globals.append((vars(parametrize), "_cache_enabled", 0))
        if parametrize._cache_enabled:
            raise NotRepeatable(f"{type(module).__name__} keeps what it computes")
        for name, value in type(module).__dict__.items():
            if isinstance(value, property):
                self.globals.append((type(module).__dict__, name, value))
                for parametrization in module.parametrizations[name]:  # type: ignore[index]
                    if type(parametrization) not in _PARAMETRIZATIONS:
                        raise NotRepeatable(f"{name} is made by {type(parametrization).__name__}")

    def _read_function(self, function: Any) -> None:
        if isinstance(function, (staticmethod, classmethod)):
            function = function.__func__
        if not isinstance(function, types.FunctionType):
            raise NotRepeatable(f"{function!r} is not written in Python")
        if function in self._seen:
            return
        self._seen.add(function)
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            if not _is_constant(value):
                raise NotRepeatable(f"{function.__qualname__} has a default that is no constant")
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        for name, cell in cells.items():
            if name != "__class__":
                self._read_value(cell.cell_contents, f"{name} in {function.__qualname__}")
                self.cells.append((cell, cell.cell_contents))
        self._read_code(function.__code__, function, frozenset(cells))

    def _read_code(self, code: types.CodeType, function: types.FunctionType, free: frozenset[str]) -> None:
        where = function.__qualname__
        generator = code.co_name == "<genexpr>"
        namespace: Any = None  # a module whose attribute is read next
        bare = False  # whether the last thing read must not be asked for attributes of its own
        for instruction in dis.get_instructions(code):
            name, argument = instruction.opname, instruction.argval
            if name in ("CACHE", "EXTENDED_ARG"):
                continue
            reads = name in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "LOAD_SUPER_METHOD")
            if namespace is not None:
                if not reads:
                    raise NotRepeatable(f"{where} hands on the module {namespace.__name__}")
                value = vars(namespace).get(argument)
                is_module = isinstance(value, types.ModuleType)
                if value is None or not (value in _NAMESPACES if is_module else _is_trusted(value)):
                    raise NotRepeatable(f"{where} reads {namespace.__name__}.{argument}")
                self.globals.append((vars(namespace), argument, value))
                namespace = value if is_module else None
                continue
            if bare and (reads or name in ("STORE_FAST", "STORE_DEREF")):
                raise NotRepeatable(f"{where} reads {argument} of a class or function")
            bare = False
            if name in _LEAVING or (name in ("STORE_DEREF", "DELETE_DEREF") and argument in free):
                raise NotRepeatable(f"{where} changes {argument}")
            if name in ("YIELD_VALUE", "RETURN_GENERATOR") and not generator:
                raise NotRepeatable(f"{where} is a generator")
            if name == "LOAD_GLOBAL":
                value = self._read_global(argument, function)
                if isinstance(value, types.ModuleType):
                    namespace = value
                bare = isinstance(value, (type, types.FunctionType))
            elif reads:
                if argument in _HIDING:
                    raise NotRepeatable(f"{where} reads {argument}")
                self.names.add(argument)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._read_code(constant, function, free)

    def _read_global(self, name: str, function: types.FunctionType) -> Any:
        """Read what a name stands for, and hand it back; None for what is built in."""
        namespace = function.__globals__
        if name not in namespace:
            if name not in _BUILTINS or not hasattr(builtins, name):
                raise NotRepeatable(f"{function.__qualname__} reads {name}")
            return None
        value = namespace[name]
        self.globals.append((namespace, name, value))
        if not isinstance(value, types.ModuleType):
            self._read_value(value, f"{name} in {function.__qualname__}")
        elif value not in _NAMESPACES:  # of the others, it depends on what is read of them
            raise NotRepeatable(f"{function.__qualname__} reads the module {name}")
        return value

    def _read_value(self, value: Any, what: str) -> None:
        """A value that code reads as it is: from its globals, its closure, or a class."""
        if _is_constant(value) or _is_trusted(value):
            return
        if isinstance(value, types.FunctionType):
            self._read_function(value)
        elif not (isinstance(value, type) and (issubclass(value, nn.Module) or _is_record(value))):
            raise NotRepeatable(f"{what} is a {type(value).__name__}")

    def read_attribute(self, module: nn.Module, name: str) -> None:
        """An attribute that some code may read of a module, where the module or its class has it."""
        value = module.__dict__.get(name)
        if isinstance(value, types.FunctionType):
            self._read_value(value, f"{type(module).__name__}.{name}")
        if (type(module), name) in self._attributes:
            return
        self._attributes.add((type(module), name))
        for cls in type(module).__mro__:
            if name in cls.__dict__:
                value = cls.__dict__[name]
                self.globals.append((cls.__dict__, name, value))
                if cls is nn.Module or cls is object:
                    if name not in _OF_MODULES and not name.startswith("__"):
                        raise NotRepeatable(f"{name} of a module is read")
                elif _is_of_torch(cls):
                    pass
                elif isinstance(value, property):
                    if not _is_parametrized(cls):
                        self._read_function(value.fget)
                elif isinstance(value, (staticmethod, classmethod, types.FunctionType)):
                    self._read_function(value)
                else:
                    self._read_value(value, f"{cls.__name__}.{name}")
                return


def _is_record(cls: type) -> bool:
    """Whether a class is a named tuple, and no more than that."""
    if cls.__bases__ != (tuple,) or not hasattr(cls, "_fields"):
        return False
    made = {"__new__", "__repr__", "_replace", "__replace__", "_asdict", "__getnewargs__"}
    return all(name in made or not isinstance(value, types.FunctionType) for name, value in cls.__dict__.items())


def _is_parametrized(cls: type) -> bool:
    """Whether `torch.nn.utils.parametrize` has made the class for one module."""
    return cls.__module__ == parametrize.__name__ and cls not in _PARAMETRIZATIONS


def _foreign_hooks(hooks: Mapping[int, Any]) -> bool:
    """Whether there are hooks but those of groups of spectral norms."""
    return any(getattr(hook, "__func__", None) not in _HOOKS_OF_GROUPS for hook in hooks.values())


def _groups(critic: nn.Module) -> list[SpectralNormGroup]:
    """Those whose hooks are on the critic, or on a part of it."""
    hooks = [hook for module in critic.modules() for hook in module._forward_pre_hooks.values()]
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    return [owner for owner in owners if isinstance(owner, SpectralNormGroup)]


def _is_of_torch(cls: type) -> bool:
    return cls.__module__.startswith("torch.nn.modules.")


def _is_layer(cls: type) -> bool:
    """Whether code of PyTorch reads the attributes of such a module."""
    return any(map(_is_of_torch, cls.__mro__[: cls.__mro__.index(nn.Module)]))


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if type(value) in (list, tuple) else value


def _is_constant(value: Any) -> bool:
    if type(value) is tuple or type(value) is torch.Size or type(value) is frozenset:
        return all(map(_is_constant, value))
    return type(value) in _CONSTANTS


def _is_trusted(value: Any) -> bool:
    """Whether an object of PyTorch, or of ``math``, computes from its arguments alone."""
    if isinstance(value, types.BuiltinFunctionType):
        if value.__module__ not in _COMPILED or value.__name__ in ("from_numpy", "frombuffer", "from_file"):
            return False
        # Beside its operations the module torch has the settings of the process.
        return value.__self__ is not torch._C or value.__name__ in _SETTINGS
    if isinstance(value, types.FunctionType):
        return value.__module__ in _TRUSTED or value is torch.compiler.is_compiling
    if isinstance(value, type):
        return value in _CONTEXTS or (issubclass(value, nn.Module) and _is_of_torch(value))
    return _is_constant(value)


# ---- the comparison, as code: a loop over descriptions would take several times as long ----


def _comparison(
    critic: nn.Module, reader: _Reader, groups: Sequence[SpectralNormGroup]
) -> Callable[[nn.Module], list[Tensor] | None]:
    """A function that compares a critic with what it is now, and returns its tensors."""
    served = {id(member.list): member.served for group in groups for member in group._members}
    grouped = {
        id(part) for group in groups for member in group._members for part in (member.list, member.parametrization)
    }
    constants: dict[str, Any] = {}

    def named(value: Any) -> str:
        if type(value) in (bool, int, str, type(None)):
            return repr(value)
        name = f"c{len(constants)}"
        constants[name] = value
        return name

    lines: list[str] = []
    places: dict[int, str] = {}  # of modules
    tensors: dict[int, str] = {}
    classes: set[type] = set()

    def differs(expression: str, value: Any) -> str:
        if isinstance(value, bool) or value is None:
            return f"{expression} is not {value!r}"
        if isinstance(value, float) and math.isnan(value):
            raise NotRepeatable("an attribute is NaN")
        if isinstance(value, (int, float, tuple)):  # 1 == 1.0 == True, which an operation may tell apart
            return f"{expression} != {named(value)} or type({expression}) is not {named(type(value))}"
        return f"{expression} != {named(value)}"

    def refuse_if(*conditions: str) -> None:
        if conditions:
            lines.append(f"if {' or '.join(conditions)}: return None")

    def visit(module: nn.Module, source: str) -> None:
        if id(module) in places:
            refuse_if(f"{source} is not {places[id(module)]}")
            return
        k = len(places)
        place = places[id(module)] = f"m{k}"
        lines.append(f"{place} = {source}")
        attributes = module.__dict__
        lines.append(f"d = {place}.__dict__")
        conditions = [f"type({place}) is not {named(type(module))}", f"len(d) != {len(attributes)}"]
        for name in _HOOKS:
            hooks = [*attributes[name].values()]
            conditions.append(f"[*d[{name!r}].values()] != {named(hooks)}" if hooks else f"d[{name!r}]")
        if id(module) in grouped:
            conditions.append(f"{place} is not {named(module)}")
        if type(module) not in classes:
            classes.add(type(module))
            conditions.append(f"type({place}).forward is not {named(type(module).forward)}")
        is_layer = _is_layer(type(module)) or type(module) in _PARAMETRIZATIONS
        for name, value in attributes.items():
            if name in _CONTAINERS or not (is_layer or name in reader.names):
                continue
            if name == "served" and value is served.get(id(module), ()):
                conditions.append(f"d[{name!r}] is not {named(value)}")
                continue
            if is_layer and type(value) is list and _is_constant(_as_tuples(value)):
                conditions.append(f"d[{name!r}] != {named(copy.deepcopy(value))}")
            elif isinstance(module, nn.RNNBase) and name in ("_flat_weights", "_flat_weight_refs"):
                pass  # the parameters once more, see below
            elif _is_constant(value):
                conditions.append(differs(f"d[{name!r}]", value))
            elif isinstance(value, types.FunctionType) or _is_trusted(value):
                conditions.append(f"d[{name!r}] is not {named(value)}")
            else:
                raise NotRepeatable(f"{type(module).__name__}.{name} is a {type(value).__name__}")
        refuse_if(*conditions)
        for kind in ("_parameters", "_buffers"):
            held = attributes[kind]
            if held:
                lines.append(f"p = d[{kind!r}]")
                refuse_if(f"len(p) != {len(held)}")
            for name, tensor in held.items():
                if tensor is None:
                    refuse_if(f"p[{name!r}] is not None")
                    continue
                if id(tensor) in tensors:
                    refuse_if(f"p[{name!r}] is not {tensors[id(tensor)]}")
                    continue
                if type(tensor) not in _TENSORS or tensor.layout != torch.strided:
                    raise NotRepeatable(f"{name} of {type(module).__name__} is a {type(tensor).__name__}")
                if not tensor.is_leaf or tensor._backward_hooks:
                    raise NotRepeatable(f"{name} of {type(module).__name__} has a history or hooks")
                t = tensors[id(tensor)] = f"t{len(tensors)}"
                lines.append(f"{t} = p[{name!r}]")
                refuse_if(
                    f"type({t}) is not {named(type(tensor))}",
                    f"{t}.dtype is not {named(tensor.dtype)}",
                    f"{t}.shape != {named(tensor.shape)}",
                    f"{t}.stride() != {named(tensor.stride())}",
                    f"{t}.requires_grad is not {tensor.requires_grad}",
                    f"{t}.grad_fn is not None",
                    f"{t}._backward_hooks",
                )
        if isinstance(module, nn.RNNBase):
            flat = module._flat_weights
            if any(id(tensor) not in tensors for tensor in flat):
                raise NotRepeatable(f"{type(module).__name__} runs on other weights than its parameters")
            lines.append("p = d['_flat_weights']")
            refuse_if(*(f"p[{k}] is not {tensors[id(tensor)]}" for k, tensor in enumerate(flat)))
        children = attributes["_modules"]
        if children:
            lines.append(f"s{k} = d['_modules']")
            refuse_if(f"len(s{k}) != {len(children)}")
        for name, child in children.items():
            if child is None:
                refuse_if(f"s{k}[{name!r}] is not None")
            else:
                visit(child, f"s{k}[{name!r}]")

    visit(critic, "critic")
    spaces: dict[int, str] = {}
    read: list[tuple[str, Any]] = []
    for (k, name), (namespace, value) in {(id(space), name): (space, v) for space, name, v in reader.globals}.items():
        if k not in spaces:
            spaces[k] = f"n{len(spaces)}"
            constants[spaces[k]] = namespace
        read.append((f"{spaces[k]}.get({name!r})", value))
    read += [(f"{named(cell)}.cell_contents", value) for cell, value in reader.cells]
    for expression, value in read:
        refuse_if(differs(expression, value) if _is_constant(value) else f"{expression} is not {named(value)}")
    body = "\n    ".join([*lines, f"return [{', '.join(tensors.values())}]"])
    scope: dict[str, Any] = constants
    exec(f"def check(critic):\n    {body}\n", scope)
    return scope.pop("check")  # type: ignore[no-any-return]


def _read_everything(critic: nn.Module) -> _Reader:
    """The reader after it has read the modules, what the names that they read stand for, what that reads, and so on."""
    reader = _Reader()
    modules = list(critic.modules())
    for module in modules:
        reader.read_module(module)
    read: set[str] = set()
    while names := reader.names - read:
        read |= names
        for module in modules:
            for name in names:
                reader.read_attribute(module, name)
    return reader
