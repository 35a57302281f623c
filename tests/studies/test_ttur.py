"""The game against its linear theory, the rules on made-up numbers, a small run."""

import numpy as np
import pytest
import study_checks
from study_checks import changed, made, verdicts

from lipgan.studies import ttur as module
from lipgan.studies.study import FAILS, HOLDS, UNKNOWN

RATES = [1e-3, 1e-2]


@pytest.fixture(scope="module")
def study():
    return study_checks.smaller("ttur", rates=RATES, steps=3, samples=10, batch=4, width=4)


def ideal(unit):
    if "ratio" in unit:
        return {"curve": [[0, 1.0], [1, 2.0]], "last": 0.1 if unit["ratio"] > 8 else 10.0}
    different = "equal" not in unit and unit["generator_lr"] != unit["critic_lr"]
    return {"fid": 100.0 if different else 200.0}


def test_the_rules_see_what_is_wrong(study):
    rows = made(study, ideal)
    assert set(verdicts(study, rows).values()) == {HOLDS}

    def failing(concerned, **entries):
        found = verdicts(study, changed(rows, lambda unit, r: {**r, **entries} if concerned(unit) else r))
        return {claim for claim, verdict in found.items() if verdict == FAILS}

    assert failing(lambda unit: unit.get("ratio") == 9, last=1.5) == {"game"}
    assert failing(lambda unit: unit.get("ratio") == 7, last=0.5) == {"game"}
    assert failing(lambda unit: unit.get("generator_lr") == unit.get("critic_lr") == 1e-3, fid=50.0) == {"sufficient"}
    assert failing(lambda unit: unit.get("generator_lr") == unit.get("critic_lr") == 1e-2, fid=50.0) >= {"high"}
    assert failing(lambda unit: unit.get("equal") == 1e-3, fid=50.0) == {"steps"}


def test_noise_is_not_compared(study):
    rows = changed(made(study, ideal), lambda unit, r: {**r, "fid": 5 * r["fid"]} if "fid" in r else r)
    assert verdicts(study, rows) == {"game": HOLDS, "sufficient": UNKNOWN, "high": UNKNOWN, "steps": UNKNOWN}


def test_the_game_goes_as_its_matrix_says(study):
    """The claim is a theorem: no run may miss it."""
    settings = study.settings(False)
    for ratio in settings["ratios"]:
        lr = settings["game_lr"]
        step = np.eye(2) + lr * np.array([[module._A, -1.0], [ratio, -ratio * module._B]])
        radius = max(abs(np.linalg.eigvals(step)))
        assert (radius < 1) == (ratio > module._A / module._B)
        found = module._play(settings, {"ratio": ratio, "seed": 3})
        assert (found["last"] < 1) == (radius < 1)
        assert len(found["curve"]) > 2


def test_a_small_run(study):
    rows = study_checks.finished(study)
    assert verdicts(study, rows)["game"] == HOLDS
    assert all(row.result["fid"] > 0 for row in rows if "ratio" not in row.unit)
    assert len(study_checks.drawn(study, rows)) > 5_000
