"""SeqGAN: sequences from numbers, values from rollouts, and a policy gradient that equals the one by enumeration."""

import itertools
from pathlib import Path

import pytest
import system_checks as checks
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipgan import data
from lipgan.data import Dataset
from lipgan.systems import Batch, latents
from lipgan.systems.seqgan import SeqGAN, SequenceCritic, SequenceGenerator
from lipgan.training import Trainer

pytestmark = pytest.mark.usefixtures("single_thread")

LENGTH, SYMBOLS = 4, 3


def ascending(n: int = 60) -> Dataset:
    """0 1 2 0, 1 2 0 1 and 2 0 1 2."""
    places = (torch.arange(n) % SYMBOLS).unsqueeze(1) + torch.arange(LENGTH)
    return Dataset("ascending", F.one_hot(places % SYMBOLS, SYMBOLS).float())


def system(progress: float = 1.0, **options: float) -> SeqGAN:
    made = checks.system_of(checks.recipe("seqgan", options=options), ascending())
    assert isinstance(made, SeqGAN)
    made.progress = progress
    return made


def every_sequence() -> Tensor:
    """``[81, 4, 3]``."""
    rows = torch.tensor(list(itertools.product(range(SYMBOLS), repeat=LENGTH)))
    return F.one_hot(rows, SYMBOLS).float()


def sharpened(generator: nn.Module) -> SequenceGenerator:
    """Far from uniform."""
    assert isinstance(generator, SequenceGenerator)
    nn.init.normal_(generator.head.weight, std=0.5)
    nn.init.normal_(generator.start, std=1.0)
    return generator


def test_sequences_have_the_probabilities_that_the_generator_gives_them() -> None:
    generator = sharpened(system().generator)
    known = every_sequence()
    probabilities = generator.log_probabilities(known).sum(1).exp().detach()
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-5)
    drawn = generator(latents(generator, 20000, torch.Generator().manual_seed(1)))
    counts = (drawn.flatten(1) @ known.flatten(1).T == LENGTH).float().mean(0)
    # The standard error of a share p among 20000 is sqrt(p / 20000).
    assert float(((counts - probabilities).abs() - 4 * (probabilities / 20000).sqrt()).max()) < 1e-4


def test_ends_are_new_and_beginnings_are_kept() -> None:
    generator = sharpened(system().generator)
    start = every_sequence()[50:51].expand(3000, -1, -1)
    ends = generator.completed(start, torch.rand(3000, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)))
    for t in range(LENGTH):
        assert torch.equal(ends[:, t, :t], start[:, :t])
    assert torch.equal(ends.sum(3), torch.ones(3000, LENGTH, LENGTH))
    # The last symbol after three that are kept has the generator's probabilities.
    following = torch.cat([start[:SYMBOLS, :3], torch.eye(SYMBOLS).unsqueeze(1)], 1)
    wanted = generator.log_probabilities(following)[:, 3].exp().detach()
    torch.testing.assert_close(ends[:, 3, 3].mean(0), wanted, rtol=0, atol=0.035)
    # All of a sequence is drawn as by the generator itself.
    z = torch.rand(5, LENGTH, LENGTH)
    torch.testing.assert_close(generator.completed(start[:5], z)[:, 0], generator(z[:, 0]))


def test_the_gradient_is_that_of_the_mean_reward() -> None:
    """Against the sum over all 81 sequences, within what so many draws leave uncertain."""
    made = system(rollouts=2)
    generator = sharpened(made.generator)
    nn.init.normal_(made.critic.head.weight, std=2.0)
    known = every_sequence()
    reward = (generator.log_probabilities(known).sum(1).exp() * made.rewards(known)).sum()
    wanted = torch.autograd.grad(-reward, list(generator.parameters()))
    random = torch.Generator().manual_seed(1)
    n = 4000
    batch = Batch(known[:1].expand(n, -1, -1), None, latents(generator, n, random), random)
    found = torch.autograd.grad(made.generator_loss(batch).loss, list(generator.parameters()))
    a, b = (torch.cat([g.flatten() for g in gradients]) for gradients in (found, wanted))
    assert float(F.cosine_similarity(a, b, dim=0)) > 0.97
    assert float(a.norm() / b.norm()) == pytest.approx(1, abs=0.15)


def test_pretraining_is_the_likelihood() -> None:
    made = system(progress=0.2, pretraining=0.3)
    batch = checks.batch(made)
    outcome = made.generator_loss(batch)
    torch.testing.assert_close(outcome.loss, -made.generator.log_probabilities(batch.real).sum(1).mean())
    made.progress = 0.3
    torch.testing.assert_close(made.generator_loss(batch).terms["nll"], outcome.terms["nll"])
    assert float(made.generator_loss(batch).terms["generator_loss"]) < 0


def test_the_policy_gradient_alone_finds_the_rule() -> None:
    """From uniform symbols: each step of an ascending sequence follows by chance in a third of the cases."""
    rates = {"generator_lr": 1e-2, "critic_lr": 5e-3, "batch_size": 32}
    run = Trainer.from_recipe(checks.recipe("seqgan", options={"pretraining": 0}, **rates), ascending())

    def follows() -> float:
        y = run.sample(500).argmax(2)
        return float((y[:, 1:] == (y[:, :-1] + 1) % SYMBOLS).float().mean())

    assert follows() < 0.5
    run.fit(120)
    assert follows() > 0.8


def test_other_data_and_settings_are_refused() -> None:
    for name in ("digits", "ring"):
        with pytest.raises(ValueError, match=r"the system 'seqgan' needs sequences .*'chords'; got samples of shape"):
            checks.system_of(checks.recipe("seqgan"), data.load(name))
    with pytest.raises(ValueError, match=r"needs sequences .*; 'halves' has others"):
        checks.system_of(checks.recipe("seqgan"), Dataset("halves", torch.full((4, 3, 2), 0.5)))
    for changes, message in (
        ({"options": {"pretraining": 1.5}}, r"pretraining must lie in \[0, 1\], got 1.5"),
        ({"options": {"rollouts": 0}}, "rollouts must be a whole number"),
        ({"loss": "wasserstein"}, "loss must be one of non-saturating, minimax"),
        ({"latent_dim": 3}, "latent_dim must be 64 for the system 'seqgan'"),
    ):
        with pytest.raises(ValueError, match=message):
            checks.system_of(checks.recipe("seqgan", **changes), ascending())


def test_it_resumes_and_accumulates(tmp_path: Path) -> None:
    """With a step of pretraining and others without."""
    row = checks.recipe("seqgan", batch_size=8, steps=4, options={"pretraining": 0.25})
    checks.assert_resumes(row, ascending(), tmp_path)
    checks.assert_parts_add_up(row, ascending())
    assert isinstance(Trainer.load(tmp_path / "checkpoint.pt", data=ascending()).critic, SequenceCritic)
