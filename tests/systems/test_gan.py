"""lipgan.systems.gan: every technique, against a closed form or numbers computed by hand."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from system_checks import assert_resumes, batch, points, recipe, system_of
from torch import Tensor, nn
from torch.nn import functional as F

from lipgan import data, recipes
from lipgan.data import BatchOrder, Dataset
from lipgan.models import Output
from lipgan.recipes import Recipe
from lipgan.systems.gan import GAN
from lipgan.training import Trainer

pytestmark = pytest.mark.usefixtures("single_thread")

GAMES = [name for name in recipes.names() if recipes.get(name).system == "gan"]


def labelled(n: int = 64) -> Dataset:
    """Points in the plane with one of four labels."""
    return dataclasses.replace(points(n), labels=torch.arange(n) % 4)


def full(critic: nn.Module, *arguments: Any) -> Output:
    output: Output = critic(*arguments, full=True)
    return output


class Slope(nn.Module):
    """``weight * x`` for numbers ``x [B, 1]``: a generator, or a critic with scores ``[B]``."""

    latent_dim = 1

    def __init__(self, weight: float, *, scores: bool = False) -> None:
        super().__init__()
        self.weight, self.scores = nn.Parameter(torch.tensor(weight, dtype=torch.float64)), scores

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight * x
        return y.squeeze(1) if self.scores else y


class Mass(nn.Module):
    """All samples at one point of the plane."""

    latent_dim = 1

    def __init__(self, x: float, y: float) -> None:
        super().__init__()
        self.point = nn.Parameter(torch.tensor([x, y]))

    def forward(self, z: Tensor) -> Tensor:
        return self.point.expand(len(z), 2)


# --- what keeps the critic Lipschitz


def test_clipping_keeps_every_weight_in_the_box_after_every_update(monkeypatch: pytest.MonkeyPatch) -> None:
    row = recipe("wgan", batch_size=8)
    trainer = Trainer.from_recipe(row, points())
    extremes: list[tuple[float, float]] = []

    def largest() -> float:
        return max(float(p.detach().abs().max()) for p in trainer.critic.parameters())

    clip = trainer.system.after_critic_update

    def spy() -> None:
        before = largest()
        clip()
        extremes.append((before, largest()))

    monkeypatch.setattr(trainer.system, "after_critic_update", spy)
    trainer.fit(3)
    bound = float(torch.tensor(row.weight_clip))
    assert len(extremes) == 3 * row.n_critic
    assert all(after <= bound for _, after in extremes)
    assert all(before > bound for before, _ in extremes), "no update left the box: the clipping had nothing to do"


@pytest.mark.parametrize("distance", [0.4, 1.0])
def test_a_wgan_gp_critic_measures_the_distance_of_two_point_masses(distance: float) -> None:
    """On the segment between them a critic of slope s has s d - w (s - 1)^2: best at s = 1 + d / 2 w."""
    row = recipe("wgan-gp", n_critic=1, critic_lr=1e-3, betas=(0.5, 0.9), generator_lr=1e-30, batch_size=32)
    real = Dataset("mass", torch.tensor([[distance, 0.0]]).expand(20, 2).clone())
    _, critic = GAN.build(row, (2,), 0)
    # The last row is the mean over 200 updates: a single one still moves the estimate by some percent.
    trainer = Trainer(Mass(0.0, 0.0), critic, row, real, log_every=200).fit(400)
    assert trainer.history[-1]["estimate"] == pytest.approx(distance * (1 + distance / 20), rel=0.03)


def test_gradient_normalization_is_refused_where_samples_mix() -> None:
    with pytest.raises(ValueError, match="critic_norm must not be 'gradient' for a critic whose layers mix"):
        system_of(recipe("gan", critic_norm="gradient", minibatch="stddev"), points())


# --- techniques


def test_label_smoothing_is_the_cross_entropy_with_a_smaller_label() -> None:
    system = system_of(recipe("label-smoothing", label_smoothing=0.2), points())
    step = batch(system)
    real, fake = system.critic(step.real), system.critic(system.generator(step.z))
    expected = F.binary_cross_entropy_with_logits(real, torch.full_like(real, 0.8))
    expected = expected + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))
    assert float(system.critic_loss(batch(system)).loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_instance_noise_falls_to_zero_over_the_steps() -> None:
    """Its standard deviation, measured at what the critic sees of samples that are all at one point."""
    row = recipe("instance-noise", architecture="mlp", instance_noise=0.5, steps=5, batch_size=1000)
    trainer = Trainer.from_recipe(row, Dataset("mass", torch.ones(1000, 2)))
    seen: list[Tensor] = []
    trainer.critic.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    trainer.fit(7)
    # Of the critic's updates, which see real and fake samples as one batch.
    noise = [x[:1000] - 1 for x in seen if len(x) == 2000]
    assert len(noise) == 7
    # 2000 numbers: the standard deviation is known to 1.6 %.
    expected = [0.5, 0.4, 0.3, 0.2, 0.1]
    assert [float(x.std()) for x in noise[:5]] == pytest.approx(expected, rel=0.06)
    assert [float(x.abs().max()) for x in noise[5:]] == [0, 0]


def test_historical_averaging_on_two_parameters() -> None:
    """Three updates by plain gradient descent of c x against g z, as the formulas say."""
    lr, weight = 0.1, 0.7
    row = recipe(
        "historical-averaging",
        loss="wasserstein",
        historical_averaging=weight,
        optimizer="sgd",
        betas=(0.0, 0.0),
        generator_lr=lr,
        critic_lr=lr,
        batch_size=4,
    )
    real = Dataset("numbers", torch.arange(8.0).unsqueeze(1).double())
    trainer = Trainer(Slope(0.5), Slope(0.3, scores=True), row, real, seed=6)
    order, random = BatchOrder(8, 6 + 1), torch.Generator().manual_seed(6 + 2)
    g, c = 0.5, 0.3
    past_g: list[float] = []
    past_c: list[float] = []
    for _ in range(3):
        trainer.fit(1)
        x = float(real.samples[order.next(4)].mean())
        z = float(torch.randn(4, 1, generator=random).double().mean())
        pull = 2 * weight * (c - sum(past_c) / len(past_c)) if past_c else 0.0
        c -= lr * (g * z - x + pull)
        past_c.append(c)
        torch.randint(8, (4,), generator=random)
        z = float(torch.randn(4, 1, generator=random).double().mean())
        pull = 2 * weight * (g - sum(past_g) / len(past_g)) if past_g else 0.0
        g -= lr * (-c * z + pull)
        past_g.append(g)
        assert float(trainer.critic.weight.detach()) == pytest.approx(c, rel=1e-12)
        assert float(trainer.generator.weight.detach()) == pytest.approx(g, rel=1e-12)


def test_historical_averages_are_part_of_the_state(tmp_path: Path) -> None:
    row = recipe("historical-averaging", batch_size=8)
    assert_resumes(row, points(), tmp_path)
    state = Trainer.from_recipe(row, points()).fit(2).state_dict()["system"]
    assert {name: part["count"] for name, part in state.items()} == {"critic": 2, "generator": 2}


def test_feature_matching_is_another_objective_of_the_generator_alone() -> None:
    plain, matching = (
        system_of(recipe("gan", generator_objective=kind), points()) for kind in ("loss", "feature-matching")
    )
    assert torch.equal(plain.critic_loss(batch(plain)).loss, matching.critic_loss(batch(matching)).loss)
    step = batch(matching)
    real, fake = full(matching.critic, step.real), full(matching.critic, matching.generator(step.z))
    expected = (real.features.mean(0) - fake.features.mean(0)).square().sum()
    loss = matching.generator_loss(batch(matching)).loss
    assert torch.allclose(loss, expected)
    assert not torch.allclose(loss, plain.generator_loss(batch(plain)).loss)


def test_paired_losses_compare_with_real_samples() -> None:
    system = system_of(recipe("rgan"), points())
    step = batch(system)
    real, fake = system.critic(step.real), system.critic(system.generator(step.z))
    assert torch.allclose(system.generator_loss(batch(system)).loss, F.softplus(real - fake).mean())
    assert torch.allclose(system.critic_loss(batch(system)).loss, F.softplus(fake - real).mean())


# --- labels


def test_the_auxiliary_classifier_is_in_both_losses() -> None:
    system = system_of(recipe("acgan"), labelled())
    step = batch(system)
    real, fake = full(system.critic, step.real), full(system.critic, system.generator(step.z, step.labels))
    assert real.logits is not None
    assert fake.logits is not None
    of_real, of_fake = (F.cross_entropy(output.logits, step.labels) for output in (real, fake))
    outcome = system.critic_loss(batch(system))
    adversarial = F.softplus(-real.scores).mean() + F.softplus(fake.scores).mean()
    assert torch.allclose(outcome.terms["critic_loss"], adversarial)
    assert torch.allclose(outcome.terms["classification"], of_real + of_fake)
    assert torch.allclose(outcome.loss, adversarial + of_real + of_fake)
    outcome = system.generator_loss(batch(system))
    assert torch.allclose(outcome.loss, F.softplus(-fake.scores).mean() + of_fake)


@pytest.mark.parametrize("conditioning", ["concat", "projection"])
def test_real_and_fake_samples_are_judged_with_their_labels(conditioning: str) -> None:
    row = recipe("cgan", architecture="mlp", conditioning=conditioning)
    system = system_of(row, labelled())
    step = batch(system)
    real, fake = (
        system.critic(step.real, step.labels),
        system.critic(system.generator(step.z, step.labels), step.labels),
    )
    outcome = system.critic_loss(batch(system))
    assert torch.allclose(outcome.loss, F.softplus(-real).mean() + F.softplus(fake).mean(), atol=1e-6)
    assert torch.allclose(
        system.generator_loss(batch(system)).loss,
        F.softplus(-system.critic(system.generator(step.z, step.labels), step.labels)).mean(),
        atol=1e-6,
    )
    permuted = dataclasses.replace(batch(system), labels=step.labels.flip(0) if step.labels is not None else None)
    assert not torch.allclose(system.critic_loss(permuted).loss, outcome.loss, rtol=1e-3)


def test_samples_are_asked_for_class_by_class(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer.from_recipe(recipe("cgan", architecture="mlp"), labelled())
    asked: list[Tensor] = []
    forward = trainer.ema.forward

    def spy(z: Tensor, labels: Tensor) -> Any:
        asked.append(labels)
        return forward(z, labels)

    monkeypatch.setattr(trainer.ema, "forward", spy)
    trainer.sample(300)
    assert torch.equal(torch.cat(asked), torch.arange(300) % 4)


def test_a_condition_needs_labels() -> None:
    with pytest.raises(ValueError, match="conditioning 'concat' needs labels, which 'points' lacks"):
        Trainer(Slope(1.0), Slope(1.0), recipe("cgan"), points())


# --- how the critic is called


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, [16]),
        ({"critic_norm": "spectral"}, [16]),
        ({"architecture": "dcgan"}, [8, 8]),
        ({"minibatch": "discrimination"}, [8, 8]),
        ({"minibatch": "stddev"}, [8, 8]),
    ],
)
def test_samples_that_a_critic_would_mix_come_apart(changes: dict[str, Any], sizes: list[int]) -> None:
    system = system_of(recipe("gan", **{"architecture": "conv", **changes}), data.load("digits", 8))
    seen: list[int] = []
    system.critic.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    system.critic_loss(batch(system))
    assert seen == sizes


# --- parts of a batch

ACCUMULATED: dict[str, dict[str, Any]] = {
    "gan": {},
    "wgan-gp": {"n_critic": 2},
    "dragan": {"architecture": "mlp"},
    "rgan": {},
    "acgan": {},
    "instance-noise": {"steps": 4},
    "cgan": {"penalty": "wgan-gp"},
}


def in_float64(row: Recipe, **options: Any) -> Trainer:
    torch.manual_seed(3)
    networks = GAN.build(dataclasses.replace(row, architecture="mlp"), (2,), 4)
    generator, critic = (network.double() for network in networks)
    return Trainer(generator, critic, row, labelled(), log_every=1, **options)


@pytest.mark.parametrize("name", ACCUMULATED)
def test_four_parts_of_a_batch_train_as_the_whole(name: str) -> None:
    row = recipe(name, batch_size=16, **ACCUMULATED[name])
    whole = in_float64(row).fit(3)
    parts = in_float64(dataclasses.replace(row, accumulation=4)).fit(3)
    for ours, theirs in zip(parts.history, whole.history, strict=True):
        assert {key for key, value in ours.items() if value is None} == {
            k for k, value in theirs.items() if value is None
        }
        for key in ours.keys() - {key for key, value in ours.items() if value is None}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-9, abs=1e-11), key
    for module in ("generator", "critic"):
        pairs = zip(getattr(parts, module).parameters(), getattr(whole, module).parameters(), strict=True)
        for ours, theirs in pairs:
            assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-10)


# --- every recipe of the ordinary training scheme


def after_thirty_updates(row: Recipe, dataset: Dataset) -> tuple[float, float]:
    """The critic's loss on one fixed batch before and after 30 updates against the initial generator."""
    row = dataclasses.replace(row, n_critic=30, generator_lr=1e-30)
    trainer = Trainer.from_recipe(row, dataset)
    # Into the box, where there is one: the constraint comes with the critic.
    trainer.system.after_critic_update()
    evaluate: Callable[[], float] = lambda: float(trainer.system.critic_loss(batch(trainer.system, 256)).loss.detach())  # noqa: E731
    before = evaluate()
    trainer.fit(1)
    return before, evaluate()


