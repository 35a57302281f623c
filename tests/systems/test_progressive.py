"""lipgan.systems.progressive: how the networks grow, and that nothing jumps when they do."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lipgan import data, recipes
from lipgan.systems.progressive import (
    EqualizedConv2d,
    EqualizedLinear,
    GrowingCritic,
    GrowingGenerator,
    Progressive,
    growth,
)
from lipgan.training import Trainer, load_generator

RECIPE = dataclasses.replace(recipes.get("progressive"), batch_size=8, steps=30)


pytestmark = pytest.mark.usefixtures("single_thread")


def trainer(name: str = "digits", **changes: Any) -> Trainer:
    return Trainer.from_recipe(dataclasses.replace(RECIPE, **changes), data.load(name), log_every=1)


def networks(size: int = 16, growth: float = 2.0) -> tuple[GrowingGenerator, GrowingCritic]:
    torch.manual_seed(3)
    generator, critic = GrowingGenerator(size, 1, 8, width=16), GrowingCritic(size, 1, width=16)
    generator.grow(growth)
    critic.grow(growth)
    return generator, critic


@pytest.mark.parametrize(
    ("progress", "grown"),
    [(0.0, 0.0), (0.2, 0.0), (0.3, 0.5), (0.4, 1.0), (0.6, 1.0), (0.75, 1.75), (0.8, 2.0), (1.0, 2.0)],
)
def test_phases_are_equal_shares_of_the_run(progress: float, grown: float) -> None:
    """Three resolutions, five phases: train 0, fade 1 in, train 1, fade 2 in, train 2."""
    assert growth(progress, 3) == pytest.approx(grown)


def test_one_resolution_needs_no_growth() -> None:
    assert growth(0.0, 1) == growth(0.5, 1) == growth(1.0, 1) == 0


def test_the_first_resolution_is_small_and_samples_are_whole() -> None:
    generator, _ = networks(growth=0.0)
    z = torch.randn(3, 8)
    assert generator(z, full=False).shape == (3, 1, 4, 4)
    assert torch.equal(generator(z), F.interpolate(generator(z, full=False), scale_factor=4))


@pytest.mark.parametrize("size", [8, 12, 16, 28])
def test_neither_network_jumps_when_a_resolution_is_added(size: int) -> None:
    """A resolution enters with weight alpha: at 1e-4 all is nearly as it was, at 1 the old layers are gone."""
    generator, critic = networks(size, growth=0.0)
    z, images = torch.randn(4, 8), torch.rand(4, 1, size, size) * 2 - 1
    sampled, faded, judged = generator(z, full=False), critic.faded(images), critic(images)
    for network in (generator, critic):
        network.grow(1e-4)
    following = (generator.sides[1],) * 2
    assert torch.allclose(generator(z, full=False), F.interpolate(sampled, size=following), atol=1e-3)
    assert torch.allclose(critic.faded(images), F.interpolate(faded, size=following), atol=1e-3)
    assert torch.allclose(critic(critic.faded(images)), judged, atol=2e-2)


def test_fading_mixes_generator_and_real_images_alike() -> None:
    generator, critic = networks(growth=1.0)
    z, images = torch.randn(4, 8), torch.rand(4, 1, 16, 16)
    coarse = F.interpolate(generator(z, full=False), scale_factor=2)
    generator.grow(2.0)
    fine = generator(z, full=False)
    for network in (generator, critic):
        network.grow(1.25)
    assert torch.allclose(generator(z), 0.75 * coarse + 0.25 * fine, atol=1e-5)
    copy = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2)
    assert torch.allclose(critic.faded(images), 0.75 * copy + 0.25 * images, atol=1e-6)


def test_equalized_weights_keep_the_variance() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 128, 8, 8)
    assert EqualizedConv2d(128, 64, 3, gain=1.0)(x)[..., 1:-1, 1:-1].var().item() == pytest.approx(1, abs=0.1)
    assert EqualizedLinear(128, 256, gain=1.0)(x[..., 0, 0]).var().item() == pytest.approx(1, abs=0.1)


def test_drift_is_its_weight_times_the_mean_square_of_the_real_scores() -> None:
    scores = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 0.5, 2.0])
    system = trainer(options={"drift": 0.1}).system
    assert isinstance(system, Progressive)
    expected = 1.0 - 2 / 3 + 0.1 * 14 / 3
    assert system.loss.critic_loss(*scores).item() == pytest.approx(expected)


def test_a_run_grows_and_its_average_with_it() -> None:
    run = trainer(steps=10).fit(10)
    grown = [row["growth"] for row in run.history]
    assert grown == pytest.approx([0, 0, 0, 0.5, 1, 1, 1, 1.5, 2, 2], abs=1e-4)
    assert isinstance(run.ema, GrowingGenerator)
    assert run.ema.stage() == (2, 1.0)
    assert run.sample(3).shape == (3, 1, 16, 16)


@pytest.mark.parametrize(("name", "steps", "lr"), [("ring", 100, 5e-3), ("digits", 30, 1e-3), ("patches", 30, 1e-3)])
def test_some_steps_teach_the_critic_to_tell(name: str, steps: int, lr: float) -> None:
    """Against a critic that cannot, whose estimate is 0; the generator hardly moves."""
    run = trainer(name, steps=1000, generator_lr=1e-5, critic_lr=lr, batch_size=16).fit(steps)
    assert sum(row["estimate"] for row in run.history[-10:]) / 10 > 0.3
    assert run.sample(3).shape == (3, *run.data.shape)


def test_a_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    whole = trainer(steps=10).fit(9)
    trainer(steps=10).fit(3).save(tmp_path / "checkpoint.pt")
    assert load_generator(tmp_path / "checkpoint.pt").stage() == (0, 1.0)
    resumed = Trainer.load(tmp_path / "checkpoint.pt").fit(6)
    assert resumed.history == whole.history
    for a, b in zip(resumed.generator.state_dict().values(), whole.generator.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_fields_without_use_are_refused() -> None:
    with pytest.raises(ValueError, match="architecture must be 'conv' for the system 'progressive'"):
        trainer(architecture="dcgan")
