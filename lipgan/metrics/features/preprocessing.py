"""What a network does with images before it looks at them, as values: scaling, cropping, normalizing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lipgan._checks import check_choice
from lipgan.metrics.features.base import as_rgb, as_unit_images, one_by_one

__all__ = ["CLIP_NORM", "IMAGENET_NORM", "INTERPOLATIONS", "Preprocessing"]

_Triple = tuple[float, float, float]

#: Means and standard deviations of the channels of images in [0, 1], as DINOv2 and OpenAI's CLIP subtract them.
IMAGENET_NORM: tuple[_Triple, _Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP_NORM: tuple[_Triple, _Triple] = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)

# Of Pillow's filters, those that PyTorch has, with antialiasing but for the first.
INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


@dataclass(frozen=True)
class Preprocessing:
    """Brings images ``[n, 1 or 3, h, w]`` to what a network takes, as programs do with Pillow's 8-bit images.

    Pillow rounds to whole levels behind each pass of its filter, across and then down, and so does this. (Pillow 13
    goes down first where an image becomes wider and flatter, and in some other cases.) Derivatives in the images take
    the rounding for the identity.

    Attributes:
        resize: pixels of the shorter side, the other in proportion; or height and width; None: as it is.
        crop: height and width of what is cut out of the middle then; None: nothing is.
        mean, std: subtracted from, and divided by, the values of each channel.
        scale: what levels from 0 to 255 are multiplied by before.
        interpolation: one of `INTERPOLATIONS`, Pillow's filters.
        square: whether the largest square in the middle is cut out first.
        round_up: of a margin of 3 pixels, whether 2 lie left and above, as torchvision has it, or 1, as transformers;
            torchvision rounds halves to even numbers.
    """

    resize: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    mean: _Triple
    std: _Triple
    scale: float = 1 / 255
    interpolation: str = "bicubic"
    square: bool = False
    round_up: bool = False

    def __post_init__(self) -> None:
        check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        if self.resize is not None and self.crop is not None:
            height, width = (self.resize, self.resize) if isinstance(self.resize, int) else self.resize
            if self.crop[0] > height or self.crop[1] > width:
                raise ValueError(f"crop must be no larger than resize, {height} x {width}, got {self.crop}")

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of all results; None where they follow from the images."""
        return self.crop or (self.resize if isinstance(self.resize, tuple) else None)

    def __call__(self, images: Tensor) -> Tensor:
        """``[n, 3, h, w]``, float32. Errors as those of :func:`lipgan.metrics.features.base.as_unit_images`."""
        return one_by_one(self._prepared, images)

    def _prepared(self, images: Tensor) -> Tensor:
        x = _rounded(255 * as_rgb(as_unit_images(images)))
        if self.square:
            side = min(x.shape[2:])
            x = self._middle(x, (side, side))
        if self.resize is not None:
            x = self._scaled(x, self._target(x.shape[2], x.shape[3]))
        if self.crop is not None:
            x = self._middle(x, self.crop)
        mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (self.mean, self.std))
        return ((x * self.scale - mean) / std).contiguous()

    def _target(self, height: int, width: int) -> tuple[int, int]:
        assert self.resize is not None
        if not isinstance(self.resize, int):
            return self.resize
        longer = int(self.resize * max(height, width) / min(height, width))
        return (self.resize, longer) if height <= width else (longer, self.resize)

    def _scaled(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if not len(x):
            return x.new_empty(0, 3, *size)
        if self.interpolation == "nearest":
            return F.interpolate(x, size=size, mode="nearest-exact")
        for across in ((x.shape[2], size[1]), size):
            if across != tuple(x.shape[2:]):
                x = _rounded(
                    F.interpolate(x, size=across, mode=self.interpolation, align_corners=False, antialias=True)
                )
        return x

    def _middle(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        margins = (x.shape[2] - size[0], x.shape[3] - size[1])
        if min(margins) < 0:
            raise ValueError(f"images of {x.shape[3]} x {x.shape[2]} pixels are too small to cut {size} out of them")
        top, left = (round(margin / 2) if self.round_up else margin // 2 for margin in margins)
        return x[:, :, top : top + size[0], left : left + size[1]]


def _rounded(levels: Tensor) -> Tensor:
    """Whole levels from 0 to 255, with the derivative of ``levels``."""
    whole = levels.detach().round().clamp(0, 255)
    return whole if not levels.requires_grad else levels + (whole - levels).detach()
