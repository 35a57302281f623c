"""Power iteration is written out once more here; critics are no steeper than the product."""

import pytest
import study_checks
import torch
from study_checks import changed, verdicts

from lipgan.studies.study import FAILS, HOLDS


@pytest.fixture(scope="module")
def study():
    return study_checks.smaller(
        "spectral-norm", shapes=[[6, 9]], iterations=200, width=16, steps=40, every=10, batch=32, lr=2e-3
    )


@pytest.fixture(scope="module")
def rows(study):
    return study_checks.finished(study)


def test_the_estimates_are_those_of_the_lecture(rows):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    torch.randn(6, generator=generator, dtype=torch.float64)
    v = torch.randn(9, generator=generator, dtype=torch.float64)
    sigma = torch.linalg.matrix_norm(weight, 2)
    expected = []
    for _ in range(200):
        u = weight @ v / (weight @ v).norm()
        v = weight.T @ u / (weight.T @ u).norm()
        expected.append(float(u @ weight @ v / sigma))
    (ratios,) = (row.result["ratios"] for row in rows if "matrix" in row.unit)
    assert ratios == pytest.approx(expected, rel=1e-10)
    assert ratios[0] < 0.99
    assert ratios[-1] == pytest.approx(1, abs=1e-9)


def test_no_critic_is_steeper_than_the_product(study, rows):
    for row in rows:
        if "method" in row.unit:
            assert 0 < row.result["steepest"] <= row.result["product"] * (1 + 1e-5)
            assert all(0 < share <= 1 for share in row.result["shares"])
    (normalized,) = (row.result for row in rows if row.unit.get("method") == "spectral norm")
    assert len(normalized["followed"]) == 4
    assert normalized["spectra"][0][0] == pytest.approx(1, abs=0.05)
    found = verdicts(study, rows)
    assert (found["iteration"], found["product"]) == (HOLDS, HOLDS)


def test_the_rules_see_what_is_wrong(study, rows):
    def only(key, value):
        return changed(rows, lambda unit, r: {**r, key: value} if key in r else r)

    assert verdicts(study, only("ratios", [0.5, 1.001]))["iteration"] == FAILS
    assert verdicts(study, only("ratios", [0.5, 0.9]))["iteration"] == FAILS
    assert verdicts(study, only("product", 1e-3))["product"] == FAILS
    assert verdicts(study, only("followed", [[1, 0.0], [2, 0.2]]))["one"] == FAILS
    assert verdicts(study, only("followed", [[1, 0.2], [2, 0.0]]))["one"] == HOLDS
    assert verdicts(study, only("shares", [0.5, 0.5]))["spectra"] == FAILS
