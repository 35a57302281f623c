"""The one place where a tensor becomes a raw address."""

from __future__ import annotations

import torch
from torch import Tensor

# The numbers of lipgan::Dtype in csrc/include/lipgan/dtype.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def address(tensor: Tensor, dtype: torch.dtype, numel: int, device: torch.device) -> int:
    """The address of a contiguous tensor that holds ``numel`` elements of ``dtype`` on ``device``.

    A kernel believes what it is told about an address. A tensor that differs from it is refused here, for good: the
    checks of the public functions give the readable messages, this one keeps memory safe.
    """
    if tensor.dtype != dtype or tensor.numel() != numel or tensor.device != device or not tensor.is_contiguous():
        raise RuntimeError(
            f"expected {numel} contiguous elements of {dtype} on {device}, got shape {tuple(tensor.shape)}, "
            f"strides {tensor.stride()}, {tensor.dtype} on {tensor.device}"
        )
    return tensor.data_ptr()
