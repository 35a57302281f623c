"""What the tests of the emulator run: a part that takes minutes, or all of it with LIPGAN_PTX_FULL=1."""

import os
from collections.abc import Iterable
from itertools import product
from typing import TypeVar

import torch

FULL = os.environ.get("LIPGAN_PTX_FULL") == "1"
TARGETS = ["sm_80", "sm_90"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]  # numbered as in lipgan/dtype.h
WIDE_DTYPES = DTYPES[:2]

T = TypeVar("T")


def selected(some: Iterable[T], more: Iterable[T]) -> list[T]:
    """The first ones; with LIPGAN_PTX_FULL=1 also those of the others that are not among them."""
    chosen = list(some)
    return chosen + [x for x in more if x not in chosen] if FULL else chosen


# Each dtype and each target; all pairs of them in the full set.
DTYPES_ON_TARGETS = selected(
    [(torch.float32, "sm_90"), (torch.float64, "sm_80"), (torch.float16, "sm_90"), (torch.bfloat16, "sm_80")],
    product(DTYPES, TARGETS),
)
WIDE_ON_TARGETS = [(dtype, target) for dtype, target in DTYPES_ON_TARGETS if dtype in WIDE_DTYPES]
