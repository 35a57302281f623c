"""What the studies take for quality, on samples whose quality is known."""

import math

import pytest
import torch

from lipgan import data, recipes
from lipgan.studies.trainers import FAILED, adapted, coverage, fit, judged, quality


def test_real_digits_are_good_and_noise_is_not():
    real = data.load("digits", 8).samples
    good = quality(real[:300])
    noise = quality(torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    assert good["fid"] < 100 < 300 < noise["fid"]
    assert good["score"] > 9 > 7 > noise["score"]
    assert good["precision"] > 0.9 > 0.6 > noise["precision"]
    assert quality(torch.full((10, 1, 8, 8), math.nan)) == FAILED


def test_a_mode_needs_one_sample_in_a_hundred():
    ring = data.load("ring")
    samples = torch.cat([ring.modes[:1].repeat(99, 1), ring.modes[1:2], torch.zeros(100, 2)]).float()
    assert coverage(samples, ring).covered == 1
    assert coverage(samples[1:100], ring).covered == 2


def test_training_that_diverges_is_none_and_the_worst():
    recipe = adapted("gan", {"faster": 1e30, "batch": 8})
    assert recipe.generator_lr == pytest.approx(2e26)
    assert fit(recipe, data.load("ring"), 0, 20) is None
    assert judged(None, 100) == FAILED


def test_moments_are_seen_and_recipes_are_kept():
    seen = []
    recipe = adapted(recipes.get("gan"), {"faster": 2.0, "batch": 8}, n_critic=2)
    assert (recipe.generator_lr, recipe.batch_size, recipe.n_critic) == (4e-4, 8, 2)
    trainer = fit(recipe, data.load("ring"), 0, 4, at=[0, 2, 4, 9], watch=lambda trainer: seen.append(trainer.step))
    assert seen == [0, 2, 4]
    assert trainer.step == 4
