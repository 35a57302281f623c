"""Timing that can be trusted a little: variants interleaved in one run, medians, ratios."""

from __future__ import annotations

import ctypes
import datetime
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass
class Table:
    """The outcome of one benchmark: rows of named cells, and notes that belong to them."""

    title: str
    columns: list[str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def render(self) -> str:
        """The table as Markdown, which reads well in a terminal too."""
        cells = [[format_cell(row.get(column, "")) for column in self.columns] for row in self.rows]
        widths = [max(len(line[k]) for line in [self.columns, *cells]) for k in range(len(self.columns))]

        def line(values: list[str]) -> str:
            return "| " + " | ".join(value.ljust(width) for value, width in zip(values, widths, strict=True)) + " |"

        rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
        body = [line(self.columns), rule, *map(line, cells)]
        return "\n".join([self.title, "", *body, *(["", *self.notes] if self.notes else [])])


def format_cell(value: Any) -> str:
    if isinstance(value, float):
        if 0 < abs(value) < 5e-3:
            return f"{value:.1e}"
        return f"{value:.2f}" if value < 100 else f"{value:.0f}"
    return str(value)


# A turn of a variant within a round: long enough for its own data to be in the caches, short against the drift of a
# machine.
_TURN_SECONDS = 0.02

# A call that takes longer than this gains nothing from caches that the call before it has filled.
_LONG_SECONDS = 1.0


def interleave(
    variants: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    warmup: int = 2,
    rounds: int = 5,
    between: Callable[[], object] | None = None,
) -> dict[str, float]:
    """Median seconds of a call of each variant; the variants take turns in every round.

    A turn is one call that is not counted, then calls for 20 ms, and at least one. Where a call takes more than a
    second, every call counts, and a turn is one of them. With ``between``, a turn is one call, which counts.

    Args:
        variants: name to function; what it returns is dropped outside of the time.
        seconds: rounds go on for about this long, and at least ``rounds`` times.
        warmup: calls of each before the first round.
        rounds: the least number of rounds.
        between: runs before each call, outside of the time, such as `Caches.empty`.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    long: set[str] = set()
    for _ in range(warmup):
        for name, run in variants.items():
            if name not in long:
                start = time.perf_counter()
                run()
                taken = time.perf_counter() - start
                if taken > _LONG_SECONDS:
                    long.add(name)
                    times[name].append(taken)
    begin = time.perf_counter()
    done = 0
    while done < rounds or time.perf_counter() - begin < seconds:
        for name, run in variants.items():
            if between is not None:
                between()
            elif name not in long:
                run()
            turn = time.perf_counter()
            while True:
                start = time.perf_counter()
                result = run()
                end = time.perf_counter()
                times[name].append(end - start)
                del result
                if between is not None or end - turn > _TURN_SECONDS:
                    break
        done += 1
    return {name: statistics.median(values) for name, values in times.items()}


class Caches:
    """What other work leaves in the caches in place of the data of a call: the rest of a training step, say."""

    def __init__(self, numbers: int = 16_000_000) -> None:
        self._numbers = torch.ones(numbers)

    def empty(self) -> None:
        """Read and write 64 MB."""
        self._numbers.mul_(1.0)


def in_fresh_process(function: Callable[..., T], *args: Any) -> T:
    """``function(*args)`` in a process of its own, with as many threads as this one.

    The allocator of the C library adapts to what a process has freed: how often PyTorch's temporaries cost page faults
    would depend on the benchmark that ran before.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return pool.submit(function, *args).result()


def copy_bandwidth(numbers: int = 32_000_000) -> float:
    """Bytes per second, read and written, of ``Tensor.copy_`` between two float32 tensors far larger than a cache."""
    source, target = torch.ones(numbers), torch.zeros(numbers)
    seconds = interleave({"copy": lambda: target.copy_(source)}, seconds=0.3)["copy"]
    return 2 * 4 * numbers / seconds


def peak_memory(run: Callable[[], object]) -> int | None:
    """Bytes by which the resident memory of the process rises while ``run`` runs, or None where it can't be told."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed before would hide what run takes
        reset.write_text("5")  # sets VmHWM back to the present VmRSS
        before = _kilobytes(status, "VmRSS")
        result = run()
        peak = _kilobytes(status, "VmHWM")
        del result
    except (OSError, AttributeError):
        return None
    return 1024 * max(0, peak - before)


def _kilobytes(status: Path, key: str) -> int:
    for line in status.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise OSError(f"{status} has no {key}")


def machine() -> dict[str, str]:
    """What a figure depends on beside the code."""
    from lipgan import __version__
    from lipgan.ops import _backend

    native = _backend.native()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": _commit(),
        "cpu": _cpu_name(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "isa": native.isa() if native else "-",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lipgan": __version__,
    }


def _commit() -> str:
    """Of the sources, where they lie in a clone; with a plus sign where they have changed since."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return "-"
    described = ["git", "-C", str(folder), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(described, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "-"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
