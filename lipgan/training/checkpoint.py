"""Checkpoints that are read without unpickling code."""

import io
import os
import reprlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lipgan._files import write_atomically

__all__ = ["CheckpointError", "explaining", "read", "write"]

FORMAT = "lipgan checkpoint"
VERSION = 2


class CheckpointError(ValueError):
    """A file that is not a whole checkpoint of this package, or one that does not fit its use."""


def write(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write ``state`` to ``path``, atomically: tensors, numbers, strings, and dicts and lists of these.

    Raises:
        OSError: as `write_atomically`.
    """
    # Serialized in memory first: torch's writer reports a full disk as an internal error, not an OSError.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, **state}, buffer)
    write_atomically(path, buffer.getvalue())


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `write` wrote, onto the CPU. Nothing in the file is executed.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: truncated, damaged, or written by something else.
    """
    try:
        # torch.load does not verify the checksums of the archive, so a flipped bit would become a weight.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"bad checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a parser fed with arbitrary bytes raises anything, from KeyError to RuntimeError
        raise CheckpointError(f"{path} is not a lipgan checkpoint, or is truncated or damaged") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a lipgan checkpoint")
    if state.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has checkpoint version {state.get('version')}, this lipgan reads version {VERSION}"
        )
    for name, (fits, wanted) in _ENTRIES.items():
        if name in state and not fits(state[name]):
            raise CheckpointError(f"checkpoint {path} is damaged: {name} must be {wanted}, got {_shown(state[name])}")
    return state


def _is_whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _is_list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _is_row(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _is_whole(value.get("step"))
        and all(isinstance(name, str) and (x is None or type(x) in (int, float)) for name, x in value.items())
    )


def _is_terms(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(x, Tensor) and x.ndim == 0 for x in value.values())


# The plain values of a trainer's checkpoint. What belongs to the networks, the optimizers and the random numbers is
# checked by those that take it over.
_ENTRIES: Mapping[str, tuple[Callable[[Any], bool], str]] = MappingProxyType(
    {
        "recipe": (lambda value: isinstance(value, dict) and _is_name(value.get("name")), "a table with a name"),
        "data": (_is_name, "a name"),
        "digest": (_is_name, "a string"),
        "shape": (_is_list_of(_is_whole), "a list of whole numbers"),
        "classes": (_is_whole, "a whole number"),
        "seed": (_is_whole, "a whole number"),
        "log_every": (_is_whole, "a whole number"),
        "step": (_is_whole, "a whole number"),
        "history": (_is_list_of(_is_row), "a list of rows, each with a step and numbers"),
        "unlogged": (_is_list_of(_is_terms), "a list of tables of numbers"),
    }
)


def _shown(value: Any) -> str:
    return " ".join(reprlib.repr(value).split())


@contextmanager
def explaining(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn whatever a checkpoint of other content provokes into one sentence."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(f"checkpoint {path} lacks the entry {error}") from error
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"checkpoint {path} does not fit: {reason[:300]}") from error
