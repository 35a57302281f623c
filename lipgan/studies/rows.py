"""Units of work and their results: made, chosen, and laid side by side."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from lipgan.studies.study import Finished, spread

__all__ = ["by_seed", "crossed", "over", "values", "where"]


def crossed(seeds: Sequence[int], **entries: Sequence[Any]) -> list[dict[str, Any]]:
    """A unit for each seed and each combination of the entries; those of a seed stand together."""
    names = [*entries, "seed"]
    return [dict(zip(names, (*chosen, seed), strict=True)) for seed in seeds for chosen in _product(entries)]


def _product(entries: Mapping[str, Sequence[Any]]) -> list[tuple[Any, ...]]:
    return list(itertools.product(*entries.values()))


def where(rows: Sequence[Finished], **entries: Any) -> list[Finished]:
    """The rows whose units have these entries, in order."""
    return [row for row in rows if all(row.unit.get(name) == value for name, value in entries.items())]


def values(rows: Sequence[Finished], key: str) -> list[float]:
    """A number of each result."""
    return [float(row.result[key]) for row in rows]


def over(rows: Sequence[Finished], key: str, **entries: Any) -> str:
    """The `spread` of a number over the rows of these entries."""
    return spread(values(where(rows, **entries), key))


def by_seed(rows: Sequence[Finished], *names: str) -> list[dict[Any, Mapping[str, Any]]]:
    """For each seed the results by the entry of that name, or by the tuple of entries; rows without them are left out.

    What is asked of every seed is then one expression: ``judge([r["a"]["x"] < r["b"]["x"] for r in by_seed(...)])``.
    """
    found: dict[int, dict[Any, Mapping[str, Any]]] = {}
    for row in rows:
        if all(name in row.unit for name in names):
            key = tuple(row.unit[name] for name in names)
            found.setdefault(row.unit["seed"], {})[key if len(names) > 1 else key[0]] = row.result
    return list(found.values())
