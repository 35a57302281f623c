"""The random numbers of a run, kept apart from the user's own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["PrivateRandom"]


class PrivateRandom:
    """A stream of torch's global random numbers that belongs to one run.

    Weight initialization, dropout and the like draw from the global generators. Inside
    ``with random.active():`` those stand where this run left them, outside where the user left them.

    Args:
        seed: where the stream starts.
        device: the device whose global generator is swapped too, beside the CPU's.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        self._active = False
        self._stored = [torch.Generator().manual_seed(seed).get_state()]
        if device.type == "cuda":
            self._stored.append(torch.Generator(device).manual_seed(seed).get_state())

    def _read(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device))
        return states

    def _restore(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self._device.type == "cuda" and len(states) > 1:
            torch.cuda.set_rng_state(states[1], self._device)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Swap the streams; not reentrant."""
        outside = self._read()
        self._restore(self._stored)
        self._active = True
        try:
            yield
        finally:
            self._active = False
            self._stored = self._read()
            self._restore(outside)

    def state(self) -> list[Tensor]:
        """Where the stream stands now: one byte tensor per generator."""
        return self._read() if self._active else self._stored

    def load_state(self, states: list[Tensor]) -> None:
        """Continue from ``states``, as `state` returned them."""
        self._stored = states
