"""What NumPy programs hand over, as the metrics take it."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["floating"]


def floating(value: ArrayLike) -> np.ndarray[Any, np.dtype[Any]]:
    """``value`` as an array, of float64 where it holds whole numbers. A mask stays, for the metrics to refuse."""
    array = np.asanyarray(value)
    return array.astype(np.float64) if array.dtype.kind in "biu" else array
