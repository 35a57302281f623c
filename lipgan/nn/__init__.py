"""Layers, and parametrizations of PyTorch's layers."""

from lipgan.nn.conv_spectral_norm import conv_spectral_norm
from lipgan.nn.layers import (
    SNConv1d,
    SNConv2d,
    SNConv3d,
    SNConvTranspose1d,
    SNConvTranspose2d,
    SNConvTranspose3d,
    SNEmbedding,
    SNLinear,
)
from lipgan.nn.spectral_norm import SpectralNorm, spectral_norm
from lipgan.nn.spectral_norm_group import SpectralNormGroup, group_spectral_norm

__all__ = [
    "SNConv1d",
    "SNConv2d",
    "SNConv3d",
    "SNConvTranspose1d",
    "SNConvTranspose2d",
    "SNConvTranspose3d",
    "SNEmbedding",
    "SNLinear",
    "SpectralNorm",
    "SpectralNormGroup",
    "conv_spectral_norm",
    "group_spectral_norm",
    "spectral_norm",
]
