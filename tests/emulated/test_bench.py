"""lipgan bench --device on the emulated device: what is timed lies there, and nothing of it comes from the host."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from emulated_device import DEVICE, crossings
from torch import nn

from lipgan.bench import device as on_device
from lipgan.bench import frechet, spectral_norm
from lipgan.bench import gradient_penalty as penalties


class Timer:
    """Calls each variant twice, and looks at what passes between host and device in the second call."""

    def __init__(self) -> None:
        self.calls = 0

    def interleave(self, variants: Mapping[str, Callable[[], Any]], **how: Any) -> dict[str, on_device.Times]:
        for run in variants.values():
            run()
            with crossings() as records:
                result = run()
            # A number that was computed on the host may go back: the trace of a distance.
            assert not [record for record in records if record.startswith("to device") and not record.endswith("[]")]
            for tensor in result if isinstance(result, tuple) else (result,):
                assert tensor.device == DEVICE
            self.calls += 1
        return {name: on_device.Times(2.0, 1.0) for name in variants}


def test_spectral_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral_norm, "MODELS", {"small": lambda: [(4, 3), (8, 4, 3, 3)]})
    timer = Timer()
    (table,) = spectral_norm.run_on(DEVICE, timer=timer)
    assert timer.calls == len(spectral_norm.VARIANTS)
    assert set(table.columns) == set(table.rows[0])
    assert (table.rows[0]["grouped device ms"], table.rows[0]["grouped host ms"]) == (2000.0, 1000.0)


def test_gradient_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    critic = functools.partial(nn.Sequential, nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 1))
    monkeypatch.setattr(penalties, "CASES", {"both": penalties.Case(critic, (5, 3), "r1+r2")})
    monkeypatch.setattr(penalties, "MORE_CASES", {})
    timer = Timer()
    (table,) = penalties.run_on(DEVICE, timer=timer)
    assert timer.calls == 2
    assert set(table.columns) == set(table.rows[0])


def test_frechet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frechet, "SIZES", [6])
    monkeypatch.setattr(frechet, "SAMPLES", 40)
    (table,) = frechet.run_on(DEVICE, timer=Timer())
    assert set(table.columns) == set(table.rows[0])


def test_the_flushed_memory_lies_on_the_device() -> None:
    class Event:
        def record(self) -> None:
            pass

        def elapsed_time(self, later: Any) -> float:
            return 5.0

    timer = on_device.Timer(DEVICE, Event, lambda device: None, flushed=64)
    assert timer.time(lambda: torch.zeros(2, device=DEVICE)).device == 5e-3
    assert timer._memory.device == DEVICE
