"""Images in one array, as batches of 8-bit RGB images like those of :mod:`lipgan.data.images`."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lipgan.data.images import MAX_PIXELS, scaled

__all__ = ["array_batches", "check_images", "image_axes", "rows_at_once"]

_Array = np.ndarray[Any, np.dtype[Any]]

# Numbers of a block.
_NUMBERS = 2**26


def image_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """How to transpose images ``[n, h, w, c]`` or ``[n, c, h, w]`` to ``[n, c, h, w]``; c is 1 or 3.

    Args:
        shape: of the images; ``[n, h, w]`` is taken for ``[n, h, w, 1]``.

    Raises:
        ValueError: neither of the two axes has length 1 or 3, or both.
    """
    if len(shape) == 3:
        return (0, 3, 1, 2)
    first, last = shape[1] in (1, 3), shape[3] in (1, 3)
    if first == last:
        problem = "it cannot be told which axis is of channels" if first else "no axis has 1 or 3 channels"
        raise ValueError(f"samples of shape {list(shape)}: {problem}")
    return (0, 1, 2, 3) if first else (0, 3, 1, 2)


def check_images(shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Raise ValueError for an array that :func:`array_batches` does not take."""
    if dtype != np.uint8:
        raise ValueError(f"images must be uint8, levels from 0 to 255, got {dtype} of shape {list(shape)}")
    if len(shape) not in (3, 4) or 0 in shape[1:]:
        raise ValueError(f"images must be [n, h, w], [n, h, w, c] or [n, c, h, w], got shape {list(shape)}")
    height, width = (([*shape, 1])[axis] for axis in image_axes(shape)[2:])
    if height * width > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS}")


def rows_at_once(shape: tuple[int, ...]) -> int:
    """How many images of such an array to read at a time."""
    return max(1, _NUMBERS // max(1, math.prod(shape[1:])))


def array_batches(blocks: Iterable[_Array], batch_size: int, size: int | None = None) -> Iterator[Tensor]:
    """Images in batches.

    Args:
        blocks: uint8 arrays ``[k, h, w]``, ``[k, h, w, c]`` or ``[k, c, h, w]`` with 1 or 3 channels, all of one shape
            but for k.
        batch_size: images of a batch; the last has the rest, and so has that at the end of a block.
        size: scale to ``size x size`` pixels as files are, by Pillow's bicubic filter. None: as they are.

    Yields:
        ``[n, 3, h, w]``, uint8; grey images three times.

    Raises:
        ValueError: as :func:`check_images`.
    """
    for block in blocks:
        check_images(block.shape, block.dtype)
        axes = image_axes(block.shape)
        for begin in range(0, len(block), batch_size):
            part = np.array(block[begin : begin + batch_size], order="C")
            images = torch.from_numpy(part if part.ndim == 4 else part[..., None]).permute(axes).expand(-1, 3, -1, -1)
            # In the layout in memory that images of files have: a network's last digits depend on it.
            yield images.contiguous() if size is None else torch.stack([_resized(image, size) for image in images])


def _resized(image: Tensor, size: int) -> Tensor:
    rgb = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    return torch.from_numpy(np.array(scaled(rgb, size, crop=False))).permute(2, 0, 1)
