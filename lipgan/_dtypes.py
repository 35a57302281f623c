"""The floating-point dtypes that the package serves, those in which it accumulates, and their autocasts."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

FLOATING_NAMES = "float32, float64, float16 or bfloat16"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over numbers of ``dtype`` are taken: itself if float64 or complex, else float32."""
    return dtype if dtype == torch.float64 or dtype.is_complex else torch.float32


def without_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """``function`` with its operations in the dtypes of their operands.

    Autocast takes products of matrices in a half type. What is said to have the precision of its argument must not
    have that of bfloat16 because a caller is within autocast.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                with torch.autocast(kind, enabled=False):
                    return call(*args, **kwargs)
        return function(*args, **kwargs)

    return call
