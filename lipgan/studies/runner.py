"""Units of work: finished ones are lines of a file, the others are computed, by one process or by several.

Several processes are workers of one, or, for machines that share a file system, a team: each member takes every n-th
unit and writes a file of its own, and the first member brings the files together.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from lipgan._files import write_atomically
from lipgan.studies.study import Finished, Settings, Study, Unit
from lipgan.training.distributed import ProcessLostError

__all__ = ["UNITS", "compute", "contribute", "finish", "read", "write"]

UNITS = "units.jsonl"

# What the first member of a team waits before it looks again for what the others have finished.
_PATIENCE = 0.5

_NUMBERS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def compute(run: Callable[[Settings, Unit], dict[str, Any]], settings: Settings, unit: Unit) -> Finished:
    """One unit, on one thread, from random numbers that follow from it: the same result in whatever process."""
    start = time.perf_counter()
    threads = torch.get_num_threads()
    digest = hashlib.sha256(_key(unit).encode()).digest()
    try:
        torch.set_num_threads(1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(digest[:7], "big"))
            result = run(settings, unit)
    finally:
        torch.set_num_threads(threads)
    # As it will be read: a run that is resumed has the same numbers as one that is not.
    return Finished(dict(unit), _decoded(json.loads(_line(result))), time.perf_counter() - start)


def read(path: Path, study: str, settings: Settings) -> list[Finished]:
    """The units in a file, without a last line that was cut short; none if there is no file.

    Raises:
        ValueError: they are of another study or of other settings, or the file is none of this module.
        OSError: it cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    found: list[Finished] = []
    # What follows the last end of a line was being written when its process was killed.
    for number, line in enumerate(lines[:-1], 1):
        try:
            entry = json.loads(line)
            if number > 1:
                found.append(Finished(entry["unit"], _decoded(entry["result"]), float(entry["seconds"])))
                continue
            header = (entry["study"], entry["settings"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is damaged in line {number}; replace the run by --overwrite") from None
        if header[0] != study:
            raise ValueError(f"{path} is of the study {header[0]}, not of {study}")
        if header[1] != json.loads(_line(settings)):
            raise ValueError(
                f"{path} was made with other settings ({_differences(header[1], settings)}); take another --out, or "
                "replace the run by --overwrite"
            )
    return found


def finish(
    study: Study,
    settings: Settings,
    units: Sequence[Unit],
    folder: Path,
    *,
    workers: int = 1,
    team: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Finished]:
    """All units, in order: those that the folder has, and the others, each of which is added to it when it is done.

    Args:
        folder: exists, and nobody but the team writes there.
        workers: processes; with 1 it is this one.
        team: how many members share the work; the others call `contribute`, and this one waits for them.
        progress: is told how many of how many units are there.

    Raises:
        ValueError, OSError: as `read`; a disk that is full.
        ProcessLostError: a process was killed.
    """
    done = _known(study, settings, folder)
    total = len(units)

    def tell() -> None:
        progress(sum(_key(unit) in done for unit in units), total)

    tell()
    own = folder / UNITS
    write(own, study.name, settings, list(done.values()))
    # Closed at once when the loop is left, so that no process goes on for a caller that has failed.
    with closing(_append(own, study, settings, _share(units, done, 0, team), workers)) as appended:
        for finished in appended:
            done[_key(finished.unit)] = finished
            tell()
    while any(_key(unit) not in done for unit in units):
        time.sleep(_PATIENCE)
        before = len(done)
        done |= _known(study, settings, folder)
        if len(done) > before:
            tell()
    parts = _parts(folder)
    if parts:
        write(own, study.name, settings, list(done.values()))
        for path in parts:
            path.unlink()
    return [done[_key(unit)] for unit in units]


def contribute(
    study: Study, settings: Settings, units: Sequence[Unit], folder: Path, *, member: int, team: int, workers: int = 1
) -> None:
    """The share of member 1, 2, ... of a team, into a file of its own, which `finish` of member 0 takes up.

    Raises:
        ValueError, OSError, ProcessLostError: as `finish`.
    """
    share = _share(units, _known(study, settings, folder), member, team)
    if share:
        own = folder / f"units-{member}.jsonl"
        write(own, study.name, settings, read(own, study.name, settings))
        with closing(_append(own, study, settings, share, workers)) as appended:
            for _ in appended:
                pass


def _known(study: Study, settings: Settings, folder: Path) -> dict[str, Finished]:
    # The parts first: they are removed after their units have come into the whole.
    paths = [*_parts(folder), folder / UNITS]
    return {_key(finished.unit): finished for path in paths for finished in read(path, study.name, settings)}


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("units-*.jsonl"))


def _share(units: Sequence[Unit], done: Mapping[str, Finished], member: int, team: int) -> list[Unit]:
    """By the place of a unit among all, which does not depend on when a member looks."""
    return [unit for place, unit in enumerate(units) if place % team == member and _key(unit) not in done]


def write(path: Path, study: str, settings: Settings, units: Sequence[Finished]) -> None:
    """A file of these units, whole or not at all, as `read` takes it.

    Raises:
        OSError: it cannot be written.
    """
    header = _line({"study": study, "settings": dict(settings)})
    write_atomically(path, "".join([header, *(_line(_entry(unit)) for unit in units)]).encode())


def _append(
    path: Path, study: Study, settings: Settings, units: Sequence[Unit], workers: int
) -> Generator[Finished, None, None]:
    """Each unit when it is done and on the disk."""
    with path.open("ab") as file, closing(_computed(study, settings, units, workers)) as computed:
        for finished in computed:
            file.write(_line(_entry(finished)).encode())
            file.flush()
            os.fsync(file.fileno())
            yield finished


def _computed(study: Study, settings: Settings, units: Sequence[Unit], workers: int) -> Generator[Finished, None, None]:
    if workers == 1 or len(units) < 2:
        for unit in units:
            yield compute(study.run, settings, unit)
        return
    with _pool(min(workers, len(units))) as pool:
        futures = [pool.submit(compute, study.run, dict(settings), dict(unit)) for unit in units]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise ProcessLostError(
                "a process of the study was killed, perhaps for memory; the units that were finished are kept, and the "
                "same command goes on with fewer --workers"
            ) from None


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with the block, and with this process, whatever ends it."""
    before = set(multiprocessing.active_children())
    # Spawned: a fork of a process with PyTorch's threads may stand still.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _prepare)
    try:
        yield pool
    except BaseException:
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare() -> None:
    # Ctrl-C goes to every process of the terminal; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _key(unit: Unit) -> str:
    return json.dumps(dict(unit), sort_keys=True)


def _entry(finished: Finished) -> dict[str, Any]:
    return {"unit": finished.unit, "result": finished.result, "seconds": round(finished.seconds, 3)}


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(_encoded(value), allow_nan=False) + "\n"


def _encoded(value: Any) -> Any:
    """With words for the numbers that JSON lacks."""
    if isinstance(value, Mapping):
        return {name: _encoded(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encoded(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _decoded(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_decoded(entry) for entry in value]
    return _NUMBERS.get(value, value) if isinstance(value, str) else value


def _differences(old: Mapping[str, Any], new: Settings) -> str:
    names = [name for name in sorted({*old, *new}) if old.get(name) != json.loads(_line(new)).get(name)]
    return "; ".join(f"{name} {old.get(name)} there and {new.get(name)} here" for name in names[:3])
