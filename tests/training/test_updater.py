"""lipgan.training.updater: optimizers, clipping, schedules and precision of one network's updates."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from system_checks import points, recipe
from torch import Tensor, nn

from lipgan import data
from lipgan.recipes import Recipe
from lipgan.systems.gan import GAN
from lipgan.training import Trainer
from lipgan.training.average import MovingAverage
from lipgan.training.updater import NetworkUpdater

pytestmark = pytest.mark.usefixtures("single_thread")


class Plane(nn.Module):
    """``w x + b`` for x of two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y.squeeze(1)


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def updated(network: NetworkUpdater, x: Tensor, *, measure: bool = False) -> tuple[Tensor, Tensor | None]:
    """The change of the parameters by one update of ``mean(module(x))``, and the norm that it returns."""
    before = flat(network.module)
    network.backward(network.module(x).mean())
    norm = network.update(measure=measure)
    return flat(network.module) - before, norm


# --- optimizers


@pytest.mark.parametrize(
    ("name", "kind", "constants"),
    [
        ("adam", torch.optim.Adam, {"betas": (0.3, 0.8)}),
        ("rmsprop", torch.optim.RMSprop, {"alpha": 0.8, "momentum": 0}),
        ("sgd", torch.optim.SGD, {"momentum": 0.3, "dampening": 0}),
    ],
)
def test_the_optimizer_has_the_constants_of_the_recipe(name: str, kind: type, constants: dict[str, Any]) -> None:
    row = recipe("gan", optimizer=name, betas=(0.3, 0.8), critic_lr=1e-3, generator_lr=2e-3)
    trainer = Trainer.from_recipe(row, points())
    for optimizer, lr in ((trainer.critic_optimizer, 1e-3), (trainer.generator_optimizer, 2e-3)):
        assert type(optimizer) is kind
        (group,) = optimizer.param_groups
        assert {key: group[key] for key in constants} == constants
        assert (group["lr"], group["weight_decay"]) == (lr, 0)


@pytest.mark.parametrize(("name", "first"), [("adam", 1.0), ("rmsprop", 1 / math.sqrt(0.2)), ("sgd", None)])
def test_the_first_update_by_hand(name: str, first: float | None) -> None:
    """Adam moves each weight by lr, RMSProp by lr / sqrt(1 - alpha), gradient descent by lr times the gradient."""
    x = torch.tensor([[1.0, -2.0], [3.0, -4.0]], dtype=torch.float64)
    gradient = torch.tensor([2.0, -3.0, 1.0], dtype=torch.float64)  # mean x, and that of the bias
    network = NetworkUpdater(Plane(), recipe("gan", optimizer=name, betas=(0.3, 0.8)), 0.01)
    change, _ = updated(network, x)
    expected = -0.01 * (gradient if first is None else first * gradient.sign())
    assert torch.allclose(change, expected, rtol=1e-6)


# --- gradients


def test_long_gradients_are_shortened_and_short_ones_are_not() -> None:
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)  # the gradient is (3, 4, 1)
    for limit, length in ((0.5, 0.5), (100.0, math.sqrt(26)), (0.0, math.sqrt(26))):
        row = recipe("gan", optimizer="sgd", betas=(0.0, 0.0), max_grad_norm=limit)
        change, norm = updated(NetworkUpdater(Plane(), row, 1.0), x, measure=True)
        assert float(change.norm()) == pytest.approx(length, rel=1e-5)
        assert norm is not None
        assert float(norm) == pytest.approx(math.sqrt(26)), "the log tells the length before"
        assert torch.nn.functional.cosine_similarity(-change, torch.tensor([3.0, 4.0, 1.0]).double(), dim=0) > 0.999


def test_logged_norms_are_those_of_the_last_updates() -> None:
    """With plain gradient descent an update is the gradient times the learning rate."""
    row = recipe("gan", optimizer="sgd", betas=(0.0, 0.0), critic_lr=0.01, generator_lr=0.01, batch_size=8)
    generator, critic = GAN.build(row, (2,), 0)
    trainer = Trainer(generator.double(), critic.double(), row, points(), log_every=2)
    critics: list[Tensor] = []
    trainer.system.begin_step = lambda: critics.append(flat(trainer.critic))  # type: ignore[method-assign]
    generators: list[Tensor] = [flat(trainer.generator)]
    trainer.fit(4, callbacks=[lambda t: generators.append(flat(t.generator))])
    critics.append(flat(trainer.critic))
    for row_, step in zip(trainer.history, (2, 4), strict=True):
        for name, weights in (("critic", critics), ("generator", generators)):
            by_hand = float((weights[step] - weights[step - 1]).norm()) / 0.01
            assert row_[f"{name}_gradient_norm"] == pytest.approx(by_hand, rel=1e-9)


