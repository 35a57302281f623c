"""MAD-GAN: k generators, and the critic's k + 1 classes."""

import math

import pytest
import system_checks as checks
import torch
from torch.nn import functional as F

from lipgan.systems import GAN, latents
from lipgan.systems.mad_gan import GeneratorMixture
from lipgan.training import Trainer

pytestmark = pytest.mark.usefixtures("single_thread")


def test_the_losses_are_those_of_the_paper() -> None:
    system = checks.system_of(checks.recipe("mad-gan", options={"generators": 3}), checks.points())
    batch = checks.batch(system, 9)
    fake = system.generator(batch.z).detach()
    real_shares = system.critic(batch.real, full=True).logits.softmax(1)
    fake_shares = system.critic(fake, full=True).logits.softmax(1)
    # Generators take turns, so sample i is of generator i mod 3.
    of_origins = torch.stack([fake_shares[i, i % 3] for i in range(9)])
    wanted = -real_shares[:, 3].log().mean() - of_origins.log().mean()
    torch.testing.assert_close(system.critic_loss(batch).loss, wanted)
    torch.testing.assert_close(system.generator_loss(batch).loss, -fake_shares[:, 3].log().mean())


def test_a_critic_that_knows_nothing_has_the_loss_of_guessing() -> None:
    system = checks.system_of(checks.recipe("mad-gan", options={"generators": 4}), checks.points())
    for p in system.critic.parameters():
        torch.nn.init.zeros_(p)
    outcome = system.critic_loss(checks.batch(system))
    assert float(outcome.loss.detach()) == pytest.approx(2 * math.log(5))


def test_one_generator_is_the_ordinary_game() -> None:
    system = checks.system_of(checks.recipe("mad-gan", options={"generators": 1}), checks.points())
    batch = checks.batch(system)
    ordinary = GAN(system.recipe, system.generator, system.critic, system.data)
    torch.testing.assert_close(system.critic_loss(batch).loss, ordinary.critic_loss(batch).loss)


def test_each_row_of_noise_goes_to_its_generator() -> None:
    system = checks.system_of(checks.recipe("mad-gan", options={"generators": 3}), checks.points())
    mixture = system.generator
    assert isinstance(mixture, GeneratorMixture)
    z = latents(mixture, 7, torch.Generator().manual_seed(0))
    assert z[:, -1].tolist() == [0, 1, 2, 0, 1, 2, 0]
    z = z[torch.randperm(7, generator=torch.Generator().manual_seed(1))]
    wanted = torch.stack([mixture.generators[int(row[-1])](row[None, :-1])[0] for row in z])
    torch.testing.assert_close(mixture(z), wanted)


def test_the_critic_drives_the_generators_apart() -> None:
    """Two generators on two Gaussians: each takes one, because the critic asks which of them made a sample."""
    random = torch.Generator().manual_seed(0)
    sides = (torch.arange(512) % 2 * 2 - 1).float()
    samples = torch.stack([1.5 * sides, torch.zeros(512)], 1) + 0.2 * torch.randn(512, 2, generator=random)
    data = checks.Dataset("two", samples)
    row = checks.recipe("mad-gan", options={"generators": 2}, latent_dim=4, ema_decay=0.9, generator_lr=5e-4)
    trainer = Trainer.from_recipe(row, data, seed=0).fit(600)
    mixture = trainer.ema
    assert isinstance(mixture, GeneratorMixture)
    z = latents(mixture, 400, torch.Generator().manual_seed(1))
    points = mixture(z)[:, 0]
    right = [float((points[z[:, -1] == i] > 0).float().mean()) for i in range(2)]
    assert sorted(right) == [pytest.approx(0, abs=0.1), pytest.approx(1, abs=0.1)]


def test_thirty_steps_of_the_critic_tell_origins_better_than_guessing() -> None:
    system = checks.system_of(checks.recipe("mad-gan", options={"generators": 2}), checks.points())
    batch = checks.batch(system, 32)
    optimizer = torch.optim.Adam(system.critic.parameters(), lr=1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        system.critic_loss(batch).loss.backward()
        optimizer.step()
    assert float(system.critic_loss(batch).loss.detach()) < 2 * math.log(3) * 0.7


@pytest.mark.parametrize("generators", [0.0, 1.5])
def test_a_number_of_generators_that_is_none(generators: float) -> None:
    with pytest.raises(ValueError, match="generators must be a whole number"):
        checks.system_of(checks.recipe("mad-gan", options={"generators": generators}), checks.points())


def test_labels_are_refused() -> None:
    data = checks.Dataset("points", checks.points().samples, torch.arange(64) % 2)
    with pytest.raises(ValueError, match="conditioning must be 'none'"):
        checks.system_of(checks.recipe("mad-gan", conditioning="concat"), data)


def test_it_serves_all_shapes_resumes_and_accumulates(tmp_path: checks.Path) -> None:
    row = checks.recipe("mad-gan", batch_size=8)
    checks.assert_serves(row)
    checks.assert_resumes(row, checks.points(), tmp_path)
    checks.assert_parts_add_up(row)


def test_the_score_is_the_log_odds_of_being_real() -> None:
    system = checks.system_of(checks.recipe("mad-gan"), checks.points())
    output = system.critic(checks.points().samples, full=True)
    real = output.logits.softmax(1)[:, -1]
    torch.testing.assert_close(output.scores, (real / (1 - real)).log())
    torch.testing.assert_close(F.logsigmoid(output.scores), real.log())
