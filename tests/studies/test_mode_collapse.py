"""Packs, the measure of a point, the rules on made-up numbers, a small run."""

import pytest
import study_checks
import torch
from study_checks import changed, made, verdicts

from lipgan.studies import mode_collapse as module
from lipgan.studies.study import FAILS, HOLDS


@pytest.fixture(scope="module")
def study():
    return study_checks.smaller("mode-collapse", steps=20, batch=8, width=8, points=2, alone=2)


def ideal(unit):
    covered = {"GAN": 3, "WGAN-GP": 8}.get(unit["method"], 5)
    return {
        "steps": [0, 2, 4],
        "modes": [0, 1, covered],
        "frames": [[[0.0, 1.0]]] * 5,
        "covered": covered,
        "high_quality": 0.5,
        "concentration": 1.0,
        "alone": 0.1,
    }


def test_the_rules_see_what_is_wrong(study):
    rows = made(study, ideal)
    assert set(verdicts(study, rows).values()) == {HOLDS}

    def failing(method, **entries):
        found = verdicts(study, changed(rows, lambda unit, r: {**r, **entries} if unit["method"] == method else r))
        return {claim for claim, verdict in found.items() if verdict == FAILS}

    assert failing("GAN", covered=8) >= {"collapse", "PacGAN", "WGAN-GP"}
    assert failing("PacGAN", covered=3) == {"PacGAN"}
    assert failing("WGAN-GP", covered=7) == {"none dropped"}
    assert failing("GAN", alone=0.6) == {"maximin"}
    assert failing("unrolled GAN", concentration=0.8) == {"maximin"}


def test_a_pack_has_one_score_and_real_and_fake_stay_apart():
    critic = module.PackedCritic(torch.nn.Sequential(torch.nn.Linear(4, 1), torch.nn.Flatten(0)), 2)
    x = torch.randn(6, 2)
    with torch.no_grad():
        scores, packs = critic(x), critic.critic(torch.stack([torch.cat([x[i], x[i + 1]]) for i in (0, 2, 4)]))
    assert torch.equal(scores, packs[[0, 0, 1, 1, 2, 2]])
    assert critic.mixes_samples


def test_rates_of_the_critics_are_in_the_proportion_of_their_recipes(study, monkeypatch):
    rates = {}

    def fit(recipe, *arguments, **options):
        rates[recipe.name, recipe.minibatch] = recipe.generator_lr, recipe.critic_lr

    monkeypatch.setattr(module, "fit", fit)
    study_checks.finished(study)
    lr = study.settings(False)["lr"]
    assert rates.pop(("unrolled", "none")) == (lr, pytest.approx(lr / 10))
    assert len(rates) == 4
    assert set(rates.values()) == {(lr, lr)}


def test_concentration_of_a_point_and_of_a_ring():
    assert module._concentration(torch.ones(5, 2)) == 0
    assert module._concentration(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(1)


def test_a_small_run(study):
    rows = study_checks.finished(study)
    assert [row.unit["method"] for row in rows] == list(module._METHODS)
    for row in rows:
        assert len(row.result["frames"]) == 5
        assert row.result["modes"][-1] == row.result["covered"]
        assert ("alone" in row.result) == (row.unit["method"] == "GAN")
    assert len(study_checks.drawn(study, rows)) > 10_000
