"""Times on a GPU: those of the device and of the host apart, with the caches of the device flushed before each call."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

# Written before each call: more than twice the L2 cache of an H100 (50 MB), and as much as an MI300X's last level.
_FLUSHED_BYTES = 256 << 20


@dataclass(frozen=True)
class Times:
    """Medians of a call, in seconds.

    Attributes:
        device: from when the device begins with the call until it is done.
        host: until the call returns; the device may go on.
    """

    device: float
    host: float


def _cuda_event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


@dataclass
class Timer:
    """Times calls on a device.

    Args:
        device: a GPU.
        event: makes an event that takes the time of the device, as ``torch.cuda.Event(enable_timing=True)``.
        synchronize: waits for the device.
        flushed: bytes that are written before a call.
    """

    device: torch.device
    event: Callable[[], Any] = _cuda_event
    synchronize: Callable[[torch.device], None] = torch.cuda.synchronize
    flushed: int = _FLUSHED_BYTES
    _memory: Any = field(default=None, repr=False)

    def time(self, run: Callable[[], object]) -> Times:
        """One call."""
        if self._memory is None:
            self._memory = torch.empty(self.flushed, dtype=torch.int8, device=self.device)
        first, last = self.event(), self.event()
        self.synchronize(self.device)
        # The device is still writing while the host makes the call: what is timed does not wait for the host, unless
        # the host takes longer than that.
        self._memory.zero_()
        first.record()
        begin = time.perf_counter()
        result = run()
        host = time.perf_counter() - begin
        last.record()
        self.synchronize(self.device)
        del result
        return Times(first.elapsed_time(last) / 1e3, host)

    def interleave(
        self, variants: Mapping[str, Callable[[], object]], *, seconds: float, warmup: int = 5, rounds: int = 20
    ) -> dict[str, Times]:
        """Median times of a call of each variant; the variants take turns.

        Args:
            variants: name to function.
            seconds: rounds go on for about this long, and at least ``rounds`` times.
            warmup: calls of each before the first round; kernels are compiled in them.
            rounds: the least number of rounds.
        """
        for run in variants.values():
            for _ in range(warmup):
                run()
        self.synchronize(self.device)
        times: dict[str, list[Times]] = {name: [] for name in variants}
        collects = gc.isenabled()
        gc.disable()
        try:
            begin, done = time.perf_counter(), 0
            while done < rounds or time.perf_counter() - begin < seconds:
                for name, run in variants.items():
                    times[name].append(self.time(run))
                done += 1
        finally:
            if collects:
                gc.enable()
        return {
            name: Times(*(statistics.median(getattr(t, part) for t in taken) for part in ("device", "host")))
            for name, taken in times.items()
        }


#: What a table of times on a device says of them.
NOTES = (
    "Medians of single calls, which take turns; the caches of the device are flushed before each. device: by events,",
    "from when it begins with the call until it is done; host: until the call returns.",
)


def columns(variants: Iterable[str]) -> list[str]:
    """The columns of a table for the times of variants."""
    return [f"{name} {part} ms" for name in variants for part in ("device", "host")]


def cells(times: Mapping[str, Times]) -> dict[str, float]:
    """What stands in those columns."""
    return {f"{name} {part} ms": 1e3 * getattr(t, part) for name, t in times.items() for part in ("device", "host")}


def name_of(device: torch.device) -> str:
    """What a table calls the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
