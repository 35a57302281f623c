"""Matrices: norms and bounds on them, square roots, polar factors.

Every function takes and returns torch tensors, works on batches where it says so, and is differentiable.
"""

from lipgan.linalg.conv_spectral_norm import conv_spectral_norm, conv_spectral_norm_bound
from lipgan.linalg.matrix_sqrt import inv_sqrtm, nuclear_norm, polar, sqrtm
from lipgan.linalg.spectral_norm_bound import spectral_norm_bound
from lipgan.linalg.trace_sqrt_product import trace_sqrt_product

__all__ = [
    "conv_spectral_norm",
    "conv_spectral_norm_bound",
    "inv_sqrtm",
    "nuclear_norm",
    "polar",
    "spectral_norm_bound",
    "sqrtm",
    "trace_sqrt_product",
]
