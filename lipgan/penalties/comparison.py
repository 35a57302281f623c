"""Whether a critic is what it was when it was read.

The comparison is code that is written for the critic: a loop over descriptions would take several times as long. It
holds nothing that holds the critic, which is reached from the call, or from the namespaces of modules and classes.
"""

from __future__ import annotations

import copy
import enum
import functools
import itertools
import operator
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.guards import TensorGuards

from lipgan.nn.spectral_norm_group import SpectralNormGroup
from lipgan.penalties.known import (
    CONTAINERS,
    HOOKS,
    PARAMETRIZATIONS,
    TENSORS,
    WEIGHT_HOOKS,
    NotRepeatable,
    alike,
    as_tuples,
    is_constant,
    is_fixed,
    is_layer,
    is_trusted,
    made_by_hooks,
)
from lipgan.penalties.reader import Reader

_STRIDED = torch.strided
_OF_CLASSES = ("__name__", "__qualname__")
_IS_LEAF, _HOOKS_OF = operator.attrgetter("is_leaf"), operator.attrgetter("_backward_hooks")
_ATTRIBUTES = operator.attrgetter("__dict__")


def comparison(
    critic: Any, reader: Reader, groups: Sequence[SpectralNormGroup]
) -> tuple[Callable[[Any], list[Tensor] | None], list[nn.Module]]:
    """A function that compares a critic with what it is now, and returns its tensors; and the modules in it.

    Args:
        reader: that has read the critic.
        groups: of spectral norms in it.

    Raises:
        NotRepeatable: something cannot be compared.
    """
    writer = _Writer(reader, groups)
    writer.visit(critic, "critic")
    return writer.finish(), writer.modules


