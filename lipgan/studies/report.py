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

__all__ = ["FILES", "PAGE", "run_study"]

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
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Analysis:
    """Run a study, or what is left of it, and write its files into the folder of its name in ``out``.

    Args:
        quick: with the settings of a short run.
        seeds: how many; None for the study's own number.
        first_seed: the others follow.
        workers: processes.
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
    number = study.seeds[quick] if seeds is None else seeds
    every = list(range(first_seed, first_seed + number))
    with ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(folder))
        remove_leftovers(folder, FILES)
        if overwrite:
            (folder / runner.UNITS).unlink(missing_ok=True)
        for name in FILES:
            check_destination(folder / name)
        units = study.units(settings, every)
        rows = runner.finish(study, settings, units, folder, workers=workers, progress=progress)
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
