"""Reads the code of a critic: what it depends on, and which of its lines may do otherwise at another call.

What a line reads of the critic is noted by name: attributes of modules, classes, functions and objects, globals,
closures. A line that the reader does not understand, or that leaves something behind, is refused: a recording in which
it runs does not count. The code that runs follows from what is compared, so that what has not run while the critic was
recorded does not run as long as that stays the same.
"""

from __future__ import annotations

import argparse
import collections
import functools
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from lipgan.penalties.bytecode import SUSPENDING, CodeReader, Line
from lipgan.penalties.known import (
    CONTAINERS,
    HIDING,
    HOOKS,
    LARGEST,
    OF_MODULES,
    PARAMETRIZATIONS,
    REFUSED_CLASSES,
    TENSORS,
    UNCALLED,
    NotRepeatable,
    as_tuples,
    check_is_of_a_program,
    functions_called,
    is_class_of_torch,
    is_constant,
    is_fixed,
    is_foreign_hook,
    is_layer,
    is_of_torch,
    is_parametrized,
    is_record,
    is_trusted,
    made_by_hooks,
    managed,
)


class Reader:
    """What the code of a critic depends on.

    Args:
        critic: as it is now.

    Attributes:
        names: of all attributes that are read.
        asks: whether the code asks what attributes there are.
        globals: (namespace, name, object) that are read, the namespace of a module or of a class; None for what is not
            there.
        settings: (module, name, constant) of PyTorch, and the filters of warnings.
        cells: (id of a function, name) of closures that are read.
        functions: ids of those that are read.
        classes: of objects, whose attributes are looked up by name, with the classes that those inherit from.
        codes: of the functions, and of those within.
        refused: by code and line, why it may do otherwise at another call.
        mutable: what code may change unseen until it is compared, None for nothing.
        met: by id, the things that code may use, which keeps the ids.
        unread: (id of an object, name) of attributes that only lines that are refused read.

    Raises:
        NotRepeatable: where it is no matter of single lines.
    """

    def __init__(self, critic: Any) -> None:
        self.names: dict[str, set[Line]] = {}
        self.asks = False
        self.globals: list[tuple[Mapping[str, Any], str, Any]] = []
        self.settings: list[tuple[types.ModuleType, str, Any]] = []
        self.cells: set[tuple[int, str]] = set()
        self.functions: set[int] = set()
        self.classes: dict[type, None] = {}
        self.codes: set[types.CodeType] = set()
        self.refused: dict[types.CodeType, dict[int, str]] = {}
        self.unread: set[tuple[int, str]] = set()
        self.mutable: str | None = None
        self._prefixes: dict[str, set[Line]] = {}
        self.met: dict[int, Any] = {}
        self._holders: list[Any] = []
        self._managed: set[types.CodeType] = set()
        self._queue: list[types.FunctionType] = []
        self._failed: dict[str, str] = {}
        self._asked: dict[tuple[type, str], str | None] = {}
        self._see(critic, "the critic")
        self._read_on()

    # ---- what there is ----

    def _see(self, value: Any, what: str) -> None:
        """A value that code may use."""
        if id(value) in self.met or is_constant(value) or is_fixed(value):
            return
        self.met[id(value)] = value
        try:
            self._meet(value, what)
        except NotRepeatable:
            del self.met[id(value)]
            raise

    def _meet(self, value: Any, what: str) -> None:
        cls = type(value)
        if isinstance(value, (type, types.FunctionType)) and not is_trusted(value):
            check_is_of_a_program(value, what)
        if isinstance(value, type):
            if not (is_trusted(value) or is_record(value)):
                if type(value) is not type:
                    raise NotRepeatable(f"{what} is a {cls.__name__}")
                self._read_operators(value)
            if not is_trusted(value) or is_class_of_torch(value):
                self._holders.append(value)
        elif is_trusted(value) or cls in TENSORS:
            return
        elif isinstance(value, nn.Module):
            self._read_module(value)
            self._holders.append(value)
            for child in value._modules.values():
                self._see(child, what)
        elif cls is types.FunctionType:
            generator = managed(value)
            if type(generator) is types.FunctionType:
                self._managed.add(generator.__code__)
            self._queue.append(value)
            self._holders.append(value)
        elif cls is types.MethodType:
            self._see(value.__self__, what)
            self._see(value.__func__, what)
        elif cls is functools.partial and not value.__dict__:
            for inner in (value.func, *value.args, *value.keywords.values()):
                self._see(inner, what)
        elif isinstance(value, (dict, list, tuple, set, frozenset)) and len(value) > LARGEST:
            raise NotRepeatable(f"{what} holds {len(value)} things")
        elif isinstance(value, dict) and _is_dict(cls):
            self.mutable = f"{what} may be changed"
            for key, inner in value.items():
                if not is_constant(key):
                    raise NotRepeatable(f"{what} has a key that is a {type(key).__name__}")
                self._see(inner, what)
            if cls is not dict and cls is not collections.OrderedDict:
                self._meet_object(value)
        elif cls in (list, tuple) or (isinstance(value, tuple) and is_record(cls)):
            self.mutable = f"{what} may be changed" if cls is list else self.mutable
            for inner in value:
                self._see(inner, what)
        elif cls in (set, frozenset) and all(map(is_constant, value)):
            self.mutable = f"{what} may be changed" if cls is set else self.mutable
        elif _is_plain_object(value):
            self._meet_object(value)
        else:
            raise NotRepeatable(f"{what} is a {cls.__name__}")

    def _meet_object(self, value: Any) -> None:
        self._read_operators(type(value))
        self._holders.append(value)

    def _read_operators(self, cls: type) -> None:
        """The methods of a class that are called by an operator or a statement."""
        for base in cls.__mro__:
            known = is_of_torch(base) or base is nn.Module or is_trusted(base)
            if not known and base.__module__ != "builtins":
                self.classes[base] = None
            for name, value in {} if known else base.__dict__.items():
                if name.startswith("__") and type(value) is types.FunctionType and name not in UNCALLED:
                    self._see(value, name)
                    self.globals.append((base.__dict__, name, value))

    def _read_module(self, module: nn.Module) -> None:
        cls = type(module)
        if not all(function.__module__.startswith("torch.nn.") for function in (cls.__call__, cls.__getattr__)):
            raise NotRepeatable(f"{cls.__name__} changes how modules are called or read")
        if cls.__getattribute__ is not object.__getattribute__:
            raise NotRepeatable(f"{cls.__name__} computes its attributes")
        hooks = [hook for name in HOOKS for hook in getattr(module, name).values()]
        if any(map(is_foreign_hook, hooks)) or module._compiled_call_impl is not None:
            raise NotRepeatable(f"{cls.__name__} has hooks")
        if "forward" in module.__dict__:
            raise NotRepeatable(f"{cls.__name__} has a forward of its own in an instance")
        if isinstance(module, REFUSED_CLASSES):
            raise NotRepeatable(f"{cls.__name__} does more than compute")
        if cls in PARAMETRIZATIONS:
            return
        if is_parametrized(cls):
            self._read_parametrized(module)
            cls = cls.__bases__[0]
        if is_layer(cls):  # whose code may read any attribute
            made = made_by_hooks(module)
            for name, value in module.__dict__.items():
                if name in CONTAINERS or name in made or (isinstance(module, nn.RNNBase) and name.startswith("_flat")):
                    continue
                if not (type(value) is list and is_constant(as_tuples(value))):
                    self._see(value, f"{cls.__name__}.{name}")
        if is_of_torch(cls):
            if not cls.forward.__module__.startswith("torch."):
                raise NotRepeatable(f"{cls.__name__}.forward is not PyTorch's")
            self._note_functions(cls)
            return
        self._see(cls.forward, "forward")
        self._read_operators(cls)

    def _note_functions(self, cls: type) -> None:
        """The functions that a layer of PyTorch calls, in the place of which a program may put its own."""
        for name in functions_called(cls):
            self.globals.append((vars(nn.functional), name, vars(nn.functional).get(name)))

    def _read_parametrized(self, module: nn.Module) -> None:
        """A module whose class computes some of its tensors."""
        self.globals.append((vars(parametrize), "_cache_enabled", 0))
        if parametrize._cache_enabled:
            raise NotRepeatable(f"{type(module).__name__} keeps what it computes")
        for name, value in type(module).__dict__.items():
            if isinstance(value, property):
                self.globals.append((type(module).__dict__, name, value))
                for parametrization in module.parametrizations[name]:  # type: ignore[index]
                    if type(parametrization) not in PARAMETRIZATIONS:
                        raise NotRepeatable(f"{name} is made by {type(parametrization).__name__}")

    # ---- what is read of it ----

    def _read_on(self) -> None:
        """Read the functions, what the names that they read stand for, what that reads, and so on."""
        done: set[tuple[int, str]] = set()
        while True:
            while self._queue:
                self._read_function(self._queue.pop())
            self._add_names_by_prefix()
            left = [(h, n) for h in self._holders for n in self.names if (id(h), n) not in done]
            if not left:
                break
            for holder, name in left:
                done.add((id(holder), name))
                try:
                    self._ask(holder, name)
                except NotRepeatable as error:
                    self.unread.add((id(holder), name))
                    self._failed[name] = str(error)
        for name, reason in self._failed.items():
            for code, line in self.names[name]:
                self._refuse(code, line, reason)

    def _add_names_by_prefix(self) -> None:
        for prefix, lines in self._prefixes.items():
            for holder in self._holders:
                for name in _attributes(holder):
                    # The methods of every module change nothing that is not compared.
                    known = name.startswith("__") or name in HIDING or name in vars(nn.Module)
                    if name.startswith(prefix) and not known:
                        self.names.setdefault(name, set()).update(lines)

    def _ask(self, holder: Any, name: str) -> None:
        """What a name stands for in something that code may ask for it."""
        cls = holder if isinstance(holder, type) else type(holder)
        if holder is not cls and not (isinstance(holder, nn.Module) and name in CONTAINERS | made_by_hooks(holder)):
            own = getattr(holder, "__dict__", {})
            if name in own:
                self._see(own[name], f"{cls.__name__}.{name}")
        if cls is types.FunctionType:
            return
        if (cls, name) not in self._asked:
            try:
                self._ask_class(cls, name)
                self._asked[cls, name] = None
            except NotRepeatable as error:
                self._asked[cls, name] = str(error)
        reason = self._asked[cls, name]
        if reason is not None:
            raise NotRepeatable(reason)

    def _ask_class(self, asked: type, name: str) -> None:
        for cls in asked.__mro__:
            if name not in cls.__dict__:
                continue
            value = cls.__dict__[name]
            if cls is nn.Module:
                if name not in OF_MODULES and not name.startswith("__"):
                    raise NotRepeatable(f"{name} of a module is read")
            elif not (cls.__module__ == "builtins" or is_of_torch(cls)):
                if isinstance(value, property):
                    if not is_parametrized(cls):
                        self._see(value.fget, f"{cls.__name__}.{name}")
                elif isinstance(value, (staticmethod, classmethod)):
                    self._see(value.__func__, f"{cls.__name__}.{name}")
                else:
                    self._see(value, f"{cls.__name__}.{name}")
            if cls.__module__ != "builtins":
                self.globals.append((cls.__dict__, name, value))
            return

    # ---- code ----

    def _refuse(self, code: types.CodeType, line: int, reason: str) -> None:
        self.refused.setdefault(code, {}).setdefault(line, reason)

    def _read_function(self, function: types.FunctionType) -> None:
        code = function.__code__
        self.functions.add(id(function))
        try:
            for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
                self._see(value, f"a default of {function.__qualname__}")
        except NotRepeatable as error:
            self._refuse(code, 0, str(error))
        cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        self._read_code(code, function, cells)

    def _read_code(
        self, code: types.CodeType, function: types.FunctionType, cells: Mapping[str, types.CellType]
    ) -> None:
        self.codes.add(code)
        reading = CodeReader(self, code, function, cells)
        for k, instruction in enumerate(reading.instructions):
            try:
                reading.read(k, instruction)
            except NotRepeatable as error:
                whole = instruction.opname in SUSPENDING
                self._refuse(code, 0 if whole else reading.lines[k], f"{function.__qualname__} {error}")
                reading.namespace = None
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._read_code(constant, function, cells)

    def is_managed(self, code: types.CodeType) -> bool:
        """Whether a generator is run by a `with` statement, which begins it anew at every call."""
        return code in self._managed and bool(code.co_flags & inspect.CO_GENERATOR)

    def note_name(self, name: str, line: Line) -> None:
        """A line reads an attribute of something."""
        if name in HIDING:
            raise NotRepeatable(f"reads {name}")
        self.names.setdefault(name, set()).add(line)

    def note_prefix(self, prefix: str, line: Line) -> None:
        """A line reads an attribute whose name begins so."""
        self._prefixes.setdefault(prefix, set()).add(line)

    def note_global(self, namespace: Mapping[str, Any], name: str, value: Any, what: str) -> None:
        """A line reads a name of a module or of a class."""
        if not isinstance(value, types.ModuleType):
            self._see(value, what)
        self.globals.append((namespace, name, value))

    def note_setting(self, namespace: types.ModuleType, name: str, value: Any) -> None:
        """A line reads a setting of PyTorch, or the filters of warnings."""
        self.settings.append((namespace, name, value))

    def note_cell(self, function: types.FunctionType, name: str, cell: types.CellType) -> None:
        """A line reads a name of the function's closure."""
        if name != "__class__":
            try:
                self._see(cell.cell_contents, f"{name} in {function.__qualname__}")
            except ValueError:
                raise NotRepeatable(f"reads {name}, which is not there") from None
            self.cells.add((id(function), name))


