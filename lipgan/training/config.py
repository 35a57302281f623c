"""The configuration of a run, as TOML that can be read, edited and given back with ``--config``."""

from __future__ import annotations

import dataclasses
import json
import reprlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lipgan import recipes
from lipgan._choices import RANGES, range_error
from lipgan._registry import lookup
from lipgan.recipes import Recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["RUN_FIELDS", "dumps", "read", "recipe_of"]

#: What belongs to a run and not to its recipe, with its type and its default; None is the recipe's or the data set's.
RUN_FIELDS: Mapping[str, tuple[type, Any]] = {
    "recipe": (str, "sngan"),
    "data": (str, "digits"),
    "size": (int, None),
    "steps": (int, None),
    "seed": (int, 0),
    "device": (str, None),
    "log_every": (int, 20),
    "save_every": (int, 500),
    "evaluate_every": (int, None),
}


def read(path: Path) -> dict[str, Any]:
    """The fields of a run and of its recipe in a TOML file, checked for their names and types.

    Raises:
        OSError: it cannot be read.
        ValueError: not TOML, an unknown field (the message names the nearest ones), a value of another type, or a whole
            number out of its range.
    """
    try:
        # Editors on Windows begin a file with a byte-order mark, which TOML does not know.
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    # Of a number with thousands of digits, too, which Python does not read.
    except ValueError as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
    known = {name: kind for name, (kind, _) in RUN_FIELDS.items()} | dict(recipes.FIELDS)
    for name, value in values.items():
        kind = lookup(known, name, f"field in {path}")
        if kind is float and type(value) is int and abs(value) < 2**53:
            values[name] = value = float(value)
        if kind is tuple:
            fits = isinstance(value, list) and len(value) == 2 and all(type(x) in (int, float) for x in value)
        else:
            fits = type(value) is kind
        if not fits:
            words = {"tuple": "a list of two numbers", "dict": "a table"}
            wanted = words.get(kind.__name__, f"of type {kind.__name__}")
            raise ValueError(f"{name} in {path} must be {wanted}, got {reprlib.repr(value)}")
        # What the command line says of the same fields.
        problem = range_error(value, *RANGES[name]) if kind is int else None
        if problem is not None:
            raise ValueError(f"{name} in {path} {problem}, got {value}")
    return values


def recipe_of(values: Mapping[str, Any], shape: tuple[int, ...] | None = None) -> Recipe:
    """The recipe called ``values["recipe"]``, for samples of ``shape``, with the fields in ``values`` put in.

    Raises:
        ValueError: an unknown recipe, or a field out of its range.
    """
    recipe = recipes.get(values["recipe"], shape)
    changes = {name: values[name] for name in recipes.FIELDS if name != "steps" and values.get(name) is not None}
    if "options" in changes:
        changes["options"] = {**recipe.options, **changes["options"]}
    recipe = recipes.from_dict(recipe.as_dict() | changes)
    if values.get("steps") is not None and recipes.is_scheduled(recipe):
        # What falls over the recipe's steps falls over those of the run.
        recipe = dataclasses.replace(recipe, steps=values["steps"])
    return recipe


def dumps(values: Mapping[str, Any]) -> str:
    """TOML of strings, numbers, lists of numbers and one level of tables; None is left out."""
    lines, tables = [], []
    for name, value in values.items():
        if isinstance(value, Mapping):
            if value:
                tables += [
                    "",
                    f"[{name}]",
                    *(f"{_toml(key)} = {_toml(number)}" for key, number in value.items()),
                ]
        elif value is not None:
            lines.append(f"{name} = {_toml(value)}")
    return "\n".join([*lines, *tables]) + "\n"


def _toml(value: Any) -> str:
    # Strings, numbers and lists of them look alike in JSON and TOML, but for pairs of surrogates and a raw DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
