"""The expected gradients by sums, against simulation; the distances; where descent ends."""

import numpy as np
import pytest
import study_checks
from study_checks import changed, verdicts

from lipgan.studies import biased_gradients
from lipgan.studies.study import FAILS, HOLDS


@pytest.fixture(scope="module")
def study():
    return study_checks.smaller("biased-gradients", steps=6000, every=10, pairs=[[0.6, 1], [0.9, 5]], sizes=[1, 2, 8])


@pytest.fixture(scope="module")
def rows(study):
    return study_checks.finished(study)


@pytest.mark.parametrize("loss", ["wasserstein", "cramer"])
def test_the_expected_gradient_is_the_mean_over_samples(loss):
    theta_star, m, theta = 0.6, 4, np.array([0.1, 0.55, 0.9])
    means = np.random.default_rng(0).binomial(m, theta_star, 200_000) / m
    gaps = theta[:, None] - means
    simulated = (np.sign(gaps) if loss == "wasserstein" else 2 * gaps).mean(1)
    assert biased_gradients._expected(theta_star, m, theta, loss) == pytest.approx(simulated, abs=0.01)


@pytest.mark.parametrize(("theta", "m", "median"), [(0.6, 1, 1.0), (0.6, 4, 0.5), (0.9, 5, 1.0), (0.5, 3, 1 / 3)])
def test_medians_of_samples(theta, m, median):
    assert biased_gradients._median(theta, m) == pytest.approx(median)
    assert biased_gradients._shares(theta, m).sum() == pytest.approx(1)


def test_one_coin_says_nothing_of_theta():
    """With samples of one, the expected gradient of W is 1 - 2 theta*, wherever theta is."""
    theta = np.array([0.2, 0.5, 0.7])
    assert biased_gradients._expected(0.6, 1, theta, "wasserstein") == pytest.approx([-0.2] * 3)


@pytest.mark.parametrize("m", [1, 5, 64])
def test_w_is_biased_and_cramer_is_not(m):
    assert biased_gradients._bias(0.6, m, "wasserstein") > 0.5
    assert biased_gradients._bias(0.6, m, "cramer") < 1e-12


def test_lipgan_s_distances_are_those_of_the_formulas(rows):
    assert max(row.result["error"] for row in rows) < 1e-12


def test_descent_ends_at_the_median_or_at_the_truth(study, rows):
    ends = {(row.unit["theta"], row.unit["loss"]): row.result["end"] for row in rows}
    assert ends[0.6, "wasserstein"] > 0.95
    assert ends[0.9, "wasserstein"] > 0.95
    assert ends[0.6, "cramer"] == pytest.approx(0.6, abs=0.03)
    assert ends[0.9, "cramer"] == pytest.approx(0.9, abs=0.03)
    assert set(verdicts(study, rows).values()) == {HOLDS}


def test_the_rules_see_what_is_wrong(study, rows):
    assert verdicts(study, changed(rows, lambda unit, r: {**r, "end": unit["theta"]}))["solution"] == FAILS
    assert verdicts(study, changed(rows, lambda unit, r: {**r, "end": 0.0}))["solution"] == FAILS
    assert verdicts(study, changed(rows, lambda unit, r: {**r, "error": 1e-3}))["distances"] == FAILS