def _attributes(holder: Any) -> Iterator[str]:
    """Names of attributes, but for those of every module or object."""
    if not isinstance(holder, type):
        yield from getattr(holder, "__dict__", ())
    if isinstance(holder, nn.Module):
        yield from (*holder._parameters, *holder._buffers, *holder._modules)
    for cls in holder.__mro__ if isinstance(holder, type) else type(holder).__mro__:
        if cls is nn.Module or cls.__module__ == "builtins" or is_of_torch(cls):
            return
        yield from cls.__dict__


def _is_dict(cls: type) -> bool:
    """Whether a class is a dict, or one that is written in Python and looks things up as a dict does."""
    if cls in (dict, collections.OrderedDict):
        return True
    return cls.__mro__[-2:] == (dict, object) and type(cls) is type and _is_in_python(cls) and len(cls.__mro__) == 3


def _is_plain_object(value: Any) -> bool:
    """Whether an object is what is in its ``__dict__``, and looks it up there."""
    cls = type(value)
    if cls in (types.SimpleNamespace, argparse.Namespace):
        return True
    if (
        cls.__module__.partition(".")[0] == "torch"
        or type(cls) is not type
        or not isinstance(getattr(value, "__dict__", None), dict)
    ):
        return False
    own = any("__getattribute__" in base.__dict__ for base in cls.__mro__[:-1])
    return not own and _is_in_python(cls)


def _is_in_python(cls: type) -> bool:
    """Whether instances hold nothing but attributes that Python sees."""
    base = dict if issubclass(cls, dict) else object
    return cls.__basicsize__ <= base.__basicsize__ + 16  # for attributes and weak references
