"""What is exact of the scores, and the claims on the shipped classifier, which needs no training."""

import pytest
import study_checks
from study_checks import changed, verdicts

from lipgan.studies.study import FAILS, HOLDS

# Some seconds: the features of some ten thousand digits, and their neighbours.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study():
    return study_checks.smaller("score-limitations", sizes=[100, 400], repetitions=4, points=500, drawn=10)


@pytest.fixture(scope="module")
def rows(study):
    return study_checks.finished(study)


def test_every_claim_holds_for_one_seed(study, rows):
    assert set(verdicts(study, rows).values()) == {HOLDS}


def test_one_image_per_class_has_the_largest_score_there_is(rows):
    (found,) = (row.result for row in rows if row.unit["kind"] == "classes")
    assert found["one"]["is"] == pytest.approx(10, abs=1e-3)
    assert found["one"]["is"] > found["real"]["is"]


def test_the_score_of_few_classes_is_at_most_their_number(rows):
    (found,) = (row.result for row in rows if row.unit["kind"] == "dropped classes")
    # A classifier that is not sure gives a little to the others.
    for level, classes in zip(found["levels"], (10, 8, 6, 4, 2), strict=True):
        assert classes - 1 < level["is"] < classes + 0.3


def test_the_first_level_of_a_distortion_changes_nothing(rows):
    first = [row.result["levels"][0] for row in rows if "levels" in row.result]
    assert len(first) == 3
    assert first[0] == first[1] == first[2]


def test_the_rules_see_what_is_wrong(study, rows):
    def only(kind, **values):
        return verdicts(study, changed(rows, lambda unit, r: {**r, **values} if unit["kind"] == kind else r))

    poor = {"is": 5.0, "fid": 1.0, "precision": 0.5, "recall": 0.5}
    assert only("classes", one=poor)["classes"] == FAILS
    assert only("blur", levels=[poor] * 5)["distortion"] == FAILS
    assert only("dropped classes", levels=[poor] * 5)["dropping"] == FAILS
    assert only("samples", fid=[1.0, 2.0])["samples"] == FAILS
    assert only("moments", gaussian={"fid": 500.0, "kid": 0.0, "precision": 0.0})["moments"] == FAILS
    assert only("cases", d={"precision": 0.9, "recall": 0.1})["cases"] == FAILS
