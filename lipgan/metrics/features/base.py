"""What every feature extractor is, and the images it takes."""

from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

__all__ = ["FeatureExtractor", "ImageFeatures", "as_rgb", "as_unit_images", "one_by_one"]

Self = TypeVar("Self", bound="ImageFeatures")


@runtime_checkable
class FeatureExtractor(Protocol):
    """Takes images ``[n, c, h, w]``, uint8 in [0, 255] or floating point in [0, 1], to features ``[n, d]``.

    Attributes:
        name: what to call these features beside a number computed from them.
        dim: the ``d`` of every batch; None where it follows from the size of the images.
    """

    @property
    def name(self) -> str: ...

    @property
    def dim(self) -> int | None: ...

    def __call__(self, images: Tensor) -> Tensor: ...


def as_unit_images(images: Tensor) -> Tensor:
    """``images [n, c, h, w]`` in float32 and [0, 1].

    Raises:
        TypeError: not a tensor of uint8 or of floating-point numbers.
        ValueError: another shape, neither 1 nor 3 channels, or floating-point numbers outside of [0, 1].
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images must have dtype uint8 or a floating-point dtype, got {images.dtype}")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape[2:]:
        raise ValueError(f"images must have shape (n, 1 or 3, h, w), got {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images.float().div_(255)
    if images.numel():
        # Images in [-1, 1], as generators make them, would give a number, and a wrong one.
        low, high = images.detach().aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"images of floating point must lie in [0, 1], got {low.item():g} to {high.item():g}")
    return images.float()


def as_rgb(images: Tensor) -> Tensor:
    """``images [n, 1 or 3, h, w]`` with 3 channels: grey ones three times."""
    return images.expand(-1, 3, -1, -1)


def one_by_one(prepare: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """``prepare(images)``, which does to each image ``[1, c, h, w]`` what it does to it among others.

    On a CPU levels are prepared image after image: in floating point a batch of large ones takes gigabytes, and one is
    still in the caches when it is scaled.
    """
    levels = isinstance(images, Tensor) and images.dtype == torch.uint8 and images.ndim == 4
    if not levels or images.device.type != "cpu" or len(images) < 2:
        return prepare(images)
    return torch.cat([prepare(images[i : i + 1]) for i in range(len(images))])


class ImageFeatures(nn.Module):
    """A frozen network as a `FeatureExtractor`: always in eval mode, and its weights want no gradient.

    Derivatives in the images pass through.

    Attributes:
        any_size: whether it brings all images to a size of its own, so that images of several sizes can be compared.
    """

    name: str
    dim: int | None
    any_size: bool = False

    def _freeze(self) -> None:
        """To be called once all weights are there."""
        self.eval()
        self.requires_grad_(False)

    def train(self: Self, mode: bool = True) -> Self:
        """Nothing changes: a model that holds the extractor may be trained."""
        return super().train(False)
