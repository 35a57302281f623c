"""What the tape holds in memory."""

from __future__ import annotations

import gc
import weakref

from tape_critics import VECTORS, after_linear, samples
from torch import Tensor

import lipgan


def test_nothing_is_left_behind() -> None:
    seen: list[weakref.ref[Tensor]] = []

    def watch(h: Tensor) -> Tensor:
        seen.append(weakref.ref(h))
        return h.sin()

    critic = after_linear(watch)().double()
    real, fake = samples(VECTORS)
    lipgan.gradient_penalty(critic, real, fake, engine="fused")  # the first call imports what it needs
    seen.clear()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        penalty = lipgan.gradient_penalty(critic, real, fake, engine="fused")
        assert seen[0]() is None
        gc.collect()
        # Other threads of the process, such as a test runner's, may leave something of their own.
        names = [f"{type(thing).__module__}.{type(thing).__qualname__}" for thing in gc.garbage]
        assert [name for name in names if name.startswith(("lipgan.", "torch."))] == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert penalty.requires_grad
