"""Data sets of one's own: folders, archives and tables of images, and arrays in .npz and .npy files.

Images become float32 in [-1, 1], level 0 to -1 and level 255 to 1. Nothing is unpickled.
"""

import errno
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lipgan._arrays import SAMPLE_KEYS, Archive, archive, check_memory, mapped
from lipgan._checks import check_range
from lipgan._files import SAMPLE_SUFFIXES, expand_braces
from lipgan.data.dataset import Dataset
from lipgan.data.image_archives import archived_images, labels_of
from lipgan.data.image_arrays import image_axes
from lipgan.data.image_sources import open_images
from lipgan.data.images import find_images, read_image

__all__ = ["LABEL_KEYS", "MAX_BYTES", "SAMPLE_KEYS", "array", "folder", "load", "sharded", "stack_images", "zipped"]

# Names of the labels in an .npz file.
LABEL_KEYS = ("y", "labels")

# Of the samples in memory. A system that promises more memory than it has would end the program only once it is used.
MAX_BYTES = 8 * 2**30

# Of an array at a time: rows, and numbers unless one row has more.
_ROWS, _NUMBERS = 1024, 2**26

_Array = np.ndarray[Any, np.dtype[Any]]


def load(name: str, size: int | None = None) -> Dataset:
    """What lies at the path ``name``: :func:`folder`, :func:`zipped`, :func:`sharded` or :func:`array`.

    Raises:
        ValueError: neither, or content that cannot be used; the message names the file.
        OSError: it does not exist, or cannot be read.
    """
    check_size(size)
    path = Path(name)
    if path.is_dir():
        return folder(name, size)
    for file in expand_braces(name) if path.suffix in (".tar", ".parquet") else [name]:
        if not Path(file).exists():
            raise FileNotFoundError(errno.ENOENT, "no such folder or file", file)
        if path.suffix not in SAMPLE_SUFFIXES or not Path(file).is_file():
            raise ValueError(f"{file} is neither a folder of images nor an .npz, .npy, .zip, .tar or .parquet file")
    readers = {".zip": zipped, ".tar": sharded, ".parquet": sharded}
    return readers.get(path.suffix, array)(name, size)


def check_size(size: int | None) -> None:
    """Refuse a ``size`` that no data set has, by a ValueError."""
    if size is not None:
        check_range("size", size)


def folder(name: str, size: int | None = None) -> Dataset:
    """The images in a folder and below it, as `lipgan.data.images` finds and reads them: always in RGB.

    Labels are the first sub-folders in the order of their names, if all images lie in such and there are at least two
    (torchvision's ImageFolder has the same order).

    Args:
        name: the folder.
        size: bring every image to ``size x size`` pixels: the largest square in its middle, scaled by Pillow's bicubic
            filter with antialiasing. None: all images are squares of one size.

    Returns:
        samples ``[n, 3, size, size]``, float32 in [-1, 1]; labels ``[n]`` or None.

    Raises:
        ValueError: no images; images of several sizes or not square, without ``size``; a file that is broken or has
            too many pixels; more than `MAX_BYTES` of samples.
        OSError: a folder cannot be read.
    """
    paths = find_images(name)
    images = ((str(path), read_image(path, size, crop=True)) for path in paths)
    samples = stack_images(images, len(paths), name)
    first = [path.relative_to(name).parts[:-1][:1] for path in paths]
    classes = {parts: index for index, parts in enumerate(sorted(set(first)))}
    labelled = () not in classes and len(classes) > 1
    return Dataset(name, samples, torch.tensor([classes[parts] for parts in first]) if labelled else None)


def zipped(name: str, size: int | None = None) -> Dataset:
    """The images in a zip archive, such as StyleGAN's data sets; nothing is unpacked to the disk.

    Labels are those of a file dataset.json at its top, ``{"labels": [["00000/img00000000.png", 6], ...]}``, if that has
    one for every image and they are integers. Folders in the archive are no classes.

    Args:
        name: the file.
        size: as of :func:`folder`.

    Returns:
        As :func:`folder`.

    Raises:
        ValueError: as :func:`folder`; no zip archive, or one that leads out of itself; labels for some images only.
        OSError: it cannot be read.
    """
    with archived_images(name) as images:
        samples = stack_images(
            ((str(image), read_image(image, size, crop=True)) for image in images), len(images), name
        )
        labels = labels_of(images)
    return Dataset(name, samples, None if labels is None else torch.tensor(labels))


