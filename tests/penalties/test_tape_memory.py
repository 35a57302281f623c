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
    left = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            seen.clear()
            penalty = lipgan.gradient_penalty(critic, real, fake, engine="fused")
            assert seen[0]() is None
            left.append(gc.collect())
    finally:
        gc.enable()
    # Other threads of the process, such as a test runner's, may leave something of their own, but not three times.
    assert min(left) == 0, left
    assert penalty.requires_grad
