"""The rules on made-up numbers, a small run."""

import math

import pytest
import study_checks
from study_checks import changed, made, verdicts

from lipgan.studies.study import FAILS, HOLDS, UNKNOWN


@pytest.fixture(scope="module")
def study():
    return study_checks.smaller("learning-rates", steps=1, samples=10, batch=4, width=4)


def ideal(unit):
    return {"fid": 100.0 if unit["method"] == "spectral norm" else 200.0}


def test_the_rules_see_what_is_wrong(study):
    rows = made(study, ideal)
    assert set(verdicts(study, rows).values()) == {HOLDS}

    def failing(method, constants, fid):
        def broken(unit, r):
            return {"fid": fid} if (unit["method"], unit["constants"]) == (method, constants) else r

        return {claim for claim, verdict in verdicts(study, changed(rows, broken)).items() if verdict == FAILS}

    assert failing("spectral norm", "A", 300.0) == {"robust"}
    assert failing("spectral norm", "E", math.inf) == {"robust", "aggressive"}
    assert failing("penalty", "D", 50.0) == {"aggressive"}
    assert failing("penalty", "B", 50.0) == set()


def test_noise_is_not_compared(study):
    rows = changed(made(study, ideal), lambda unit, r: {"fid": 5 * r["fid"]})
    assert set(verdicts(study, rows).values()) == {UNKNOWN}


def test_a_small_run(study):
    rows = study_checks.finished(study)
    assert len(rows) == 18
    verdicts(study, rows)
    assert len(study_checks.drawn(study, rows)) > 5_000
