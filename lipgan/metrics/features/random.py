"""Features of a convolutional network with random weights."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipgan.metrics.features.base import ImageFeatures, as_rgb, as_unit_images

__all__ = ["RandomFeatures"]

_WIDTHS = (32, 64, 128)
_SLOPE = 0.2


class RandomFeatures(ImageFeatures):
    """Means over the image of what three layers of random filters find: textures at three scales, without any training.

    Each layer is a 3x3 convolution of stride 2 and a LeakyReLU. The weights depend on ``seed`` alone. Features of grey
    images are those of the same images in RGB. Images of another size have features of another distribution: bring both
    sides to one size first.

    Args:
        seed: of the weights.

    Source: Naeem et al. 2020 (arXiv:2002.09797), which proposes embeddings of random networks where the images are far
        from those that a trained network knows; the network here is smaller.
    """

    name = "random"
    dim = sum(_WIDTHS)

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        # A generator of its own: neither the global one nor the order of other calls may change a metric.
        random = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList()
        channels = 3
        for width in _WIDTHS:
            # Made on the meta device, which draws no weights of its own.
            layer = nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False, device="meta").to_empty(device="cpu")
            # Keeps the variance from layer to layer (He et al. 2015).
            std = math.sqrt(2 / ((1 + _SLOPE**2) * channels * 9))
            nn.init.normal_(layer.weight, std=std, generator=random)
            self.layers.append(layer)
            channels = width
        self._freeze()

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[n, 224]``, float32. Errors as those of :func:`lipgan.metrics.features.base.as_unit_images`."""
        x = (2 * as_rgb(as_unit_images(images)) - 1).contiguous()
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), _SLOPE)
            features.append(x.mean((2, 3)))
        return torch.cat(features, 1)
