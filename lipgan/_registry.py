"""Look-up by name, with one helpful error for every table of the package."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

Entry = TypeVar("Entry")


def lookup(table: Mapping[str, Entry], name: str, kind: str) -> Entry:
    """Return ``table[name]``.

    Args:
        table: the known entries.
        name: the wanted key.
        kind: what the table holds, in the singular, for the message ("recipe").

    Raises:
        ValueError: unknown name; the message holds the nearest names, or all of them when none is near.
    """
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(table)) or 'none'}"
    raise ValueError(f"unknown {kind} {name!r}; {hint}")
