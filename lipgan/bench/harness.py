"""Timing that can be trusted a little: variants interleaved in one run, medians, ratios."""

from __future__ import annotations

import ctypes
import datetime
import functools
import gc
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

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
_CACHED_SECONDS = 0.1
# Of one that takes longer than this, what is done once per process is a small part, so that a warm-up counts;
_LONG_SECONDS = 1.0
# and of one that takes longer than this, two are enough.
_LONGEST_SECONDS = 3.0

#: What `interleave` took since `take_quartiles`, in the order of the calls.
_quartiles: list[dict[str, Any]] = []


def interleave(
    variants: Mapping[str, Callable[[], T]],
    *,
    seconds: float,
    warmup: int = 2,
    rounds: int = 3,
    between: Callable[[], object] | None = None,
    check: Callable[[dict[str, T]], object] | None = None,
) -> dict[str, float]:
    """Median seconds of a call of each variant; the variants take turns in every round.

    A turn is one call that is not counted, then calls for 20 ms, and at least one. Where a call takes more than a tenth
    of a second, a turn is one call, which counts, and where it takes more than a second, the warm-ups are turns. With
    ``between``, a turn is one call, which counts. `take_quartiles` has the spread of the times.

    Args:
        variants: name to function; what it returns is dropped outside of the time.
        seconds: rounds go on until this long after the first call; then only variants go on that have not had their
            turns.
        warmup: calls of each before the first round, at least one if there is a check.
        rounds: the least number of turns of each, but two of calls of more than three seconds.
        between: runs before each call, outside of the time, such as `Caches.empty`.
        check: gets the result of the first call of each, before a second one; raises if they don't agree.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    turns = dict.fromkeys(variants, 0)
    last = dict.fromkeys(variants, 0.0)  # seconds of the latest call
    results: dict[str, T] = {}

    def call(name: str, *, counted: bool) -> T:
        start = time.perf_counter()
        result = variants[name]()
        last[name] = time.perf_counter() - start
        if counted or last[name] > _LONG_SECONDS:
            times[name].append(last[name])
        return result

    def due(name: str, over: bool) -> bool:
        least = min(rounds, 2) if last[name] > _LONGEST_SECONDS else rounds
        return turns[name] < least or not over

    begin = time.perf_counter()
    for k in range(max(warmup, check is not None)):
        for name in variants:
            if k > 0 and last[name] > _LONG_SECONDS:
                continue
            result = call(name, counted=False)
            turns[name] = len(times[name])
            if k == 0 and check is not None:
                results[name] = result
            del result
        if k == 0 and check is not None:
            check(results)
            results.clear()
    while waiting := [name for name in variants if due(name, time.perf_counter() - begin >= seconds)]:
        for name in waiting:
            if between is not None:
                between()
            elif last[name] <= _CACHED_SECONDS:
                variants[name]()
            turn = time.perf_counter()
            while True:
                call(name, counted=True)
                if between is not None or time.perf_counter() - turn > _TURN_SECONDS:
                    break
            turns[name] += 1
    medians = {name: statistics.median(values) for name, values in times.items()}
    _quartiles.append({"times": {name: _quartiles_of(values) for name, values in times.items()}})
    return medians


def _quartiles_of(seconds: list[float]) -> dict[str, float]:
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else 3 * seconds
    return {"calls": len(seconds), "lower": lower, "median": median, "upper": upper}


def take_quartiles() -> list[dict[str, Any]]:
    """The quartiles and the number of calls of all that `interleave` has timed since this was called, in seconds.

    Each with the case, where it was `in_fresh_process`.
    """
    taken = list(_quartiles)
    _quartiles.clear()
    return taken


class Caches:
    """What other work leaves in the caches in place of the data of a call: the rest of a training step, say."""

    def __init__(self, numbers: int = 16_000_000) -> None:
        self._numbers = torch.ones(numbers)

    def empty(self) -> None:
        """Read and write 64 MB."""
        self._numbers.mul_(1.0)


# A process that takes longer than this stands still.
_PATIENCE_SECONDS = 900.0


def prepare_processes(modules: Iterable[str]) -> None:
    """Begin to import modules in the process of which those of `in_fresh_process` are copies."""
    if _CONTEXT == "forkserver":
        from multiprocessing import forkserver  # not on Windows

        multiprocessing.set_forkserver_preload([*modules])
        forkserver.ensure_running()


def in_fresh_process(function: Callable[..., T], *args: Any) -> T:
    """``function(*args)`` in a process of its own, with as many threads as this one.

    The allocator of the C library adapts to what a process has freed: how often PyTorch's temporaries cost page faults
    would depend on the benchmark that ran before. The process is a copy of one that has imported the benchmarks and
    computed nothing (on Linux; elsewhere it is a new one).

    Raises:
        RuntimeError: the process has ended without a result.
        TimeoutError: it has none after a quarter of an hour.
    """
    context: Any = multiprocessing.get_context(_CONTEXT)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, torch.get_num_threads(), function, args))
    process.start()
    sender.close()
    case = f"{function.__name__}({', '.join(map(_described, args))})"
    try:
        if not receiver.poll(_PATIENCE_SECONDS):
            raise TimeoutError(f"{case} has no result after {_PATIENCE_SECONDS:.0f} seconds")
        error, trace, result, quartiles = receiver.recv()
        process.join(5.0)  # torch's compiler has processes to end
    except EOFError:
        process.join()
        raise RuntimeError(f"the process of {case} ended with status {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    _quartiles.extend({"case": case, **taken} for taken in quartiles)
    if error is not None:
        raise error from RuntimeError(f"in the process of {case}:\n{trace}")
    return cast(T, result)


# Forks of a process that has threads may stand still; the one that forks here has none of PyTorch's.
_CONTEXT = "forkserver" if sys.platform == "linux" else "spawn"


def _answer(sender: Any, threads: int, function: Callable[..., object], args: tuple[Any, ...]) -> None:
    gc.freeze()  # Collections do not go through what was imported, be it by one benchmark or by all.
    torch.set_num_threads(threads)
    take_quartiles()
    try:
        result = function(*args)
    except Exception as error:
        sender.send((error, traceback.format_exc(), None, []))
    else:
        sender.send((None, "", result, take_quartiles()))


def _described(value: Any) -> str:
    if isinstance(value, functools.partial):
        return f"{value.func.__name__}({', '.join(map(_described, value.args))})"
    return repr(value)


def copy_bandwidth(numbers: int = 32_000_000) -> float:
    """Bytes per second, read and written, of ``Tensor.copy_`` between two float32 tensors far larger than a cache."""
    source, target = torch.ones(numbers), torch.zeros(numbers)
    seconds = interleave({"copy": lambda: target.copy_(source)}, seconds=0.3)["copy"]
    return 2 * 4 * numbers / seconds


def product_rate(rows: int, inner: int, columns: int, dtype: torch.dtype) -> float:
    """Multiplications per second of ``torch.mm`` of rows x inner by inner x columns."""
    a, b = torch.ones(rows, inner, dtype=dtype), torch.ones(inner, columns, dtype=dtype)
    seconds = interleave({"product": lambda: torch.mm(a, b)}, seconds=0.3)["product"]
    return rows * inner * columns / seconds


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


# What a figure comes from, in a clone.
_SOURCES = ("lipgan", "csrc", "kernels", "CMakeLists.txt", "setup.py")


def _commit() -> str:
    """The last one that changed the sources, where they lie in a clone; with a plus sign where they differ from it."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return "-"

    def git(*words: str) -> str:
        words = ("git", "-C", str(folder), *words, "--", *_SOURCES)
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("log", "-1", "--format=%h") + ("+" if git("status", "--porcelain") else "")
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
