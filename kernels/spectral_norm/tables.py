"""What forward and backward share: tables of addresses and of work, and arrays reached by their addresses.

A steady call copies nothing from the host to the device. Tables that follow from the shapes are made once (`Plans`).
A table of addresses is written by a kernel that gets them as its arguments (`fill_kernel`): no host memory has to
outlive the call, and a CUDA graph that captures the call holds the addresses that it was captured with. Outside of a
graph the tables of the latest calls are kept under the addresses that stand in them, since parameters stay where they
are and allocators come back to the same places; what stands in a table is its key, so that none can be stale.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import config
from ..common import divide, is_capturing, stream_of

Plan = TypeVar("Plan")

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
def reordered(columns, channels, w):
    """int32: the entries of v that belong to memory columns. With w / channels for channels, the way back."""
    columns, channels = columns.to(tl.int32), channels.to(tl.int32)
    return columns % channels * (w.to(tl.int32) // channels) + columns // channels


@triton.jit
def load_slab_factors(
    u,  # T [h]
    v,  # T [w]
    row,
    col,
    rows,
    columns,
    inner,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """The factors of u v^T in a tile of the memory [w / inner, h * inner]: of u [BLOCK_W], of v [BLOCK_H, BLOCK_W]."""
    slabs = row + tl.arange(0, BLOCK_H)
    cols = (col + tl.arange(0, BLOCK_W)).to(tl.int32)
    inner = inner.to(tl.int32)
    u_tile = tl.load(u + cols // inner, mask=cols < columns, other=0.0).to(ACC)
    mask = (slabs < rows)[:, None] & (cols < columns)[None, :]
    entries = (slabs * inner)[:, None] + (cols % inner)[None, :]
    return u_tile, tl.load(v + entries, mask=mask, other=0.0).to(ACC)


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


# Addresses that one launch of fill_kernel writes.
FILLED = 24


@triton.jit(do_not_specialize=[f"a{i}" for i in range(FILLED)])
def fill_kernel(
    table,  # int64 [FILLED]
    a0: tl.int64, a1: tl.int64, a2: tl.int64, a3: tl.int64, a4: tl.int64, a5: tl.int64,
    a6: tl.int64, a7: tl.int64, a8: tl.int64, a9: tl.int64, a10: tl.int64, a11: tl.int64,
    a12: tl.int64, a13: tl.int64, a14: tl.int64, a15: tl.int64, a16: tl.int64, a17: tl.int64,
    a18: tl.int64, a19: tl.int64, a20: tl.int64, a21: tl.int64, a22: tl.int64, a23: tl.int64,
):  # fmt: skip
    """table = the arguments."""
    values = (
        a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15, a16, a17, a18, a19, a20, a21, a22, a23,
    )  # fmt: skip
    for i in tl.static_range(24):
        tl.store(table + i, tl.cast(values[i], tl.int64))


class Plans(Generic[Plan]):
    """Plans by what they were made for, the latest `size` of them, and for good those that went into a CUDA graph.

    A plan has tensors on the device. It is dropped only after the device has done all that it was asked, because
    launches on other streams may read it; a graph may read its plans as long as it lives, and nothing says how long.

    Args:
        make: a plan, of the arguments of a call.
        size: plans beyond which the oldest half is dropped.
    """

    def __init__(self, make: Callable[..., Plan], size: int = 64) -> None:
        self.make, self.size = make, size
        self.plans: dict[Any, Plan] = {}
        self.captured: dict[Any, Plan] = {}

    def of(self, key: tuple[Any, ...], like: Tensor) -> Plan:
        """The plan for `key`, on the device of `like`."""
        plan = self.plans.get(key)
        if plan is None:
            plan = self.captured.get(key)
            if plan is None:
                plan = self.make(*key)
            if len(self.plans) >= self.size and not is_capturing(like):
                self._drop(self.size // 2)
            self.plans[key] = plan
        if is_capturing(like):
            self.captured[key] = plan
        return plan

    def _drop(self, count: int) -> None:
        if torch.cuda.is_initialized():
            for index in range(torch.cuda.device_count()):
                torch.cuda.synchronize(index)
        for key in list(self.plans)[:count]:
            del self.plans[key]

    def clear(self) -> None:
        self.plans.clear()
        self.captured.clear()


# Tables of addresses by (device, stream, addresses), the latest of them. A table is read on its own stream only, so
# that the memory of one that is dropped is handed on in the order of that stream.
_KEPT_TABLES = 256
_tables: dict[Any, Tensor] = {}


def forget_addresses() -> None:
    """For those who keep launches from running: a table that was not written is not kept."""
    _tables.clear()


def _filled(addresses: Sequence[int], device: torch.device) -> Tensor:
    count = config.ceil_div(len(addresses), FILLED) * FILLED
    table = torch.empty(count, dtype=torch.int64, device=device)
    padded = [*addresses, *[0] * (count - len(addresses))]
    for first in range(0, count, FILLED):
        part = table if count == FILLED else table[first : first + FILLED]
        fill_kernel[(1,)](part, *padded[first : first + FILLED], num_warps=1)
    return table


def address_table(addresses: list[int], like: Tensor) -> Tensor:
    """int64 of these addresses, on the device of `like`, for launches on the current stream of that device.

    Call it with that device as the current one.
    """
    if is_capturing(like):
        # Its memory is the graph's, and so is the launch that writes it.
        return _filled(addresses, like.device)
    key = (like.get_device(), stream_of(like), *addresses)
    table = _tables.get(key)
    if table is None:
        table = _filled(addresses, like.device)
        if len(_tables) >= _KEPT_TABLES:
            del _tables[next(iter(_tables))]
        _tables[key] = table
    return table


def address(
    tensor: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    itemsize: int,
    copies: list[Tensor],
    is_plain: bool = True,
) -> int:
    """The address of a contiguous tensor of that dtype, on that device.

    Args:
        tensor: whose values the memory at the address holds, at multiples of `itemsize`.
        is_plain: False for one that lies in an order of its own, by its layout, which the caller has found by its
            strides.
        copies: of a tensor whose memory does not (a negation that is put off, zeros without memory, an odd offset) a
            copy goes here, and its address is returned. It has to live until the launch.

    Raises:
        ValueError: for another tensor.
    """
    if tensor.dtype is not dtype or tensor.device != device or (is_plain and not tensor.is_contiguous()):
        raise ValueError(
            f"expected contiguous {dtype} on {device}, got strides {tensor.stride()}, {tensor.dtype} on {tensor.device}"
        )
    where = tensor.data_ptr()
    if where % itemsize or where == 0 or tensor.is_neg():
        copies.append(tensor.clone())
        where = copies[-1].data_ptr()
    return where


def check_width(shapes: Sequence[config.Shape], block_h: int) -> None:
    widest = max(w for _, w in shapes)
    if widest * block_h >= 1 << 31:
        raise ValueError(f"a matrix with {widest} columns is too wide: offsets within a tile are 32-bit")


def work_table(counts: Sequence[int], device: torch.device) -> Tensor:
    """For each layer its number of programs; the rows are (layer, place in the layer)."""
    sizes = torch.tensor(counts, dtype=torch.int64)
    layers = torch.repeat_interleave(torch.arange(len(counts)), sizes)
    starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    places = torch.arange(len(layers)) - starts
    return torch.stack([layers, places], dim=1).to(torch.int32).to(device)


# The dimension that the rows of a weight's matrix are, and how it lies: `inner` and `channels` of
# lipgan/ops/spectral_norm/layout.py. Of a group it is None where all are contiguous and their rows are dimension 0.
Layout = tuple[int, int, int]


@dataclass(frozen=True)
class Matrix:
    """A matrix [h, w] that lies in memory as [w / inner, h, inner], with memory columns in the order of `channels`."""

    h: int
    w: int
    inner: int
    channels: int

    @property
    def is_strided(self) -> bool:
        """Whether a row is not one piece of memory."""
        return self.inner < self.w

    @property
    def in_memory(self) -> config.Shape:
        """The rows and columns of the memory: of the matrix, or, of a strided one, [w / inner, h * inner]."""
        return (self.w // self.inner, self.h * self.inner) if self.is_strided else (self.h, self.w)


def matrices_of(shapes: Sequence[torch.Size], layouts: Sequence[Layout] | None) -> list[Matrix]:
    if any(len(shape) < 2 for shape in shapes):
        raise ValueError(f"expected weights of two or more dimensions, got shapes {[tuple(s) for s in shapes]}")
    matrices = []
    for layer, shape in enumerate(shapes):
        dim, *order = (0,) if layouts is None else layouts[layer]
        w = math.prod(shape[:dim]) * math.prod(shape[dim + 1 :])
        matrices.append(Matrix(shape[dim], w, *(order or (w, w))))
    return matrices


def are_ordered(matrices: Sequence[Matrix]) -> bool:
    """Whether any of them does not lie as it is."""
    return any(matrix.inner < matrix.w or matrix.channels < matrix.w for matrix in matrices)
