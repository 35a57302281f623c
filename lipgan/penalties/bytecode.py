"""The instructions of a piece of a critic's code: what they read, which a `Reader` is told, or why they are refused."""

from __future__ import annotations

import builtins
import dis
import importlib
import types
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lipgan.penalties.known import (
    BUILTINS,
    HIDING,
    NAMESPACES,
    NotRepeatable,
    are_plain_filters,
    is_constant,
    is_trusted,
)

# A line of some code; 0 stands for all of them.
Line = tuple[types.CodeType, int]

_LEAVING = {"STORE_GLOBAL", "DELETE_GLOBAL", "STORE_NAME", "STORE_ATTR", "DELETE_ATTR", "IMPORT_NAME", "IMPORT_STAR"}
_LEAVING |= {"LOAD_BUILD_CLASS", "LOAD_LOCALS", "LOAD_FROM_DICT_OR_GLOBALS", "GET_AWAITABLE", "SETUP_ANNOTATIONS"}
_READING = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "LOAD_SUPER_METHOD")
SUSPENDING = ("YIELD_VALUE", "RETURN_GENERATOR")
_CALLS = ("PRECALL", "CALL", "CALL_FUNCTION")


class Notes(Protocol):
    """Who is told what code reads: a `Reader`."""

    mutable: str | None
    asks: bool
    globals: list[tuple[Mapping[str, Any], str, Any]]

    def is_managed(self, code: types.CodeType) -> bool: ...

    def note_name(self, name: str, line: Line) -> None: ...

    def note_prefix(self, prefix: str, line: Line) -> None: ...

    def note_global(self, namespace: Mapping[str, Any], name: str, value: Any, what: str) -> None: ...

    def note_cell(self, function: types.FunctionType, name: str, cell: types.CellType) -> None: ...

    def note_setting(self, namespace: types.ModuleType, name: str, value: Any) -> None: ...


