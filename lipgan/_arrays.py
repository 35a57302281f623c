"""NumPy's files, read with care: by their headers first, without unpickling, and with one sentence for all that is
wrong in them."""

import io
import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.lib import format as npy

# Names of the samples in an .npz file; arr_0 is what numpy.savez calls an array without a name.
SAMPLE_KEYS = ("x", "images", "samples", "arr_0")

#: Mean and covariance as programs call them: pytorch-fid and most others, then those that say it in words, then files
#: that hold the statistics of clean-fid beside others.
STATISTICS_KEYS = (("mu", "sigma"), ("mean", "cov"), ("mu_clean", "sigma_clean"))

__all__ = ["Archive", "Header", "archive", "available_memory", "check_memory", "explaining", "mapped"]

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


@dataclass(frozen=True)
class Header:
    """What is known of an array before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool = False  # whether the first index runs fastest

    @property
    def nbytes(self) -> int:
        """Bytes of the array, once it is read."""
        return math.prod(self.shape) * self.dtype.itemsize


class Archive:
    """The arrays of an .npz file by their names, without ``.npy``."""

    def __init__(self, file: zipfile.ZipFile) -> None:
        self._file = file
        self.names = [info.filename.removesuffix(".npy") for info in file.infolist() if info.filename.endswith(".npy")]

    def header(self, name: str) -> Header:
        """Of the array called ``name``, which exists.

        Raises:
            ValueError: it is damaged, holds Python objects, or promises more than there is.
        """
        info = self._file.getinfo(f"{name}.npy")
        if info.flag_bits & 1:
            raise ValueError(f"the array {name} is encrypted")
        # What numpy.savez and savez_compressed write. Others may ask for gigabytes to unpack a byte.
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"the array {name} is compressed in a way that NumPy does not write")
        with self._file.open(info) as file:
            header = _header(file)
        if header.dtype.hasobject:
            raise ValueError(f"the array {name} holds Python objects, which are not unpickled")
        # An array is allocated before it is read: a header must not promise more than there is.
        if header.nbytes > info.file_size:
            raise ValueError(f"the array {name} is cut off")
        return header

    def read(self, name: str) -> Array:
        """The array called ``name``, whose header was found right."""
        with self._file.open(f"{name}.npy") as file:
            return npy.read_array(file, allow_pickle=False)

    def blocks(self, name: str, rows: int) -> Iterator[Array]:
        """The array called ``name``, so many rows at a time. An array in an archive cannot be mapped.

        Raises:
            ValueError: as :meth:`header`, it has no rows, or, stored by columns, it is larger than the memory.
        """
        header = self.header(name)
        if not header.shape:
            raise ValueError(f"the array {name} must have rows, got shape ()")
        if header.fortran and len(header.shape) > 1:
            check_memory(f"the array {name} of shape {list(header.shape)} alone would", header.nbytes)
            whole = self.read(name)
            yield from (whole[begin : begin + rows] for begin in range(0, len(whole), rows))
            return
        shape = header.shape[1:]
        with self._file.open(f"{name}.npy") as file:
            _header(file)  # what follows are the numbers
            for begin in range(0, header.shape[0], rows):
                count = min(rows, header.shape[0] - begin)
                size = count * math.prod(shape) * header.dtype.itemsize
                content = file.read(size)
                if len(content) < size:
                    raise ValueError(f"the array {name} is cut off")
                yield np.frombuffer(content, header.dtype).reshape(count, *shape)


@contextmanager
def archive(path: str | os.PathLike[str], what: str) -> Iterator[Archive]:
    """Open an .npz file.

    Args:
        path: of the file.
        what: the beginning of the sentence for a file that is wrong, behind its name: "is no file of ...".

    Raises:
        ValueError: the file is damaged or something else, or whatever is raised within: one sentence, which begins with
            the name of the file.
        OSError: it cannot be read.
    """
    with explaining(path, what), open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError("it is not an .npz archive, or was cut off")
        with zipfile.ZipFile(file) as opened:
            yield Archive(opened)


@contextmanager
def mapped(path: str | os.PathLike[str], what: str) -> Iterator[Array]:
    """Map the array of an .npy file, so that it is in memory in part only; arguments and errors as :func:`archive`."""
    with explaining(path, what):
        with open(path, "rb") as file:
            if file.read(4) == b"PK\x03\x04":
                raise ValueError("it is an archive under another name")
            file.seek(0)
            header = _header(file)
        if header.dtype.hasobject:
            raise ValueError("it holds Python objects, which are not unpickled")
        # It notices a file that was cut off.
        yield np.load(path, mmap_mode="r", allow_pickle=False)


@contextmanager
def explaining(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Whatever is raised within becomes one sentence that begins with the name of the file and ``what``; a ValueError.

    An OSError that names a file stays, and so does a lack of memory.
    """
    try:
        yield
    except MemoryError:
        raise
    # What NumPy and the decoders of archives raise on a damaged file is not documented: RuntimeError, zlib.error, ...
    except Exception as error:
        # A damaged archive leads to places outside the file, whose errors name none.
        if isinstance(error, OSError) and error.filename:
            raise
        # torch's, of what is made of the arrays.
        if isinstance(error, RuntimeError) and "memory" in str(error) and "alloc" in str(error):
            raise
        raise ValueError(f"{os.fspath(path)} {what}: {str(error) or type(error).__name__}") from error


# What NumPy reads without being told that the file is trusted.
_LONGEST_HEADER = 10_000


def _header(file: IO[bytes]) -> Header:
    try:
        version = npy.read_magic(file)
    except ValueError as error:
        raise ValueError("it is not an .npy array, or was cut off") from error
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"arrays of format {version[0]}.{version[1]} are not read")
    # NumPy reads a header whole before it finds it too long, and one of gigabytes may be packed in a few megabytes.
    length = file.read(2 * version[0])
    if int.from_bytes(length, "little") > _LONGEST_HEADER:
        raise ValueError(f"the header of an array is longer than {_LONGEST_HEADER} bytes")
    try:
        shape, fortran, dtype = read(io.BytesIO(length + file.read(int.from_bytes(length, "little"))))
    # NumPy parses the header as Python: brackets within brackets are a RecursionError or a MemoryError.
    except Exception as error:
        raise ValueError("the header of an array is damaged") from error
    if any(side < 0 for side in shape):
        raise ValueError(f"the header of an array is damaged: shape {shape}")
    return Header(tuple(shape), dtype, fortran)


def check_memory(what: str, needed: int) -> None:
    """ValueError if the ``needed`` bytes are more than there are, as far as that can be told; ``what`` takes them."""
    there = available_memory()
    if there is not None and needed > there:
        raise ValueError(f"{what} take {needed / 2**30:.3g} GiB of memory, {there / 2**30:.3g} are available")


def available_memory() -> int | None:
    """Bytes that this process can still take without swapping, or None where that cannot be told."""
    found = []
    for pattern, read in ((Path("/proc/meminfo"), _from_meminfo), (Path("/sys/fs/cgroup"), _from_cgroup)):
        try:
            found.append(read(pattern))
        except (OSError, ValueError, KeyError):
            continue
    return min(found, default=None)


def _from_meminfo(path: Path) -> int:
    rows = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    return 1024 * int(rows["MemAvailable"].split()[0])


def _from_cgroup(folder: Path) -> int:
    # "max", where there is no limit, is no number. Files in memory that can be dropped count as used.
    limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
    rows = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return limit - used + int(rows["inactive_file"]) + int(rows["active_file"])
