"""The closed forms of the example, and what the rules answer to."""

import math

import pytest
import study_checks
from study_checks import changed, verdicts

from lipgan.studies.study import FAILS, HOLDS


@pytest.fixture(scope="module")
def study():
    return study_checks.smaller(
        "divergences-on-parallel-lines", thetas=[-0.5, 0.0], samples=50, steps=40, batch=64, lr=1e-2, width=8
    )


@pytest.fixture(scope="module")
def rows(study):
    return study_checks.finished(study)


def test_w_is_the_distance_js_is_constant_and_kl_infinite(study, rows):
    for row in rows:
        theta = row.unit["theta"]
        assert row.result["wasserstein"] == pytest.approx(abs(theta), abs=1e-7)
        assert row.result["js"] == pytest.approx(math.log(2) if theta else 0, abs=1e-12)
        assert row.result["kl"] == (math.inf if theta else 0)
    assert verdicts(study, rows)["exact"] == HOLDS


def test_a_certified_critic_never_exceeds_w(study, rows):
    """But for the heights of fresh samples, whose means differ by a standard deviation of at most 0.0065."""
    for row in rows:
        assert row.result["critic"]["estimate"] <= math.hypot(row.unit["theta"], 4 * 0.0065) + 1e-6
        assert abs(row.result["critic"]["slope"]) <= 1 + 1e-5
        assert row.result["discriminator"]["estimate"] <= math.log(2)


def test_the_gradient_of_a_critic_points_to_the_data(rows):
    for row in rows:
        if row.unit["theta"]:
            assert math.copysign(1, row.unit["theta"]) * row.result["critic"]["slope"] > 0.5


def test_the_rules_see_what_is_wrong(study, rows):
    def far(unit, result):
        return {**result, "wasserstein": result["wasserstein"] + 0.01}

    def finite(unit, result):
        return {**result, "kl": 5.0}

    def steep(unit, result):
        return {**result, "discriminator": {"estimate": math.log(2), "slope": 1.0}}

    def ideal(unit, result):
        theta = unit["theta"]
        critic = {"estimate": abs(theta), "slope": math.copysign(1, theta) if theta else 0.3}
        return {**result, "critic": critic, "discriminator": {"estimate": math.log(2) if theta else 0.0, "slope": 0.0}}

    assert verdicts(study, changed(rows, far))["exact"] == FAILS
    assert verdicts(study, changed(rows, finite))["exact"] == FAILS
    assert verdicts(study, changed(rows, steep))["gradients"] == FAILS
    assert set(verdicts(study, changed(rows, ideal)).values()) == {HOLDS}