def sharded(name: str, size: int | None = None) -> Dataset:
    """The images in .tar archives, such as the shards of WebDataset, or in .parquet files; without labels.

    Args:
        name: the file, or several with braces: shards-{000..003}.tar.
        size: as of :func:`folder`.

    Returns:
        samples ``[n, 3, size, size]``, float32 in [-1, 1], in the order in which they are stored.

    Raises:
        ValueError: as :func:`folder`; what :mod:`lipgan.data.image_shards` and :mod:`lipgan.data.image_tables` refuse.
        OSError: a file cannot be read.
    """
    with open_images(name) as images:
        rows = ((str(image), read_image(image, size, crop=True)) for image in images)
        return Dataset(name, stack_images(rows, len(images), name))


def stack_images(images: Iterable[tuple[str, Tensor]], n: int, source: str) -> Tensor:
    """Collect images without holding them twice.

    Args:
        images: ``n`` names and images ``[1 or 3, h, w]``, uint8. Where some have colour, all get three channels.
        n: at least 1.
        source: where they are from, for messages.

    Returns:
        ``[n, 1 or 3, h, h]``, float32 in [-1, 1].

    Raises:
        ValueError: images of several sizes or not square, or more than `MAX_BYTES`.
    """
    samples: Tensor | None = None
    for i, (name, levels) in enumerate(images):
        height, width = levels.shape[1:]
        if samples is None:
            _check_square(name, height, width)
            _check_memory(source, (n, *levels.shape))
            samples = torch.empty(n, *levels.shape)
        if levels.shape[1:] != samples.shape[2:]:
            raise ValueError(
                f"{name} has {width} x {height} pixels, images before it {samples.shape[3]} x {samples.shape[2]}: "
                "give a size (--size N) to bring all to one"
            )
        if len(levels) > samples.shape[1]:
            _check_memory(source, (n, *levels.shape))
            samples = samples.expand(-1, len(levels), -1, -1).clone()
        samples[i] = levels
    if samples is None:
        raise ValueError(f"{source} holds no image")
    return samples.div_(127.5).sub_(1)


def _check_square(name: str, height: int, width: int) -> None:
    if height != width:
        raise ValueError(
            f"{name} has {width} x {height} pixels, which is no square: give a size (--size N) to cut one out of the "
            "middle"
        )


def _check_memory(source: str, shape: tuple[int, ...]) -> None:
    needed = 4 * math.prod(shape)
    if needed > MAX_BYTES:
        raise ValueError(
            f"{source} holds {shape[0]} samples of shape {list(shape[1:])}, which take {needed / 2**30:.3g} GiB, "
            f"more than {MAX_BYTES / 2**30:.3g}: choose fewer, or a smaller size"
        )
    check_memory(f"{source} holds {shape[0]} samples of shape {list(shape[1:])}, which", needed)


def array(name: str, size: int | None = None) -> Dataset:
    """Samples, and labels if there are any, from an .npz or .npy file.

    An .npz file has its samples under one of `SAMPLE_KEYS` and its labels, integers ``[n]``, under one of `LABEL_KEYS`
    or not at all; an .npy file has samples alone. Samples are

    - vectors: ``[n, d]``, floating point, of any range;
    - grey images: ``[n, h, w]``;
    - images: ``[n, h, w, channels]`` or ``[n, channels, h, w]`` with 1 or 3 channels, whichever of the two axes has
      that length. Where both have, the layout cannot be told, and the file is refused.

    Images are uint8, or floating point in [-1, 1].

    Args:
        name: the file.
        size: bring images to ``size x size`` pixels: the largest square in the middle, scaled by a bicubic filter with
            antialiasing. None: they are square already. Vectors have none.

    Returns:
        samples ``[n, channels, size, size]`` or ``[n, d]``, float32; labels ``[n]`` or None.

    Raises:
        ValueError: a file of something else, damaged or cut off; more than `MAX_BYTES` of samples.
        OSError: it cannot be read.
    """
    if Path(name).suffix == ".npy":
        # Mapped, so that it is never in memory as a whole beside the samples.
        with mapped(name, "cannot be used") as rows:
            axes = _axes(rows.shape, rows.dtype, size)
            return Dataset(name, _samples(rows, axes, size))
    with archive(name, "cannot be used") as stored:
        x, y = _one_of(stored, SAMPLE_KEYS), _one_of(stored, LABEL_KEYS)
        if x is None:
            names = ", ".join(stored.names) or "none at all"
            raise ValueError(f"it has none of the arrays {', '.join(SAMPLE_KEYS)}, only {names}")
        header = stored.header(x)
        axes = _axes(header.shape, header.dtype, size)
        if y is not None:
            labels = stored.header(y)
            if labels.shape != header.shape[:1] or labels.dtype.kind not in "iu":
                raise ValueError(
                    f"labels must be integers [{header.shape[0]}], got {labels.dtype} of shape {list(labels.shape)}"
                )
        # An array in an archive cannot be mapped, and one of huge images may be scaled to a few samples.
        check_memory(f"the array {x} of shape {list(header.shape)} alone would", header.nbytes)
        samples = _samples(stored.read(x), axes, size)
        return Dataset(name, samples, None if y is None else torch.from_numpy(stored.read(y).astype(np.int64)))


