"""The three ways agree on every critic; the rules on made-up numbers."""

import math

import pytest
import study_checks
from study_checks import changed, made, verdicts

from lipgan.studies.study import FAILS, HOLDS, UNKNOWN


@pytest.fixture(scope="module")
def study():
    return study_checks.smaller("penalty-cost", depths=[1, 2], batches=[3], width=4, rounds=2)


def ideal(unit):
    numbers = {"double backward": (2.0, 1.0, 10.0), "tape": (1.5, 0.8, 9.0), "plan": (1.0, 0.5, 10.5)}
    found = {"error": 1e-6}
    for method, values in numbers.items():
        found |= {f"{method} {key}": value for key, value in zip(("ms", "ratio", "MB"), values, strict=True)}
    return found


def test_the_rules_see_what_is_wrong(study):
    rows = made(study, ideal)
    assert set(verdicts(study, rows).values()) == {HOLDS}
    for key, value, claim in (("error", 0.1, "same"), ("plan ratio", 1.1, "time"), ("plan MB", 12.0, "memory")):
        found = verdicts(study, changed(rows, lambda unit, r, key=key, value=value: {**r, key: value}))
        assert {name for name, verdict in found.items() if verdict == FAILS} == {claim}
    untold = changed(rows, lambda unit, r: {**r, "plan MB": math.nan})
    assert verdicts(study, untold)["memory"] == UNKNOWN


def test_a_small_run(study):
    rows = study_checks.finished(study)
    # A theorem: three ways to one derivative.
    assert verdicts(study, rows)["same"] == HOLDS
    assert all(row.result["plan ms"] > 0 for row in rows)
    assert len(study_checks.drawn(study, rows)) > 5_000
