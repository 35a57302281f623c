"""What is drawn follows from the seed alone; the rules on made-up numbers; a small run."""

import math

import pytest
import study_checks
from study_checks import made, verdicts

from lipgan.studies import random_architectures as module
from lipgan.studies.study import FAILS, HOLDS, UNKNOWN


@pytest.fixture(scope="module")
def study():
    return study_checks.smaller("random-architectures", steps=2, samples=20, batch=4, depths=[2], widths=[4])


def fids(study, gan, penalized):
    """Made-up rows: the FID of each seed by both methods."""
    of = {"GAN": gan, "WGAN-GP": penalized}
    return made(study, lambda unit: {"fid": of[unit["method"]][unit["seed"]]}, range(len(gan)))


def test_the_rules_see_what_is_wrong(study):
    rows = fids(study, [90, 900, math.inf, 90], [90, 190, 190, 90])
    assert verdicts(study, rows) == {"more": HOLDS, "sensitive": HOLDS}
    table = study.analyse(study.settings(False), rows).table
    assert dict(zip((row[0] for row in table.rows), (row[1:] for row in table.rows), strict=True)) == {
        800: (0, 2, 2, 0),
        400: (0, 2, 2, 0),
        200: (0, 2, 2, 0),
        100: (0, 0, 2, 2),
        50: (0, 0, 0, 4),
    }
    assert verdicts(study, fids(study, [90, 150], [90, 900])) == {"more": FAILS, "sensitive": FAILS}
    # As many on one side as on the other, half as many, and nothing that tells them apart.
    assert verdicts(study, fids(study, [90, 300], [300, 90]))["more"] == FAILS
    assert verdicts(study, fids(study, [90, 300, 300], [300, 90, 90]))["more"] == FAILS
    assert verdicts(study, fids(study, [90, 300, 300, 300], [300, 90, 90, 90]))["more"] == HOLDS
    assert verdicts(study, fids(study, [90, 90], [90, 90]))["more"] == FAILS
    # Before samples are digits, only the order in which methods learn.
    assert set(verdicts(study, fids(study, [900, 850, 700], [390, 380, 370])).values()) == {UNKNOWN}


def test_a_seed_is_an_architecture():
    settings = module.STUDY.settings(False)
    drawn = [module._architecture(settings, seed) for seed in range(40)]
    assert drawn == [module._architecture(settings, seed) for seed in range(40)]
    for name, values in (("nonlinearity G", 4), ("depth D", 4), ("width G", 3), ("norm D", 2)):
        assert len({chosen[name] for chosen in drawn}) == values


def test_a_small_run(study):
    rows = study_checks.finished(study, [0, 1])
    assert rows[0].result["architecture"] == rows[1].result["architecture"]
    assert all(row.result["fid"] > 0 for row in rows)
    verdicts(study, rows)
    assert len(study_checks.drawn(study, rows)) > 5_000
