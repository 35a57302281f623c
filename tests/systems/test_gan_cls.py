"""GAN-CLS: sentences that are read, a critic that is shown wrong ones, and images that do as they are told."""

import dataclasses
from pathlib import Path

import pytest
import system_checks as checks
import torch
from torch.nn import functional as F

from lipgan import data
from lipgan.data import Dataset
from lipgan.systems.gan_cls import GANCLS, MatchingCritic, Sentences, TextEncoder, TextToImage
from lipgan.training import Trainer, load_generator

pytestmark = pytest.mark.usefixtures("single_thread")

PLACES = ("one below, left", "one below, right", "one above, left", "one above, right")


def places(n: int = 256) -> Dataset:
    """Points at four places, each with its sentence."""
    labels = torch.arange(n) % 4
    centres = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]])
    noise = 0.2 * torch.randn(n, 2, generator=torch.Generator().manual_seed(4))
    return Dataset("places", centres[labels] + noise, labels, captions=PLACES)


def system() -> GANCLS:
    """With codes that are learned."""
    made = checks.system_of(checks.recipe("gan-cls", options={"pretraining": 30}), places())
    assert isinstance(made, GANCLS)
    made.begin_step()
    return made


def test_sentences_are_read_letter_by_letter() -> None:
    sentences, encoder = Sentences(3), TextEncoder()
    sentences.hold(["Two thin sevens", "two thin seven", "two thin sevens"])
    assert sentences.captions() == ("two thin sevens", "two thin seven", "two thin sevens")
    codes = encoder(sentences.letters)
    assert torch.equal(codes[0], codes[2])
    assert not torch.allclose(codes[0], codes[1])
    # Two of three are the same, so that numbers of variance 1 are these, but for those that hardly differ.
    apart = (codes[0] - codes[1]).abs()
    assert float(apart.detach().median()) == pytest.approx(3 / 2**0.5, rel=0.02)
    # A space at the end is another sentence, the emptiness after it is none.
    sentences.hold(["two", "two ", "two"])
    codes = encoder(sentences.letters)
    assert torch.equal(codes[0], codes[2])
    assert not torch.allclose(codes[0], codes[1])
    with pytest.raises(ValueError, match=r"captions must have 1 to 64 letters, got ''"):
        sentences.hold(["", "a", "b"])


def test_codes_are_learned_once_and_shared() -> None:
    made = system()
    codes = made.generator.text.codes
    assert torch.equal(codes, made.critic.text.codes)
    torch.testing.assert_close(codes.mean(0), torch.zeros(32), rtol=0, atol=1e-5)
    torch.testing.assert_close(codes.var(0, correction=0), torch.ones(32))
    # Sentences are told apart by what they show: places at a side are nearer to each other than across the middle.
    distances = torch.cdist(codes, codes)
    assert float(distances[0, 3]) > float(torch.stack([distances[0, 1], distances[0, 2]]).min())
    before = codes.clone()
    made.begin_step()
    assert torch.equal(codes, before)
    labels = torch.tensor([2, 0, 2])
    assert torch.equal(made.generator.text(labels), codes[labels])
    with pytest.raises(ValueError, match="pretraining must be a whole number"):
        checks.system_of(checks.recipe("gan-cls", options={"pretraining": 0}), places())


def test_wrong_sentences_are_of_the_other_classes_and_equally_likely() -> None:
    made, batch = system(), checks.batch(system(), 256)
    drawn = torch.stack([made.others(batch) for _ in range(40)])
    further = (drawn - batch.labels) % 4
    # The standard error of a share of 1/3 among 10240 is 0.005.
    shares = further.flatten().bincount(minlength=4) / further.numel()
    torch.testing.assert_close(shares, torch.tensor([0.0, 1 / 3, 1 / 3, 1 / 3]), rtol=0, atol=0.025)


def test_the_critic_sees_three_kinds_of_pairs() -> None:
    made = system()
    batch = checks.batch(made)
    state = batch.random.get_state()
    wrong = made.others(batch)
    batch.random.set_state(state)
    fake = made.generator(batch.z, batch.labels)
    right, mismatched, made_up = (
        made.critic(x, labels) for x, labels in ((batch.real, batch.labels), (batch.real, wrong), (fake, batch.labels))
    )
    expected = -F.logsigmoid(right).mean() - (F.logsigmoid(-mismatched).mean() + F.logsigmoid(-made_up).mean()) / 2
    outcome = made.critic_loss(batch)
    torch.testing.assert_close(outcome.loss, expected)
    torch.testing.assert_close(outcome.terms["matching"], (right - mismatched).mean().detach())
    torch.testing.assert_close(made.generator_loss(batch).loss, -F.logsigmoid(made_up).mean())


def test_points_go_where_the_sentence_says() -> None:
    """And the critic prefers the right sentence."""
    rates = {"generator_lr": 2e-3, "critic_lr": 2e-3, "latent_dim": 2, "ema_decay": 0.9}
    run = Trainer.from_recipe(checks.recipe("gan-cls", options={"pretraining": 50}, **rates), places(), log_every=25)
    run.fit(150)
    sample = run.sample(400)
    right = (sample.sign() == places(400).samples.sign()).all(1).float().mean()
    # By chance a quarter.
    assert float(right) > 0.9
    assert run.history[-1]["matching"] > 0.5
    with torch.no_grad():
        labels = torch.zeros(2, dtype=torch.int64)
        between = run.ema(torch.zeros(2, 2), labels, labels + 3, torch.tensor([0.0, 1.0]))
        ends = run.ema(torch.zeros(2, 2), torch.tensor([0, 3]))
    torch.testing.assert_close(between, ends)


def test_the_checkpoint_holds_the_sentences(tmp_path: Path) -> None:
    row = checks.recipe("gan-cls", batch_size=8, options={"pretraining": 2})
    Trainer.from_recipe(row, places()).fit(1).save(tmp_path / "checkpoint.pt")
    generator = load_generator(tmp_path / "checkpoint.pt")
    assert isinstance(generator, TextToImage)
    assert generator.captions == PLACES
    renamed = dataclasses.replace(places(), captions=(*PLACES[:3], "elsewhere"))
    with pytest.raises(ValueError, match="other samples or labels"):
        Trainer.load(tmp_path / "checkpoint.pt", data=renamed)


def test_data_without_sentences_are_refused() -> None:
    for name, why in (("ring", "'ring' has none"), ("swiss-roll", "these data have no labels")):
        with pytest.raises(ValueError, match=f"needs data with a sentence for each class.*; {why}"):
            checks.system_of(checks.recipe("gan-cls"), data.load(name))
    with pytest.raises(ValueError, match="loss must be one that judges samples by themselves"):
        checks.system_of(checks.recipe("gan-cls", loss="relativistic"), places())


def test_it_serves_images_resumes_and_accumulates(tmp_path: Path) -> None:
    row = checks.recipe("gan-cls", batch_size=8, options={"pretraining": 2})
    images = dataclasses.replace(checks.pictures(3), labels=torch.arange(24) % 4, captions=PLACES)
    run = Trainer.from_recipe(row, images, log_every=1).fit(2)
    assert run.sample(3).shape == (3, 3, 16, 16)
    assert isinstance(run.critic, MatchingCritic)
    checks.assert_resumes(row, places(), tmp_path)
    checks.assert_parts_add_up(row, places())
