"""Tar archives of image files, such as the shards of WebDataset. Nothing is unpacked to the disk.

The headers are read once, and each image by itself where it lies, so the archives must not be compressed.
"""

import io
import os
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO

from lipgan._arrays import explaining
from lipgan._files import expand_braces
from lipgan.data.image_archives import MAX_BYTES, belongs
from lipgan.data.images import SUFFIXES

__all__ = ["ShardImage", "sharded_images"]

# How the files of programs that compress begin.
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

# Long names and other additions to a header. They are read whole, and one that says gigabytes is no header.
_LONGEST_HEADER = 2**20

_BLOCK = 512


@dataclass(frozen=True)
class ShardImage:
    """A file in a tar archive; ``str`` names both."""

    archive: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"

    def open(self) -> io.BytesIO:
        """Its content.

        Raises:
            ValueError: too large, or the archive has changed.
            OSError: the archive cannot be read.
        """
        if self.size > MAX_BYTES:
            raise ValueError(f"it has {self.size} bytes, more than {MAX_BYTES}")
        with open(self.archive, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise ValueError("the archive was cut off meanwhile")
        return io.BytesIO(content)


def sharded_images(name: str, left_out: Counter[str] | None = None) -> list[ShardImage]:
    """The image files in tar archives, by suffix, in the order in which they are stored.

    Hidden files are left out. A sample of WebDataset is all files whose names are alike up to the first dot: where one
    of its images has no second dot (0001.jpg beside 0001.mask.png), the others are left out.

    Args:
        name: of an archive, or of several with the numbers in braces: shards-{000..003}.tar.
        left_out: gets the numbers of the other files, as of :func:`lipgan.data.images.find_images`; links and other
            files without content of their own under "linked".

    Raises:
        ValueError: no tar archive, a damaged or compressed one, one whose names lead out of it or are there twice, or
            one with two images of a sample; no images.
        OSError: an archive cannot be read.
    """
    counts: Counter[str] = Counter() if left_out is None else left_out
    found: list[ShardImage] = []
    for path in expand_braces(name):
        with explaining(path, "is no archive of images"), open(path, "rb") as file:
            found += _first_of_samples(_images(path, file, counts), counts)
    if not found:
        raise ValueError(f"{name} holds no image ({', '.join(SUFFIXES)})")
    return found


class _Headers:
    """A file of which headers are read, which are short."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _LONGEST_HEADER:
            raise ValueError(f"a header in it has {size} bytes")
        return self._file.read(size)


def _images(path: str, file: IO[bytes], left_out: Counter[str]) -> list[ShardImage]:
    """All images in one archive."""
    begin = file.read(_BLOCK)
    for magic, program in _COMPRESSED.items():
        if begin.startswith(magic):
            raise ValueError(f"it is compressed by {program}: unpack it to a .tar first")
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    found: list[ShardImage] = []
    names: set[str] = set()
    last = -1
    with tarfile.open(fileobj=_Headers(file), mode="r:") as archive:  # type: ignore[call-overload]
        while (member := archive.next()) is not None:
            archive.members = []  # it keeps them all otherwise
            # Sizes that are negative would lead back to where it was before.
            if member.size < 0 or member.offset <= last:
                raise ValueError(f"the header of {member.name} is damaged")
            last = member.offset
            if member.isreg() and member.offset_data + member.size > length:
                raise ValueError(f"it was cut off: {member.name} has {member.size} bytes by its header")
            if not belongs(member.name) or member.isdir():
                continue
            # A link would lead to another file, and one with holes is not stored as it is.
            if not member.isreg() or member.issparse():
                left_out["linked" if not member.isreg() else "sparse"] += 1
                continue
            if member.name in names:
                raise ValueError(f"it has {member.name} twice")
            names.add(member.name)
            if member.name.lower().endswith(SUFFIXES):
                found.append(ShardImage(path, member.name, member.offset_data, member.size))
            else:
                left_out[PurePosixPath(member.name).suffix.lower()] += 1
        # It takes any header that it cannot read for the end, unless it is the first.
        file.seek(archive.offset)
        if any(file.read(_BLOCK)):
            behind = f"behind {found[-1].name}" if found else "behind its first files"
            raise ValueError(f"it is damaged {behind}")
    return found


def _first_of_samples(images: Iterable[ShardImage], left_out: Counter[str]) -> list[ShardImage]:
    """Without masks and the like of a sample that has an image."""
    images = list(images)
    plain: dict[str, ShardImage] = {}
    for image in images:
        sample, extension = _parts(image.name)
        if "." not in extension:
            if sample in plain:
                raise ValueError(f"the sample {sample} has two images, {plain[sample].name} and {image.name}")
            plain[sample] = image
    kept = []
    for image in images:
        sample, extension = _parts(image.name)
        if plain.get(sample, image) is image:
            kept.append(image)
        else:
            left_out[f".{extension}"] += 1
    return kept


def _parts(name: str) -> tuple[str, str]:
    """A name before its first dot, and what follows."""
    path = PurePosixPath(name)
    first, _, extension = path.name.partition(".")
    return str(path.with_name(first)), extension.lower()
