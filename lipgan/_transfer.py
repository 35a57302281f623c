"""Copies from the CPU to a GPU that the CPU does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor

# Whose copies read pinned memory while the CPU goes on.
_PINNED_FOR = {"cuda"}


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``tensor.to(device, dtype)``, on a GPU by way of pinned memory and without waiting for what is queued there.

    PyTorch's allocator keeps pinned memory for the next copy, once the GPU has read it. From memory that is not pinned,
    a copy waits until the GPU is there: in a training step, for all kernels that were launched before.
    """
    if dtype is not None and tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    if tensor.device == device:
        return tensor
    if device.type in _PINNED_FOR and tensor.device.type == "cpu" and not torch.compiler.is_compiling():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
