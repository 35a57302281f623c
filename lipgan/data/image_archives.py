"""Zip archives of image files, such as StyleGAN's data sets. Nothing is unpacked to the disk."""

import io
import json
import os
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath

from lipgan._arrays import explaining
from lipgan.data.images import MAX_PIXELS, SUFFIXES

__all__ = ["MAX_BYTES", "ArchivedImage", "archived_images", "belongs", "labels_of"]

#: A deflated file can unpack to a thousand times its size. An image of MAX_PIXELS in 8-bit RGB, and then some.
MAX_BYTES = 4 * MAX_PIXELS

_LABELS = "dataset.json"
# Some millions of images.
_MAX_LABELS = 2**28


@dataclass(frozen=True)
class ArchivedImage:
    """A file in an archive that is open; ``str`` names both."""

    archive: str
    file: zipfile.ZipFile
    info: zipfile.ZipInfo

    def __str__(self) -> str:
        return f"{self.archive}/{self.info.filename}"

    def open(self, largest: int | None = None) -> io.BytesIO:
        """Its content.

        Args:
            largest: refuse one of more bytes; None for what the largest image takes, and then some.

        Raises:
            ValueError: encrypted, compressed in a way that few programs write, or too large.
            zipfile.BadZipFile, zlib.error, OSError: damaged.
        """
        if self.info.flag_bits & 1:
            raise ValueError("it is encrypted")
        if self.info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError("it is compressed by another method than deflate")
        largest = MAX_BYTES if largest is None else largest
        if self.info.file_size > largest:
            raise ValueError(f"it unpacks to {self.info.file_size} bytes, more than {largest}")
        return io.BytesIO(self.file.read(self.info))


@contextmanager
def archived_images(
    path: str | os.PathLike[str], left_out: Counter[str] | None = None
) -> Iterator[list[ArchivedImage]]:
    """The image files in a zip archive, by suffix, in the order of their names, for as long as the context lasts.

    Hidden files and folders, and what macOS adds in ``__MACOSX``, are left out.

    Args:
        path: of the archive.
        left_out: gets the numbers of the other files, as of :func:`lipgan.data.images.find_images`.

    Raises:
        ValueError: no zip archive, a damaged one, one without images, or one whose names lead out of it.
        OSError: it cannot be read.
    """
    name = os.fspath(path)
    with open(path, "rb") as stream:
        with explaining(path, "is no archive of images"):
            if not zipfile.is_zipfile(stream):
                raise ValueError("it is not a zip archive, or was cut off")
            opened = zipfile.ZipFile(stream)
        with opened:
            found = []
            with explaining(path, "is no archive of images"):
                members = [info for info in opened.infolist() if belongs(info.filename) and not info.is_dir()]
            for info in members:
                if info.filename.lower().endswith(SUFFIXES):
                    found.append(ArchivedImage(name, opened, info))
                elif left_out is not None:
                    left_out[PurePosixPath(info.filename).suffix.lower()] += 1
            if not found:
                raise ValueError(f"{name} holds no image ({', '.join(SUFFIXES)})")
            yield sorted(found, key=lambda image: image.info.filename)


def belongs(name: str) -> bool:
    """Whether a file of that name in an archive is part of it: hidden ones, and what macOS adds, are not.

    Raises:
        ValueError: the name leads out of the archive. A program that unpacks it would write elsewhere; here nothing is
            written, but such a file is no data set.
    """
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if ".." in parts or "/" in parts[:1] or (parts and parts[0].endswith(":")):
        raise ValueError(f"{name} leads out of it")
    return not any(part.startswith(".") or part == "__MACOSX" for part in parts)


def labels_of(images: Sequence[ArchivedImage]) -> list[int] | None:
    """The label of each image of an archive by its dataset.json, as StyleGAN's tool writes it.

    None without that file, and where it has no labels or labels that are not integers.

    Raises:
        ValueError: it is damaged, or has labels for some of the images only.
    """
    first = images[0]
    if _LABELS not in first.file.namelist():
        return None
    with explaining(f"{first.archive}/{_LABELS}", "cannot be used"):
        content = json.load(ArchivedImage(first.archive, first.file, first.file.getinfo(_LABELS)).open(_MAX_LABELS))
        rows = content.get("labels") if isinstance(content, dict) else None
        if not rows:
            return None
        found = dict(rows)
        missing = [image.info.filename for image in images if image.info.filename not in found]
        if missing:
            raise ValueError(f"it has labels, but none for {missing[0]}")
    labels = [found[image.info.filename] for image in images]
    if not all(type(label) is int and 0 <= label < 2**31 for label in labels):
        return None
    return labels
