"""Checkpoints that are read without unpickling code."""

import io
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

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
    return state


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
