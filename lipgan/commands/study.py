"""``lipgan study``: claims of the lectures, seen to happen: figure, table and page of each."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Callable
from pathlib import Path

from lipgan._choices import STUDIES
from lipgan._files import write_atomically
from lipgan.commands.console import find_device, say
from lipgan.commands.names import check_study
from lipgan.studies import Analysis, Study, contribute, get, run_study
from lipgan.studies.page import overview
from lipgan.studies.report import PAGE

__all__ = ["main"]


def main(args: argparse.Namespace) -> None:
    """Run the studies that the arguments name, and print the verdict on each claim.

    Under torchrun its processes share the units of work, and the first one writes and prints.

    Raises:
        ValueError, OSError: bad input, or files that cannot be written, in one sentence.
    """
    check_study(args)
    if args.list:
        width = max(map(len, STUDIES))
        print("\n".join(f"{name:<{width}}  {title}" for name, title in STUDIES.items()))
        return
    if args.device is not None and find_device(args.device).type != "cpu":
        raise ValueError(f"--device must be cpu for studies, which run on --workers processes, got {args.device!r}")
    out: Path = args.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is not a folder")
    member, team = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if team > 1 and args.overwrite:
        raise ValueError("--overwrite is not for several processes of torchrun: remove the folder before")
    done: list[tuple[Study, Analysis]] = []
    for name in STUDIES if args.name == "all" else [args.name]:
        study = get(name)
        if member:
            seeds = {"seeds": args.seeds, "first_seed": args.seed or 0}
            contribute(study, out, member=member, team=team, quick=args.quick, workers=args.workers, **seeds)
            continue
        with _Bar(name) as progress:
            analysis = run_study(
                study,
                out,
                quick=args.quick,
                seeds=args.seeds,
                first_seed=args.seed or 0,
                workers=args.workers,
                team=team,
                overwrite=args.overwrite,
                progress=progress,
            )
        done.append((study, analysis))
        print(f"{name}: {analysis.verdict}")
        for claim, finding in zip(study.claims, analysis.findings, strict=True):
            line = f"{claim.key}: {finding.verdict}: {finding.seen}"
            print(textwrap.fill(line, 110, initial_indent="  ", subsequent_indent="    "))
        print(f"  see {out / name / PAGE}", flush=True)
    if args.name == "all" and not member:
        write_atomically(out / PAGE, overview(done).encode())
        print(f"see {out / PAGE}")


class _Bar:
    """Units of work on stderr: a bar where somebody watches, else a line at the start."""

    def __init__(self, name: str) -> None:
        # Imported here, as by the other commands.
        from tqdm import tqdm

        self._name = name
        self._said = False
        self._bar = tqdm(desc=name, unit="unit", disable=None, leave=False)

    def __enter__(self) -> Callable[[int, int], None]:
        return self._update

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def _update(self, done: int, total: int) -> None:
        if not self._said:
            self._said = True
            found = f", {done} of them finished before" if done else ""
            say(f"{self._name}: {total} units of work{found}")
        self._bar.total = total
        self._bar.update(done - self._bar.n)
