#!/usr/bin/env python3
"""The tables of docs/measurements.md and README.md, from what ``lipgan bench`` measured.

    python scripts/measurements.py --run 2            # all into docs/measurements/2.NAME.json; then the pages
    python scripts/measurements.py --run 2 kid fid    # these only
    python scripts/measurements.py                    # the pages, from all files of docs/measurements

A run goes on with the next benchmark where one fails, and leaves out those whose file is there already, measured of the
same commit. A page says where a table goes, by the benchmark, the number of the table in it, and the columns that are
shown::

    <!-- table: frechet 0: d, lipgan ms, to sqrtm -->
    (the table)
    <!-- end -->

``machine`` stands there for the facts of the machine, ``summary`` for the table of the README, ``exponents`` for how
times grow with sizes, ``slower sweep 0`` for a sentence on the rows whose ratio is below 1. Of several runs, a cell is
the median; that of a ratio is followed by the least and the largest. Of a table that no file has, the page says that it
is not measured yet.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
import traceback
from pathlib import Path
from typing import Any

from lipgan import bench
from lipgan._choices import BENCHMARKS
from lipgan._files import write_atomically
from lipgan.bench.harness import format_cell
from lipgan.bench.harness import machine as machine_here

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "docs" / "measurements.md", ROOT / "README.md")
FOLDER = ROOT / "docs" / "measurements"

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


#: How times grow: what, by which column of sizes, the benchmark, its table, the rows, the columns of times by what they
#: are called, what is to be added to the exponent (1 for a time per item), and the exponent that the arithmetic has.
EXPONENTS: list[tuple[str, str, str, int, dict[str, Any], dict[str, str], int, str]] = [
    (
        "spectral norm of n weights",
        "n",
        "spectral-norm",
        3,
        {},
        {name: name for name in ("torch", "per layer", "grouped")},
        1,
        "1",
    ),
    (
        "Frechet distance",
        "d",
        "frechet",
        0,
        {},
        {name: f"{name} ms" for name in ("sqrtm", "eigvals", "lipgan")},
        0,
        "3",
    ),
    *(
        (
            f"precision and recall, {dtype}",
            "n",
            "prdc",
            0,
            {"dtype": dtype},
            {name: f"{name} ms" for name in ("matrices", "lipgan")},
            0,
            "2",
        )
        for dtype in ("float32", "float64")
    ),
    ("kernel distance, subsets", "n", "kid", 0, {"dtype": "float32"}, {"matrices": "matrices ms"}, 0, "0"),
    ("kernel distance", "n", "kid", 0, {"dtype": "float32"}, {"lipgan": "lipgan ms"}, 0, "0 to 2"),
]


# ---- a whole run ----


def measure(number: int, names: list[str], seconds: float, folder: Path = FOLDER) -> list[str]:
    """Write ``NUMBER.NAME.json`` for each benchmark; returns the names of those that failed."""
    bench.load(names)
    failed = []
    for name in names:
        path = folder / f"{number}.{name}.json"
        if path.exists() and _is_current(path):
            print(f"{path.name} is there, of the same commit", flush=True)
            continue
        try:
            bench.main(
                argparse.Namespace(
                    which=name, json=path, plot=None, threads=None, seed=0, seconds=seconds, device="cpu"
                )
            )
        except Exception:
            traceback.print_exc()
            failed.append(name)
    return failed


def _is_current(path: Path) -> bool:
    commit = machine_here()["commit"]
    (run,) = read([path])
    return commit == run["machine"]["commit"] and not commit.endswith("+")


# ---- tables ----


def files(folder: Path = FOLDER) -> list[Path]:
    """Those of the runs, by their numbers."""
    return sorted(folder.glob("*.json"), key=lambda path: (int(path.name.partition(".")[0]), path.name))


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


def _tables(runs: list[Run], name: str, number: int) -> list[dict[str, Any]]:
    """The table of each run that has it as the latest one, for another title has other sizes.

    Raises:
        ValueError: there is no such benchmark.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"a table must be of a benchmark ({', '.join(BENCHMARKS)}), got {name!r}")
    found = [run["results"][name][number] for run in runs if len(run["results"].get(name, ())) > number]
    return [one for one in found if one["title"] == found[-1]["title"]]


