"""lipgan.systems.ali: the pairs that the critic sees, both sides' losses, and an encoder that inverts the generator."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lipgan import data, recipes
from lipgan.data import Dataset
from lipgan.systems.base import Batch
from lipgan.training import Trainer, load_generator

RECIPE = dataclasses.replace(recipes.get("ali"), batch_size=8)


pytestmark = pytest.mark.usefixtures("single_thread")


def trainer(dataset: str | Dataset = "digits", seed: int = 0, **changes: Any) -> Trainer:
    dataset = data.load(dataset) if isinstance(dataset, str) else dataset
    return Trainer.from_recipe(dataclasses.replace(RECIPE, **changes), dataset, seed=seed, log_every=1)


def random() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def pairs(run: Trainer, n: int = 6) -> tuple[Batch, Tensor, Tensor]:
    """A batch, and the scores of its real and of its fake pairs."""
    z = torch.randn(n, run.generator.latent_dim, generator=random())
    batch = Batch(run.data.samples[:n], None, z, random())
    noise = torch.randn(n, run.generator.latent_dim, generator=random())
    codes = run.generator(batch.real, encode=True, noise=noise)
    return batch, run.critic(batch.real, codes), run.critic(run.generator(z), z)


def test_the_losses_are_of_pairs_and_the_generators_has_the_labels_inverted() -> None:
    run = trainer("ring")
    batch, real, fake = pairs(run)
    expected = F.softplus(-real).mean() + F.softplus(fake).mean()
    assert run.system.critic_loss(batch).loss.item() == pytest.approx(expected.item(), rel=1e-5)
    batch, _, _ = pairs(run)
    inverted = F.softplus(real).mean() + F.softplus(-fake).mean()
    outcome = run.system.generator_loss(batch)
    assert outcome.loss.item() == pytest.approx(inverted.item(), rel=1e-5)
    assert "reconstruction" not in outcome.terms


def test_veegan_adds_the_error_of_restored_noise() -> None:
    run = trainer("ring", options={"reconstruction": 0.7})
    batch, real, fake = pairs(run)
    restored = run.generator(run.generator(batch.z), encode=True)
    error = (batch.z - restored).square().mean()
    outcome = run.system.generator_loss(batch)
    expected = F.softplus(real).mean() + F.softplus(-fake).mean() + 0.7 * error
    assert outcome.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert recipes.get("veegan").options == {"reconstruction": 1.0}


def test_codes_have_the_spread_that_the_encoder_says() -> None:
    encoder = trainer("ring").generator.encoder
    x = torch.tensor([[0.3, -1.0]]).expand(4000, 2)
    mean, log_std = encoder.readout(x[:1]).chunk(2, 1)
    codes = encoder(x, torch.randn(4000, 2, generator=random()))
    assert torch.equal(encoder(x[:1]), mean)
    assert torch.allclose(codes.mean(0), mean[0], atol=0.1)
    assert torch.allclose(codes.std(0), log_std[0].exp(), rtol=0.1)


def gaussian() -> Dataset:
    points = torch.randn(500, 2, generator=torch.Generator().manual_seed(8))
    return Dataset("gaussian", points @ torch.tensor([[1.0, 0.6], [0.0, 0.5]]) + torch.tensor([1.0, -1.0]))


def inversion_error(run: Trainer) -> float:
    """Mean square of z - E(G(z)), in units of the variance of z."""
    z = torch.randn(1000, run.generator.latent_dim, generator=random())
    return float((z - run.generator(run.generator(z), encode=True)).detach().square().mean())


def test_the_encoder_of_veegan_inverts_the_generator() -> None:
    """A code that knows nothing of z has the error 1."""
    run = trainer(gaussian(), batch_size=64, options={"reconstruction": 1.0})
    assert inversion_error(run) > 0.9
    run.fit(300)
    assert inversion_error(run) < 0.3


@pytest.mark.parametrize("name", ["ring", "digits", "patches"])
@pytest.mark.parametrize("recipe", ["ali", "veegan"])
def test_30_steps_teach_the_critic_to_tell(name: str, recipe: str) -> None:
    """Against a critic that cannot, whose estimate is 0."""
    run = trainer(name, critic_lr=1e-3, generator_lr=1e-5, options=recipes.get(recipe).options).fit(30)
    assert sum(row["estimate"] for row in run.history[-5:]) / 5 > 0.1
    assert run.sample(3).shape == (3, *run.data.shape)


def test_a_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    options = {"reconstruction": 1.0}
    whole = trainer(options=options).fit(4)
    trainer(options=options).fit(2).save(tmp_path / "checkpoint.pt")
    resumed = Trainer.load(tmp_path / "checkpoint.pt").fit(2)
    assert resumed.history == whole.history
    assert torch.equal(resumed.sample(4), whole.sample(4))
    generator = load_generator(tmp_path / "checkpoint.pt")
    assert generator(generator(whole.data.samples[:3], encode=True)).shape == (3, 1, 16, 16)


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="loss must be one of minimax"):
        trainer(loss="least-squares")
    with pytest.raises(ValueError, match="reconstruction must be at least 0"):
        trainer(options={"reconstruction": -1.0})
    with pytest.raises(ValueError, match="architecture must be one whose critic has a linear last layer"):
        trainer(architecture="autoencoder")
