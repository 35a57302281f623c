"""The rules on made-up numbers; a small run, whose estimates are those of the log."""

import math

import pytest
import study_checks
from study_checks import changed, made, verdicts

from lipgan.studies.study import FAILS, HOLDS


@pytest.fixture(scope="module")
def study():
    return study_checks.smaller("critic-tracks-quality", steps=8, points=4, samples=10, batch=4, width=4, mlp_width=8)


def series(estimates):
    points = [{"step": k, "fid": 100.0 - k, "estimate": x} for k, x in enumerate(estimates)]
    return {"points": points, "frames": []}


STEADY = [0.1, 0.69, 0.68, 0.69, 0.68, 0.69, 0.68, 0.69]
FALLING = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0]


def test_the_rules_see_what_is_wrong(study):
    rows = made(study, lambda unit: series(STEADY if unit["method"] == "GAN" else FALLING))
    assert set(verdicts(study, rows).values()) == {HOLDS}

    def failing(method, estimates):
        found = verdicts(study, changed(rows, lambda unit, r: series(estimates) if unit["method"] == method else r))
        return {claim for claim, verdict in found.items() if verdict == FAILS}

    assert failing("WGAN", FALLING[::-1]) == {"wasserstein"}
    assert failing("WGAN-GP", [1.0] * 8) == {"wasserstein"}
    assert failing("GAN", [0.69 - 0.001 * k for k in range(8)]) == {"jensen-shannon"}
    assert failing("GAN", [0.2 + 0.01 * k for k in range(8)]) == {"constant"}


def test_a_small_run(study):
    rows = study_checks.finished(study)
    for row in rows:
        assert [point["step"] for point in row.result["points"]] == [2, 4, 6, 8]
        assert len(row.result["frames"]) == 4
        # The estimate of a discriminator is at most log 2, on every batch.
        assert row.unit["method"] != "GAN" or all(p["estimate"] <= math.log(2) for p in row.result["points"])
    verdicts(study, rows)
    assert len(study_checks.drawn(study, rows)) > 5_000