@pytest.mark.parametrize("name", GAMES)
def test_thirty_updates_lower_the_critics_own_criterion(name: str) -> None:
    row = recipe(name, batch_size=16)
    before, after = after_thirty_updates(row, data.load("ring"))
    assert after < before - 1e-3 * abs(before), (before, after)
    # The same measurement of a critic that does not learn: nothing but its updates lowers the criterion.
    before, after = after_thirty_updates(dataclasses.replace(row, critic_lr=1e-30), data.load("ring"))
    if row.critic_norm == "none":
        assert after == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in ("r3gan", "dcgan", "lsgan") for kind in ("r1", "r2", "r1+r2")),
        *(("wgan-gp", "wgan-gp"), ("wgan-gp", "lp"), ("dragan", "max")),
    ],
)
def test_penalties_share_the_forward_pass(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those at samples, and of perceptrons those between them; with the loss and the gradients of the two apart."""
    system = system_of(recipe(name, penalty=kind, penalty_weight=3.0), points())
    assert isinstance(system, GAN)
    system.generator.double(), system.critic.double()
    before = {key: value.clone() for key, value in system.critic.state_dict().items()}
    drawn = batch(system)
    shared: list[Any] = []
    judged = system._penalized_with_scores
    monkeypatch.setattr(system, "_penalized_with_scores", lambda *given: shared.append(1) or judged(*given))
    outcome = system.critic_loss(drawn)
    assert shared
    parameters = [*system.critic.parameters()]
    ours = torch.autograd.grad(outcome.loss, parameters, allow_unused=True, materialize_grads=True)
    system.critic.load_state_dict(before)
    monkeypatch.setattr("lipgan.systems.gan.AT_SAMPLES", ())
    system.penalized_with_scores = False
    apart = system.critic_loss(batch(system))
    theirs = torch.autograd.grad(apart.loss, parameters, allow_unused=True, materialize_grads=True)
    assert outcome.terms.keys() == apart.terms.keys()
    for term, value in outcome.terms.items():
        torch.testing.assert_close(value.detach(), apart.terms[term].detach(), rtol=1e-9, atol=1e-11)
    assert len(shared) == 1
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)
