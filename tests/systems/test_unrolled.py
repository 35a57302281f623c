"""Unrolled GAN: the gradient through the look-ahead, and what it is good for."""

import dataclasses

import pytest
import system_checks as checks
import torch
from torch import Tensor

from lipgan import models
from lipgan.metrics import mode_coverage
from lipgan.systems import GAN
from lipgan.systems.unrolled import Unrolled
from lipgan.training import Trainer

pytestmark = pytest.mark.usefixtures("single_thread")


def smooth_game(optimizer: str = "sgd", **options: float) -> Unrolled:
    """In float64 with smooth networks, so that finite differences have a meaning."""
    torch.manual_seed(0)
    generator = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()
    generator.latent_dim = 3  # type: ignore[assignment]
    critic = torch.nn.Sequential(
        torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1), torch.nn.Flatten(0)
    ).double()
    row = checks.recipe("unrolled", options=options, optimizer=optimizer, critic_lr=0.5)
    system = Trainer(generator, critic, row, checks.points()).system
    assert isinstance(system, Unrolled)
    return system


def test_the_gradient_is_that_of_the_whole_look_ahead() -> None:
    system = smooth_game(unrolled_steps=3)
    batch = checks.batch(system)

    def loss() -> Tensor:
        return system.generator_loss(batch).loss

    parameters = list(system.generator.parameters())
    gradients = torch.autograd.grad(loss(), parameters)
    random = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = [torch.randn(p.shape, generator=random, dtype=p.dtype) for p in parameters]
        slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
        h = 1e-5
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(d, alpha=sign * h)
            values.append(loss().detach())
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.sub_(d, alpha=sign * h)
        # The error of central differences is h^2 times a third derivative, and eps / h: 1e-10.
        torch.testing.assert_close((values[0] - values[1]) / (2 * h), slope, rtol=1e-6, atol=1e-9)


def test_the_look_ahead_is_gradient_ascent_of_the_critic() -> None:
    system = smooth_game(unrolled_steps=2)
    batch = checks.batch(system)
    outcome = system.generator_loss(batch)
    before = {name: p.clone() for name, p in system.critic.state_dict().items()}
    first = system.critic_loss(batch).loss.detach()
    optimizer = torch.optim.SGD(system.critic.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        system.critic_loss(batch).loss.backward()
        optimizer.step()
    ahead = system.critic_loss(batch).loss.detach()
    system.critic.load_state_dict(before)
    torch.testing.assert_close(outcome.loss, -ahead)
    torch.testing.assert_close(outcome.terms["critic_gain"], first - ahead)


def test_the_steps_are_of_the_size_of_the_optimizers() -> None:
    system = smooth_game(optimizer="adam", unrolled_steps=1, unrolled_rate=0.02)
    batch = checks.batch(system)
    loss = system.critic_loss(batch).loss
    gradients = torch.autograd.grad(loss, list(system.critic.parameters()))
    kept = system.recipe.betas[1]
    for k in range(3):
        system.generator_loss(batch)
        system.after_generator_update()
        for mean, gradient in zip(system.means, gradients, strict=True):
            torch.testing.assert_close(mean, (1 - kept ** (k + 1)) * gradient.square())
    # The gradient never changed, so that Adam's step is the rate times its sign.
    ahead = system.generator_loss(batch).loss
    with torch.no_grad():
        for p, gradient in zip(system.critic.parameters(), gradients, strict=True):
            p.sub_(gradient.sign(), alpha=0.5 * 0.02)
    torch.testing.assert_close(ahead, -system.critic_loss(batch).loss, rtol=1e-5, atol=1e-7)


def test_no_steps_are_the_ordinary_game() -> None:
    system = smooth_game(unrolled_steps=0)
    ordinary = GAN(system.recipe, system.generator, system.critic, system.data)
    batch = checks.batch(system)
    assert torch.equal(system.generator_loss(batch).loss, ordinary.generator_loss(batch).loss)


@pytest.mark.parametrize("critic_norm", ["none", "spectral"])
def test_the_look_ahead_leaves_no_trace_in_the_critic(critic_norm: str) -> None:
    row = checks.recipe("unrolled", critic_norm=critic_norm)
    system = checks.system_of(row, checks.pictures())
    before = {name: value.clone() for name, value in system.critic.state_dict().items()}
    system.generator_loss(checks.batch(system)).loss.backward()
    checks.assert_same(dict(system.critic.state_dict()), before)


def covered(steps_ahead: float) -> int:
    """Modes of the ring that a sample among 2000 comes within 10 standard deviations of."""
    row = checks.recipe("unrolled", options={"unrolled_steps": steps_ahead}, ema_decay=0.9, latent_dim=16)
    torch.manual_seed(0)
    trainer = Trainer(*models.build("mlp", (2,), width=64, latent_dim=16), row, "ring").fit(300)
    data = trainer.data
    assert data.modes is not None
    assert data.mode_std is not None
    return mode_coverage(trainer.sample(2000), data.modes, data.mode_std, radius=10).covered


def test_it_covers_modes_that_the_ordinary_game_misses() -> None:
    """As in the paper's figure 2, where ordinary training moves from mode to mode, at the same learning rates."""
    assert covered(0) <= 3
    assert covered(5) >= 7


def test_options_out_of_range() -> None:
    for options, message in (
        ({"unrolled_steps": 1.5}, "unrolled_steps must be a whole number"),
        ({"unrolled_steps": -1.0}, "unrolled_steps must be a whole number"),
        ({"unrolled_rate": 0.0}, "unrolled_rate must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            smooth_game(**options)


def test_it_serves_all_shapes_and_conditionings_and_resumes(tmp_path: checks.Path) -> None:
    checks.assert_serves(checks.recipe("unrolled", options={"unrolled_steps": 2}))
    checks.assert_resumes(checks.recipe("unrolled", options={"unrolled_steps": 2}), checks.points(), tmp_path)
    data = dataclasses.replace(checks.points(), labels=torch.arange(64) % 3)
    for conditioning in ("concat", "auxiliary", "projection"):
        row = checks.recipe("unrolled", options={"unrolled_steps": 2}, conditioning=conditioning, batch_size=8)
        assert Trainer.from_recipe(row, data).fit(1).sample(3).isfinite().all()
