"""Folders of image files, as batches of 8-bit RGB images.

Pixels are read as pytorch-fid reads them: converted to RGB, transparency dropped, the orientation that a camera noted
ignored. One thing differs: 16-bit grey is scaled to 8 bits, where Pillow's own conversion would clip it to white.
"""

import contextlib
import functools
import os
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

__all__ = [
    "MAX_PIXELS",
    "SUFFIXES",
    "ImageError",
    "Images",
    "Openable",
    "default_workers",
    "find_images",
    "image_batches",
    "left_out_in_words",
    "read_image",
    "scaled",
    "to_rgb",
]

# Suffixes of the file names, in lower case: those that pytorch-fid and clean-fid read. And the decoders that may read
# such files: Pillow has others, which run programs or follow what a file says.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")

# A file of some kilobytes can unpack to gigabytes: its header is asked first. 2^26 pixels are 192 MiB.
MAX_PIXELS = 2**26

# A system that refuses a thread ends the program.
_MAX_WORKERS = 64


class ImageError(ValueError):
    """An image file that cannot be used. The message names it."""


def find_images(folder: str | os.PathLike[str], left_out: Counter[str] | None = None) -> list[Path]:
    """The image files in ``folder`` and below it, by suffix, in the order of their names.

    Hidden files and folders are left out, and linked folders are not entered, so that a circle of links ends.

    Args:
        folder: where to look.
        left_out: gets the numbers of the other files that are not hidden, by their suffixes in lower case.

    Raises:
        ValueError: there is none.
        OSError: ``folder``, or one below it, cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    found = []
    others: Counter[str] = Counter()
    for root, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.startswith("."):
                continue
            if name.lower().endswith(SUFFIXES):
                found.append(Path(root, name))
            else:
                others[Path(name).suffix.lower()] += 1
    if not found:
        problem = f"{os.fspath(folder)} holds no image ({', '.join(SUFFIXES)})"
        raise ValueError(problem if not others else f"{problem}, but {_kinds(others)}")
    if left_out is not None:
        left_out.update(others)
    return sorted(found)


def left_out_in_words(folder: str, left_out: Counter[str]) -> str:
    """What :func:`find_images` counted, in one line."""
    number = left_out.total()
    return f"{folder}: {number} file{'s' * (number > 1)} of other kinds left out ({_kinds(left_out)})"


def _kinds(left_out: Counter[str]) -> str:
    return ", ".join(f"{number} {suffix or 'without a suffix'}" for suffix, number in sorted(left_out.items()))


class Openable(Protocol):
    """An image that is no file of its own. ``str`` names it."""

    def open(self) -> IO[bytes]: ...


class Images(Protocol):
    """Images in an order, and how many there are."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Path | Openable]: ...


