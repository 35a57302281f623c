"""The memory of the native backend's outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from lipgan.ops import _backend


def empty_cache() -> int:
    """Free the memory that is kept for outputs and not in use; returns its size in bytes.

    A fresh output costs page faults, often more than its arithmetic: the C library returns freed memory of that size
    to the system. Outputs of the native backend of 64 KB and more therefore take memory that an earlier output has
    left, and leave it to the next one when their tensor is freed. Up to 1 GB is kept so. The tensors are ordinary ones,
    except that ``resize_`` cannot make them larger. This is the counterpart of :func:`torch.cuda.empty_cache`.
    """
    module = _backend.native()
    return int(module.empty_cache()) if module is not None else 0


def empty_matrix(rows: int, columns: int, like: Tensor) -> Tensor:
    """A new matrix of the dtype and on the device of ``like``; in that memory where it is one of float64 on the CPU."""
    serves = like.device.type == "cpu" and like.dtype == torch.float64 and _backend.is_unobserved((like,))
    if not serves or _backend.native() is None:
        return like.new_empty(rows, columns)
    module = _backend.serving_native()
    result: Tensor = module.empty_matrix(rows, columns)
    return result
