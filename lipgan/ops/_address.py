"""The one place where a tensor becomes a raw address.

A kernel believes what it is told about an address. A tensor that is not what the kernel will be told is refused here,
for good: the checks of the public functions give the readable messages, these keep memory safe.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The numbers of lipgan::Dtype in csrc/include/lipgan/dtype.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def addresses(tensors: Sequence[Tensor], dtype: torch.dtype, numels: Sequence[int], device: str = "cpu") -> list[int]:
    """The addresses of contiguous tensors of ``dtype`` on ``device``, which hold ``numels`` elements each."""
    result = []
    for tensor, numel in zip(tensors, numels, strict=True):
        if (
            tensor.dtype is not dtype
            or tensor.numel() != numel
            or not tensor.is_contiguous()
            or not (tensor.is_cpu if device == "cpu" else tensor.device.type == device)
        ):
            raise RuntimeError(
                f"expected {numel} contiguous elements of {dtype} on {device}, got shape {tuple(tensor.shape)}, "
                f"strides {tensor.stride()}, {tensor.dtype} on {tensor.device}"
            )
        result.append(tensor.data_ptr())
    return result


def address(tensor: Tensor, dtype: torch.dtype, numel: int, device: str = "cpu") -> int:
    """:func:`addresses` of one tensor."""
    return addresses((tensor,), dtype, (numel,), device)[0]
