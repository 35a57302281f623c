"""Mode-regularized GAN: the encoder's terms, and the modes that they keep."""

import dataclasses

import pytest
import system_checks as checks
import torch
from torch.nn import functional as F

from lipgan.metrics import mode_coverage
from lipgan.training import Trainer

pytestmark = pytest.mark.usefixtures("single_thread")


def test_the_losses_are_those_of_the_paper() -> None:
    weights = {"reconstruction_weight": 0.3, "realism_weight": 0.7}
    system = checks.system_of(checks.recipe("mode-regularized", options=weights), checks.points())
    batch = checks.batch(system)
    samples, restored = system.generator(batch.z, batch.real)
    torch.testing.assert_close(samples, system.generator(batch.z))
    wanted = -F.logsigmoid(system.critic(samples)).mean()
    wanted = wanted + 0.3 * ((restored - batch.real) ** 2).mean() - 0.7 * F.logsigmoid(system.critic(restored)).mean()
    torch.testing.assert_close(system.generator_loss(batch).loss, wanted)


def test_without_the_terms_it_is_the_ordinary_game() -> None:
    row = checks.recipe("mode-regularized", options={"reconstruction_weight": 0.0, "realism_weight": 0.0})
    system = checks.system_of(row, checks.points())
    batch = checks.batch(system)
    loss = system.generator_loss(batch).loss
    torch.testing.assert_close(loss, -F.logsigmoid(system.critic(system.generator(batch.z))).mean())
    loss.backward()
    encoder = system.generator.encoder
    assert all(p.grad is None or not p.grad.any() for p in encoder.parameters())


def test_thirty_steps_restore_better_than_the_mean_of_the_data() -> None:
    data = checks.points()
    row = checks.recipe("mode-regularized", options={"reconstruction_weight": 10.0}, generator_lr=1e-3, latent_dim=4)
    trainer = Trainer.from_recipe(row, data, log_every=30).fit(30)
    assert trainer.history[-1]["reconstruction"] is not None
    with torch.no_grad():
        _, restored = trainer.generator(torch.zeros(len(data), 4), data.samples)
    assert float((restored - data.samples).square().mean()) < float(data.samples.var(0).mean())


def test_it_covers_modes_that_the_ordinary_game_misses() -> None:
    """With a generator ten times as fast as the critic, the ordinary training scheme moves from mode to mode."""
    covered = []
    for weight in (0.0, 1.0):
        options = {"reconstruction_weight": weight * 0.2, "realism_weight": weight * 0.4}
        row = checks.recipe("mode-regularized", options=options, ema_decay=0.9, latent_dim=8)
        row = dataclasses.replace(row, generator_lr=1e-3, critic_lr=1e-4)
        trainer = Trainer.from_recipe(row, "ring", seed=0).fit(300)
        data = trainer.data
        assert data.modes is not None
        assert data.mode_std is not None
        covered.append(mode_coverage(trainer.sample(2000), data.modes, data.mode_std, radius=10).covered)
    assert covered[0] <= 3
    assert covered[1] >= 7


def test_labels_are_refused() -> None:
    data = checks.Dataset("points", checks.points().samples, torch.arange(64) % 2)
    with pytest.raises(ValueError, match="conditioning must be 'none'"):
        checks.system_of(checks.recipe("mode-regularized", conditioning="concat"), data)


def test_it_serves_all_shapes_resumes_and_accumulates(tmp_path: checks.Path) -> None:
    row = checks.recipe("mode-regularized", batch_size=8)
    checks.assert_serves(row)
    checks.assert_serves(checks.recipe("mode-regularized", loss="relativistic", generator_norm="spectral"))
    checks.assert_resumes(row, checks.points(), tmp_path)
    checks.assert_parts_add_up(row)
