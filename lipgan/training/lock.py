"""One run at a time in a folder."""

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK", "FolderInUseError", "locked"]

LOCK = ".lock"

# What systems answer whose files have no locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


class FolderInUseError(ValueError):
    """Another process works in the folder. The message names it."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within, no other process gets the lock of ``folder``, which exists.

    The file .lock tells who holds it: process, host, and since when. The lock itself is the system's (flock), which
    ends with the process however that ends, so that a file that a killed process left is taken over. Where the file
    system has no locks, the file counts as stale when its process is on this host and gone.

    Raises:
        FolderInUseError: another process holds it.
        OSError: the file cannot be written.
    """
    path = folder / LOCK
    descriptor = _acquire(path)
    try:
        yield
    finally:
        # Removed before it is released: whoever has opened it meanwhile finds that it is no longer the folder's.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _flock(descriptor) and (owner := _owner(descriptor)) is not None and _runs(owner):
                raise FolderInUseError(_in_use(path, owner))
            if _is_at(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, (json.dumps(_this_process()) + "\n").encode(), 0)
                return descriptor
        except BlockingIOError:
            message = _in_use(path, _owner(descriptor))
            os.close(descriptor)
            raise FolderInUseError(message) from None
        except BaseException:
            os.close(descriptor)
            raise
        # Its holder has removed it in between.
        os.close(descriptor)


def _flock(descriptor: int) -> bool:
    """Take the system's lock; False where there is none to take, BlockingIOError where another process has it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"pid": pid, "host": socket.gethostname(), "since": time.time(), "began": _began(pid)}


def _owner(descriptor: int) -> dict[str, Any] | None:
    """What the file says, or None where it is not what this module writes."""
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return None
    if not isinstance(owner, dict) or type(owner.get("pid")) is not int or not isinstance(owner.get("host"), str):
        return None
    return owner


def _runs(owner: dict[str, Any]) -> bool:
    """Whether the process may still be there. Of another host nothing is known."""
    if owner["host"] != socket.gethostname():
        return True
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    # The number of a process that is gone may have been given to another one.
    return owner.get("began") is None or owner["began"] == _began(owner["pid"])


def _began(pid: int) -> int | None:
    """When the process began, in ticks since the start of the system; None where that cannot be told."""
    try:
        # The name, in brackets, may hold anything; the time is the 20th entry behind it.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _in_use(path: Path, owner: dict[str, Any] | None) -> str:
    who = "another process" if owner is None else f"process {owner['pid']} on {owner['host']}"
    since = owner.get("since") if owner is not None else None
    if isinstance(since, float):
        with contextlib.suppress(ValueError, OverflowError, OSError):
            who += f" since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(since))}"
    return f"{path.parent} is in use by {who}; if that process is gone, remove {path}"
