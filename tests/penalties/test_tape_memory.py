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
    try:
        penalty = lipgan.gradient_penalty(critic, real, fake, engine="fused")
        assert seen[0]() is None
        assert gc.collect() == 0
    finally:
        gc.enable()
    assert penalty.requires_grad
