"""Tensors under the transforms of torch.func."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack


def active() -> bool:
    """Whether a transform of torch.func is being applied."""
    return torch._C._are_functorch_transforms_active()


def are_batched(grads: Sequence[Tensor]) -> bool:
    """Whether a backward is under a transform: of torch.func, or the older vmap of ``is_grads_batched=True``."""
    if torch.compiler.is_compiling():
        return False
    return active() or any(map(_functorch.is_legacy_batchedtensor, grads))


def overwrite(target: Tensor, value: Tensor) -> None:
    """``target.copy_(value)`` for a state that a transform may have captured, as a buffer of a module is.

    ``copy_`` itself is refused there. The state takes the values; no derivative goes through it. A state that is
    batched, such as the buffers of :func:`torch.func.stack_module_state`, takes one row per sample.

    Raises:
        RuntimeError: the value differs from sample to sample of a vmap, and the state does not.
    """
    interpreter = _functorch.peek_interpreter_stack()
    if interpreter is None:
        target.copy_(value)
        return
    level = interpreter.level()
    batched = [
        _functorch.is_batchedtensor(tensor) and _functorch.maybe_get_level(tensor) == level
        for tensor in (target, value)
    ]
    if batched[1] and not batched[0]:
        raise RuntimeError(
            "u and v cannot follow weights that differ from sample to sample of a vmap: pass the buffers batched, as "
            "torch.func.stack_module_state returns them, or call eval()"
        )
    places = [
        _functorch.maybe_get_bdim(tensor) if _functorch.is_batchedtensor(tensor) else 0 for tensor in (target, value)
    ]
    wrapped = [_functorch.maybe_get_level(tensor) == level for tensor in (target, value)]
    with temporarily_pop_interpreter_stack():
        if wrapped[0]:
            target = _functorch.get_unwrapped(target)
        if wrapped[1]:
            value = _functorch.get_unwrapped(value)
        if batched[0]:
            target = target.movedim(places[0], 0)
        if batched[1]:
            value = value.movedim(places[1], 0)
        overwrite(target, value)
