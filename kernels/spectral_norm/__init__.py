"""Spectral normalization of a group of weights, its backward, and the backward of that.

A group is a list of matrices of one dtype on one device; each launch serves all of them. Three kinds of
tables tell a program what to work on:

  addresses  int64 [num_layers, n]  where the arrays of a layer lie; written by a kernel, kept by what stands in it
  geometry   int64 [num_layers, n]  sizes of a layer, offsets of its sections in `scratch`; cached by shapes
  work       int32 [programs, 2]    the layer of a program and its place in it; cached by shapes

No kernel uses atomics: partial results go to `scratch` and are combined in a fixed order, so equal inputs
give equal bits. All arithmetic is in the accumulation dtype A (float64 for float64, float32 otherwise):
values are widened right after a load and rounded once on a store.
"""

from . import tables
from .backward import spectral_norm_bwd
from .double_backward import spectral_norm_double_bwd
from .forward import spectral_norm_fwd

__all__ = ["spectral_norm_bwd", "spectral_norm_double_bwd", "spectral_norm_fwd", "tables"]
