"""Every name in the table is a recipe; the rules on made-up numbers; a small run."""

import math

import pytest
import study_checks
from study_checks import changed, made, verdicts

from lipgan import recipes
from lipgan.studies import losses_table as module
from lipgan.studies.study import FAILS, HOLDS


@pytest.fixture(scope="module")
def study():
    return study_checks.smaller("losses-table", recipes=list(module._NEEDED), size=8, steps=1, samples=10)


def ideal(unit):
    wgan = unit["recipe"] == "wgan"
    recall = 0.1 if unit["recipe"] == "dcgan" else 0.5
    return {"fid": 200.0 if wgan else 100.0, "precision": 0.5, "recall": recall, "ms": 1.0}


def test_the_rules_see_what_is_wrong(study):
    rows = made(study, ideal)
    assert set(verdicts(study, rows).values()) == {HOLDS}
    for name, key, value, claim in (("sngan", "fid", math.inf, "clipping"), ("wgan-gp", "recall", 0.1, "collapse")):

        def broken(unit, r, name=name, key=key, value=value):
            return {**r, key: value} if unit["recipe"] == name else r

        found = verdicts(study, changed(rows, broken))
        assert {entry for entry, verdict in found.items() if verdict == FAILS} == {claim}


def test_the_table_names_recipes_once():
    assert set(module._RECIPES) <= set(recipes.names())
    assert len(set(module._RECIPES)) == len(module._RECIPES)
    assert set(module._NEEDED) <= set(module._RECIPES)


def test_a_small_run(study):
    rows = study_checks.finished(study)
    assert all(row.result["ms"] > 0 for row in rows)
    verdicts(study, rows)
    assert len(study_checks.drawn(study, rows)) > 5_000
