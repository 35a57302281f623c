"""What reads the numbers of tensors below every dispatch mode, so that no operation tells of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lipgan.penalties.known import TENSORS

# What makes a tensor of data, by the place and the name of the data among its arguments.
_MAKING: dict[Any, tuple[int, str]] = {
    torch.tensor: (0, "data"),
    torch.as_tensor: (0, "data"),
    torch.asarray: (0, "obj"),
    Tensor.new_tensor: (1, "data"),
}
# What takes an index, in which there may be lists.
_INDEXING = {Tensor.__getitem__, Tensor.__setitem__}
# What writes numbers down.
_WRITING: set[Any] = {Tensor.__array__, Tensor.__repr__}
_NUMBERS = (bool, int, float, complex)


class Unseen(TorchFunctionMode):
    """Looks at the calls that may read numbers of tensors unseen, while it is active.

    `torch.tensor` and an index read the items of a list, whether these are tensors, or objects that convert one.

    Attributes:
        given: whether the data of the call that runs is of Python's numbers alone; None where no such call runs.
        refusal: why numbers have left a tensor, None if none have.
    """

    def __init__(self) -> None:
        super().__init__()
        self.given: bool | None = None
        self.refusal: str | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _MAKING:
            place, name = _MAKING[func]
            data = args[place] if place < len(args) else kwargs.get(name)
            self.given = type(data) in TENSORS or _is_of_numbers(data)
        elif func in _INDEXING:
            index = args[1] if type(args[1]) is tuple else (args[1],)
            self.given = type(args[0]) in TENSORS and all(map(_is_index, index))
        elif func in _WRITING:
            self.refusal = f"{func.__name__} of a tensor reads its numbers"
        try:
            return func(*args, **kwargs)
        finally:
            self.given = None


def _is_of_numbers(data: Any) -> bool:
    if type(data) in (list, tuple, torch.Size, range):
        return all(map(_is_of_numbers, data))
    if isinstance(data, (np.number, np.bool_)):
        return type(data).__module__ == "numpy"
    return type(data) in _NUMBERS


def _is_index(item: Any) -> bool:
    if type(item) is slice:
        return all(end is None or type(end) is int for end in (item.start, item.stop, item.step))
    return item is None or item is ... or type(item) in TENSORS or _is_of_numbers(item)