def read_image(
    path: str | os.PathLike[str] | Openable,
    size: int | None = None,
    *,
    crop: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """Read one file.

    Args:
        path: a PNG, JPEG, WEBP, BMP, TIFF, PPM or PGM file, whatever its name, or a part of another file, such as
            :class:`lipgan.data.image_archives.ArchivedImage`; of several frames, the first.
        size: scale to ``size x size`` pixels, by Pillow's bicubic filter with antialiasing. None: as it is.
        crop: where ``size`` is given, cut out the largest square in the middle before, instead of distorting.
        max_pixels: refuse an image of more.

    Returns:
        ``[3, h, w]``, uint8; in memory the channels of a pixel lie together, as decoders write them.

    Raises:
        ImageError: not such a file, broken, cut off, larger than ``max_pixels``, or not to be opened.
    """
    try:
        source: Path | IO[bytes]
        if isinstance(path, str | os.PathLike):
            source = Path(path)
            # A pipe with the name of an image would be waited for.
            if source.exists() and not source.is_file():
                raise ImageError("it is not a regular file")
        else:
            source = path.open()
        with _quiet_pillow, Image.open(source, formats=_FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise ImageError(f"{image.width} x {image.height} pixels are more than {max_pixels}")
            rgb = to_rgb(image)
            if size is not None:
                rgb = scaled(rgb, size, crop=crop)
            return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
    # Decoders fail in many ways on broken files: struct.error, SyntaxError, IndexError, and more with each format.
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, UnidentifiedImageError):
            reason = f"not a {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]} image"
        raise ImageError(f"{path} cannot be used: {reason or type(error).__name__}") from error


def scaled(image: Image.Image, size: int, *, crop: bool) -> Image.Image:
    """``image`` with ``size x size`` pixels, by Pillow's bicubic filter with antialiasing.

    Args:
        image: of a mode that Pillow interpolates, such as L or RGB.
        size: pixels a side; an image that has them is returned as it is.
        crop: use the largest square in the middle (of an odd margin, the smaller half lies left and above), instead of
            distorting.
    """
    if image.size == (size, size):
        return image
    if crop and image.width != image.height:
        # Not by resize's own box, around which the filter sees what lies outside.
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return image.resize((size, size), Image.Resampling.BICUBIC)


class _QuietPillow:
    """While a thread is in it, Pillow's warnings are off: it warns of large images before they can be refused, and of
    oddities in metadata that is not read.

    The filters of warnings belong to the process: what threads set and restore each by itself would be restored in the
    wrong order. So the first that comes sets them, and the last that leaves restores them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._filters.__exit__(None, None, None)


_quiet_pillow = _QuietPillow()


def to_rgb(image: Image.Image) -> Image.Image:
    """``image`` in mode RGB, itself if it has that; deep grey is scaled to 8 bits, and transparency dropped.

    Raises:
        ImageError: levels of floating point, or whole ones beyond 16 bits: Pillow would clip them to 8 bits.
    """
    if image.mode == "F":
        raise ImageError("its levels are floating point, whose range is not known: save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64)
        low, high = int(levels.min()), int(levels.max())
        if low < 0 or high > 65535:
            raise ImageError(f"its levels must be from 0 to 65535, got {low} to {high}: save it with 8 or 16 bits")
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    # Pillow would copy what needs no conversion.
    return image if image.mode == "RGB" else image.convert("RGB")


def default_workers() -> int:
    """Threads for :func:`image_batches` that keep pace with a network, as measured in docs/measurements.md."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, cores)


def image_batches(
    paths: Images,
    batch_size: int,
    size: int | None = None,
    *,
    skip: Callable[[ImageError], None] | None = None,
    workers: int = 0,
    mixed: bool = False,
) -> Iterator[Tensor]:
    """Read files in batches.

    Args:
        paths: such as those of :func:`find_images`, or what :func:`read_image` takes besides.
        batch_size: images of a batch; the last has the rest.
        size: as in :func:`read_image`.
        skip: told of each file that cannot be used, which is then left out. None: the first one ends the reading.
        workers: threads that read up to a batch ahead, while the caller is busy with the one before. Order and errors
            are the same with any number; more than 64 are taken as 64. 0: read when a batch is asked for.
        mixed: whether the images may differ in size; a batch then ends where the size changes.

    Yields:
        ``[n, 3, h, w]``, uint8, in memory as of :func:`read_image`.

    Raises:
        ImageError: a file cannot be used, and ``skip`` is None.
        ValueError: an image has another size than the first, ``size`` is None and ``mixed`` false.
    """
    batch: list[Tensor] = []
    shape: torch.Size | None = None
    with contextlib.closing(_read_ahead(paths, size, workers, batch_size)) as results:
        for path, result in results:
            try:
                image = result()
            except ImageError as error:
                if skip is None:
                    raise
                skip(error)
                continue
            if mixed and batch and image.shape != batch[0].shape:
                yield _stacked(batch)
                batch = []
            if shape is None:
                shape = image.shape
            if image.shape != shape and not mixed:
                raise ValueError(
                    f"{path} has {image.shape[2]} x {image.shape[1]} pixels, images before it "
                    f"{shape[2]} x {shape[1]}: scale them all to one size, by size or --size"
                )
            batch.append(image)
            if len(batch) == batch_size:
                yield _stacked(batch)
                batch = []
        if batch:
            yield _stacked(batch)


def _stacked(images: list[Tensor]) -> Tensor:
    # As they lie in memory: torch.stack would bring the channels apart, which takes as long as to scale them.
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def _read_ahead(
    paths: Images, size: int | None, workers: int, ahead: int
) -> Generator[tuple[Path | Openable, Callable[[], Tensor]], None, None]:
    """Every path, in order, with a function that returns its image or raises."""
    if not workers:
        for path in paths:
            yield path, functools.partial(read_image, path, size)
        return
    # Threads, because Pillow releases Python's lock while it decodes and scales.
    pool = ThreadPoolExecutor(min(workers, _MAX_WORKERS), "lipgan-images")
    waiting: deque[tuple[Path | Openable, Future[Tensor]]] = deque()
    try:
        for path in paths:
            if len(waiting) == ahead:
                first, future = waiting.popleft()
                yield first, future.result
            waiting.append((path, pool.submit(read_image, path, size)))
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
