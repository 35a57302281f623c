"""Fields of a recipe that a training scheme has no use for."""

from __future__ import annotations

import dataclasses

from lipgan.recipe import Recipe

__all__ = ["refuse"]


def refuse(recipe: Recipe, *names: str) -> None:
    """Tell whoever changes a field that the system would ignore.

    Raises:
        ValueError: one of the fields differs from its default.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(recipe)}
    for name in names:
        value = getattr(recipe, name)
        if value != defaults[name]:
            raise ValueError(
                f"{name} must be {defaults[name]!r} for the system {recipe.system!r}, which has no use for it, "
                f"got {value!r}"
            )
