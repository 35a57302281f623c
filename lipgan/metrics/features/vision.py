"""The features that are recommended beside Inception's: DINOv2's for a Frechet distance, CLIP's for the CMMD."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipgan.metrics.features.external import ExternalFeatures
from lipgan.metrics.features.huggingface import transformer
from lipgan.metrics.features.preprocessing import CLIP_NORM, IMAGENET_NORM, Preprocessing

__all__ = ["ClipFeatures", "DinoFeatures"]

_DINO_SIDE = 224
# What the published DINOv2 adds to the number of patches a side before it interpolates the embeddings of positions.
_DINO_OFFSET = 0.1


class DinoFeatures(ExternalFeatures):
    """The features of the distance "FD-DINOv2": the normed token of the class of DINOv2 ViT-L/14.

    Images are scaled to 224x224 pixels, whatever their shape, by Pillow's bicubic filter with antialiasing; the
    published code of the distance does so by default. The embeddings of positions are interpolated once, as in the
    published code of the network, which differs by some thousandths from what transformers does.

    Args:
        weights: a folder of a DINOv2 in the format of transformers. None: facebook/dinov2-large in the hub's cache.
        sha256: what the SHA-256 of its model.safetensors begins with.
        pretrained: False for random weights, always the same.
        download: let transformers fetch what is not in its cache.

    Attributes:
        name: "dinov2"; of another network than ViT-L, with the length of its features and the number of its layers.

    Raises:
        ValueError: transformers is not installed; files that are not here, or of another model.

    Source: Stein et al., "Exposing flaws of generative model evaluation metrics and their unfair treatment of diffusion
        models" (2023, arXiv:2306.04675), and its package dgm-eval; Oquab et al. 2023 (arXiv:2304.07193).
    """

    def __init__(
        self,
        weights: str | None = None,
        *,
        sha256: str | None = None,
        pretrained: bool = True,
        download: bool = False,
    ) -> None:
        which = "facebook/dinov2-large" if weights is None else str(weights)
        model, _ = transformer(
            which, "dinov2", sha256=sha256, pretrained=pretrained, download=download, kind=("dinov2",)
        )
        config: Any = model.config
        _at_side(model, _DINO_SIDE)
        name = "dinov2"
        if (config.hidden_size, config.num_hidden_layers) != (1024, 24):
            name += f"-{config.hidden_size}-{config.num_hidden_layers}"
        mean, std = IMAGENET_NORM
        preprocessing = Preprocessing((_DINO_SIDE, _DINO_SIDE), None, mean, std)
        super().__init__(name if pretrained else f"{name}, random weights", _Pooled(model), preprocessing)


class ClipFeatures(ExternalFeatures):
    """The features of the distance "CMMD": embeddings of images by OpenAI's CLIP ViT-L/14 at 336 pixels, of length 1.

    The largest square in the middle of an image is scaled to 336x336 pixels by Pillow's bicubic filter with
    antialiasing, as the published code of the distance does.

    Args:
        weights: a folder of a CLIP in the format of transformers. None: openai/clip-vit-large-patch14-336 in the cache
            of the hub.
        sha256, pretrained, download: as of :class:`DinoFeatures`.

    Attributes:
        name: "clip"; of another network, with the length of its features and the pixels of its images.

    Raises:
        ValueError: as :class:`DinoFeatures`.

    Source: Jayasumana et al. 2024 (arXiv:2401.09603); Radford et al. 2021 (arXiv:2103.00020).
    """

    def __init__(
        self,
        weights: str | None = None,
        *,
        sha256: str | None = None,
        pretrained: bool = True,
        download: bool = False,
    ) -> None:
        which = "openai/clip-vit-large-patch14-336" if weights is None else str(weights)
        kinds = ("clip", "clip_vision_model")
        model, _ = transformer(which, "clip", sha256=sha256, pretrained=pretrained, download=download, kind=kinds)
        config: Any = model.config
        side = config.image_size
        name = "clip"
        if (config.projection_dim, side, config.patch_size, config.num_hidden_layers) != (768, 336, 14, 24):
            name += f"-{config.projection_dim}-{side}"
        mean, std = CLIP_NORM
        preprocessing = Preprocessing((side, side), None, mean, std, square=True)
        super().__init__(name if pretrained else f"{name}, random weights", _Embedding(model), preprocessing)


class _Pooled(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        token: Tensor = self.model(pixel_values=pixels).pooler_output
        return token


class _Embedding(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.model(pixel_values=pixels).image_embeds)


def _at_side(model: Any, side: int) -> None:
    """Interpolate the embeddings of positions of a DINOv2 to images of ``side x side`` pixels, for good."""
    embeddings = model.embeddings
    patch: int = model.config.patch_size
    old: Tensor = embeddings.position_embeddings.detach()
    count, new = math.isqrt(old.shape[1] - 1), side // patch
    if count != new:
        grid = old[:, 1:].reshape(1, count, count, -1).permute(0, 3, 1, 2).float()
        scale = (new + _DINO_OFFSET) / count
        grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
        positions = torch.cat([old[:, :1].float(), grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)
        embeddings.position_embeddings = nn.Parameter(positions)
