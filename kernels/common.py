"""What the kernels of several ops share: arithmetic to the nearest, and tiles of matrices."""

import torch
import triton
import triton.language as tl


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def materialized(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where its memory does not hold its values at multiples of the size of its elements.

    A negation may be put off (x.conj().imag), zeros may have no memory, and torch.frombuffer takes any offset.
    """
    if tensor.is_neg() or tensor._is_zerotensor() or tensor.data_ptr() % tensor.element_size():
        return tensor.clone()
    return tensor


@triton.jit
def divide(x, y):
    """x / y to the nearest; the plain division of float32 is off by up to 2 units in the last place."""
    if y.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def square_root(x):
    """Square root to the nearest; the plain one of float32 is an approximation."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def matrix_tile(matrix, row, col, h, w, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Pointers to the tile at (row, col) of a matrix [h, w], and the mask of its elements inside the matrix.

    Offsets within a tile are int32, which takes fewer registers; the host refuses w that do not fit.
    """
    i, j = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_W)
    first = tl.cast(row, tl.int64) * w + col
    pointers = matrix + first + (i[:, None] * tl.cast(w, tl.int32) + j[None, :])
    return pointers, (row + i < h)[:, None] & (col + j < w)[None, :]
