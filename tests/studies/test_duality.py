"""The inequality, which no critic may break, and the rules."""

import pytest
import study_checks
from study_checks import changed, verdicts

from lipgan.studies.study import FAILS, HOLDS


@pytest.fixture(scope="module")
def study():
    return study_checks.smaller("duality", samples=40, steps=40, every=20, width=16, lr=1e-2)


@pytest.fixture(scope="module")
def rows(study):
    return study_checks.finished(study)


def test_no_critic_breaks_the_inequality(study, rows):
    assert len(rows) == 5
    for row in rows:
        assert row.result["estimate"] <= row.result["upper"] * row.result["exact"] * (1 + 1e-5)
        assert row.result["lower"] <= row.result["upper"]
    assert verdicts(study, rows)["bound"] == HOLDS


def test_all_critics_of_a_seed_see_the_same_samples(rows):
    assert len({row.result["exact"] for row in rows}) == 1


def test_constrained_critics_are_certified(rows):
    found = {row.unit["method"]: row.result for row in rows}
    assert found["GroupSort"]["upper"] == pytest.approx(1, abs=1e-5)
    assert found["GroupSort"]["estimate"] > 0.2 * found["GroupSort"]["exact"]
    assert found["spectral norm"]["upper"] < 1.5


def test_the_rules_see_what_is_wrong(study, rows):
    def beyond(unit, result):
        return {**result, "estimate": 1.01 * result["upper"] * result["exact"]}

    def ideal(unit, result):
        clipped, penalty = unit["method"].startswith("clipping"), unit["method"] == "penalty"
        share = 0.1 if clipped else 0.95
        return {**result, "estimate": share * result["exact"], "upper": 1.0, "lower": 1.02 if penalty else 1.0}

    assert verdicts(study, changed(rows, beyond))["bound"] == FAILS
    assert set(verdicts(study, changed(rows, ideal)).values()) == {HOLDS}
    assert verdicts(study, changed(rows, lambda unit, r: {**r, "estimate": 0.5 * r["exact"]}))["tight"] == FAILS
    assert verdicts(study, changed(rows, lambda unit, r: {**r, "lower": 0.9}))["penalty"] == FAILS
    assert verdicts(study, changed(rows, lambda unit, r: {**r, "estimate": r["exact"]}))["clipping"] == FAILS