class CodeReader:
    """Reads some code, one instruction after the other.

    Attributes:
        instructions: without those that do nothing.
        lines: of the instructions.
        namespace: a module of which an attribute is read next.
    """

    def __init__(
        self,
        reader: Notes,
        code: types.CodeType,
        function: types.FunctionType,
        cells: Mapping[str, types.CellType],
    ) -> None:
        self._reader, self._code, self._function, self._cells = reader, code, function, cells
        starts = dict(dis.findlinestarts(code))
        self.instructions: list[dis.Instruction] = []
        self.lines: list[int] = []
        line = code.co_firstlineno
        for instruction in dis.get_instructions(code):
            line = starts.get(instruction.offset) or line
            if instruction.opname not in ("CACHE", "EXTENDED_ARG", "NOP", "RESUME"):
                self.instructions.append(instruction)
                self.lines.append(line)
        self.namespace: types.ModuleType | None = None

    def read(self, k: int, instruction: dis.Instruction) -> None:
        """One instruction; NotRepeatable, with what it does, if it may do otherwise at another call."""
        name, argument = instruction.opname, instruction.argval
        if self.namespace is not None:
            self._read_namespace(name in _READING, argument, k)
        elif name in _LEAVING or (name in ("STORE_DEREF", "DELETE_DEREF") and argument in self._cells):
            raise NotRepeatable(f"changes {argument}")
        elif name in SUSPENDING and self._code.co_name != "<genexpr>" and not self._reader.is_managed(self._code):
            raise NotRepeatable("is a generator")
        elif name == "LOAD_GLOBAL":
            self._read_global(argument, k)
        elif name in ("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_CLOSURE") and argument in self._cells:
            value = self._cells[argument]
            self._reader.note_cell(self._function, argument, value)
        elif name in _READING:
            self._reader.note_name(argument, (self._code, self.lines[k]))

    def _read_namespace(self, reads: bool, name: str, k: int) -> None:
        namespace, self.namespace = self.namespace, None
        assert namespace is not None
        if not reads:
            raise NotRepeatable(f"hands on the module {namespace.__name__}")
        what = f"reads {namespace.__name__}.{name}"
        if namespace.__name__.startswith("torch.backends"):
            value = getattr(namespace, name, None)
            if isinstance(value, types.ModuleType):
                self.namespace = value
            elif is_constant(value):
                self._reader.note_setting(namespace, name, value)
            else:
                raise NotRepeatable(what)
            return
        value = vars(namespace).get(name)
        if value is None and name not in vars(namespace):
            raise NotRepeatable(what)
        if namespace is warnings and name == "filters" and are_plain_filters(value):
            # PyTorch imports it with the first gradient that is carried on, and it adds a filter: not between recording
            # and comparison.
            importlib.import_module("torch.fx.experimental.symbolic_shapes")
            self._reader.note_setting(namespace, name, [*value])
            self._reader.mutable = "the filters of warnings may be changed"
            return
        if isinstance(value, types.ModuleType):
            self.namespace = value if _is_readable(value) else None
        elif namespace in NAMESPACES:
            value = value if is_trusted(value) else None
        if self.namespace is None and (
            isinstance(value, types.ModuleType) or (value is None and namespace in NAMESPACES)
        ):
            raise NotRepeatable(what)
        try:
            self._reader.note_global(vars(namespace), name, value, f"{namespace.__name__}.{name}")
        except NotRepeatable as error:
            raise NotRepeatable(f"{what}: {error}") from None

    def _read_global(self, name: str, k: int) -> None:
        reader, namespace = self._reader, self._function.__globals__
        if name in namespace:
            value = namespace[name]
            if isinstance(value, types.ModuleType):
                if not _is_readable(value):
                    raise NotRepeatable(f"reads the module {name}")
                self.namespace = value
            reader.note_global(namespace, name, value, f"{name} in {self._function.__qualname__}")
            return
        if name in ("getattr", "hasattr"):
            self._read_by_name(name, k)
        elif name not in BUILTINS or not hasattr(builtins, name):
            raise NotRepeatable(f"reads {name}")
        reader.globals += [(namespace, name, None), (vars(builtins), name, vars(builtins)[name])]

    # ---- getattr ----

    def _read_by_name(self, by: str, k: int) -> None:
        """An attribute whose name is computed: all that it may be count as read."""
        reader = self._reader
        reader.asks = True
        line = self._code, self.lines[k]
        first, second = self._arguments(by, k)
        name = second[0].argval if len(second) == 1 and second[0].opname == "LOAD_CONST" else None
        if isinstance(name, str):
            reader.note_name(name, line)
            return
        prefix = _prefix(second)
        if not prefix or prefix.startswith("__") or any(hiding.startswith(prefix) for hiding in HIDING):
            own = self._function.__code__.co_varnames[:1]
            stored = {i.argval for i in self.instructions if i.opname.startswith("STORE_")}
            if len(first) != 1 or _local(first[0]) not in own or own[0] != "self" or "self" in stored:
                raise NotRepeatable(f"calls {by} with a name that may be any")
            reader.mutable = f"{self._function.__qualname__} calls {by} with a name that may be any"
        reader.note_prefix(prefix, line)

    def _arguments(self, by: str, k: int) -> tuple[Sequence[dis.Instruction], Sequence[dis.Instruction]]:
        """The instructions that compute the first two arguments of a call."""
        starts: dict[int, int] = {}  # at which each argument begins
        depth, at = 0, k + 1
        while at < len(self.instructions):
            instruction = self.instructions[at]
            if instruction.opname in _CALLS and depth == instruction.arg and depth in (2, 3):
                break
            if instruction.opcode in dis.hasjrel or instruction.opcode in dis.hasjabs:
                raise NotRepeatable(f"calls {by} with arguments that depend on a condition")
            starts[depth] = at
            if instruction.opname != "PUSH_NULL":
                depth += dis.stack_effect(instruction.opcode, instruction.arg, jump=False)
            if depth < 0:
                raise NotRepeatable(f"hands on {by}")
            at += 1
        else:
            raise NotRepeatable(f"hands on {by}")
        begin = starts[0]
        middle = starts.get(1, begin)
        end = starts.get(2, at) if depth == 3 else at
        if middle == begin:  # both were loaded at once
            return self.instructions[begin : begin + 1], []
        return self.instructions[begin:middle], self.instructions[middle:end]


def _local(instruction: dis.Instruction) -> str | None:
    """The name of the variable that an instruction loads, the first if it loads two."""
    if not instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
        return None
    value = instruction.argval
    return str(value[0] if isinstance(value, tuple) else value)


_OF_STRINGS = ("LOAD_", "FORMAT_", "CONVERT_VALUE", "BUILD_STRING")


def _prefix(expression: Sequence[dis.Instruction]) -> str:
    """What a string begins with that an expression computes, as far as is known."""
    if len(expression) < 2 or expression[0].opname != "LOAD_CONST" or not isinstance(expression[0].argval, str):
        return ""
    begin, second, last = expression[0].argval, expression[1], expression[-1]
    if last.opname == "BUILD_STRING":
        plain = all(i.opname.startswith(_OF_STRINGS) for i in expression) and not second.opname.startswith("FORMAT")
        return begin if plain and second.opname not in _READING else ""
    operators = [i for i in expression if i.opname.startswith("BINARY_")]
    if len(operators) == 1 and operators[0] is last and second.opname not in _READING:
        if last.opname == "BINARY_ADD" or last.argrepr == "+":
            return begin
        if last.opname == "BINARY_MODULO" or last.argrepr == "%":
            return begin.partition("%")[0]
    if second.opname in _READING and second.argval == "format" and not operators:
        others = [i for i in expression[2:] if i.opname in _READING or i.opname == "BUILD_STRING"]
        return "" if others else begin.partition("{")[0]
    return ""


def _is_readable(module: types.ModuleType) -> bool:
    """Whether single names of a module may be read: PyTorch's own, and any that is not PyTorch's."""
    name = module.__name__
    return module in NAMESPACES or name.startswith("torch.backends") or name.partition(".")[0] != "torch"
