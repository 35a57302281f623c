"""Data sets that fit in memory, by name.

`load` returns a `Dataset`: samples as one tensor, so that a batch is one gather, on whatever device they lie.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from lipgan.data.dataset import BatchOrder, Dataset
from lipgan.data.digits import digits
from lipgan.registry import lookup

__all__ = ["LOADERS", "BatchOrder", "Dataset", "load", "names"]

LOADERS: Mapping[str, Callable[[int], Dataset]] = MappingProxyType({"digits": digits})
DEFAULT_SIZE = 16


def names() -> list[str]:
    """The names that `load` knows, sorted."""
    return sorted(LOADERS)


def load(name: str, size: int = DEFAULT_SIZE) -> Dataset:
    """Load the data set called ``name`` with square images of ``size`` pixels a side.

    Raises:
        ValueError: unknown name (the message names the nearest ones), or a size that the data set cannot
            have.
    """
    return lookup(LOADERS, name, "data set")(size)
