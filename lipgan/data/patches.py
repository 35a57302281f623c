"""Patches of natural images that need no download."""

import torch

from lipgan.data.dataset import Dataset

__all__ = ["patches"]

_SEED = 6
_MAX_PATCHES = 4096
# All patches together: 2^23 pixels of three float32 are 96 MiB.
_MAX_PIXELS = 2**23


def patches(size: int) -> Dataset:
    """Square patches of the two photographs that come with scikit-learn, at places drawn once.

    The photographs show a Chinese temple and a flower, 640 x 427 pixels each. Patches are cut as they are, not scaled,
    and overlap.

    Source: scikit-learn's load_sample_images; china.jpg by danielbuechele, flower.jpg by vultilion, both CC BY 2.0.

    Args:
        size: pixels a side, a multiple of 4 from 8 to 128.

    Returns:
        samples ``[n, 3, size, size]``, float32 in [-1, 1], and labels ``[n]``: 0 temple, 1 flower, in turn. n is 4096
        up to size 44, and an even number near 2^23 / size^2 above: 3640 at 48, 2048 at 64, 512 at 128.

    Raises:
        ValueError: another ``size``.
    """
    # Imported here because it takes a second, which no other data set need wait for.
    from sklearn.datasets import load_sample_images

    if size % 4 or not 8 <= size <= 128:
        raise ValueError(f"size of patches must be a multiple of 4 from 8 to 128, got {size}")
    photographs = [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]
    n = min(_MAX_PATCHES, _MAX_PIXELS // size**2) // 2 * 2
    labels = torch.arange(n) % 2
    _, height, width = photographs[0].shape
    # Drawn as fractions: every size sees the same places, and the seed decides them alone.
    fractions = torch.rand(n, 2, generator=torch.Generator().manual_seed(_SEED), dtype=torch.float64)
    corners = (fractions * torch.tensor([height - size + 1, width - size + 1])).long().tolist()
    levels = torch.stack(
        [photographs[i % 2][:, top : top + size, left : left + size] for i, (top, left) in enumerate(corners)]
    )
    return Dataset("patches", levels.float() / 127.5 - 1, labels)
