"""lipgan.systems.aae: who is real for the critic, what the autoencoder minimizes, and codes that become noise."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lipgan import data, recipes
from lipgan.data import Dataset
from lipgan.objectives import losses
from lipgan.systems.aae import AAE
from lipgan.systems.base import Batch
from lipgan.training import Trainer, load_generator

RECIPE = dataclasses.replace(recipes.get("aae"), batch_size=8)


pytestmark = pytest.mark.usefixtures("single_thread")


def trainer(dataset: str | Dataset = "digits", **changes: Any) -> Trainer:
    dataset = data.load(dataset) if isinstance(dataset, str) else dataset
    return Trainer.from_recipe(dataclasses.replace(RECIPE, **changes), dataset, log_every=1)


def batch_of(run: Trainer, n: int = 6) -> tuple[Batch, Tensor]:
    """A batch, and the codes that its random numbers give."""
    z = torch.randn(n, run.generator.latent_dim, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(n, run.generator.latent_dim, generator=torch.Generator().manual_seed(2))
    batch = Batch(run.data.samples[:n], None, z, torch.Generator().manual_seed(2))
    return batch, run.generator(batch.real, encode=True, noise=noise)


@pytest.mark.parametrize("loss", ["non-saturating", "wasserstein", "relativistic"])
def test_the_losses_follow_from_codes_and_noise(loss: str) -> None:
    run = trainer("ring", loss=loss, options={"reconstruction": 3.0})
    batch, codes = batch_of(run)
    real, fake = run.critic(batch.z), run.critic(codes)
    objective = losses.get(loss)
    assert run.system.critic_loss(batch).loss.item() == pytest.approx(
        objective.critic_loss(real, fake).item(), rel=1e-5
    )
    outcome = run.system.generator_loss(batch_of(run)[0])
    error = (batch.real - run.generator(codes)).square().mean()
    adversarial = objective.generator_loss(fake, real)
    assert outcome.terms["reconstruction"].item() == pytest.approx(error.item(), rel=1e-5)
    assert outcome.loss.item() == pytest.approx((3 * error + adversarial).item(), rel=1e-5)


def gaussian() -> Dataset:
    """Correlated points far from the origin: their codes are not noise unless they are made to be."""
    points = torch.randn(500, 2, generator=torch.Generator().manual_seed(8))
    return Dataset("gaussian", points @ torch.tensor([[1.0, 0.6], [0.0, 0.5]]) + torch.tensor([3.0, -2.0]))


def test_the_critic_makes_the_codes_noise() -> None:
    """Of data around (3, -2): their codes get the moments of the noise while the decoder learns to restore them."""
    run = trainer(gaussian(), batch_size=64, generator_lr=1e-3, critic_lr=1e-3, options={"reconstruction": 1.0})
    data, noise = run.data.samples, torch.randn(500, 2, generator=torch.Generator().manual_seed(1))

    def distance_from_noise() -> float:
        codes = run.generator(data, encode=True, noise=noise).detach()
        return float(codes.mean(0).square().sum() + (torch.cov(codes.T) - torch.eye(2)).square().sum())

    assert distance_from_noise() > 1
    run.fit(400)
    assert distance_from_noise() < 0.5
    assert run.history[-1]["reconstruction"] < 0.2 * float(data.var(0).mean())
    assert torch.allclose(run.sample(500).mean(0), data.mean(0), atol=0.6)


@pytest.mark.parametrize("name", ["ring", "digits", "patches"])
def test_30_steps_restore_samples_better_than_their_mean(name: str) -> None:
    run = trainer(name, batch_size=16, generator_lr=2e-3, options={"reconstruction": 100.0}).fit(30)
    baseline = float((run.data.samples - run.data.samples.mean(0)).square().mean())
    assert sum(row["reconstruction"] for row in run.history[-3:]) / 3 < 0.9 * baseline
    assert run.sample(3).shape == (3, *run.data.shape)


def test_a_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    whole = trainer().fit(4)
    trainer().fit(2).save(tmp_path / "checkpoint.pt")
    resumed = Trainer.load(tmp_path / "checkpoint.pt").fit(2)
    assert resumed.history == whole.history
    assert torch.equal(resumed.sample(4), whole.sample(4))
    generator = load_generator(tmp_path / "checkpoint.pt")
    assert generator(generator(whole.data.samples[:3], encode=True)).shape == (3, 1, 16, 16)


@pytest.mark.parametrize("architecture", ["dcgan", "mlp", "sngan"])
def test_other_architectures_give_encoder_and_decoder(architecture: str) -> None:
    run = trainer(architecture=architecture)
    assert isinstance(run.system, AAE)
    run.fit(1)


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="architecture must be one whose critic has a linear last layer"):
        trainer(architecture="autoencoder")
    with pytest.raises(ValueError, match="conditioning must be 'none' for the system 'aae'"):
        trainer(conditioning="concat")
