"""InfoGAN: the mutual information of codes and samples."""

import math

import pytest
import system_checks as checks
import torch
from torch.distributions import Categorical, Normal
from torch.nn import functional as F

from lipgan.systems import latents
from lipgan.training import Trainer

pytestmark = pytest.mark.usefixtures("single_thread")


def test_the_noise_ends_in_codes() -> None:
    system = checks.system_of(checks.recipe("infogan", options={"code": 4}, latent_dim=5), checks.points())
    z = latents(system.generator, 4000, torch.Generator().manual_seed(0))
    assert z.shape == (4000, 5 + 4 + 2)
    value, continuous = z[:, 5:9], z[:, 9:]
    assert torch.equal(value.sum(1), torch.ones(4000))
    assert torch.equal(value.unique(), torch.tensor([0.0, 1.0]))
    # The standard error of a share of 1/4 among 4000 is 0.007.
    torch.testing.assert_close(value.mean(0), torch.full((4,), 0.25), rtol=0, atol=0.035)
    assert -1 <= float(continuous.min()) < -0.99
    assert 0.99 < float(continuous.max()) <= 1


def test_the_losses_are_those_of_the_paper() -> None:
    weights = {"code": 4, "categorical_weight": 0.7, "continuous_weight": 0.3}
    system = checks.system_of(checks.recipe("infogan", options=weights), checks.points())
    batch = checks.batch(system)
    fake = system.generator(batch.z)
    output = system.critic(fake, full=True)
    codes = batch.z[:, -6:]
    read = Categorical(logits=output.logits[:, :4]).log_prob(codes[:, :4].argmax(1)).mean()
    # Without the constant of a normal distribution.
    near = (Normal(output.logits[:, 4:], 1.0).log_prob(codes[:, 4:]) + 0.5 * math.log(2 * math.pi)).sum(1).mean()
    information = 0.7 * read + 0.3 * near
    torch.testing.assert_close(system.generator_loss(batch).loss, -F.logsigmoid(output.scores).mean() - information)
    outcome = system.critic_loss(batch)
    ordinary = -F.logsigmoid(system.critic(batch.real)).mean() - F.logsigmoid(-output.scores).mean()
    torch.testing.assert_close(outcome.loss, ordinary - information)
    torch.testing.assert_close(outcome.terms["mutual_information"], (math.log(4) + read).detach())


def test_the_code_takes_a_meaning() -> None:
    """On two Gaussians a code of two values says, after some hundred steps, which of them a sample is of."""
    random = torch.Generator().manual_seed(0)
    sides = (torch.arange(512) % 2 * 2 - 1).float()
    samples = torch.stack([1.5 * sides, torch.zeros(512)], 1) + 0.3 * torch.randn(512, 2, generator=random)
    data = checks.Dataset("two", samples)
    row = checks.recipe("infogan", options={"code": 2}, latent_dim=4, ema_decay=0.9, generator_lr=5e-4)
    trainer = Trainer.from_recipe(row, data, seed=0, log_every=50).fit(400)
    assert trainer.history[-1]["mutual_information"] > 0.9 * math.log(2)
    with torch.no_grad():
        z = latents(trainer.ema, 400, torch.Generator().manual_seed(1))
        x = trainer.ema(z)
    right = [float((x[z[:, 4 + value] == 1, 0] > 0).float().mean()) for value in range(2)]
    assert sorted(right) == [pytest.approx(0, abs=0.1), pytest.approx(1, abs=0.1)]


def test_thirty_steps_raise_the_bound_above_that_of_guessing() -> None:
    row = checks.recipe("infogan", options={"code": 3}, latent_dim=1, generator_lr=5e-3, critic_lr=5e-3)
    trainer = Trainer.from_recipe(row, checks.points(), log_every=10).fit(30)
    assert trainer.history[-1]["mutual_information"] > 0.3


@pytest.mark.parametrize("code", [1.0, 2.5])
def test_a_code_of_no_values(code: float) -> None:
    with pytest.raises(ValueError, match="code must be a whole number"):
        checks.system_of(checks.recipe("infogan", options={"code": code}), checks.points())


def test_it_serves_all_shapes_resumes_and_accumulates(tmp_path: checks.Path) -> None:
    row = checks.recipe("infogan", batch_size=8)
    checks.assert_serves(row)
    checks.assert_resumes(row, checks.points(), tmp_path)
    checks.assert_parts_add_up(row)
