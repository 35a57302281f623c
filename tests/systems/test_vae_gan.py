"""VAE/GAN: the three terms, and which network learns from which."""

import pytest
import system_checks as checks
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from lipgan.systems import Batch, System
from lipgan.systems.vae_gan import VAEGAN
from lipgan.training import Trainer

pytestmark = pytest.mark.usefixtures("single_thread")


def terms(system: System, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """L_prior, L_like and the decoder's objective by the formulas, with gradients to whatever they are made of."""
    state = batch.random.get_state()
    mean, log_variance = system.generator.encoder(batch.real).chunk(2, 1)
    noise = batch.randn(batch.z)
    batch.random.set_state(state)
    posterior = Normal(mean, (log_variance / 2).exp())
    prior = kl_divergence(posterior, Normal(0.0, 1.0)).sum(1).mean()
    restored = system.generator.generator(mean + posterior.scale * noise)
    features = [system.critic(x, full=True).features for x in (batch.real, restored)]
    likelihood = -Normal(features[1], 1.0).log_prob(features[0].detach()).sum(1).mean()
    likelihood = likelihood + Normal(0.0, 1.0).log_prob(torch.zeros(())) * features[0].shape[1]
    fakes = (system.generator(batch.z), restored)
    return prior, likelihood, sum(-F.logsigmoid(system.critic(x)).mean() for x in fakes) / 2


@pytest.fixture
def system() -> System:
    """In float64: a feature at the kink of its unit makes all the difference for a gradient."""
    row = checks.recipe("vae-gan", options={"gamma": 0.1}, latent_dim=3)
    torch.manual_seed(0)
    networks = [network.double() for network in VAEGAN.build(row, (2,), 0)]
    system = Trainer(*networks, row, checks.points()).system
    for p in system.critic.parameters():
        p.requires_grad_(False)
    return system


def test_the_loss_is_the_sum_of_the_paper(system: System) -> None:
    batch = checks.batch(system)
    prior, likelihood, objective = terms(system, batch)
    outcome = system.generator_loss(batch)
    torch.testing.assert_close(outcome.terms["prior"], prior)
    torch.testing.assert_close(outcome.terms["likelihood"], likelihood)
    torch.testing.assert_close(outcome.terms["generator_loss"], objective)
    torch.testing.assert_close(outcome.loss, prior + 0.1 * likelihood + objective)


def test_each_network_learns_from_its_part(system: System) -> None:
    batch = checks.batch(system)
    prior, likelihood, objective = terms(system, batch)
    encoder, decoder = (list(m.parameters()) for m in (system.generator.encoder, system.generator.generator))
    wanted = [
        *torch.autograd.grad(prior + likelihood, encoder, retain_graph=True),
        *torch.autograd.grad(0.1 * likelihood + objective, decoder),
    ]
    system.generator_loss(batch).loss.backward()
    for p, gradient in zip([*encoder, *decoder], wanted, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_the_critic_sees_samples_and_reconstructions_as_fake(system: System) -> None:
    batch = checks.batch(system)
    state = batch.random.get_state()
    parts = system.generator(batch.z, batch.real, batch.randn(batch.z))
    batch.random.set_state(state)
    wanted = -F.logsigmoid(system.critic(batch.real)).mean()
    for fake in (parts.samples, parts.restored):
        wanted = wanted - F.logsigmoid(-system.critic(fake)).mean() / 2
    torch.testing.assert_close(system.critic_loss(batch).loss, wanted)


def test_thirty_steps_restore_better_than_a_shuffle_of_the_data() -> None:
    data = checks.points()
    trainer = Trainer.from_recipe(checks.recipe("vae-gan", generator_lr=2e-3), data, log_every=30)
    trainer.fit(30)
    with torch.no_grad():
        likelihood = trainer.system.generator_loss(checks.batch(trainer.system, 64)).terms["likelihood"]
        features = trainer.critic(data.samples, full=True).features
        guess = 0.5 * (features - features.roll(1, 0)).square().sum(1).mean()
    assert float(likelihood) < float(guess)


def test_gamma_must_be_positive() -> None:
    with pytest.raises(ValueError, match="gamma must be positive"):
        checks.system_of(checks.recipe("vae-gan", options={"gamma": 0.0}), checks.points())


def test_it_serves_all_shapes_resumes_and_accumulates(tmp_path: checks.Path) -> None:
    row = checks.recipe("vae-gan", batch_size=8)
    checks.assert_serves(row)
    checks.assert_serves(checks.recipe("vae-gan", loss="relativistic", critic_norm="spectral"))
    checks.assert_resumes(row, checks.points(), tmp_path)
    checks.assert_parts_add_up(row)
