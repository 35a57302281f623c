"""Files that are whole or absent."""

import contextlib
import errno
import itertools
import os
import re
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

__all__ = ["SAMPLE_SUFFIXES", "check_destination", "expand_braces", "is_path", "remove_leftovers", "write_atomically"]


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Put ``content`` at ``path``: after a crash at any moment the file is the old one or the new one.

    A link stays, and the file that it leads to is replaced. What is no regular file (a device, a pipe) and what is open
    already (/dev/stdout, the /dev/fd/63 of a shell's ``>(...)``) cannot be replaced: it is opened and written.

    Raises:
        OSError: the disk is full, the folder is missing, ...; the file at ``path`` is then unchanged and no
            temporary file is left.
    """
    temporary = None
    try:
        target = _target(Path(path))
        if not isinstance(target, Path):
            with os.fdopen(os.open(path, os.O_WRONLY) if target is None else os.dup(target), "wb") as file:
                file.write(content)
            return
        # os.replace is atomic only within one file system, hence a temporary file in the same folder.
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            # Without this, a power cut after the rename could leave the new name on an empty file.
            os.fsync(file.fileno())
        # mkstemp makes the file private; a result has the permissions of any new file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError):
            # Name the file that the caller knows: a failed write names none, and mkstemp its own.
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def check_destination(path: str | os.PathLike[str]) -> None:
    """ValueError unless `write_atomically` can write there now, as far as can be seen without doing it.

    To be called before the work whose result goes there.
    """
    folder = None
    try:
        target = _target(Path(path))
        if isinstance(target, Path):
            folder = target.parent
            # Permissions do not tell of a file system that is full or read-only.
            descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{target.name}.")
            os.close(descriptor)
            os.unlink(temporary)
        elif not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        reason = f"{error.strerror or error}"
        if isinstance(error, IsADirectoryError):
            reason = "it is a folder"
        elif folder is not None and not folder.is_dir():
            reason = f"{folder} is not a folder"
        elif folder is not None:
            reason = f"{reason} in {folder}"
        raise ValueError(f"{os.fspath(path)} cannot be written: {reason}") from error


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Remove what processes that were killed while they wrote these files into ``folder`` have left there.

    Nobody may be writing them meanwhile.
    """
    pattern = re.compile(rf"\.({'|'.join(map(re.escape, names))})\.[a-z0-9_]{{8}}")
    for path in folder.iterdir():
        if pattern.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


def _target(path: Path) -> Path | int | None:
    """The place of the regular file to replace or to make, behind all links; None for what is to be opened.

    A number is that of a file which this process has open: opened anew, it would be written from its beginning.

    Raises:
        OSError: it is a folder or a socket, or links lead round in a circle.
    """
    try:
        kind = os.stat(path).st_mode
    except FileNotFoundError:
        kind = stat.S_IFREG
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if stat.S_ISSOCK(kind):
        raise OSError(errno.ENXIO, "it is a socket")
    regular = stat.S_ISREG(kind)
    while path.is_symlink():
        # These links lead to what a process has open, whatever they read as.
        if re.fullmatch(r"/proc/\d+(/task/\d+)?/fd", folder := os.path.realpath(path.parent)):
            return int(path.name) if folder.startswith(f"/proc/{os.getpid()}/") else None
        path = path.parent / os.readlink(path)
    return path if regular else None


#: Endings of the files that hold samples.
SAMPLE_SUFFIXES = (".npz", ".npy", ".zip", ".tar", ".parquet")


def is_path(name: str) -> bool:
    """Whether ``name`` is meant as a path: it exists, has a separator, or ends in one of `SAMPLE_SUFFIXES`."""
    separators = [separator for separator in (os.sep, os.altsep) if separator]
    return any(s in name for s in separators) or Path(name).suffix in SAMPLE_SUFFIXES or os.path.exists(name)


_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MAX_FILES = 100_000


def expand_braces(name: str) -> list[str]:
    """The names of files that a name with braces stands for, as in a shell: {000..003} for numbers, {a,b} for words.

    Args:
        name: without braces, it stands for itself, and so does one that a file has.

    Raises:
        ValueError: braces that hold something else, or that stand for too many files.
    """
    if "{" not in name or os.path.exists(name):
        return [name]
    parts = _BRACES.split(name)
    choices: list[list[str]] = []
    number = 1
    for index, part in enumerate(parts):
        ends = _RANGE.fullmatch(part) if index % 2 else None
        if ends is not None:
            first, last = int(ends[1]), int(ends[2])
            number *= max(0, last - first + 1)
            if number > _MAX_FILES:
                raise ValueError(f"{name} stands for more than {_MAX_FILES} files")
            choices.append([str(i).zfill(len(ends[1])) for i in range(first, last + 1)])
        else:
            choices.append(part.split(",") if index % 2 else [part])
            number *= len(choices[-1])
        if index % 2 and (not number or choices[-1] == [""]):
            raise ValueError(f"{name} stands for no file: braces hold numbers, {{000..003}}, or words, {{a,b}}")
    return ["".join(chosen) for chosen in itertools.product(*choices)]
