"""Adversarial variational Bayes: what the critic's scores are, and posteriors and bounds that are known."""

import math
from pathlib import Path
from typing import Any

import pytest
import system_checks as checks
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.nn import functional as F

from lipgan.data import Dataset
from lipgan.systems._encoder import EncoderDecoder, NoisyEncoder
from lipgan.systems.ali import JointCritic
from lipgan.training import Trainer

pytestmark = pytest.mark.usefixtures("single_thread")

# x = 2 z + noise of standard deviation 1, z ~ N(0, 1): the posterior is N(0.4 x, 0.2), x ~ N(0, 5).
SLOPE, STD = 2.0, 1.0
POSTERIOR_SLOPE, POSTERIOR_STD = 0.4, math.sqrt(0.2)


def gaussian(n: int = 2000) -> Dataset:
    random = torch.Generator().manual_seed(8)
    return Dataset("gaussian", math.sqrt(SLOPE**2 + STD**2) * torch.randn(n, 1, generator=random))


def linear(slope: float) -> nn.Module:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, slope)
    return layer.requires_grad_(False)


class Given(nn.Module):
    """Codes ``slope x + std noise``."""

    def __init__(self, slope: float, std: float) -> None:
        super().__init__()
        self.slope, self.std = slope, std
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        mean = self.slope * x
        return self.shift + (mean.unsqueeze(1) if noise.ndim == 3 else mean) + self.std * noise


def trainer(encoder: nn.Module | None = None, contrast: float = 0, **changes: Any) -> Trainer:
    """Of the linear decoder; with the encoder of the recipe, or one that stays as it is."""
    fields = {"critic_lr": 5e-3, "generator_lr": 3e-3 if encoder is None else 1e-30, "lr_decay": "linear", **changes}
    row = checks.recipe("avb", options={"std": STD, "contrast": contrast}, latent_dim=1, **fields)
    encoder = NoisyEncoder(row, (1,), width=64) if encoder is None else encoder
    networks = EncoderDecoder(encoder, linear(SLOPE), 1), JointCritic(row, (1,), width=64)
    return Trainer(*networks, row, gaussian(), log_every=100)


def test_the_losses_are_those_of_the_paper() -> None:
    """Without contrast: eq. 3.2 of the critic, eq. 3.7 of encoder and decoder."""
    system = checks.system_of(checks.recipe("avb", options={"std": 0.7, "contrast": 0}), checks.points())
    batch = checks.batch(system)
    state = batch.random.get_state()
    codes = system.generator(batch.real, encode=True, noise=batch.randn(batch.z))
    ours, prior = system.critic(batch.real, codes), system.critic(batch.real, batch.z)
    batch.random.set_state(state)
    expected = -F.logsigmoid(ours).mean() - F.logsigmoid(-prior).mean()
    torch.testing.assert_close(system.critic_loss(batch).loss, expected)
    batch.random.set_state(state)
    bound = Normal(system.generator(codes), 0.7).log_prob(batch.real).sum(1).mean() - ours.mean()
    outcome = system.generator_loss(batch)
    torch.testing.assert_close(outcome.terms["elbo"], bound.detach())
    ours_gradients, wanted = (
        torch.autograd.grad(loss, list(system.generator.parameters())) for loss in (outcome.loss, -bound)
    )
    torch.testing.assert_close(ours_gradients, wanted)


def test_scores_become_the_logarithm_of_the_ratio_of_posterior_and_prior() -> None:
    run = trainer(Given(POSTERIOR_SLOPE, POSTERIOR_STD), steps=250).fit(250)
    x = run.data.samples
    posterior = Normal(POSTERIOR_SLOPE * x, POSTERIOR_STD)
    z = posterior.mean + POSTERIOR_STD * torch.randn(2000, 1, generator=torch.Generator().manual_seed(3))
    truth = (posterior.log_prob(z) - Normal(0.0, 1.0).log_prob(z)).squeeze(1)
    with torch.no_grad():
        scores = run.critic(x, z)
    # The truth has a standard deviation of 1.1 among these pairs.
    assert float((scores - truth).square().mean().sqrt()) < 0.35
    divergence = float(kl_divergence(posterior, Normal(0.0, 1.0)).mean())
    assert float(scores.mean()) == pytest.approx(divergence, abs=0.15)


@pytest.mark.parametrize("std", [0.5, 0.02])
def test_contrast_leaves_little_of_the_divergence_to_the_critic(std: float) -> None:
    """A Gaussian posterior is its own r: the critic has nothing to tell, and the rest is exact but for the moments."""
    run = trainer(Given(2.0, std), contrast=200, steps=20).fit(20)
    with torch.no_grad():
        batch = checks.batch(run.system, 2000)
        divergence = run.system.generator_loss(batch).terms["divergence"]
    truth = kl_divergence(Normal(2.0 * batch.real, std), Normal(0.0, 1.0)).mean()
    assert float(divergence) == pytest.approx(float(truth), abs=0.25)


def test_the_posterior_of_a_linear_model_is_found() -> None:
    """And the bound is then the log likelihood."""
    run = trainer(contrast=16, steps=300, ema_decay=0.9).fit(300)
    x = torch.tensor([-3.0, 0.0, 2.0])
    noise = torch.randn(3, 2000, 1, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        codes = run.ema(x.unsqueeze(1), encode=True, noise=noise).squeeze(2)
        elbo = run.system.generator_loss(checks.batch(run.system, 2000)).terms["elbo"]
    torch.testing.assert_close(codes.mean(1), POSTERIOR_SLOPE * x, rtol=0, atol=0.2)
    torch.testing.assert_close(codes.std(1), torch.full((3,), POSTERIOR_STD), rtol=0.3, atol=0)
    evidence = MultivariateNormal(torch.zeros(1), torch.tensor([[SLOPE**2 + STD**2]])).log_prob(run.data.samples)
    assert float(elbo) == pytest.approx(float(evidence.mean()), abs=0.2)


def test_bad_settings_are_named() -> None:
    for changes, message in (
        ({"options": {"std": 0.0}}, "std must be positive, got 0.0"),
        ({"options": {"contrast": 1}}, "contrast must be a whole number"),
        ({"loss": "hinge"}, "loss must be one of non-saturating, minimax"),
        ({"critic_norm": "spectral"}, "critic_norm must be 'none' for the system 'avb'"),
    ):
        with pytest.raises(ValueError, match=message):
            checks.system_of(checks.recipe("avb", **changes), checks.points())


def test_it_serves_all_shapes_resumes_and_accumulates(tmp_path: Path) -> None:
    row = checks.recipe("avb", batch_size=8)
    checks.assert_serves(row)
    checks.assert_resumes(row, checks.points(), tmp_path)
    checks.assert_parts_add_up(row)
