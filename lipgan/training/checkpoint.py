"""Files that are whole or absent, and checkpoints that are read without unpickling code."""

import contextlib
import io
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

__all__ = ["CheckpointError", "read", "write", "write_atomically"]

FORMAT = "lipgan checkpoint"
VERSION = 2


class CheckpointError(ValueError):
    """A file that is not a whole checkpoint of this package, or one that does not fit its use."""


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Put ``content`` at ``path``: after a crash at any moment the file is the old one or the new one.

    Raises:
        OSError: the disk is full, the folder is missing, ...; the file at ``path`` is then unchanged and no
            temporary file is left.
    """
    path = Path(path)
    temporary = None
    try:
        # os.replace is atomic only within one file system, hence a temporary file in the same folder.
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            # Without this, a power cut after the rename could leave the new name on an empty file.
            os.fsync(file.fileno())
        # mkstemp makes the file private; a result has the permissions of any new file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError):
            # Name the file that the caller knows: a failed write names none, and mkstemp its own.
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


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