def test_a_frozen_player_gets_its_gradients_back() -> None:
    network = NetworkUpdater(Plane(), recipe("gan"), 0.1)
    network.module.layer.bias.requires_grad_(False)  # type: ignore[union-attr]
    with network.frozen():
        assert not any(p.requires_grad for p in network.parameters)
    assert [p.requires_grad for p in network.parameters] == [True, False]


# --- schedules


def test_linear_decay_reaches_zero_at_the_last_step() -> None:
    row = recipe("gan", lr_decay="linear", steps=4, critic_lr=1e-3, generator_lr=2e-3, batch_size=8)
    trainer = Trainer.from_recipe(row, points())
    rates: list[tuple[float, float]] = []

    def note(t: Trainer) -> None:
        rates.append((t.critic_optimizer.param_groups[0]["lr"], t.generator_optimizer.param_groups[0]["lr"]))

    trainer.fit(4, callbacks=[note])
    share = [1, 0.75, 0.5, 0.25]
    assert [a for a, _ in rates] == pytest.approx([1e-3 * s for s in share])
    assert [b for _, b in rates] == pytest.approx([2e-3 * s for s in share])
    before = flat(trainer.critic), flat(trainer.generator)
    trainer.fit(2)
    assert torch.equal(flat(trainer.critic), before[0])
    assert torch.equal(flat(trainer.generator), before[1])


# --- precision


# The tolerance is the largest difference of a loss from that in float32 over 20 steps, relative to the larger of the
# loss and 1. bfloat16 has 8 bits, 0.4 % for a number; a difference grows from step to step, most where losses do.
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("name", "dataset", "changes", "tolerance"),
    [("gan", "ring", {}, 0.05), ("wgan-gp", "ring", {"n_critic": 2}, 0.15), ("sngan", "digits", {}, 0.05)],
)
def test_half_precision_follows_float32(
    name: str, dataset: str, changes: dict[str, Any], tolerance: float, precision: str
) -> None:
    row = recipe(name, batch_size=16, **changes)
    samples = data.load(dataset, 8 if dataset == "digits" else None)

    def history(row: Recipe) -> list[dict[str, Any]]:
        trainer = Trainer.from_recipe(row, samples, log_every=1)
        # float16 begins with the factor 65536, and leaves out the updates that overflow until it has a smaller one.
        for network in (trainer._critic_updater, trainer._generator_updater):
            if network.scaler.is_enabled():
                network.scaler.load_state_dict({**network.scaler.state_dict(), "scale": 256.0})
        assert {p.dtype for p in trainer.generator.parameters()} == {torch.float32}
        return trainer.fit(20).history

    wide, half = history(row), history(dataclasses.replace(row, precision=precision))
    assert wide != half, "nothing ran in half precision"
    for a, b in zip(wide, half, strict=True):
        for key in ("critic_loss", "generator_loss"):
            assert abs(a[key] - b[key]) < tolerance * max(1.0, abs(a[key])), (key, a["step"])


def test_float16_leaves_out_updates_that_overflow_and_goes_on() -> None:
    """The scale halves after each of them; a norm that overflowed is not a number that JSON has."""
    row = recipe("gan", precision="float16", batch_size=8)
    trainer = Trainer.from_recipe(row, points(), log_every=1)
    network = trainer._critic_updater
    network.scaler.load_state_dict({**network.scaler.state_dict(), "scale": 2.0**40})
    before = flat(trainer.critic)
    trainer.fit(1)
    assert torch.equal(flat(trainer.critic), before)
    assert trainer.history[0]["critic_gradient_norm"] is None
    json.loads(json.dumps(trainer.history, allow_nan=False))
    assert network.scaler.get_scale() == 2.0**39
    trainer.fit(40)
    assert not torch.equal(flat(trainer.critic), before)
    assert trainer.history[-1]["critic_gradient_norm"] > 0


def test_the_scale_of_float16_is_part_of_the_state(tmp_path: Any) -> None:
    row = recipe("gan", precision="float16", batch_size=8)
    trainer = Trainer.from_recipe(row, points())
    trainer._critic_updater.scaler.load_state_dict({**trainer._critic_updater.scaler.state_dict(), "scale": 8.0})
    trainer.fit(2).save(tmp_path / "checkpoint.pt")
    resumed = Trainer.load(tmp_path / "checkpoint.pt", data=points())
    assert resumed._critic_updater.scaler.get_scale() == 8.0


# --- the average


def test_a_shared_parameter_is_averaged_once() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight
    average = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    average[1].weight = average[0].weight
    expected = 0.75 * average[0].weight.detach() + 0.25 * module[0].weight.detach()
    MovingAverage(average, module).update(0.75)
    assert torch.allclose(average[1].weight, expected)
