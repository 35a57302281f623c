"""The floating-point dtypes that the package serves, and those in which it accumulates."""

import torch

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

FLOATING_NAMES = "float32, float64, float16 or bfloat16"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over numbers of ``dtype`` are taken: itself if float64 or complex, else float32."""
    return dtype if dtype == torch.float64 or dtype.is_complex else torch.float32