def _one_of(stored: Archive, keys: tuple[str, ...]) -> str | None:
    found = [key for key in keys if key in stored.names]
    if len(found) > 1:
        raise ValueError(f"it has the arrays {' and '.join(found)}, of which one must be chosen")
    return found[0] if found else None


def _axes(shape: tuple[int, ...], dtype: np.dtype[Any], size: int | None) -> tuple[int, ...] | None:
    """How to transpose images ``[n, a, b, c]`` to ``[n, channels, h, w]``, once grey ones have c = 1; None for vectors.

    Raises:
        ValueError: samples that :func:`array` does not document.
    """
    levels = dtype == np.uint8
    if not levels and (dtype.kind != "f" or dtype.itemsize > 8):
        raise ValueError(f"samples must be uint8 or float16, float32 or float64, got {dtype}")
    if len(shape) not in (2, 3, 4) or 0 in shape:
        raise ValueError(
            f"samples must be [n, d], [n, h, w], [n, h, w, channels] or [n, channels, h, w], got shape {list(shape)}"
        )
    if len(shape) == 2:
        if levels:
            raise ValueError(f"vectors must be floating point, got uint8 of shape {list(shape)}")
        if size is not None:
            raise ValueError(f"size is for images, and it holds vectors [{shape[1]}]; got {size}")
        _check_memory("it", shape)
        return None
    if len(shape) == 3:
        axes: tuple[int, ...] = (0, 3, 1, 2)
        shape = (*shape, 1)
    else:
        axes = image_axes(shape)
    n, channels, height, width = (shape[axis] for axis in axes)
    if size is None:
        _check_square("an image in it", height, width)
    _check_memory("it", (n, channels, size or height, size or width))
    return axes


@torch.no_grad()
def _samples(rows: _Array, axes: tuple[int, ...] | None, size: int | None) -> Tensor:
    """``rows`` as samples, some at a time, so that nothing else is as large."""
    samples: Tensor | None = None
    step = max(1, min(_ROWS, _NUMBERS // math.prod(rows.shape[1:])))
    for begin in range(0, len(rows), step):
        with np.errstate(over="ignore"):  # the infinities are found in the end
            block = torch.from_numpy(np.array(rows[begin : begin + step], dtype=np.float32, order="C"))
        if axes is not None:
            if rows.dtype == np.uint8:
                block = block.div_(127.5).sub_(1)
            lowest, highest = (float(extreme) for extreme in block.aminmax())
            if not -1 <= lowest <= highest <= 1:
                raise ValueError(
                    f"images of floating point must lie in [-1, 1], got {lowest:.6g} to {highest:.6g}; levels from 0 "
                    "to 255 must be uint8"
                )
            block = (block if block.ndim == 4 else block[..., None]).permute(axes)
            if size is not None:
                block = _scaled(block, size)
        if samples is None:
            samples = torch.empty(len(rows), *block.shape[1:])
        samples[begin : begin + step] = block
    assert samples is not None
    return samples


def _scaled(images: Tensor, size: int) -> Tensor:
    """``images [n, c, h, w]`` as ``[n, c, size, size]``: the largest square in the middle, scaled."""
    height, width = images.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    images = images[:, :, top : top + side, left : left + side]
    if side == size:
        return images
    scaled = F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
    # The cubic kernel overshoots at edges.
    return scaled.clamp_(-1, 1)
