"""The studies by name. Their modules are imported when they are asked for."""

from __future__ import annotations

import importlib

from lipgan._choices import STUDIES
from lipgan._registry import lookup
from lipgan.studies.study import Study

__all__ = ["get", "names"]


def names() -> list[str]:
    """The names that `get` knows, in the order of the lectures."""
    return list(STUDIES)


def get(name: str) -> Study:
    """The study called ``name``.

    Raises:
        ValueError: unknown name; the message names the nearest ones.
    """
    lookup(STUDIES, name, "study")
    study: Study = importlib.import_module(f"lipgan.studies.{name.replace('-', '_')}").STUDY
    return study
