"""Matrices [h, w] as weights hold them in memory, by the two integers of lipgan/ops/spectral_norm/layout.py."""

import torch
from torch import Tensor


def columns_in_memory(w: int, channels: int) -> Tensor:
    """The column of the matrix, and entry of v, that each memory column is: [w / channels, channels] of them."""
    return torch.arange(w).view(channels, -1).T.reshape(-1) if w else torch.arange(0)


def in_memory(matrix: Tensor, inner: int, channels: int) -> Tensor:
    """The contiguous array [outer, h, inner] of a matrix [h, w]."""
    h, w = matrix.shape
    outer = w // inner if inner else 1
    return matrix[:, columns_in_memory(w, channels)].reshape(h, outer, inner).transpose(0, 1).contiguous()


def out_of_memory(array: Tensor, channels: int) -> Tensor:
    """The matrix [h, w] of an array [outer, h, inner]."""
    outer, h, inner = array.shape
    matrix = array.new_empty(h, outer * inner)
    matrix[:, columns_in_memory(outer * inner, channels)] = array.transpose(0, 1).reshape(h, outer * inner)
    return matrix
