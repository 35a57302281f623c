"""The adaptive divergence: a critic that is free as long as it tells nothing, and held the more, the more it tells."""

import math

import pytest
import system_checks as checks
import torch
from torch.nn import functional as F

from lipgan.systems.adaptive_divergence import AdaptiveDivergence, strength
from lipgan.training import Trainer

pytestmark = pytest.mark.usefixtures("single_thread")


def test_the_strength_by_the_formula() -> None:
    entropy = torch.tensor([math.log(2), 1.0, math.log(2) / 2, 0.0], dtype=torch.float64)
    wanted = torch.tensor([0.0, 0.0, 0.3 * math.log(2), 0.3 * math.log(100)], dtype=torch.float64)
    torch.testing.assert_close(strength(entropy, 0.3), wanted)


def test_the_loss_of_a_critic_that_tells_the_two_apart() -> None:
    system = checks.system_of(checks.recipe("adaptive-divergence", options={"weight": 0.2}), checks.points())
    assert isinstance(system, AdaptiveDivergence)
    batch = checks.batch(system)
    real, fake = system.critic(batch.real), system.critic(system.generator(batch.z))
    crossed = (-F.logsigmoid(real).mean() - F.logsigmoid(-fake).mean()) / 2
    # At first it is free.
    torch.testing.assert_close(system.critic_loss(batch).loss, 2 * crossed)
    system.after_critic_update()
    torch.testing.assert_close(system.entropy, (0.99 * math.log(2) + 0.01 * crossed).double().detach())
    system.entropy = torch.tensor(0.3, dtype=torch.float64)
    squares = sum(p.square().sum() for name, p in system.critic.named_parameters() if name.endswith("weight"))
    wanted = 2 * (crossed - 0.2 * math.log(0.3 / math.log(2)) * squares)
    torch.testing.assert_close(system.critic_loss(batch).loss, wanted)


def strengths_of(real_at: float) -> list[float]:
    """Of a critic that meets a generator that stands still at 0, and data around ``(real_at, real_at)``."""
    random = torch.Generator().manual_seed(0)
    data = checks.Dataset("points", torch.randn(256, 2, generator=random) + real_at)
    row = checks.recipe("adaptive-divergence", options={"memory": 0.9}, critic_lr=1e-3, latent_dim=2, ema_decay=0.5)
    torch.manual_seed(0)
    generator = torch.nn.Linear(2, 2)
    generator.latent_dim = 2  # type: ignore[assignment]
    with torch.no_grad():
        generator.weight.copy_(torch.eye(2))
        generator.bias.zero_()
    _, critic = AdaptiveDivergence.build(row, (2,), 0)
    trainer = Trainer(generator, critic, row, data, seed=0, log_every=20)
    trainer.generator_optimizer.param_groups[0]["lr"] = 0.0
    trainer.fit(120)
    return [entry["strength"] for entry in trainer.history]


def test_it_is_held_by_how_far_apart_the_distributions_are() -> None:
    same, near, far = (strengths_of(at)[-1] for at in (0.0, 1.0, 4.0))
    assert same < 0.1 * near
    assert near < far


def test_a_held_critic_has_smaller_gradients() -> None:
    """Which is what the paper wants of it: far away distributions do not leave the generator without a slope."""
    slopes = []
    for weight in (0.0, 1e-2):
        row = checks.recipe("adaptive-divergence", options={"weight": weight, "memory": 0.9}, critic_lr=1e-3)
        data = checks.Dataset("points", torch.randn(256, 2, generator=torch.Generator().manual_seed(0)) * 0.1 + 3)
        trainer = Trainer.from_recipe(row, data, seed=0)
        trainer.generator_optimizer.param_groups[0]["lr"] = 0.0
        trainer.fit(100)
        x = data.samples[:64].clone().requires_grad_()
        slopes.append(float(torch.autograd.grad(trainer.critic(x).sum(), x)[0].norm(dim=1).mean()))
    assert slopes[1] < slopes[0]


def test_thirty_steps_lower_the_cross_entropy() -> None:
    row = checks.recipe("adaptive-divergence", critic_lr=1e-3)
    trainer = Trainer.from_recipe(row, checks.points(), log_every=30).fit(30)
    # A critic that knows nothing has twice log 2.
    assert trainer.history[-1]["critic_loss"] < 2 * math.log(2)
    assert trainer.history[-1]["strength"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "hinge"}, "loss must be 'minimax' or 'non-saturating'"),
        ({"options": {"weight": -1.0}}, "weight must be at least 0"),
        ({"options": {"memory": 1.0}}, "memory must lie in"),
    ],
)
def test_what_it_refuses(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checks.system_of(checks.recipe("adaptive-divergence", **changes), checks.points())


def test_it_serves_all_shapes_resumes_and_accumulates(tmp_path: checks.Path) -> None:
    row = checks.recipe("adaptive-divergence", batch_size=8)
    checks.assert_serves(row)
    checks.assert_resumes(row, checks.points(), tmp_path)
    checks.assert_parts_add_up(row)
