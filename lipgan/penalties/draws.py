"""Random draws as a compiler is given them, in the place of PyTorch's: which number goes where is as it was recorded.

A compiler lays intermediate results out as it likes, and takes some draws to pieces of its own. Where the memory of a
tensor is in another order, so are the numbers that are drawn into it. These operations stay what they are, and are
given tensors with the strides that they had.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

_library = torch.library.Library("lipgan", "FRAGMENT")  # type: ignore[no-untyped-call]
_TAGS = (torch.Tag.nondeterministic_seeded, torch.Tag.needs_exact_strides)
for _signature in (
    "draw(Tensor like, str name, float[] numbers) -> Tensor",
    "bernoulli(Tensor p) -> Tensor",
    "native_dropout(Tensor x, float p, bool? train) -> (Tensor, Tensor)",
):
    _library.define(_signature, tags=_TAGS)  # type: ignore[no-untyped-call]

# Draws that overwrite a tensor, by the names that `draw` takes.
_IN_PLACE: dict[Any, str] = {
    getattr(aten, name).default: name
    for name in ("normal_", "uniform_", "exponential_", "log_normal_", "cauchy_", "geometric_")
}
_IN_PLACE[aten.bernoulli_.float] = "bernoulli_"
_LIKE: dict[Any, tuple[str, list[float]]] = {
    aten.rand_like.default: ("uniform_", [0.0, 1.0]),
    aten.randn_like.default: ("normal_", [0.0, 1.0]),
}
_SAME: dict[Any, Any] = {
    aten.bernoulli.default: torch.ops.lipgan.bernoulli.default,
    aten.native_dropout.default: torch.ops.lipgan.native_dropout.default,
}
#: Operations whose result holds nothing that a draw into it would not overwrite.
FRESH = {aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default}


def overwrites(func: Any) -> bool:
    """Whether an operation fills its operand with numbers that are drawn."""
    return func in _IN_PLACE


def substitute(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]] | None:
    """Operation and arguments that stand for a draw, None for what is no draw or has options of its own.

    That for one which `overwrites` returns a new tensor.
    """
    if any(value not in (None, False) for value in kwargs.values()):
        return None
    if func in _IN_PLACE:
        return torch.ops.lipgan.draw.default, (args[0], _IN_PLACE[func], [float(number) for number in args[1:]])
    if func in _LIKE:
        return torch.ops.lipgan.draw.default, (args[0], *_LIKE[func])
    return (_SAME[func], tuple(args)) if func in _SAME else None


def _draw(like: Tensor, name: str, numbers: Sequence[float]) -> Tensor:
    result: Tensor = getattr(torch.empty_like(like), name)(*numbers)
    return result


def _native_dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    return torch.native_dropout(x, p, train)


def _dropout_fake(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)


for _key in ("CPU", "CUDA"):
    _library.impl("draw", _draw, _key)  # type: ignore[no-untyped-call]
    _library.impl("bernoulli", torch.bernoulli, _key)  # type: ignore[no-untyped-call]
    _library.impl("native_dropout", _native_dropout, _key)  # type: ignore[no-untyped-call]
torch.library.register_fake("lipgan::draw", lambda like, name, numbers: torch.empty_like(like), lib=_library)
torch.library.register_fake("lipgan::bernoulli", lambda p: p.new_empty(p.shape), lib=_library)
torch.library.register_fake("lipgan::native_dropout", _dropout_fake, lib=_library)