class _Writer:
    """Writes the comparison, a line for each thing that is reached."""

    def __init__(self, reader: Reader, groups: Sequence[SpectralNormGroup]) -> None:
        self.modules: list[nn.Module] = []
        self._reader = reader
        self._served = {id(member.list): member.served for group in groups for member in group._members}
        self._grouped = {
            id(part) for group in groups for member in group._members for part in (member.list, member.parametrization)
        }
        self._constants: dict[str, Any] = {"alike": alike, "is_": operator.is_, "is_leaf": _IS_LEAF, "hooks": _HOOKS_OF}
        self._lines: list[str] = []
        self._places: dict[int, str] = {}  # of what has been visited, but for tensors
        self._tensors: dict[int, str] = {}
        self._held: list[Tensor] = []  # the same
        self._kept: list[Any] = []  # whose ids are in use
        self._classes: set[type] = set()
        self._numbers = itertools.count()

    def finish(self) -> Callable[[Any], list[Tensor] | None]:
        """The function."""
        reader = self._reader
        spaces: dict[int, str] = {}
        entries = {(id(space), name): (space, value) for space, name, value in reader.globals}
        for (k, name), (namespace, value) in entries.items():
            if k not in spaces:
                spaces[k] = f"n{len(spaces)}"
                self._constants[spaces[k]] = namespace
            self._visit_held(value, f"{spaces[k]}.get({name!r})")
        for module, name, value in reader.settings:
            self._refuse_if(self._differs(f"{self._named(module)}.{name}", value))
        for cls in reader.classes:
            name = self._named(cls)
            self._refuse_if(
                f"{name}.__mro__ is not {self._named(cls.__mro__)}",
                self._other_names(f"{name}.__dict__", cls.__dict__),
                *(f"{name}.{of} != {getattr(cls, of)!r}" for of in _OF_CLASSES if of in reader.names),
            )
        self._lines.append(f"held = [{', '.join(self._tensors.values())}]")
        if self._held:
            self._constants["are_alike"] = tensor_guards(self._held)
            self._refuse_if("not are_alike(*held)", "not all(map(is_leaf, held))", "any(map(hooks, held))")
            self._attributes_of_tensors()
        body = "\n    ".join([*self._lines, "return held"])
        exec(f"def check(critic):\n    {body}\n", self._constants)
        return self._constants.pop("check")  # type: ignore[no-any-return]

    def _attributes_of_tensors(self) -> None:
        """What a program has added to a tensor is not read; nor may it be later, where code takes its absence."""
        names = {name for name in self._reader.names if not hasattr(Tensor, name)}
        if not all(map(names.isdisjoint, map(_ATTRIBUTES, self._held))):
            raise NotRepeatable("an attribute of a tensor is read")
        # Python 3.10 has no table of what catches exceptions.
        if self._reader.asks or any(getattr(code, "co_exceptiontable", True) for code in self._reader.codes):
            self._constants |= {"apart": names.isdisjoint, "attributes": _ATTRIBUTES}
            self._refuse_if("not all(map(apart, map(attributes, held)))")

    # ---- lines ----

    def _named(self, value: Any) -> str:
        if type(value) in (bool, int, str, type(None)):
            return repr(value)
        name = f"c{len(self._constants)}"
        self._constants[name] = value
        return name

    def _differs(self, expression: str, value: Any) -> str:
        if isinstance(value, bool) or value is None:
            return f"{expression} is not {value!r}"
        name = f"c{len(self._constants)}"
        self._constants[name] = value
        return f"{expression} is not {name} and not alike({expression}, {name})"

    def _other_names(self, place: str, names: Iterable[Any]) -> str:
        """That a dict of attributes has others than these: one that is new may stand before one of a class."""
        return f"[*{place}] != {self._named([*names])}"

    def _refuse_if(self, *conditions: str) -> None:
        if conditions:
            self._lines.append(f"if {' or '.join(conditions)}: return None")

    def _place(self, value: Any, source: str, letter: str) -> str | None:
        """A variable for what is reached, or None if it has been reached before."""
        if id(value) in self._places:
            self._refuse_if(f"{source} is not {self._places[id(value)]}")
            return None
        place = self._places[id(value)] = f"{letter}{next(self._numbers)}"
        self._kept.append(value)
        self._lines.append(f"{place} = {source}")
        return place

    # ---- things ----

    def visit(self, value: Any, source: str) -> None:
        """Compare what an expression stands for."""
        condition = self._condition(value, source)
        if condition is not None:
            self._refuse_if(condition)
        elif isinstance(value, Tensor):
            self._visit_tensor(value, source, source)
        elif isinstance(value, nn.Module):
            self._visit_module(value, source)
        elif type(value) is types.FunctionType:
            self._visit_function(value, source)
        elif type(value) is types.MethodType:
            place = self._place(value, source, "b")
            if place is not None:
                self._refuse_if(f"type({place}) is not {self._named(types.MethodType)}")
                self.visit(value.__func__, f"{place}.__func__")
                self.visit(value.__self__, f"{place}.__self__")
        elif type(value) is functools.partial:
            place = self._place(value, source, "b")
            if place is not None:
                self._refuse_if(f"type({place}) is not {self._named(functools.partial)}", f"{place}.__dict__")
                self.visit(value.func, f"{place}.func")
                self._visit_sequence(value.args, f"{place}.args")
                self._visit_dict(value.keywords, f"{place}.keywords")
        elif isinstance(value, dict):
            self._visit_dict(value, source)
        elif isinstance(value, (list, tuple)):
            self._visit_sequence(value, source)
        elif isinstance(value, (set, frozenset)):
            self._refuse_if(f"type({source}) is not {self._named(type(value))}")
            self._refuse_if(f"not alike([*{source}], {self._named([*value])})")  # their order may count
        else:
            place = self._place(value, source, "o")
            if place is not None:
                self._refuse_if(f"type({place}) is not {self._named(type(value))}")
                self._visit_attributes(value, place)

    def _condition(self, value: Any, source: str) -> str | None:
        """That something is another constant, or another object that is known; None for anything else."""
        if is_constant(value):
            return self._differs(source, value)
        if is_fixed(value) or is_trusted(value) or isinstance(value, (type, types.ModuleType, property)):
            differs = f"{source} is not {self._named(value)}"
            if isinstance(value, enum.Enum):
                differs += f" or {self._named(value.__dict__)} != {self._named({**value.__dict__})}"
            return differs
        return None

    def _visit_held(self, value: Any, source: str) -> None:
        """What a module or a class holds: functions without a closure are held here as well."""
        function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
        function = function.fget if isinstance(function, property) else function
        if id(function) not in self._reader.met and self._condition(value, source) is None:  # PyTorch's own
            self._refuse_if(f"{source} is not {self._named(value)}")
            return
        if type(function) is not types.FunctionType or is_trusted(function):
            self.visit(value, source)
            return
        if function is not value or set(function.__code__.co_freevars) <= {"__class__"}:
            name = self._named(value)
            self._refuse_if(f"{source} is not {name}")
            self._function_held(function)
        else:
            self.visit(value, source)

    def _function_held(self, function: types.FunctionType) -> None:
        """A function that is held: its code may be replaced, too."""
        if id(function) not in self._places:
            place = self._places[id(function)] = self._named(function)
            self._in_function(function, place)

    def _visit_function(self, function: types.FunctionType, source: str) -> None:
        place = self._place(function, source, "f")
        if place is not None:
            self._refuse_if(f"type({place}) is not {self._named(types.FunctionType)}")
            self._in_function(function, place)

    def _in_function(self, function: types.FunctionType, place: str) -> None:
        code = function.__code__
        self._refuse_if(f"{place}.__code__ is not {self._named(code)}")
        defaults, by_name = function.__defaults__, function.__kwdefaults__
        if defaults is None:
            self._refuse_if(f"{place}.__defaults__ is not None")
        elif all(map(is_constant, defaults)):
            self._refuse_if(self._differs(f"{place}.__defaults__", defaults))
        elif id(function) in self._reader.functions and 0 not in self._reader.refused.get(code, ()):
            self._visit_sequence(defaults, f"{place}.__defaults__")
        if not by_name:
            self._refuse_if(f"{place}.__kwdefaults__")
        elif 0 not in self._reader.refused.get(code, ()):
            self._visit_dict(by_name, f"{place}.__kwdefaults__")
        for k, name in enumerate(code.co_freevars):
            if (id(function), name) in self._reader.cells:
                self.visit(function.__closure__[k].cell_contents, f"{place}.__closure__[{k}].cell_contents")  # type: ignore[index]
        self._visit_attributes(function, place)

    def _visit_attributes(self, value: Any, place: str) -> None:
        """The attributes of a function or an object that are read."""
        reader, own = self._reader, value.__dict__
        attributes = f"{place}d"
        self._lines.append(f"{attributes} = {place}.__dict__")
        self._refuse_if(self._other_names(attributes, own))
        for name in own:
            if name in reader.names and (id(value), name) not in reader.unread:
                self.visit(own[name], f"{attributes}[{name!r}]")

    def _visit_dict(self, value: Mapping[Any, Any], source: str) -> None:
        place = self._place(value, source, "e")
        if place is None:
            return
        self._refuse_if(
            f"type({place}) is not {self._named(type(value))}",
            f"len({place}) != {len(value)}",
            f"not alike([*{place}], {self._named([*value])})",
        )
        held = [inner for inner in value.values() if self._may_be_held(inner)]
        if len(held) == len(value):
            self._refuse_if(f"not all(map(is_, {place}.values(), {self._named(held)}))")
            for inner in held:
                if type(inner) is types.FunctionType and not is_trusted(inner):
                    self._function_held(inner)
        else:
            for key, inner in value.items():
                self.visit(inner, f"{place}[{self._named(key)}]")
        if value and type(value) is not dict and getattr(value, "__dict__", None):
            self._visit_attributes(value, place)

    def _may_be_held(self, value: Any) -> bool:
        if type(value) is types.FunctionType:
            return not value.__code__.co_freevars
        return is_constant(value) or is_fixed(value) or is_trusted(value)

    def _visit_sequence(self, value: Sequence[Any], source: str) -> None:
        place = self._place(value, source, "e")
        if place is None:
            return
        if is_constant(as_tuples(value)):
            self._refuse_if(f"not alike({place}, {self._named(copy.deepcopy(value))})")
            return
        self._refuse_if(f"type({place}) is not {self._named(type(value))}", f"len({place}) != {len(value)}")
        for k, inner in enumerate(value):
            self.visit(inner, f"{place}[{k}]")

    # ---- modules and tensors ----

    def _visit_module(self, module: nn.Module, source: str) -> None:
        place = self._place(module, source, "m")
        if place is None:
            return
        self.modules.append(module)
        reader, attributes, made = self._reader, module.__dict__, made_by_hooks(module)
        own = f"{place}d"
        self._lines.append(f"{own} = {place}.__dict__")
        conditions = [f"type({place}) is not {self._named(type(module))}", self._other_names(own, attributes)]
        for name in HOOKS:
            hooks = [*attributes[name].values()]
            conditions.append(f"[*{own}[{name!r}].values()] != {self._named(hooks)}" if hooks else f"{own}[{name!r}]")
        if id(module) in self._grouped:
            conditions.append(f"{place} is not {self._named(module)}")
        if type(module) not in self._classes:
            self._classes.add(type(module))
            self._visit_held(type(module).forward, f"type({place}).forward")
        known = is_layer(type(module)) or type(module) in PARAMETRIZATIONS
        others: list[str] = []
        for name, value in attributes.items():
            if name in CONTAINERS or name in made or not (known or name in reader.names):
                continue
            if (id(module), name) in reader.unread:
                continue
            if name == "served" and value is self._served.get(id(module), ()):
                conditions.append(f"{own}[{name!r}] is not {self._named(value)}")
            elif known and type(value) is list and is_constant(as_tuples(value)):
                conditions.append(f"not alike({own}[{name!r}], {self._named(copy.deepcopy(value))})")
            elif isinstance(module, nn.RNNBase) and name in ("_flat_weights", "_flat_weight_refs"):
                pass  # the parameters once more, see below
            elif (condition := self._condition(value, f"{own}[{name!r}]")) is not None:
                conditions.append(condition)
            else:
                others.append(name)
        self._refuse_if(*conditions)
        for hook in module._forward_pre_hooks.values():
            if type(hook) in WEIGHT_HOOKS:
                self._hook_held(hook)
        for name in others:
            self.visit(attributes[name], f"{own}[{name!r}]")
        for kind in ("_parameters", "_buffers"):
            held = attributes[kind]
            if not held:
                self._refuse_if(f"{own}[{kind!r}]")
                continue
            self._lines.append(f"p = {own}[{kind!r}]")
            self._refuse_if(self._other_names("p", held))
            for name, tensor in held.items():
                if tensor is None:
                    self._refuse_if(f"p[{name!r}] is not None")
                else:
                    self._visit_tensor(tensor, f"p[{name!r}]", f"{name} of {type(module).__name__}")
        if isinstance(module, nn.RNNBase):
            flat = module._flat_weights
            if any(id(tensor) not in self._tensors for tensor in flat):
                raise NotRepeatable(f"{type(module).__name__} runs on other weights than its parameters")
            self._lines.append(f"p = {own}['_flat_weights']")
            self._refuse_if(*(f"p[{k}] is not {self._tensors[id(tensor)]}" for k, tensor in enumerate(flat)))
        children = attributes["_modules"]
        if not children:
            self._refuse_if(f"{own}['_modules']")
        else:
            self._lines.append(f"{place}s = {own}['_modules']")
            self._refuse_if(self._other_names(f"{place}s", children))  # a Sequential runs them in their order
        for name, child in children.items():
            if child is None:
                self._refuse_if(f"{place}s[{name!r}] is not None")
            else:
                self._visit_module(child, f"{place}s[{name!r}]")

    def _hook_held(self, hook: Any) -> None:
        """What a hook that makes a weight is told."""
        name = self._named(hook.__dict__)
        self._refuse_if(*(self._differs(f"{name}[{key!r}]", value) for key, value in hook.__dict__.items()))

    def _visit_tensor(self, tensor: Tensor, source: str, what: str) -> None:
        if id(tensor) in self._tensors:
            self._refuse_if(f"{source} is not {self._tensors[id(tensor)]}")
            return
        if type(tensor) not in TENSORS or tensor.layout is not _STRIDED:
            raise NotRepeatable(f"{what} is a {type(tensor).__name__}")
        if not tensor.is_leaf or tensor._backward_hooks:
            raise NotRepeatable(f"{what} has a history or hooks")
        t = self._tensors[id(tensor)] = f"t{len(self._tensors)}"
        self._held.append(tensor)
        self._lines.append(f"{t} = {source}")


def tensor_guards(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Whether tensors are of the same classes, dtypes, devices, sizes, strides, as many different ones as these are."""
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    guards: Any = TensorGuards
    return guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check  # type: ignore[no-any-return]
