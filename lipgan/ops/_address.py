"""The one place in Python where a tensor becomes a raw address: for lipgan._cuda.

A kernel believes what it is told about an address. A tensor that is not what the kernel will be told is refused here,
for good: the checks of the public functions give the readable messages, these keep memory safe.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The numbers of lipgan::Dtype in csrc/include/lipgan/dtype.h.
DTYPE_NUMBERS = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def materialized(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy where its memory does not hold its values at multiples of the size of its elements.

    A negation may be put off (``x.conj().imag``), zeros may have no memory, and ``torch.frombuffer`` takes any offset.
    """
    if tensor.is_neg() or tensor._is_zerotensor() or tensor.data_ptr() % tensor.element_size():
        return tensor.clone()
    return tensor


def address(tensor: Tensor, dtype: torch.dtype, numel: int, device: str, is_plain: bool = True) -> int:
    """The address of a contiguous tensor of ``numel`` elements of ``dtype`` on a device of the type ``device``.

    ``is_plain`` is False for one that is dense in an order of its own, which the caller has found by its strides.
    """
    if (
        tensor.dtype != dtype
        or tensor.numel() != numel
        or (is_plain and not tensor.is_contiguous())
        or tensor.device.type != device
        or tensor.is_neg()
        or tensor.data_ptr() % tensor.element_size()
    ):
        raise RuntimeError(
            f"expected {numel} contiguous elements of {dtype} on {device}, got shape {tuple(tensor.shape)}, "
            f"strides {tensor.stride()}, {tensor.dtype} on {tensor.device}"
        )
    return tensor.data_ptr()


def addresses(
    tensors: Sequence[Tensor],
    dtype: torch.dtype,
    numels: Sequence[int],
    device: torch.device,
    copies: list[Tensor],
    is_plain: bool = True,
) -> list[int]:
    """:func:`address` of several tensors, each materialized: copies go to ``copies``, to live until the launch."""
    found, itemsize, kind = [], dtype.itemsize, device.type
    for tensor, numel in zip(tensors, numels, strict=True):
        where = tensor.data_ptr()
        if where % itemsize or where == 0 or tensor.is_neg():
            copies.append(tensor.clone())
            where = address(copies[-1], dtype, numel, kind, is_plain)
        elif (
            tensor.dtype is not dtype
            or tensor.numel() != numel
            or tensor.device != device
            or (is_plain and not tensor.is_contiguous())
        ):
            address(tensor, dtype, numel, kind, is_plain)  # says what is wrong
            raise RuntimeError(f"expected a tensor on {device}, got one on {tensor.device}")
        found.append(where)
    return found
