"""Quadrature against closed forms, the known optima, and a short fit."""

import math

import pytest
import study_checks
import torch
from study_checks import changed, verdicts

from lipgan.studies import f_gan
from lipgan.studies.study import FAILS, HOLDS

NAMES = ("kl", "reverse-kl", "pearson", "hellinger", "jensen-shannon", "gan")


@pytest.fixture(scope="module")
def study():
    return study_checks.smaller("f-gan", steps=10, last_steps=10, critic_steps=1, batch=64, width=16, test_samples=1000)


@pytest.fixture(scope="module")
def rows(study):
    return study_checks.finished(study)


def test_quadrature_has_the_closed_forms_of_two_gaussians(monkeypatch):
    """For p = N(1, 0.8^2) and q = N(0, 1)."""
    m, s = 1.0, 0.8
    x, _ = f_gan._grid()
    monkeypatch.setattr(f_gan, "_grid", lambda: (x, f_gan._log_normal(x, m, s)))
    kl = -math.log(s) + (s * s + m * m) / 2 - 0.5
    reverse = math.log(s) + (1 + m * m) / (2 * s * s) - 0.5
    hellinger = 2 - 2 * math.sqrt(2 * s / (1 + s * s)) * math.exp(-m * m / (4 * (1 + s * s)))
    # The integral of p^2 / q is one of a Gaussian of variance s^2 / (2 - s^2).
    pearson = math.exp(m * m / (2 - s * s)) / (s * math.sqrt(2 - s * s)) - 1
    for name, value in (("kl", kl), ("reverse-kl", reverse), ("hellinger", hellinger), ("pearson", pearson)):
        assert f_gan.divergence_of(name, 0.0, 1.0) == pytest.approx(value, rel=1e-9), name


@pytest.mark.parametrize("name", NAMES)
def test_the_bound_at_the_optimal_critic_is_the_divergence(name):
    assert f_gan._at_optimal_critic(name, 1.0, 1.8) == pytest.approx(f_gan.divergence_of(name, 1.0, 1.8), abs=1e-9)


@pytest.mark.parametrize("name", ["kl", "reverse-kl", "pearson", "jensen-shannon"])
def test_the_known_optima_are_found(name):
    assert f_gan.optimum(name) == pytest.approx(f_gan._KNOWN[name], abs=2e-4)


def test_the_gan_differs_from_js_by_a_constant():
    gan, js = f_gan.optimum("gan"), f_gan.optimum("jensen-shannon")
    assert gan[:2] == pytest.approx(js[:2], abs=1e-4)
    assert js[2] - gan[2] == pytest.approx(math.log(4), abs=1e-9)


def test_samples_are_of_the_mixture():
    x = f_gan._mixture(200_000, torch.Generator().manual_seed(0)).double()
    mean = -0.33 + 2 * 0.67
    variance = 0.33 * (0.0625 + 1) + 0.67 * (2 + 4) - mean**2
    assert float(x.mean()) == pytest.approx(mean, abs=5 * math.sqrt(variance / 2e5))
    assert float(x.var()) == pytest.approx(variance, rel=0.02)


def test_the_theorems_hold_on_the_smallest_run(study, rows):
    found = verdicts(study, rows)
    assert (found["optima"], found["tight"]) == (HOLDS, HOLDS)
    for row in rows:
        assert row.result["bound"] <= row.result["divergence"] + 4 * row.result["error"]


def test_the_rules_see_what_is_wrong(study, rows):
    def with_share(share):
        def change(unit, result):
            best, base = f_gan.optimum(unit["divergence"])[2], f_gan._at_equality(unit["divergence"])
            return {**result, "divergence": best, "bound": base + share * (best - base), "error": 0.0}

        return verdicts(study, changed(rows, change))

    assert (with_share(0.9)["bound"], with_share(0.9)["fit"]) == (HOLDS, HOLDS)
    assert with_share(0.7)["bound"] == FAILS
    assert with_share(1.1)["bound"] == FAILS
    far = changed(rows, lambda unit, result: {**result, "divergence": result["divergence"] + 1})
    assert verdicts(study, far)["fit"] == FAILS


@pytest.mark.slow
def test_a_short_fit_nears_the_optimum():
    """KL, whose optimum has the moments of the mixture: mean 1.01 and standard deviation 1.83, from 0 and 1."""
    longer = study_checks.smaller("f-gan", steps=100, last_steps=1, batch=128, width=16, lr=1e-2, model_lr=5e-2)
    settings = longer.settings(False)
    result = longer.run(settings, {"divergence": "kl", "seed": 0})
    start = f_gan.divergence_of("kl", 0.0, 1.0)
    assert result["divergence"] < 0.5 * (start + f_gan.optimum("kl")[2])
