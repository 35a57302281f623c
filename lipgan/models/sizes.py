"""Which images the convolutional architectures serve, and the sides that their layers meet."""

from __future__ import annotations

__all__ = ["sides", "square"]


def sides(size: int, channels: int) -> list[int]:
    """The sides of the maps from 3 to 7 pixels up to ``size``, each twice the one before, or twice and one.

    Raises:
        ValueError: size or channels out of range.
    """
    if size % 4 or not 8 <= size <= 128:
        raise ValueError(f"size must be a multiple of 4 from 8 to 128, got {size}")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    result = [size]
    while result[0] > 7 or (result[0] > 4 and result[0] % 2 == 0):
        result.insert(0, result[0] // 2)
    return result


def square(architecture: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """``(size, channels)`` of images of ``shape = (channels, size, size)``.

    Raises:
        ValueError: not a square image.
    """
    if len(shape) != 3 or shape[1] != shape[2]:
        raise ValueError(
            f"the {architecture} architecture needs square images (channels, size, size), got shape {shape}"
        )
    return shape[1], shape[0]
