"""Layers, and parametrizations of PyTorch's layers."""

from lipgan.nn.attention import SelfAttention2d
from lipgan.nn.conditional_batch_norm import ConditionalBatchNorm1d, ConditionalBatchNorm2d
from lipgan.nn.conv_spectral_norm import conv_spectral_norm
from lipgan.nn.gradient_normalization import GradientNormalized
from lipgan.nn.group_sort import GroupSort, MaxMin
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
from lipgan.nn.minibatch import MinibatchDiscrimination, MinibatchStdDev
from lipgan.nn.orthogonal import OrthogonalConv2d, OrthogonalLinear, orthogonal
from lipgan.nn.patch import patch
from lipgan.nn.spectral_norm import SpectralNorm, spectral_norm
from lipgan.nn.spectral_norm_group import SpectralNormGroup, group_spectral_norm
from lipgan.nn.spectral_norm_layouts import hook_state_dict
from lipgan.nn.virtual_batch_norm import VirtualBatchNorm

__all__ = [
    "ConditionalBatchNorm1d",
    "ConditionalBatchNorm2d",
    "GradientNormalized",
    "GroupSort",
    "MaxMin",
    "MinibatchDiscrimination",
    "MinibatchStdDev",
    "OrthogonalConv2d",
    "OrthogonalLinear",
    "SNConv1d",
    "SNConv2d",
    "SNConv3d",
    "SNConvTranspose1d",
    "SNConvTranspose2d",
    "SNConvTranspose3d",
    "SNEmbedding",
    "SNLinear",
    "SelfAttention2d",
    "SpectralNorm",
    "SpectralNormGroup",
    "VirtualBatchNorm",
    "conv_spectral_norm",
    "group_spectral_norm",
    "hook_state_dict",
    "orthogonal",
    "patch",
    "spectral_norm",
]
