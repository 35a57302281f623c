"""AlphaGAN: what each of the four networks minimizes, and codes that become noise."""

from pathlib import Path

import pytest
import system_checks as checks
import torch
from torch import Tensor
from torch.nn import functional as F

from lipgan.data import Dataset
from lipgan.systems import Batch, System
from lipgan.training import Trainer

pytestmark = pytest.mark.usefixtures("single_thread")


def codes_of(system: System, batch: Batch) -> Tensor:
    """The codes that the next call of a loss will draw."""
    state = batch.random.get_state()
    codes: Tensor = system.generator(batch.real, encode=True, noise=batch.randn(batch.z))
    batch.random.set_state(state)
    return codes


def r(scores: Tensor) -> Tensor:
    """``-log D + log(1 - D)`` of the paper, for probabilities D."""
    return (-F.logsigmoid(scores) + F.logsigmoid(-scores)).mean()


@pytest.fixture
def system() -> System:
    return checks.system_of(checks.recipe("alpha-gan", options={"reconstruction": 3.0}), checks.points())


def test_each_network_of_the_autoencoder_learns_from_its_part(system: System) -> None:
    """Algorithm 1, by the gradients: the encoder's has no term of the critic of samples."""
    batch = checks.batch(system)
    codes = codes_of(system, batch)
    restored = system.generator(codes)
    error = 3 * (batch.real - restored).abs().mean()
    encoder, decoder = (list(m.parameters()) for m in (system.generator.encoder, system.generator.decoder))
    of_codes = r(system.critic(codes, codes=True))
    of_samples = (r(system.critic(restored)) + r(system.critic(system.generator(batch.z)))) / 2
    wanted = [
        *torch.autograd.grad(error + of_codes, encoder, retain_graph=True),
        *torch.autograd.grad(error + of_samples, decoder),
    ]
    outcome = system.generator_loss(batch)
    assert outcome.loss.item() == pytest.approx((error + of_codes + of_samples).item(), rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(outcome.loss, [*encoder, *decoder]), tuple(wanted))


def test_the_critics_judge_samples_and_codes(system: System) -> None:
    batch = checks.batch(system)
    codes = codes_of(system, batch)
    wanted = -F.logsigmoid(system.critic(batch.real)).mean()
    for fake in (system.generator(batch.z), system.generator(codes)):
        wanted = wanted - F.logsigmoid(-system.critic(fake)).mean() / 2
    wanted = wanted - F.logsigmoid(system.critic(batch.z, codes=True)).mean()
    wanted = wanted - F.logsigmoid(-system.critic(codes, codes=True)).mean()
    torch.testing.assert_close(system.critic_loss(batch).loss, wanted)


def test_codes_become_noise_and_decode_to_their_samples() -> None:
    """Of correlated points around (3, -2)."""
    random = torch.Generator().manual_seed(8)
    points = torch.randn(500, 2, generator=random) @ torch.tensor([[1.0, 0.6], [0.0, 0.5]]) + torch.tensor([3.0, -2.0])
    rates = {"generator_lr": 2e-3, "critic_lr": 2e-3, "lr_decay": "linear", "steps": 220, "ema_decay": 0.9}
    row = checks.recipe("alpha-gan", options={"reconstruction": 2.0}, **rates)
    run = Trainer.from_recipe(row, Dataset("gaussian", points), log_every=20)
    noise = torch.randn(500, 2, generator=random)

    def moments() -> Tensor:
        with torch.no_grad():
            codes = run.ema(points, encode=True, noise=noise)
        return torch.cat([codes.mean(0), torch.cov(codes.T).flatten()])

    wanted = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    before = float((moments() - wanted).norm())
    run.fit(220)
    assert before > 1.2
    assert float((moments() - wanted).norm()) < 0.5
    spread = float((points - points.mean(0)).abs().mean())
    assert run.history[-1]["reconstruction"] < 0.5 * spread
    torch.testing.assert_close(run.sample(500).mean(0), points.mean(0), rtol=0, atol=0.6)


def test_bad_settings_are_named() -> None:
    for changes, message in (
        ({"options": {"reconstruction": -1.0}}, "reconstruction must be at least 0, got -1.0"),
        ({"loss": "relativistic"}, "loss must be one of non-saturating, minimax, hinge, wasserstein"),
        ({"penalty": "r1"}, "penalty must be 'none' for the system 'alpha-gan'"),
    ):
        with pytest.raises(ValueError, match=message):
            checks.system_of(checks.recipe("alpha-gan", **changes), checks.points())


def test_it_serves_all_shapes_resumes_and_accumulates(tmp_path: Path) -> None:
    row = checks.recipe("alpha-gan", batch_size=8)
    checks.assert_serves(row)
    checks.assert_serves(checks.recipe("alpha-gan", loss="hinge", critic_norm="spectral", instance_noise=0.1))
    checks.assert_resumes(row, checks.points(), tmp_path)
    checks.assert_parts_add_up(row)
