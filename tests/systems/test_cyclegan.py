"""lipgan.systems.cyclegan: the two domains, the losses of both directions, and translations that arrive."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from lipgan import data, recipes
from lipgan.data import Dataset
from lipgan.objectives import losses
from lipgan.systems.base import Batch, latents
from lipgan.systems.cyclegan import CycleGAN, Translators, transformed
from lipgan.training import Trainer, load_generator
from lipgan.training.run import Run

RECIPE = dataclasses.replace(recipes.get("cyclegan"), batch_size=8)


pytestmark = pytest.mark.usefixtures("single_thread")


def trainer(dataset: str | Dataset = "digits", **changes: Any) -> Trainer:
    if isinstance(dataset, str):
        dataset = data.load(dataset, 8 if dataset in ("digits", "patches") else None)
    return Trainer.from_recipe(dataclasses.replace(RECIPE, **changes), dataset, log_every=1)


def test_outlines_are_where_neighbours_differ() -> None:
    image = -torch.ones(1, 1, 8, 8)
    image[..., 2:6, 2:7] = 1.0
    outlined = transformed(image)[0, 0]
    assert outlined[3:5, 3:6].eq(-1).all(), "the inside"
    assert outlined[1:7, 1].eq(1).all(), "an edge, from outside"
    assert outlined[2:6, 2].eq(1).all(), "and from inside"
    assert outlined[0].eq(-1).all(), "the background"
    assert transformed(torch.full((1, 3, 8, 8), 0.3)).eq(-1).all()
    assert transformed(data.load("digits").samples).abs().max() <= 1


def test_vectors_are_turned_and_moved() -> None:
    points = torch.tensor([[1.0, 0.0, 5.0], [0.0, 1.0, 6.0]])
    assert torch.equal(transformed(points), torch.tensor([[1.0, 1.0, 5.0], [0.0, 0.0, 6.0]]))
    assert torch.equal(transformed(torch.tensor([[1.0]])), torch.tensor([[2.0]]))


def test_the_losses_are_the_sums_of_both_directions() -> None:
    """On vectors, where a thirtieth of the weights counts."""
    run = trainer("ring", options={"cycle": 210.0, "identity": 60.0})
    system = run.system
    assert isinstance(system, CycleGAN)

    def batch() -> Batch:
        random = torch.Generator().manual_seed(3)
        return Batch(run.data.samples[:6], None, torch.zeros(6, 2), random)

    a, b = batch().real, system.others(batch())
    to_b, critic, loss = run.generator, run.critic, losses.get("least-squares")

    def to_a(x: torch.Tensor) -> torch.Tensor:
        return run.generator(x, back=True)

    expected = loss.critic_loss(critic(a, "a"), critic(to_a(b), "a")) + loss.critic_loss(critic(b), critic(to_b(a)))
    assert system.critic_loss(batch()).loss.item() == pytest.approx(expected.item(), rel=1e-5)
    adversarial = loss.generator_loss(critic(to_b(a), "b")) + loss.generator_loss(critic(to_a(b), "a"))
    cycle = (to_a(to_b(a)) - a).abs().mean() + (to_b(to_a(b)) - b).abs().mean()
    identity = (to_b(b) - b).abs().mean() + (to_a(a) - a).abs().mean()
    outcome = system.generator_loss(batch())
    assert outcome.loss.item() == pytest.approx((adversarial + 7 * cycle + 2 * identity).item(), rel=1e-5)
    assert outcome.terms["cycle"].item() == pytest.approx(cycle.item(), rel=1e-5)


def test_parts_of_a_batch_see_their_part_of_domain_b() -> None:
    system = trainer("ring").system
    assert isinstance(system, CycleGAN)
    real, z = system.data.samples[:6], torch.zeros(6, 2)
    whole = system.others(Batch(real, None, z, torch.Generator().manual_seed(3)))
    parts = [
        system.others(Batch(real[k : k + 3], None, z[:3], torch.Generator().manual_seed(3), before=k, after=3 - k))
        for k in (0, 3)
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert not any(torch.equal(transformed(x[None])[0], y) for x, y in zip(real, whole, strict=True)), "no pairs"


def test_samples_are_judged_by_domain_b(tmp_path: Path) -> None:
    """Not by the ring that they are translations of."""
    run = trainer("ring")
    translated = transformed(run.data.samples)
    run.sample = lambda n, **_: translated[:n]  # type: ignore[method-assign]
    Run(run, tmp_path, steps=1, save_every=1, evaluate_every=1).execute()
    assert run.history[-1]["modes"] == 8
    assert run.history[-1]["sliced_wasserstein"] == 0
    assert torch.equal(run.system.target.samples, translated)
    images = trainer("digits").system.target
    assert images.modes is None
    assert torch.equal(images.samples, transformed(data.load("digits", 8).samples))
    assert images.name != "digits", "the classifier of digits knows nothing of outlines"


def test_inputs_are_samples_of_the_data() -> None:
    run = trainer("ring")
    drawn = latents(run.generator, 50, torch.Generator().manual_seed(1))
    known = {tuple(x) for x in run.data.samples.tolist()}
    assert {tuple(x) for x in drawn.tolist()} <= known
    assert isinstance(run.generator, Translators)
    # The modes alternate in the data: all of them are among the sources.
    assert (torch.cdist(run.data.modes, run.generator.sources).amin(1) < 0.1).all()


def test_translations_arrive_and_come_back() -> None:
    run = trainer("two-gaussians", batch_size=64, generator_lr=1e-3, critic_lr=1e-3)
    a = run.data.samples[:1000]
    b = transformed(run.data.samples[1000:2000])

    def distance() -> float:
        """Of the means and the covariances of translations and domain B."""
        made = run.ema(a).detach()
        return float((made.mean(0) - b.mean(0)).norm() + (torch.cov(made.T) - torch.cov(b.T)).norm())

    before = distance()
    run.fit(400)
    assert distance() < 0.25 * before
    returned = run.ema(run.ema(a), back=True)
    assert (returned - a).abs().mean() < 0.3


@pytest.mark.parametrize("name", ["digits", "patches"])
def test_30_steps_lower_the_error_of_the_cycle(name: str) -> None:
    run = trainer(name, generator_lr=2e-3).fit(30)
    assert run.history[-1]["cycle"] < 0.7 * run.history[0]["cycle"]
    assert run.sample(3).shape == (3, *run.data.shape)


def test_60_steps_teach_the_critics_to_tell() -> None:
    """Against two critics that cannot: all scores 1/2, each with the loss 1/4."""
    run = trainer("ring", critic_lr=1e-3, generator_lr=1e-5, batch_size=32).fit(60)
    assert sum(row["critic_loss"] for row in run.history[-5:]) / 5 < 0.42


def test_a_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    whole = trainer().fit(4)
    trainer().fit(2).save(tmp_path / "checkpoint.pt")
    resumed = Trainer.load(tmp_path / "checkpoint.pt").fit(2)
    assert resumed.history == whole.history
    assert torch.equal(resumed.sample(4), whole.sample(4))
    alone = load_generator(tmp_path / "checkpoint.pt")
    assert isinstance(alone, Translators)
    assert isinstance(whole.generator, Translators)
    assert torch.equal(alone.sources, whole.generator.sources), "a checkpoint translates without the data"


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="loss must be one that judges samples by themselves"):
        trainer(loss="relativistic")
    with pytest.raises(ValueError, match="latent_dim must be 64 for the system 'cyclegan'"):
        trainer(latent_dim=3)
