"""What a study is: claims of the lectures, units of work, and what follows from them by rules fixed before."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from matplotlib.figure import Figure

__all__ = [
    "FAILS",
    "HOLDS",
    "LECTURES",
    "UNKNOWN",
    "VERDICTS",
    "Analysis",
    "Claim",
    "Finding",
    "Finished",
    "Settings",
    "Study",
    "Table",
    "Unit",
    "judge",
    "spread",
]

#: The three verdicts.
HOLDS, FAILS, UNKNOWN = VERDICTS = ("holds", "does not hold here", "cannot be told")

#: What the sources of claims call the lectures.
LECTURES: Mapping[str, str] = MappingProxyType(
    {
        "lecture 000": "R. Isachenko, Deep Generative Models, lecture 11 (Ozon Masters, 2021)",
        "lecture 001": "R. Isachenko, Deep Generative Models, lecture 8 (AI Masters, 2024)",
        "lecture 002": "R. Isachenko, Deep Generative Models, lecture 9 (MIPT, 2020)",
        "lecture 003": "S. Yoon, Deep Learning, 15: Generative Adversarial Network (Seoul National University, 2020)",
        "lecture 004": "D. Derkach, Generative adversarial networks (HSE-Yandex Autumn School, 2021)",
    }
)

#: JSON values by name: the constants of a study, and what makes a unit of it, its "seed" among them.
Settings = Mapping[str, Any]
Unit = Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """What is claimed.

    Attributes:
        key: a short name.
        text: the claim, in a sentence or two.
        source: where it stands.
        rule: what is asked of the numbers for "holds", in words; the code of the analysis does the same.
    """

    key: str
    text: str
    source: str
    rule: str


@dataclass(frozen=True)
class Finding:
    """A verdict on the claim of that key, with the numbers it follows from in a sentence."""

    claim: str
    verdict: str
    seen: str

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict must be one of {', '.join(VERDICTS)}, got {self.verdict!r}")


@dataclass(frozen=True)
class Finished:
    """A unit with its result (JSON values, and numbers that are not finite) and the seconds that it took."""

    unit: Unit
    result: Mapping[str, Any]
    seconds: float


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers under column names; the same numbers in full as CSV, and rounded as Markdown."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | int, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"rows must have {len(self.columns)} entries, got {row!r}")

    def csv(self) -> str:
        """With a header, numbers to full precision."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return text.getvalue()

    def cells(self) -> list[list[str]]:
        """The rows as text, numbers to four digits."""
        return [[value if isinstance(value, str) else _rounded(value) for value in row] for row in self.rows]

    def markdown(self) -> str:
        """A table of GitHub's Markdown."""
        lines = [list(self.columns), ["---"] * len(self.columns), *self.cells()]
        return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


@dataclass(frozen=True)
class Analysis:
    """What follows from the finished units: a finding for each claim, in order, and the table."""

    findings: tuple[Finding, ...]
    table: Table

    @property
    def verdict(self) -> str:
        """Of the study, which holds if each claim does, and does not if one does not."""
        found = [finding.verdict for finding in self.findings]
        return FAILS if FAILS in found else UNKNOWN if UNKNOWN in found else HOLDS


@dataclass(frozen=True)
class Study:
    """Claims, and how they are seen to hold or not.

    Attributes:
        name: the key in the registry.
        title: of the page.
        claims: at least one.
        method: what is run, in a few sentences.
        full: the settings; JSON values.
        quick: those of them that ``--quick`` changes.
        seeds: how many seeds, and how many with ``--quick``.
        units: the units of work of some settings and seeds, each a mapping of JSON values with the key "seed".
        run: computes a unit from the settings and the unit alone. It is a function of a module, so that other
            processes find it. Before each call, PyTorch's global random numbers start anew from the unit.
        analyse: takes all units, in the order of ``units``, to findings and table.
        draw: the figure of the same units.
        caption: what the figure shows.
    """

    name: str
    title: str
    claims: tuple[Claim, ...]
    method: str
    full: Settings
    quick: Settings
    seeds: tuple[int, int]
    units: Callable[[Settings, Sequence[int]], list[dict[str, Any]]]
    run: Callable[[Settings, Unit], dict[str, Any]]
    analyse: Callable[[Settings, Sequence[Finished]], Analysis]
    draw: Callable[[Settings, Sequence[Finished]], Figure]
    caption: str

    def __post_init__(self) -> None:
        unknown = set(self.quick) - set(self.full)
        if unknown:
            raise ValueError(f"quick must change settings of full, got {', '.join(sorted(unknown))}")

    def settings(self, quick: bool) -> dict[str, Any]:
        """The settings of a run."""
        return {**self.full, **self.quick} if quick else dict(self.full)


def judge(passed: Sequence[bool]) -> str:
    """The rule for what is asked of every seed: "holds" if all pass, "does not hold here" if at most half do.

    Between the two, and without any, nothing can be told.
    """
    if not passed:
        return UNKNOWN
    share = sum(passed) / len(passed)
    return HOLDS if share == 1 else FAILS if share <= 0.5 else UNKNOWN


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds, as "0.512 ± 0.003"."""
    mean = sum(values) / len(values)
    if len(values) == 1 or not math.isfinite(mean):
        return _rounded(mean)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return f"{_rounded(mean)} ± {deviation:.0f}" if 100 <= deviation < 1e6 else f"{_rounded(mean)} ± {deviation:.2g}"


def _rounded(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    if value == 0:
        return "0"
    return f"{value:.3g}" if abs(value) < 1e-3 or abs(value) >= 1e6 else f"{value:.4g}"
