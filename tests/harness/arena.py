"""Memory for kernels that run on the CPU: what they write beside their arrays, or leave unwritten, shows."""

from collections.abc import Sequence

import numpy as np
import torch

GUARD = 64  # bytes before and after each array
POISON = 0xFF  # a NaN in every dtype


class Arena:
    """Arrays between guards; everything starts as poison."""

    def __init__(self) -> None:
        self.arrays: list[tuple[np.ndarray, int, int]] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype, misaligned: bool = False) -> torch.Tensor:
        """An array at a multiple of 16 bytes, or one element after such a multiple."""
        size = int(np.prod(shape)) * dtype.itemsize
        raw = np.full(size + 2 * GUARD + 32, POISON, np.uint8)
        start = GUARD + (-(raw.ctypes.data + GUARD)) % 16 + (dtype.itemsize if misaligned else 0)
        self.arrays.append((raw, start, start + size))
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(raw, dtype=torch.uint8)[start : start + size].view(dtype).reshape(shape)

    def copy(self, tensor: torch.Tensor, misaligned: bool = False) -> torch.Tensor:
        return self.empty(tensor.shape, tensor.dtype, misaligned).copy_(tensor)

    def assert_guards_untouched(self) -> None:
        for raw, start, end in self.arrays:
            assert (raw[:start] == POISON).all(), "something wrote before the beginning of an array"
            assert (raw[end:] == POISON).all(), "something wrote beyond the end of an array"