def _key(columns: list[str], row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is about: its cells before the first measurement."""
    cells = [row.get(column, "") for column in columns]
    return tuple(cells[: next((k for k, cell in enumerate(cells) if isinstance(cell, float)), len(cells))])


def _merged(found: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """For each row of the latest table, the same row of all that have it."""
    latest = found[-1]
    merged = []
    for wanted in latest["rows"]:
        key = _key(latest["columns"], wanted)
        rows = [row for one in found for row in one["rows"] if _key(one["columns"], row) == key]
        merged.append(rows)
    return merged


def table(runs: list[Run], name: str, number: int, columns: list[str] | None) -> str:
    """One table as Markdown under its title; ValueError for a benchmark or a column that there is not."""
    found = _tables(runs, name, number)
    if not found:
        return f"Not measured yet (`lipgan bench {name}`)."
    latest = found[-1]
    shown = latest["columns"] if columns is None else columns
    for column in shown:
        if column not in latest["columns"]:
            raise ValueError(f"{name} {number} has no column {column!r}, got {', '.join(latest['columns'])}")
    rows = [[_cell(column, [row.get(column, "") for row in same]) for column in shown] for same in _merged(found)]
    widths = [max(len(line[k]) for line in [shown, *rows]) for k in range(len(shown))]
    lines = [shown, *rows]
    texts = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    count = f"{len(found)} runs" if len(found) > 1 else "one run"
    return "\n".join([f"*{latest['title']} ({count})*", "", texts[0], rule, *texts[1:]])


def slower(runs: list[Run], name: str, number: int) -> str:
    """A sentence on the rows of a table whose median ratio is below 1; empty if no file has the table."""
    found = _tables(runs, name, number)
    if not found:
        return ""
    below = []
    for same in _merged(found):
        ratios = [row["ratio"] for row in same if "ratio" in row]
        if ratios and statistics.median(ratios) < 1:
            below.append(f"{', '.join(map(str, _key(found[-1]['columns'], same[0])))} ({_cell('ratio', ratios)})")
    if not below:
        return f"lipgan is slower in none of the {len(found[-1]['rows'])} rows."
    return f"lipgan is slower in {len(below)} of the {len(found[-1]['rows'])} rows: {'; '.join(below)}."


def exponents(runs: list[Run]) -> str:
    """A table of the exponents with which times grow, by least squares in logarithms."""
    lines = ["| what | grows with | sizes | expected | exponents |", "|---|---|---|---|---|"]
    for what, size, name, number, key, columns, plus, expected in EXPONENTS:
        found = _tables(runs, name, number)
        sizes, cells = "", []
        for label, column in columns.items():
            slopes = []
            for one in found:
                rows = [row for row in one["rows"] if all(row[part] == value for part, value in key.items())]
                slopes.append(plus + _slope([row[size] for row in rows], [row[column] for row in rows]))
                sizes = f"{rows[0][size]} to {rows[-1][size]}"
            if slopes:
                spread = f" ({min(slopes):.2f}..{max(slopes):.2f})" if len(slopes) > 1 else ""
                cells.append(f"{label} {statistics.median(slopes):.2f}{spread}")
        lines.append(f"| {what} | {size} | {sizes} | {expected} | {', '.join(cells) or 'not measured yet'} |")
    return "\n".join(lines)


def _slope(sizes: list[float], values: list[float]) -> float:
    return statistics.linear_regression([*map(math.log, sizes)], [*map(math.log, values)]).slope


def _is_ratio(column: str) -> bool:
    # "of mm", "copy": shares of what the machine can do.
    return (
        column in ("copy", "of mm", "times the bound")
        or column.endswith("%")
        or "ratio" in column
        or column.startswith(("to ", "prepared to "))
        or " over " in f" {column}"
    )


def _cell(column: str, values: list[Any]) -> str:
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if not numbers:
        return ", ".join(dict.fromkeys(map(format_cell, values)))
    text = format_cell(numbers[0] if len({*numbers}) == 1 else statistics.median(numbers))
    if _is_ratio(column) and len(numbers) > 1:
        text += f" ({format_cell(min(numbers))}..{format_cell(max(numbers))})"
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
        times = f"{statistics.median(ratios):.3g}"
        if len(ratios) > 1:
            times += f" ({min(ratios):.3g}..{max(ratios):.3g})"
        lines.append(f"| {what} | {against} | {first} | {second} | {times} |")
    return "\n".join(lines)


def _with_unit(column: str, value: float) -> str:
    if column.endswith("/s"):
        return f"{value:.1f} steps/s"
    return f"{value / 1000:.2f} s" if value >= 1000 else f"{format_cell(value)} ms"


def fill(page: str, runs: list[Run]) -> str:
    """The page with its tables made anew."""

    def replacement(match: re.Match[str]) -> str:
        what, _, columns = match["what"].partition(":")
        words = what.split()
        if what == "machine":
            text = machine(runs)
        elif what == "summary":
            text = summary(runs)
        elif what == "exponents":
            text = exponents(runs)
        elif words[0] == "slower":
            text = slower(runs, words[1], int(words[2]))
        else:
            shown = [column.strip() for column in columns.split(",")] if columns else None
            text = table(runs, words[0], int(words[1]), shown)
        return f"{match[1]}\n{text}\n\n{match[3]}" if text else f"{match[1]}{match[3]}"

    return _MARK.sub(replacement, page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=int, metavar="N", help="measure, as the run of this number")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="as of lipgan bench (default: 1.0)")
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks of the run (default: all)")
    args = parser.parse_args()
    if args.names and args.run is None:
        parser.error("names of benchmarks go with --run")
    if unknown := [name for name in args.names if name not in BENCHMARKS]:
        parser.error(f"no benchmark {', '.join(unknown)}: choose from {', '.join(BENCHMARKS)}")
    failed = [] if args.run is None else measure(args.run, args.names or [*BENCHMARKS], args.seconds)
    runs = read(files())
    pages = {path: fill(path.read_text(), runs) for path in PAGES}
    for path, text in pages.items():
        write_atomically(path, text.encode())
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
