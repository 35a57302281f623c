"""What forward and backward share: tables of addresses and of work, and arrays reached by their addresses."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import config
from ..common import divide

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


@triton.jit
def is_aligned(address, w):
    """Whether every row of a matrix starts at a multiple of 16 bytes, the width of the widest load."""
    return (address % 16 == 0) & (w % 16 == 0)


@triton.jit
def as_pointer(address, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def width(w, ALIGNED: tl.constexpr):
    """w; if ALIGNED in a form that shows the compiler that rows and masks change at multiples of 16 only."""
    if ALIGNED:
        return w // 16 * 16
    else:
        return w


@triton.jit
def load_sum(ptr, count, STEP: tl.constexpr):
    """Sum of an array, in an order that depends on its length only."""
    acc = tl.zeros([STEP], ptr.dtype.element_ty)
    for first in range(0, count, STEP):
        index = first + tl.arange(0, STEP)
        acc += tl.load(ptr + index, mask=index < count, other=0.0)
    return tl.sum(acc, axis=0)


@triton.jit
def inverse_scale(sigma, TINY: tl.constexpr):
    """1 / sigma, and 1 where sigma is 0 or below the smallest normal number: Y = W there, never NaN."""
    return divide(1.0, tl.where(tl.abs(sigma) < TINY, 1.0, sigma))


def check_width(shapes: Sequence[config.Shape], tile: config.Tile) -> None:
    widest = max(w for _, w in shapes)
    if widest * tile.block_h >= 1 << 31:
        raise ValueError(f"a matrix with {widest} columns is too wide: offsets within a tile are 32-bit")


def work_table(counts: Sequence[int], device: torch.device) -> Tensor:
    """For each layer its number of programs; the rows are (layer, place in the layer)."""
    sizes = torch.tensor(counts, dtype=torch.int64)
    layers = torch.repeat_interleave(torch.arange(len(counts)), sizes)
    starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    places = torch.arange(len(layers)) - starts
    return torch.stack([layers, places], dim=1).to(torch.int32).to(device)


def address_table(columns: Sequence[Sequence[Tensor]], like: Tensor) -> Tensor:
    """int64 [num_layers, len(columns)] of contiguous tensors of the dtype and device of `like`."""
    for tensor in (tensor for column in columns for tensor in column):
        fits = tensor.dtype == like.dtype and tensor.device == like.device and tensor.is_contiguous()
        if not fits or tensor.is_neg() or tensor.data_ptr() % tensor.element_size():
            raise ValueError(
                f"expected contiguous {like.dtype} on {like.device}, "
                f"got strides {tensor.stride()}, {tensor.dtype} on {tensor.device}"
            )
    rows = [[tensor.data_ptr() for tensor in layer] for layer in zip(*columns, strict=True)]
    # From pinned memory the copy is queued on the stream like a kernel; otherwise it would wait for the GPU.
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=like.is_cuda)
    return table.to(like.device, non_blocking=True)


def check_shapes(matrices: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor]) -> None:
    for matrix, u, v in zip(matrices, us, vs, strict=True):
        if matrix.dim() != 2 or (u.shape + v.shape) != matrix.shape:
            raise ValueError(
                f"expected a matrix [h, w] with u [h] and v [w], "
                f"got {tuple(matrix.shape)}, {tuple(u.shape)} and {tuple(v.shape)}"
            )


def shapes(matrices: Sequence[Tensor]) -> tuple[config.Shape, ...]:
    return tuple((matrix.shape[0], matrix.shape[1]) for matrix in matrices)
