"""Handwritten digits that need no download."""

import torch
from torch.nn import functional as F

from lipgan.data.dataset import Dataset

__all__ = ["digits"]


def digits(size: int) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, scaled up.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI (1998); 8x8 pixels, levels 0
        to 16.

    Args:
        size: pixels a side, at least 8. Larger than 8 is bicubic interpolation: it adds no detail, only
            pixels.

    Returns:
        samples ``[1797, 1, size, size]``, float32 in [-1, 1] (-1 is the background), and labels
        ``[1797]`` in 0..9.

    Raises:
        ValueError: ``size`` below 8.
    """
    # Imported here because it takes a second, which no other data set need wait for.
    from sklearn.datasets import load_digits

    if size < 8:
        raise ValueError(f"size of digits must be at least 8, their own, got {size}")
    raw = load_digits()
    samples = torch.from_numpy(raw.images).float().unsqueeze(1) / 8 - 1
    if size > 8:
        # The cubic kernel overshoots at edges by a few levels.
        samples = F.interpolate(samples, size=(size, size), mode="bicubic", align_corners=False).clamp(-1, 1)
    return Dataset("digits", samples, torch.from_numpy(raw.target).long())
