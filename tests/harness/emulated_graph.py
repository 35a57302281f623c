"""A CUDA graph of the emulated device: what a capture forbids, and what a replay does to fixed memory.

While a function is captured its operations are noted, and nothing is computed for good: what they change is put back,
and what they make holds NaN. A replay runs them again and writes what they make into the memory of the capture. As on
a GPU, a copy from or to the host, a number that Python reads and a size that it waits for are errors in a capture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import emulated_device
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

aten = torch.ops.aten
_MAKES_NOTHING = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}


class EmulatedGraph:
    """See `lipgan.penalties.graphed_step._CudaGraph`."""

    captures = 0
    replays = 0

    def __init__(self, function: Callable[[], Any], generators: Sequence[torch.Generator] = ()) -> None:
        type(self).captures += 1
        self._steps: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._before: list[tuple[Tensor, Tensor]] = []
        self._made: set[int] = set()
        state = torch.get_rng_state()
        emulated_device.capture = self._note
        try:
            with emulated_device.crossings() as records:
                self._records = records
                self.outcome = function()
                self._check()
        finally:
            emulated_device.capture = None
            torch.set_rng_state(state)
            for tensor, content in reversed(self._before):
                tensor.copy_(content)
            self._before.clear()
        for *_, out in self._steps:
            for tensor in out:
                _poison(tensor)

    def _check(self) -> None:
        if self._records:
            raise RuntimeError(f"operation not permitted when stream is capturing: {self._records[0]}")

    def _note(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._check()
        mutates = getattr(func, "_schema", None) is not None and func._schema.is_mutable
        if mutates or func is aten.native_batch_norm.default:
            for tensor in _tensors((args, kwargs)):
                if tensor.untyped_storage()._cdata not in self._made:
                    self._before.append((tensor, tensor.clone()))
        result = func(*args, **kwargs)
        made = _fresh(result, (args, kwargs))
        self._made |= {tensor.untyped_storage()._cdata for tensor in made}
        if made or mutates or not _tensors(result):  # views are of memory that others write
            self._steps.append((func, args, kwargs, made))
        return result

    def replay(self) -> None:
        type(self).replays += 1
        with torch.no_grad():
            for func, args, kwargs, made in self._steps:
                if str(getattr(func, "overloadpacket", func)).removeprefix("aten.") in _MAKES_NOTHING:
                    for tensor in made:
                        _poison(tensor)
                    continue
                for tensor, new in zip(made, _fresh(func(*args, **kwargs), (args, kwargs)), strict=True):
                    tensor.copy_(new)

    @staticmethod
    def warm_up(function: Callable[[], Any], device: torch.device) -> Any:
        return function()


def _tensors(items: Any) -> list[Tensor]:
    return [item for item in tree_flatten(items)[0] if isinstance(item, Tensor)]


def _fresh(result: Any, given: Any) -> list[Tensor]:
    """The results in memory of their own."""
    storages = {tensor.untyped_storage()._cdata for tensor in _tensors(given)}
    return [tensor for tensor in _tensors(result) if tensor.untyped_storage()._cdata not in storages]


def _poison(tensor: Tensor) -> None:
    if tensor.is_floating_point():
        tensor.detach().fill_(math.nan)
