"""lipgan.systems.lapgan: the pyramid, what each level is conditioned on, and its exact resume."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lipgan import data, recipes
from lipgan.objectives import losses
from lipgan.systems.base import Batch
from lipgan.systems.lapgan import Level, PyramidCritic, PyramidGenerator, pyramid
from lipgan.training import Trainer

RECIPE = dataclasses.replace(recipes.get("lapgan"), batch_size=8)


pytestmark = pytest.mark.usefixtures("single_thread")


def trainer(name: str = "digits", **changes: Any) -> Trainer:
    return Trainer.from_recipe(dataclasses.replace(RECIPE, **changes), data.load(name), log_every=1)


def networks(size: int = 32) -> tuple[PyramidGenerator, PyramidCritic]:
    torch.manual_seed(5)
    return PyramidGenerator((1, size, size), 8, width=8), PyramidCritic((1, size, size), width=8)


@pytest.mark.parametrize(
    ("shape", "sides"),
    [((1, 8, 8), [8]), ((3, 16, 16), [8, 16]), ((1, 28, 28), [14, 28]), ((1, 64, 64), [8, 16, 32, 64]), ((2,), [1])],
)
def test_levels_halve_down_to_8_pixels(shape: tuple[int, ...], sides: list[int]) -> None:
    assert PyramidGenerator(shape, 8, width=4).sides == PyramidCritic(shape, width=4).sides == sides


def test_a_pyramid_adds_up_to_the_images() -> None:
    """The coarsest images, and at each level the difference, h_k = I_k - l_k, which has no blurred part of its own."""
    images = torch.randn(3, 1, 32, 32)
    levels = pyramid(images, 3)
    assert levels[0].low is None
    total = levels[0].images
    for finer in levels[1:]:
        assert finer.low is not None
        difference = finer.images - finer.low
        assert torch.allclose(F.avg_pool2d(difference, 2), torch.zeros(()), atol=1e-6)
        total = F.interpolate(total, scale_factor=2) + difference
    assert torch.allclose(total, images, atol=1e-6)


def test_sampling_conditions_each_level_on_the_sample_before() -> None:
    generator, _ = networks()
    z = torch.randn(2, generator.latent_dim)
    assert generator.latent_dim == 8 + 16**2 + 32**2
    images = generator.coarsest(z[:, :8])
    for k, (start, side) in enumerate(((8, 16), (8 + 16**2, 32))):
        low = F.interpolate(images, scale_factor=2)
        plane = z[:, start : start + side**2].view(2, 1, side, side)
        images = low + generator.details[k](torch.cat([low, plane], 1))
    assert torch.allclose(generator(z), images.clamp(-1, 1), atol=1e-6)


def test_training_conditions_each_level_on_real_images() -> None:
    generator, _ = networks()
    z, real = torch.randn(2, generator.latent_dim), torch.rand(2, 1, 32, 32)
    levels = generator(z, real=real)
    for made, given in zip(levels[1:], pyramid(real, 3)[1:], strict=True):
        assert torch.equal(made.low, given.low)
    other = z.clone()
    other[:, :8] += 1  # the noise of the coarsest level
    changed = [not torch.equal(a.images, b.images) for a, b in zip(levels, generator(other, real=real), strict=True)]
    assert changed == [True, False, False]


def test_the_losses_are_sums_over_independent_levels() -> None:
    run = trainer("digits")
    assert isinstance(run.generator, PyramidGenerator)
    real = run.data.samples[:6]
    random = torch.Generator().manual_seed(1)
    batch = Batch(real, None, torch.randn(6, run.generator.latent_dim, generator=random), random)
    outcome = run.system.critic_loss(batch)
    loss = losses.get("non-saturating")
    made, expected = run.generator(batch.z, real=real), torch.zeros(())
    for k, (fake, true) in enumerate(zip(made, pyramid(real, 2), strict=True)):
        judged = []
        for images, low in (true, fake):
            assert isinstance(run.critic, PyramidCritic)
            if low is None:
                judged.append(run.critic.coarsest(images))
            else:
                judged.append(run.critic.details[k - 1](torch.cat([images, low], 1)).squeeze(1))
        expected = expected + loss.critic_loss(*judged)
    assert outcome.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    outcome.terms["critic_loss_1"].backward()
    assert isinstance(run.critic, PyramidCritic)
    assert all(not p.grad.any() for p in run.critic.coarsest.parameters()), "a level's loss is of its networks only"
    assert all(p.grad.any() for p in run.critic.details[0].parameters())


def test_the_scores_of_samples_are_those_of_their_levels() -> None:
    _, critic = networks()
    images = torch.randn(3, 1, 32, 32)
    scores = critic(images, pyramid(images, 3))
    assert scores.shape == (3, 3)
    assert torch.allclose(critic(images), scores.sum(0))


def test_one_level_is_the_ordinary_game() -> None:
    generator, critic = PyramidGenerator((2,), 8), PyramidCritic((2,))
    z = torch.randn(5, 8)
    assert torch.equal(generator(z), generator.coarsest(z))
    assert torch.equal(critic(generator(z)), critic(generator(z), [Level(generator(z), None)])[0])


@pytest.mark.parametrize("name", ["ring", "digits", "patches"])
def test_30_steps_teach_the_critics_to_tell(name: str) -> None:
    """Against critics that cannot: log 4 for each level."""
    run = trainer(name, critic_lr=1e-3).fit(30)
    levels = 1 if name == "ring" else 2
    assert min(row["critic_loss"] for row in run.history) < 0.8 * levels * 1.3863
    assert run.sample(3).shape == (3, *run.data.shape)


def test_a_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    whole = trainer().fit(4)
    trainer().fit(2).save(tmp_path / "checkpoint.pt")
    resumed = Trainer.load(tmp_path / "checkpoint.pt").fit(2)
    assert resumed.history == whole.history
    assert torch.equal(resumed.sample(4), whole.sample(4))


def test_fields_without_use_are_refused() -> None:
    with pytest.raises(ValueError, match="penalty must be 'none' for the system 'lapgan'"):
        trainer(penalty="wgan-gp")
