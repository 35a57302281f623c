"""lipgan bench --device: what the timer takes, and what is said where there is no form for a device."""

import argparse
from typing import Any

import pytest
import torch

from lipgan import bench
from lipgan.__main__ import main
from lipgan.bench import device as on_device
from lipgan.bench import kid


class Clock:
    """A device that does what it is asked in order, and takes the times that `work` says."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, []

    def work(self, name: str, milliseconds: float) -> None:
        self.log.append(name)
        self.now += milliseconds

    def event(self) -> Any:
        clock = self

        class Event:
            def record(self) -> None:
                clock.log.append("event")
                self.at = clock.now

            def elapsed_time(self, later: Any) -> float:
                return later.at - self.at

        return Event()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def timer_of(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> on_device.Timer:
    class Memory:
        def zero_(self) -> None:
            clock.work("flush", 100.0)

    timer = on_device.Timer(torch.device("cpu"), clock.event, lambda _: clock.log.append("wait"), flushed=8)
    monkeypatch.setattr(timer, "_memory", Memory())
    return timer


def test_a_call_is_timed_by_events_after_the_caches_are_flushed(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    timer = timer_of(clock, monkeypatch)
    times = timer.time(lambda: clock.work("run", 3.0))
    assert clock.log == ["wait", "flush", "event", "run", "event", "wait"]
    assert times.device == pytest.approx(3e-3)  # of the device's clock, without the flush
    assert 0 < times.host < 1.0  # of the host's own


def test_variants_take_turns_on_a_device(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    timer = timer_of(clock, monkeypatch)
    slow = iter([9.0, 2.0, 4.0, 50.0, 3.0])
    runs = {"a": lambda: clock.work("a", 1.0), "b": lambda: clock.work("b", next(slow))}
    times = timer.interleave(runs, seconds=0.0, warmup=1, rounds=4)
    assert [name for name in clock.log if name in runs] == ["a", "b"] * 5
    assert times["a"].device == pytest.approx(1e-3)
    assert times["b"].device == pytest.approx(3.5e-3)  # the median, without the call of the warm-up
    assert on_device.cells(times).keys() == set(on_device.columns(runs))


def test_memory_of_the_size_of_the_caches_is_written() -> None:
    timer = on_device.Timer(torch.device("cpu"), Clock().event, lambda _: None, flushed=4096)
    timer.time(lambda: None)
    assert timer._memory.nbytes == 4096


def arguments(**given: Any) -> argparse.Namespace:
    defaults = {"which": "kid", "json": None, "plot": None, "threads": None, "seed": 0, "seconds": 0.0, "device": None}
    return argparse.Namespace(**{**defaults, **given})


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
@pytest.mark.parametrize("name", ["spectral-norm", "all"])
def test_without_a_gpu_one_line_says_so(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", name, "--device", "cuda"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert "device 'cuda' cannot be used here" in output.err


def test_a_benchmark_without_a_form_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "find_device", lambda name: torch.device("meta"))
    monkeypatch.setattr(kid, "run", lambda **how: [])
    with pytest.raises(ValueError, match=r"lipgan bench kid has no form for meta: it times the CPU \(--device cpu\)"):
        bench.main(arguments(device="meta"))
    bench.main(arguments())  # the device was not asked for
    assert "kid has no form for meta: these are times of the CPU." in capsys.readouterr().out


def test_all_leaves_out_what_has_no_form(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[str, torch.device]] = []
    for name in ("spectral_norm", "gradient_penalty", "frechet"):
        module = getattr(__import__("lipgan.bench", fromlist=[name]), name)
        monkeypatch.setattr(module, "run_on", lambda device, name=name, **how: asked.append((name, device)) or [])
    monkeypatch.setattr(bench, "find_device", lambda name: torch.device("meta"))
    bench.main(arguments(which="all", device="meta"))
    assert asked == [(name, torch.device("meta")) for name in ("spectral_norm", "gradient_penalty", "frechet")]
    output = capsys.readouterr().out
    assert "overhead has no form for meta, and is left out." in output
    assert "times of the CPU" not in output
