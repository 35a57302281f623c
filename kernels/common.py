"""What kernels of several ops share: arithmetic to the nearest, tiles of matrices and of products, the last program."""

from typing import Any

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


def is_capturing(like: torch.Tensor) -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


def stream_of(like: torch.Tensor) -> int:
    """The current stream of a tensor's device, as a number; 0 where there are none."""
    return torch._C._cuda_getCurrentRawStream(like.get_device()) if like.is_cuda else 0


# Tickets by (device, stream): launches on one stream come one after the other. And those that CUDA graphs have yet to
# take, by device: the launches of a graph may run beside each other and beside all others.
_tickets: dict[Any, torch.Tensor] = {}
_for_graphs: dict[torch.device, list[torch.Tensor]] = {}
_TICKETS_FOR_GRAPHS = 1024


def ticket_of(like: torch.Tensor) -> torch.Tensor:
    """The ticket, int32 [1], that a launch on the current stream of a tensor's device hands to `is_last_program`.

    It is 0 whenever a launch begins, since each leaves it so. A launch in a CUDA graph gets one of its own, for good:
    nothing says how long the graph lives. Where all are taken, or none were made before the capture, the graph sets to
    0 what it takes.
    """
    device = like.device
    if is_capturing(like):
        left = _for_graphs.get(device)
        return left.pop() if left else torch.zeros(1, dtype=torch.int32, device=device)
    key = device, stream_of(like)
    if key not in _tickets:
        _tickets[key] = torch.zeros(1, dtype=torch.int32, device=device)
        if like.is_cuda and device not in _for_graphs:
            # Each in a line of the cache of its own, written before a graph on any stream takes one.
            lines = torch.zeros(_TICKETS_FOR_GRAPHS, 32, dtype=torch.int32, device=device)
            torch.cuda.current_stream(device).synchronize()
            _for_graphs[device] = list(lines[:, :1].unbind())
    return _tickets[key]


def forget_tickets() -> None:
    """For those who end launches before they are done: what these leave behind is no ticket."""
    _tickets.clear()
    _for_graphs.clear()


@triton.jit
def is_last_program(ticket):
    """Whether this program of a launch is the last one to ask; it then sees what all of them stored before they asked.

    It sets the ticket back to 0, for the next launch.
    """
    # One thread takes the ticket and so releases what all have stored. (Scalars are stored by that thread, which counts
    # where a barrier waits for no stores to memory.) The newest Triton has a barrier here itself.
    tl.debug_barrier()
    is_last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1
    if is_last:
        tl.store(ticket, 0)
    return is_last


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


@triton.jit
def product_tile(
    a,  # T [m, depth], any strides
    b,  # T [depth, n], any strides
    row,
    col,
    m,
    n,
    depth,
    a_row_stride,
    a_col_stride,
    b_row_stride,
    b_col_stride,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The tile of A B whose corner is (row, col); what lies outside of A and B counts as 0.

    PRECISION: "ieee" multiplies operands as they are; "tf32x3" (float32, NVIDIA) adds three products of TF32 parts.

    Offsets within a tile are int32, which takes fewer registers; the host refuses strides that do not fit.
    """
    ACC: tl.constexpr = a.dtype.element_ty
    i, k = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    a += row.to(tl.int64) * a_row_stride
    b += col.to(tl.int64) * b_col_stride
    a_offsets = i[:, None] * a_row_stride + k[None, :] * a_col_stride
    b_offsets = k[:, None] * b_row_stride + i[None, :] * b_col_stride
    inside_rows, inside_cols = (row + i < m)[:, None], (col + i < n)[None, :]
    acc = tl.zeros([BLOCK, BLOCK], ACC)
    for first in range(0, depth, BLOCK_K):
        inside = k < depth - first
        a_tile = tl.load(a + a_offsets, mask=inside_rows & inside[None, :], other=0.0)
        b_tile = tl.load(b + b_offsets, mask=inside_cols & inside[:, None], other=0.0)
        acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION, out_dtype=ACC)
        a += BLOCK_K * a_col_stride
        b += BLOCK_K * b_row_stride
    return acc
