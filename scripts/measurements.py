#!/usr/bin/env python3
"""The tables of docs/measurements.md and README.md, from what ``lipgan bench ... --json FILE`` wrote.

    python scripts/measurements.py docs/measurements/*.json

A page says where a table goes, by the benchmark, the number of the table in it, and the columns that are shown::

    <!-- table: frechet 0: d, lipgan ms, to sqrtm -->
    (the table)
    <!-- end -->

``<!-- table: machine -->`` stands for the facts of the machine, ``<!-- table: summary -->`` for the table of the
README. Of several runs, a cell is the median; that of a ratio is followed by the least and the largest. A benchmark
that no file has is an error: no figure stays that was not seen.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

from lipgan._files import write_atomically
from lipgan.bench.harness import format_cell

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "docs" / "measurements.md", ROOT / "README.md")

_MARK = re.compile(r"(<!-- table: (?P<what>[^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)

Run = dict[str, Any]

#: Rows of the README: what, against what, the benchmark, its table, the row by the cells that tell it, and the columns.
SUMMARY: list[tuple[str, str, str, int, dict[str, Any], str, str]] = [
    *(
        (
            f"spectral norm, {model}, forward and backward",
            "PyTorch",
            "spectral-norm",
            0,
            {"model": model},
            "torch ms",
            "grouped ms",
        )
        for model in ("MLP 2-512-512-512-1", "SNGAN-32 critic", "ResNet-128 critic")
    ),
    *(
        (
            f"gradient penalty, {critic}",
            "double backward",
            "gradient-penalty",
            0,
            {"critic": critic},
            "torch ms",
            "lipgan ms",
        )
        for critic in ("DCGAN-32, batch 64", "ResNet-32, batch 16", "MLP 2-128-128-128-1, batch 256")
    ),
    (
        "Frechet distance, 2048 features",
        "`scipy.linalg.sqrtm` (pytorch-fid)",
        "frechet",
        0,
        {"d": 2048},
        "sqrtm ms",
        "lipgan ms",
    ),
    (
        "Frechet distance, 2048 features",
        "`torch.linalg.eigvals` (torchmetrics)",
        "frechet",
        0,
        {"d": 2048},
        "eigvals ms",
        "lipgan ms",
    ),
    (
        "training SN-GAN on digits",
        "plain PyTorch",
        "step",
        0,
        {"recipe": "SN-GAN on digits"},
        "torch steps/s",
        "lipgan steps/s",
    ),
]


def read(paths: list[Path]) -> list[Run]:
    """The runs in files; ValueError for a file that is no such run."""
    runs = []
    for path in paths:
        run = json.loads(path.read_text())
        if not isinstance(run, dict) or not {"machine", "results"} <= run.keys():
            raise ValueError(f"{path} must be what lipgan bench --json writes, got no machine and results in it")
        runs.append(run)
    return runs


def machine(runs: list[Run]) -> str:
    """A sentence on where and when the runs were made; ValueError for runs of different machines."""
    facts = [run["machine"] for run in runs]
    for key in ("cpu", "cores", "threads", "isa", "python", "torch"):
        if len({fact[key] for fact in facts}) > 1:
            raise ValueError(f"the runs must be of one machine, got {sorted({fact[key] for fact in facts})} for {key}")
    first = facts[0]
    dates = sorted({fact["date"] for fact in facts})
    commits = sorted({fact["commit"] for fact in facts})
    names = [name for run in runs for name in run["results"]]
    most = max(names.count(name) for name in names)
    return (
        f"{first['cpu']}, {first['cores']} cores, {first['threads']} threads, {first['isa']}, {first['system']}, "
        f"Python {first['python']}, torch {first['torch']}; {', '.join(dates)}, commit {', '.join(commits)}; "
        + (f"medians of up to {most} runs, in brackets the least and the largest ratio." if most > 1 else "one run.")
    )


def table(runs: list[Run], name: str, number: int, columns: list[str] | None) -> str:
    """One table as Markdown; ValueError where no run has it, or one has other rows."""
    found = [run["results"][name][number] for run in runs if len(run["results"].get(name, ())) > number]
    if not found:
        raise ValueError(f"the files must hold the benchmark {name}, got none with its table {number}")
    shown = found[0]["columns"] if columns is None else columns
    for column in shown:
        if column not in found[0]["columns"]:
            raise ValueError(f"{name} {number} has no column {column!r}, got {', '.join(found[0]['columns'])}")
    if len({len(one["rows"]) for one in found}) > 1:
        raise ValueError(f"the runs must have the same rows in {name} {number}")
    rows = [
        [_cell(column, [one["rows"][k].get(column, "") for one in found]) for column in shown]
        for k in range(len(found[0]["rows"]))
    ]
    widths = [max(len(line[k]) for line in [shown, *rows]) for k in range(len(shown))]
    lines = [shown, *rows]
    texts = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([texts[0], rule, *texts[1:]])


def _is_ratio(column: str) -> bool:
    return "ratio" in column or column.startswith(("to ", "prepared to ")) or " over " in column


def _cell(column: str, values: list[Any]) -> str:
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(numbers) < len(values):
        return format_cell(values[0])
    text = format_cell(statistics.median(numbers))
    if _is_ratio(column) and len(numbers) > 1:
        text += f" ({format_cell(min(numbers))} to {format_cell(max(numbers))})"
    return text


def summary(runs: list[Run]) -> str:
    """The table of the README."""
    lines = ["| | against | before | lipgan | times as fast |", "|---|---|---|---|---|"]
    for what, against, name, number, key, before, ours in SUMMARY:
        rows = [
            row
            for run in runs
            if name in run["results"]
            for row in run["results"][name][number]["rows"]
            if all(row[column] == value for column, value in key.items())
        ]
        if not rows:
            raise ValueError(f"the files must hold the row {key} of {name} {number}, got none")
        # Of speeds, not of times, the quotient is the other way around.
        ratios = [row[ours] / row[before] if before.endswith("/s") else row[before] / row[ours] for row in rows]
        first, second = (
            _with_unit(column, statistics.median(row[column] for row in rows)) for column in (before, ours)
        )
        lines.append(f"| {what} | {against} | {first} | {second} | {statistics.median(ratios):.3g} |")
    return "\n".join(lines)


def _with_unit(column: str, value: float) -> str:
    if column.endswith("/s"):
        return f"{value:.1f} steps/s"
    return f"{value / 1000:.2f} s" if value >= 1000 else f"{format_cell(value)} ms"


def fill(page: str, runs: list[Run]) -> str:
    """The page with its tables made anew."""

    def replacement(match: re.Match[str]) -> str:
        what, _, columns = match["what"].partition(":")
        if what == "machine":
            text = machine(runs)
        elif what == "summary":
            text = summary(runs)
        else:
            name, _, number = what.strip().partition(" ")
            shown = [column.strip() for column in columns.split(",")] if columns else None
            text = table(runs, name, int(number), shown)
        return f"{match[1]}\n{text}\n\n{match[3]}"

    return _MARK.sub(replacement, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    runs = read(parser.parse_args().files)
    pages = {path: fill(path.read_text(), runs) for path in PAGES}
    for path, text in pages.items():
        write_atomically(path, text.encode())


if __name__ == "__main__":
    main()
