"""The pixels themselves as features."""

from torch import Tensor

from lipgan.metrics.features.base import ImageFeatures, as_unit_images

__all__ = ["Pixels"]


class Pixels(ImageFeatures):
    """Images ``[n, c, h, w]`` as their ``c h w`` values in [0, 1], float32.

    A distance of these compares means and covariances of pixels: it sees brightness, contrast and blur, and little of
    what an image shows. The images of both sides must be of one size.
    """

    name = "pixels"
    dim = None

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[n, c h w]``. Errors as those of :func:`lipgan.metrics.features.base.as_unit_images`."""
        return as_unit_images(images).flatten(1)
