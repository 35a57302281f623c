"""lipgan.recipes and what its rows name: losses and architectures."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from lipgan import data, models, recipes
from lipgan.objectives import losses
from lipgan.training import Trainer


def test_sngan_has_constants_of_its_paper() -> None:
    """Table 1: the learning rate and betas of the residual networks; one critic update, as settings B and C have."""
    recipe = recipes.get("sngan")
    assert "sngan" in recipes.names()
    assert (recipe.loss, recipe.critic_norm) == ("hinge", "spectral")
    assert (recipe.generator_lr, recipe.critic_lr, recipe.betas) == (2e-4, 2e-4, (0.0, 0.9))
    assert (recipe.batch_size, recipe.n_critic) == (64, 1)
    residual = recipes.get("sngan-resnet")
    assert (residual.generator_lr, residual.critic_lr, residual.betas) == (2e-4, 2e-4, (0.0, 0.9))
    assert residual.n_critic == 5


def test_wgan_gp_has_the_constants_of_its_paper() -> None:
    recipe = recipes.get("wgan-gp")
    assert (recipe.loss, recipe.critic_norm) == ("wasserstein", "none")
    assert (recipe.penalty, recipe.penalty_weight, recipe.penalty_target) == ("wgan-gp", 10, 1)
    assert (recipe.generator_lr, recipe.critic_lr, recipe.betas) == (1e-4, 1e-4, (0.0, 0.9))
    assert (recipe.batch_size, recipe.n_critic) == (64, 5)


def test_wgan_has_the_constants_of_its_paper() -> None:
    """Algorithm 1."""
    recipe = recipes.get("wgan")
    assert (recipe.loss, recipe.optimizer, recipe.penalty) == ("wasserstein", "rmsprop", "none")
    assert (recipe.generator_lr, recipe.critic_lr) == (5e-5, 5e-5)
    assert (recipe.weight_clip, recipe.n_critic, recipe.batch_size) == (0.01, 5, 64)


def test_unknown_names_tell_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown recipe 'sn-gan'; did you mean sngan( or |\?)"):
        recipes.get("sn-gan")
    with pytest.raises(ValueError, match=r"unknown recipe 'zzz'; known: .*sngan"):
        recipes.get("zzz")
    with pytest.raises(ValueError, match=r"unknown loss 'hing'; did you mean hinge( or |\?)"):
        losses.get("hing")
    with pytest.raises(ValueError, match=r"unknown architecture 'convv'; did you mean conv( or |\?)"):
        models.build("convv", (1, 16, 16))


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipes.get("sngan").batch_size = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0),
        ("batch_size", 1.5),
        ("n_critic", 0),
        ("steps", -1),
        ("generator_lr", 0.0),
        ("critic_lr", float("nan")),
        ("critic_lr", float("inf")),
        ("betas", (0.0, 1.0)),
        ("betas", (-0.1, 0.9)),
        ("ema_decay", 1.0),
        ("critic_norm", "spectrall"),
        ("penalty", "wgan"),
        ("penalty_weight", -1.0),
        ("penalty_weight", float("nan")),
        ("penalty_target", float("inf")),
        ("loss", "hing"),
        ("architecture", "nothing"),
    ],
)
def test_a_field_out_of_range_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        recipes.check(dataclasses.replace(recipes.get("sngan"), **{field: value}))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 12, 16, 20, 24, 28, 32])
def test_conv_serves_every_size(size: int, channels: int) -> None:
    generator, critic = models.build("conv", (channels, size, size))
    z = torch.randn(2, int(generator.latent_dim))  # type: ignore[arg-type]
    fake = generator(z)
    assert fake.shape == (2, channels, size, size)
    assert fake.abs().max() <= 1
    scores = critic(fake)
    assert scores.shape == (2,)
    scores.sum().backward()
    for module in (generator, critic):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name


def test_the_critic_keeps_its_lipschitz_bound() -> None:
    """Batch norm in the critic would divide by a batch's deviation, whatever the norms of the weights."""
    _, critic = models.build("conv", (1, 16, 16))
    assert not [module for module in critic.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    x = torch.randn(4, 1, 16, 16)
    assert torch.allclose(critic(x)[:1], critic(x[:1]), atol=1e-6), "a score depends on the rest of the batch"


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 10, 10), "multiple of 4"),
        ((1, 4, 4), "multiple of 4 from 8 to 128, got 4"),
        ((1, 132, 132), "got 132"),
        ((2, 16, 16), "channels must be 1 or 3, got 2"),
        ((1, 16, 12), "square"),
        ((2,), "square"),
    ],
)
def test_conv_refuses_other_shapes(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.build("conv", shape)


def test_the_documentation_has_a_row_for_every_recipe() -> None:
    page, _ = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text().split("<!-- digits -->")
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    for name in recipes.names():
        assert name in rows, name


# --- values for vectors


def test_points_have_shorter_noise_and_larger_steps() -> None:
    """Where the source, which is about images, says otherwise; images and sequences have what the source says."""
    for name in recipes.names():
        for shape in ((1, 16, 16), (16, 11)):
            assert recipes.for_shape(name, shape) == {}
            assert recipes.get(name, shape) == recipes.get(name)
        points, source = recipes.get(name, (2,)), recipes.get(name)
        assert points.latent_dim == {"cyclegan": 64, "began": 1}.get(name, 8)
        if name not in ("ali", "veegan", "unrolled"):
            assert (points.ema_decay, points.generator_lr, points.critic_lr) == (0.9, 1e-3, 1e-3)
        changed = recipes.for_shape(name, (2,))
        assert points == dataclasses.replace(source, **changed)
        assert all(getattr(source, field) != value for field, value in changed.items())
    # It has no noise.
    assert "latent_dim" not in recipes.for_shape("cyclegan", (2,))
    assert recipes.for_shape("avb", (2,)) == {"ema_decay": 0.9}
    assert recipes.for_shape("unrolled", (2,)) == {"latent_dim": 8, "ema_decay": 0.9}
    assert recipes.for_shape("ali", (2,)) == {"latent_dim": 8}
    assert recipes.for_shape("cramer", (2,))["penalty_weight"] == recipes.for_shape("wgan-gp", (2,))["penalty_weight"]
    assert recipes.get("wgan-gp", (2,)).penalty_weight < recipes.get("wgan-gp").penalty_weight
    with pytest.raises(ValueError, match="unknown recipe 'wgan-pg'; did you mean"):
        recipes.for_shape("wgan-pg", (2,))


@pytest.mark.parametrize("name", [name for name in recipes.names() if name not in ("gan-cls", "seqgan")])
def test_every_recipe_serves_points_with_its_values_for_them(name: str) -> None:
    """All but those of sentences and of sequences."""
    dataset = data.load("ring")
    trainer = Trainer.from_recipe(recipes.get(name, dataset.shape), dataset)
    assert trainer.sample(3).shape == (3, 2)
