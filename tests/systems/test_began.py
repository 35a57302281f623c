"""lipgan.systems.began: the equations of BEGAN, the balance that they keep, and its exact resume."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lipgan import data, recipes
from lipgan.systems.began import BEGAN, Equilibrium
from lipgan.training import Trainer

RECIPE = dataclasses.replace(recipes.get("began"), batch_size=8)


pytestmark = pytest.mark.usefixtures("single_thread")


def trainer(name: str = "digits", **changes: Any) -> Trainer:
    size = 8 if name in ("digits", "patches") else None
    return Trainer.from_recipe(dataclasses.replace(RECIPE, **changes), data.load(name, size), log_every=1)


def test_the_losses_are_those_of_the_paper() -> None:
    loss = Equilibrium(gamma=0.5, lambda_k=0.1)
    loss.k = torch.tensor(0.25, dtype=torch.float64)
    real, fake = torch.tensor([-0.6, -1.0]), torch.tensor([-0.1, -0.5])  # L(x) = 0.8, L(G(z)) = 0.3
    assert loss.critic_loss(real, fake).item() == pytest.approx(0.8 - 0.25 * 0.3)
    assert loss.generator_loss(fake).item() == pytest.approx(0.3)
    assert loss.estimate(real, fake).item() == pytest.approx(0.8 + abs(0.5 * 0.8 - 0.3))
    loss.move()
    assert loss.k.item() == pytest.approx(0.25 + 0.1 * (0.5 * 0.8 - 0.3))


@pytest.mark.parametrize(("real", "fake", "limit"), [(1.0, 0.0, 1.0), (0.1, 1.0, 0.0)])
def test_k_stays_within_0_and_1(real: float, fake: float, limit: float) -> None:
    loss = Equilibrium(gamma=0.5, lambda_k=0.9)
    loss.k = torch.tensor(0.5, dtype=torch.float64)
    for _ in range(3):
        loss.critic_loss(-torch.full((4,), real), -torch.full((4,), fake))
        loss.move()
    assert loss.k.item() == limit


def test_k_moves_once_by_the_mean_over_the_parts_of_a_batch() -> None:
    real, fake = torch.rand(8), torch.rand(8)
    whole, parts = Equilibrium(0.5, 0.1), Equilibrium(0.5, 0.1)
    whole.k = parts.k = torch.tensor(0.3, dtype=torch.float64)
    whole.critic_loss(-real, -fake)
    for a, b in zip(real.chunk(2), fake.chunk(2), strict=True):
        parts.critic_loss(-a, -b)
    whole.move()
    parts.move()
    assert parts.k.item() == pytest.approx(whole.k.item(), rel=1e-6)


def test_a_step_follows_the_equations() -> None:
    """k of one training step, from the errors that the critic itself gives."""
    run = trainer(options={"lambda_k": 0.2, "gamma": 1.0})
    errors: list[float] = []

    def watch(module: torch.nn.Module, args: Any, restored: torch.Tensor) -> None:
        errors.extend(
            (half - copy).abs().double().mean().item()
            for half, copy in zip(args[0].split(8), restored.split(8), strict=True)
        )

    run.critic.register_forward_hook(watch)
    run.fit(1)
    assert isinstance(run.system, BEGAN)
    k = 0.2 * (errors[0] - errors[1])
    assert 0 < k < 1
    assert run.system.equilibrium.k.item() == pytest.approx(k, rel=1e-5)
    row = run.history[0]
    assert row["critic_loss"] == pytest.approx(errors[0], rel=1e-5), "k was 0"
    assert row["generator_loss"] == pytest.approx(errors[2], rel=1e-5)
    assert row["balance"] == 0


@pytest.mark.parametrize("name", ["ring", "digits", "patches"])
def test_30_steps_lower_the_measure_of_convergence(name: str) -> None:
    run = trainer(name, critic_lr=1e-3, generator_lr=1e-3).fit(30)
    assert run.history[-1]["estimate"] < 0.85 * run.history[0]["estimate"]
    assert run.sample(3).shape == (3, *run.data.shape)


def test_its_autoencoder_tells_the_modes_of_the_ring_from_what_lies_between() -> None:
    """By the recipe for points: a code as long as a point, or longer, restores what lies between as well."""
    trained = Trainer.from_recipe("began", "ring").fit(800)
    angles = torch.arange(16) * math.pi / 8
    points = 2 * torch.stack([angles.cos(), angles.sin()], 1)
    with torch.no_grad():
        errors = (points - trained.critic(points, reconstruct=True)).abs().mean(1)
    modes, between = errors[::2].mean(), errors[1::2].mean()
    # 0.064 and 0.476; with codes of 8 numbers 0.044 and 0.062.
    assert between > 3 * modes
    assert between > 0.25


def test_a_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    options = {"lambda_k": 0.2, "gamma": 1.0}
    whole = trainer(options=options).fit(6)
    trainer(options=options).fit(3).save(tmp_path / "checkpoint.pt")
    resumed = Trainer.load(tmp_path / "checkpoint.pt").fit(3)
    assert resumed.history == whole.history
    assert resumed.history[-1]["balance"] > 0
    for a, b in zip(resumed.critic.parameters(), whole.critic.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {"gamma": 0.0}}, "gamma must be above 0"),
        ({"options": {"gamma": 1.5}}, "gamma must be above 0"),
        ({"options": {"lambda_k": -1.0}}, "lambda_k must be at least 0"),
        ({"architecture": "conv"}, "architecture must be 'autoencoder'"),
        ({"penalty": "r1"}, "penalty must be 'none' for the system 'began'"),
        ({"loss": "hinge"}, "loss must be 'non-saturating' for the system 'began'"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(**changes)
