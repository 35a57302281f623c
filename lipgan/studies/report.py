"""The folder of a study: units of work, figure, table, page, verdicts."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

import lipgan
from lipgan._files import check_destination, remove_leftovers, write_atomically
from lipgan.studies import figures, page, runner
from lipgan.studies.study import Analysis, Study
from lipgan.training.lock import locked

__all__ = ["FILES", "PAGE", "contribute", "run_study"]

PAGE = "index.html"
#: What a folder of a study holds.
FILES = (runner.UNITS, "figure.png", "figure.svg", "table.csv", "table.md", "verdicts.json", PAGE)


def run_study(
    study: Study,
    out: Path,
    *,
    quick: bool = False,
    seeds: int | None = None,
    first_seed: int = 0,
    workers: int = 1,
    team: int = 1,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Analysis:
    """Run a study, or what is left of it, and write its files into the folder of its name in ``out``.

    Args:
        quick: with the settings of a short run.
        seeds: how many; None for the study's own number.
        first_seed: the others follow.
        workers: processes.
        team: how many share the work, on this machine or others that see ``out``; all but this one call `contribute`.
        overwrite: forget the units that the folder has, instead of going on with them.
        progress: is told how many of how many units are there.

    Raises:
        ValueError: the folder holds units of other settings, or another process works in it.
        OSError: a file cannot be read or written.
        ProcessLostError: a process was killed.
    """
    folder = out / study.name
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    settings = study.settings(quick)
    every = _every_seed(study, quick, seeds, first_seed)
    with ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(folder))
        remove_leftovers(folder, FILES)
        if overwrite:
            for path in folder.glob("units*.jsonl"):
                path.unlink()
        for name in FILES:
            check_destination(folder / name)
        units = study.units(settings, every)
        rows = runner.finish(study, settings, units, folder, workers=workers, team=team, progress=progress)
        analysis = study.analyse(settings, rows)
        with figures.style():
            figure = study.draw(settings, rows)
        svg = figures.as_svg(figure)
        text = page.render(
            study,
            settings,
            analysis,
            svg,
            seeds=every,
            units=len(rows),
            seconds=sum(row.seconds for row in rows),
            command=_command(study, quick, every),
            machine=_machine(),
        )
        verdicts = {
            "study": study.name,
            "verdict": analysis.verdict,
            "claims": [
                {"claim": claim.text, "source": claim.source, "rule": claim.rule, "verdict": found.verdict}
                | {"seen": found.seen}
                for claim, found in zip(study.claims, analysis.findings, strict=True)
            ],
            "quick": quick,
            "seeds": every,
            "settings": settings,
            "lipgan": lipgan.__version__,
        }
        contents = {
            "figure.png": figures.as_png(figure),
            "figure.svg": f'<?xml version="1.0" encoding="utf-8"?>\n{svg}\n'.encode(),
            "table.csv": analysis.table.csv().encode(),
            "table.md": analysis.table.markdown().encode(),
            "verdicts.json": (json.dumps(verdicts, indent=2) + "\n").encode(),
            PAGE: text.encode(),
        }
        for name, content in contents.items():
            write_atomically(folder / name, content)
    return analysis


def contribute(
    study: Study,
    out: Path,
    *,
    member: int,
    team: int,
    quick: bool = False,
    seeds: int | None = None,
    first_seed: int = 0,
    workers: int = 1,
) -> None:
    """Compute the share of member 1, 2, ... of a team of which member 0 calls `run_study` with the same arguments.

    Raises:
        ValueError, OSError, ProcessLostError: as `run_study`.
    """
    folder = out / study.name
    folder.mkdir(parents=True, exist_ok=True)
    settings = study.settings(quick)
    units = study.units(settings, _every_seed(study, quick, seeds, first_seed))
    runner.contribute(study, settings, units, folder, member=member, team=team, workers=workers)


def _every_seed(study: Study, quick: bool, seeds: int | None, first: int) -> list[int]:
    return list(range(first, first + (study.seeds[quick] if seeds is None else seeds)))


def _command(study: Study, quick: bool, seeds: Sequence[int]) -> str:
    words = ["lipgan", "study", study.name]
    if quick:
        words.append("--quick")
    if len(seeds) != study.seeds[quick]:
        words += ["--seeds", str(len(seeds))]
    if seeds[0]:
        words += ["--seed", str(seeds[0])]
    return shlex.join(words)


def _machine() -> str:
    return (
        f"lipgan {lipgan.__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} on {platform.machine()}"
    )
