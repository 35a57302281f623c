"""The networks of SAGAN: those of SNGAN with one self-attention layer each.

Zhang et al. 2018 (arXiv:1805.08318). The paper puts the attention at 32 of 128 pixels; here it looks at the map in the
middle of the pyramid, whatever the size. Spectral normalization, which the paper has on both sides, is the recipe's.
"""

from __future__ import annotations

from typing import Any

from lipgan.models.sngan import ResNetCritic, ResNetGenerator

__all__ = ["SAGANCritic", "SAGANGenerator"]


class SAGANGenerator(ResNetGenerator):
    """`ResNetGenerator` with self-attention."""

    def __init__(self, size: int = 32, channels: int = 3, latent_dim: int = 64, **options: Any) -> None:
        super().__init__(size, channels, latent_dim, attention=True, **options)


class SAGANCritic(ResNetCritic):
    """`ResNetCritic` with self-attention."""

    def __init__(self, size: int = 32, channels: int = 3, **options: Any) -> None:
        super().__init__(size, channels, attention=True, **options)
