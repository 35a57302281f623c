"""Files that are whole or absent."""

import contextlib
import os
import tempfile
from pathlib import Path

__all__ = ["write_atomically"]


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
