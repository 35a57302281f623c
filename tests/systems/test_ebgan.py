"""EBGAN: energies with a margin, and the repelling regularizer."""

import pytest
import system_checks as checks
import torch
from torch import Tensor

from lipgan.data import load
from lipgan.training import Trainer

pytestmark = pytest.mark.usefixtures("single_thread")


def energies(system: checks.System, x: Tensor) -> Tensor:
    return (x - system.critic(x, reconstruct=True)).square().flatten(1).mean(1)


def test_the_losses_are_those_of_the_paper() -> None:
    row = checks.recipe("ebgan", options={"margin": 0.7, "pulling_away": 0.3})
    system = checks.system_of(row, checks.pictures())
    batch = checks.batch(system, 6)
    fake = system.generator(batch.z)
    wanted = energies(system, batch.real).mean() + (0.7 - energies(system, fake)).clamp_min(0).mean()
    torch.testing.assert_close(system.critic_loss(batch).loss, wanted)
    codes = system.critic(fake, full=True).features
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    alike = torch.stack([torch.cosine_similarity(codes[i], codes[j], 0) ** 2 for i, j in pairs]).mean()
    torch.testing.assert_close(system.generator_loss(batch).loss, energies(system, fake).mean() + 0.3 * alike)


def test_the_regularizer_keeps_samples_apart() -> None:
    alike = []
    for weight in (0.0, 1.0):
        row = checks.recipe("ebgan", options={"pulling_away": weight}, latent_dim=4)
        trainer = Trainer.from_recipe(row, "ring", seed=0, log_every=100).fit(100)
        alike.append(trainer.history[-1]["pulling_away"])
    assert alike[1] < alike[0]


def test_sixty_steps_restore_the_data_better_than_grey() -> None:
    data = load("digits")
    # At the recipe's own learning rates so few steps depend on the last places of the processor's arithmetic.
    row = checks.recipe("ebgan", batch_size=16, generator_lr=2e-4, critic_lr=2e-4)
    trainer = Trainer.from_recipe(row, data).fit(60)
    with torch.no_grad():
        restored = float(energies(trainer.system, data.samples).mean())
    assert restored < 0.7 * float(data.samples.square().mean())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "hinge"}, "loss must be 'energy'"),
        ({"critic_norm": "gradient"}, "critic_norm must not be 'gradient'"),
        ({"architecture": "conv"}, "architecture must be 'autoencoder'"),
        ({"options": {"pulling_away": -1.0}}, "pulling_away must be at least 0"),
        ({"options": {"margin": 0.0}}, "margin must be positive"),
    ],
)
def test_what_it_refuses(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checks.system_of(checks.recipe("ebgan", **changes), checks.pictures())


def test_it_serves_all_shapes_and_resumes(tmp_path: checks.Path) -> None:
    row = checks.recipe("ebgan", batch_size=8)
    checks.assert_serves(row)
    checks.assert_resumes(row, checks.points(), tmp_path)
