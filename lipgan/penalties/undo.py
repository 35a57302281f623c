"""What a critic changes while it runs, so that it can run again as if it had not."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors in arguments or results of an operation."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, (list, tuple)):
        return [tensor for item in result for tensor in tensors_of(item)]
    return []


@functools.cache
def mutates(func: Any) -> bool:
    """Whether an operation changes one of its arguments in place."""
    return bool(func._schema.is_mutable)


@functools.cache
def mutated_arguments(func: Any) -> list[tuple[int, str]]:
    """Places and names of the arguments that an operation changes."""
    arguments = func._schema.arguments
    return [(i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]


def mutated(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call of an operation changes."""
    return tensors_of(_mutated(func, args, kwargs))


def _mutated(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    return [args[place] if place < len(args) else kwargs.get(name) for place, name in mutated_arguments(func)]


_BATCH_NORMS = (
    torch.ops.aten.native_batch_norm.default,
    torch.ops.aten.cudnn_batch_norm.default,
    torch.ops.aten.miopen_batch_norm.default,
)


def changed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """`mutated`, and the running statistics of batch norm, of which its schema says nothing."""
    return tensors_of(changed_arguments(func, args, kwargs))


def changed_arguments(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """`changed`, whatever stands for the tensors."""
    if func in _BATCH_NORMS:
        return [*args[3:5]]
    return _mutated(func, args, kwargs) if mutates(func) else []


@functools.cache
def is_random(func: Any) -> bool:
    """Whether an operation draws random numbers."""
    return torch.Tag.nondeterministic_seeded in func.tags


def _place(tensor: Tensor) -> tuple[Any, ...] | None:
    """The memory of a tensor and where it lies in it, as ``Tensor.set_`` takes it; None for a sparse one."""
    try:
        return tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    except (NotImplementedError, RuntimeError):
        return None


def _differ(place: tuple[Any, ...] | None, other: tuple[Any, ...]) -> bool:
    return place is None or place[0]._cdata != other[0]._cdata or place[1:] != other[1:]


class Undo:
    """The content of tensors before they were changed, and the states of generators before their first draw.

    Args:
        x: the samples; the generators of their device count.
    """

    def __init__(self, x: Tensor) -> None:
        self._device = x.get_device() if x.is_cuda else None
        self._before: list[tuple[Tensor, Tensor, int, tuple[Any, ...] | None]] = []
        self._random_states: list[tuple[torch.Generator, Tensor]] = []

    def keep(self, tensor: Tensor) -> None:
        """Note the content of a tensor that is about to change."""
        version = 0 if tensor.is_inference() else tensor._version
        self._before.append((tensor, tensor.detach().clone(), version, _place(tensor)))

    def keep_random_state(self, generator: torch.Generator | None = None) -> None:
        """Note the state of a generator, by default of those of the devices, before its first draw."""
        generators = [generator] if generator is not None else [torch.default_generator]
        if generator is None and self._device is not None:
            generators.append(torch.cuda.default_generators[self._device])
        for generator in generators:
            if all(generator is not saved for saved, _ in self._random_states):
                self._random_states.append((generator, generator.get_state()))

    @torch.no_grad()
    def restore(self) -> None:
        """Give buffers that the critic changed (running means, singular vectors), and the random state, back."""
        for target, before, version, place in reversed(self._before):
            if place is not None and _differ(_place(target), place):  # transposed, squeezed or resized in place
                target.set_(*place)
            target.copy_(before)
            if not target.is_inference():
                # Autograd may have saved it for the backward of an earlier forward pass, and finds what it saved.
                torch._C._autograd._unsafe_set_version_counter((target,), (version,))
        for generator, state in self._random_states:
            generator.set_state(state)
