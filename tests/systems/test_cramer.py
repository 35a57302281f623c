"""Cramer GAN: algorithm 1 of the paper, and that its generator's gradient is that of the energy distance."""

import dataclasses
import math

import pytest
import system_checks as checks
import torch

from lipgan import data, recipes
from lipgan.objectives.regularizers import energy_distance
from lipgan.systems import System
from lipgan.systems.cramer import Cramer
from lipgan.training import Trainer

pytestmark = pytest.mark.usefixtures("single_thread")


def others(system: System, batch: checks.Batch) -> torch.Tensor:
    """x_g' as the next call of a loss will draw it."""
    state = batch.random.get_state()
    other: torch.Tensor = system.generator(batch.randn(batch.z))
    batch.random.set_state(state)
    return other


def test_the_losses_are_those_of_the_algorithm() -> None:
    system = checks.system_of(checks.recipe("cramer", penalty="none"), checks.points())
    batch = checks.batch(system)
    h = [system.critic(x, full=True).features for x in (batch.real, system.generator(batch.z), others(system, batch))]
    real, fake, other = h
    f_real = (real - other).norm(dim=1) - real.norm(dim=1)
    f_fake = (fake - other).norm(dim=1) - fake.norm(dim=1)
    torch.testing.assert_close(system.critic_loss(batch).loss, -(f_real - f_fake).mean())
    batch = checks.batch(system)
    wanted = (real - fake).norm(dim=1) + (real - other).norm(dim=1) - (fake - other).norm(dim=1)
    torch.testing.assert_close(system.generator_loss(batch).loss, wanted.mean())


def test_the_penalty_is_of_the_whole_surrogate() -> None:
    system = checks.system_of(checks.recipe("cramer", penalty="r1", penalty_weight=2.0), checks.points())
    batch = checks.batch(system)
    other = others(system, batch).detach()
    x = batch.real.clone().requires_grad_()
    h, h_other = (system.critic(y, full=True).features for y in (x, other))
    f = (h - h_other).norm(dim=1) - h.norm(dim=1)
    (slope,) = torch.autograd.grad(f.sum(), x, create_graph=True)
    wanted = slope.square().sum(1).mean()
    outcome = system.critic_loss(batch)
    torch.testing.assert_close(outcome.terms["penalty"], wanted)
    parameters = list(system.critic.parameters())
    got = torch.autograd.grad(outcome.terms["penalty"], parameters, allow_unused=True)
    true = torch.autograd.grad(wanted, parameters, allow_unused=True)
    for g, t, p in zip(got, true, parameters, strict=True):
        zero = torch.zeros_like(p)
        torch.testing.assert_close(zero if g is None else g, zero if t is None else t, rtol=1e-4, atol=1e-6)


def test_the_generators_gradient_is_that_of_the_energy_distance() -> None:
    """On the numbers 0 and 1, as in the paper's example: of the mean over many batches, in the shape of its formula."""
    torch.manual_seed(0)
    real = (torch.rand(1000, 1) < 0.6).double()
    shift = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    g, other = (torch.randn(1000, 1, dtype=torch.float64) + shift for _ in range(2))
    loss = ((real - g).abs() + (real - other).abs() - (g - other).abs()).mean()
    (gradient,) = torch.autograd.grad(loss, shift)
    distance = energy_distance(real, torch.randn(1000, 1, dtype=torch.float64) + shift)
    (wanted,) = torch.autograd.grad(distance, shift)
    # Each is the mean of 1000 numbers of modulus at most 2, mostly 0 or 1: a standard error of about 0.03.
    assert float(gradient) == pytest.approx(float(wanted), abs=0.15)


def test_a_generator_that_makes_the_data_has_the_surrogate_zero() -> None:
    system = checks.system_of(checks.recipe("cramer", penalty="none"), checks.points())
    batch = checks.batch(system)
    real = system.generator(batch.z)
    outcome = system.critic_loss(dataclasses.replace(batch, real=real))
    assert float(outcome.loss.detach()) == pytest.approx(0, abs=1e-6)


def test_thirty_steps_bring_the_samples_nearer() -> None:
    data = checks.points(512)
    row = checks.recipe("cramer", generator_lr=1e-3, critic_lr=1e-3, ema_decay=0.5, latent_dim=4)
    trainer = Trainer.from_recipe(row, data, seed=0)
    before = energy_distance(data.samples, trainer.sample(512))
    after = energy_distance(data.samples, trainer.fit(30).sample(512))
    assert float(after) < 0.5 * float(before)


class _Circle(torch.nn.Module):
    """What a generator makes of the ring that fills the space between its modes."""

    latent_dim = 8

    def __init__(self) -> None:
        super().__init__()
        self.radius = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.radius * torch.nn.functional.normalize(z[:, :2])


def test_its_critic_tells_the_modes_of_the_ring_from_what_lies_between() -> None:
    """By the recipe for points; a penalty of the paper's weight leaves it nearly flat there."""
    recipe = dataclasses.replace(recipes.get("cramer", (2,)), n_critic=1, generator_lr=1e-9)
    torch.manual_seed(0)
    _, critic = Cramer.build(recipe, (2,), 0)
    trainer = Trainer(_Circle(), critic, recipe, data.load("ring")).fit(100)
    angles = torch.arange(16) * math.pi / 8
    points = 2 * torch.stack([angles.cos(), angles.sin()], 1)
    assert trainer.data.modes is not None
    assert torch.cdist(points[::2], trainer.data.modes).amin(1).max() < 1e-5
    others = trainer.sample(256)
    with torch.no_grad():
        scores = torch.stack([trainer.critic(points, other.expand(16, -1)) for other in others]).mean(0)
    # 1.26 to 1.37 in three seeds; 0.08 and 0.12 in two with the weight 10.
    assert scores[::2].mean() - scores[1::2].mean() > 0.7


def test_features_must_be_a_whole_number() -> None:
    with pytest.raises(ValueError, match="features must be a whole number"):
        checks.system_of(checks.recipe("cramer", options={"features": 0.5}), checks.points())


def test_it_serves_all_shapes_resumes_and_accumulates(tmp_path: checks.Path) -> None:
    row = checks.recipe("cramer", batch_size=8, n_critic=2)
    checks.assert_serves(row)
    checks.assert_resumes(row, checks.points(), tmp_path)
    checks.assert_parts_add_up(row)
