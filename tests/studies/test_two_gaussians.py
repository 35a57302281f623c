"""The formula of the optimal discriminator, and the three kinds of critics on a short run."""

import numpy as np
import pytest
import study_checks
import torch
from study_checks import changed, verdicts

from lipgan.studies import two_gaussians
from lipgan.studies.study import FAILS, HOLDS


@pytest.fixture(scope="module")
def study():
    return study_checks.smaller("two-gaussians", steps=60, batch=64, width=16, lr=1e-2, points=17, test_samples=20)


@pytest.fixture(scope="module")
def rows(study):
    return study_checks.finished(study)


@pytest.mark.parametrize("at", [-1.0, 0.0, 0.3, 2.0])
def test_the_optimal_slope_is_the_derivative_of_the_formula(at):
    x = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    p, q = (torch.exp(-0.5 * ((x - mean) / 0.5) ** 2) for mean in (-2.0, 2.0))
    (slope,) = torch.autograd.grad(torch.log(q / (p + q)), x)
    assert two_gaussians._optimal_slope(at) == pytest.approx(float(slope), rel=1e-9)


def test_the_optimal_discriminator_saturates(study, rows):
    assert two_gaussians._optimal_slope(2.0) < 1e-11
    assert verdicts(study, rows)["optimal"] == HOLDS


def test_a_certified_critic_is_nowhere_steeper_than_1(rows):
    (sort,) = (row for row in rows if row.unit["method"] == "GroupSort")
    assert max(sort.result["slopes"]) <= 1 + 1e-5
    assert min(sort.result["slopes"]) > 0.2


def test_clipping_bounds_the_slope_by_the_box(rows):
    """Three layers of 16 units: each weight matrix has a norm of at most 0.01 sqrt(inputs outputs)."""
    (clipped,) = (row for row in rows if row.unit["method"].startswith("clipping"))
    assert max(clipped.result["slopes"]) <= 0.01**4 * np.sqrt(2 * 16) * 16 * 16 * np.sqrt(16) * (1 + 1e-5)


def test_the_rules_see_what_is_wrong(study, rows):
    def flat(unit, result):
        return {**result, "slopes": [1e-3] * 17, "at_fake": 1e-3}

    def steep(unit, result):
        return {**result, "slopes": [1.0] * 17, "at_fake": 1.0}

    found = verdicts(study, changed(rows, flat))
    assert (found["trained"], found["critic"], found["clipped"]) == (HOLDS, FAILS, HOLDS)
    found = verdicts(study, changed(rows, steep))
    assert (found["trained"], found["critic"], found["clipped"]) == (FAILS, HOLDS, FAILS)
