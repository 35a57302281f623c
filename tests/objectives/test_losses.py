"""lipgan.losses: values by hand, gradients, what each critic estimates, options."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lipgan.objectives import divergences, losses

NAMES = losses.names()


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


REAL, FAKE = [2.0, 0.5, -1.0], [-3.0, 0.25, 1.0]


def test_the_table() -> None:
    assert set(NAMES) == {
        "minimax",
        "non-saturating",
        "least-squares",
        "hinge",
        "wasserstein",
        "kl-wgan",
        "relativistic",
        "energy",
        *(f"f-{name}" for name in divergences.names()),
    }
    assert [name for name in NAMES if losses.get(name).paired] == ["relativistic"]
    with pytest.raises(ValueError, match=r"unknown loss 'wasserstien'; did you mean wasserstein\?"):
        losses.get("wasserstien")
    assert all(losses.get(name) == losses.LOSSES[name] for name in NAMES)


def weighted(fake: list[float]) -> float:
    weights = [math.exp(score) for score in fake]
    return sum(w * s for w, s in zip(weights, fake, strict=True)) / sum(weights)


# For every row: the critic's loss and the generator's, of REAL and FAKE, from the papers' formulas.
BY_HAND: dict[str, tuple[float, float]] = {
    "minimax": (
        mean([softplus(-s) for s in REAL]) + mean([softplus(s) for s in FAKE]),
        mean([math.log(1 - 1 / (1 + math.exp(-s))) for s in FAKE]),
    ),
    "non-saturating": (
        mean([-math.log(1 / (1 + math.exp(-s))) for s in REAL])
        + mean([-math.log(1 - 1 / (1 + math.exp(-s))) for s in FAKE]),
        mean([-math.log(1 / (1 + math.exp(-s))) for s in FAKE]),
    ),
    "least-squares": ((1 + 0.25 + 4) / 6 + (9 + 0.0625 + 1) / 6, (16 + 0.5625 + 0) / 6),
    "hinge": ((0 + 0.5 + 2) / 3 + (0 + 1.25 + 2) / 3, 1.75 / 3),
    "wasserstein": (-1.75 / 3 - 0.5, 1.75 / 3),
    "kl-wgan": (weighted(FAKE) - 0.5, -weighted(FAKE)),
    "relativistic": (
        mean([softplus(-5.0), softplus(-0.25), softplus(2.0)]),
        mean([softplus(5.0), softplus(0.25), softplus(-2.0)]),
    ),
    # Energies of the real ones: -2, which counts as 0, -0.5 likewise, and 1. Margin 1.
    "energy": ((0 + 0 + 1) / 3 + (0 + 1.25 + 2) / 3, 1.75 / 3),
    "f-kl": (mean([math.exp(s - 1) for s in FAKE]) - 0.5, 1.75 / 3),
    "f-reverse-kl": (
        mean([math.exp(-s) for s in REAL]) + mean([s - 1 for s in FAKE]),
        mean([math.exp(-s) for s in FAKE]),
    ),
    "f-pearson": (mean([s * s / 4 + s for s in FAKE]) - 0.5, 1.75 / 3),
    "f-hellinger": (
        mean([math.exp(-s) - 1 for s in REAL]) + mean([math.exp(s) - 1 for s in FAKE]),
        mean([math.exp(-s) - 1 for s in FAKE]),
    ),
    "f-jensen-shannon": (
        mean([softplus(-s) for s in REAL]) + mean([softplus(s) for s in FAKE]) - math.log(4),
        mean([softplus(-s) for s in FAKE]) - math.log(2),
    ),
    "f-gan": (
        mean([softplus(-s) for s in REAL]) + mean([softplus(s) for s in FAKE]),
        mean([softplus(-s) for s in FAKE]),
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_by_hand(name: str) -> None:
    loss = losses.get(name)
    real, fake = torch.tensor(REAL, dtype=torch.float64), torch.tensor(FAKE, dtype=torch.float64)
    critic, generator = BY_HAND[name]
    for value, expected in (
        (loss.critic_loss(real, fake), critic),
        (loss.generator_loss(fake, real), generator),
    ):
        assert value.shape == ()
        assert value.item() == pytest.approx(expected, rel=1e-13)
    if not loss.paired:
        assert loss.generator_loss(fake) == loss.generator_loss(fake, real)
        # Means over either sample by itself.
        assert loss.critic_loss(real, fake).item() == pytest.approx(
            loss.critic_loss(real.repeat(2), fake).item(), rel=1e-13
        )


def test_hinge_where_the_critic_is_blind_and_where_it_is_sure() -> None:
    hinge = losses.get("hinge")
    assert float(hinge.critic_loss(torch.zeros(4), torch.zeros(4))) == 2
    assert float(hinge.critic_loss(torch.ones(4), -torch.ones(4))) == 0


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_pulled_in_the_right_direction(name: str) -> None:
    loss = losses.get(name)
    # Real samples that look fake, and fake ones that look real.
    real = torch.tensor([-0.7, -0.2], dtype=torch.float64, requires_grad=True)
    fake = torch.tensor([0.1, 0.4], dtype=torch.float64, requires_grad=True)
    to_real, to_fake = torch.autograd.grad(loss.critic_loss(real, fake), (real, fake))
    assert (to_real < 0).all()
    assert (to_fake > 0).all()
    (to_fake,) = torch.autograd.grad(loss.generator_loss(fake, real.detach()), fake)
    assert (to_fake < 0).all()


# The weights of kl-wgan are constants: test_kl_wgan_has_the_gradients_of_the_donsker_varadhan_bound.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "kl-wgan"])
def test_gradients(name: str) -> None:
    loss = losses.get(name)
    real = torch.tensor(REAL, dtype=torch.float64, requires_grad=True)
    fake = torch.tensor(FAKE, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss.critic_loss, (real, fake))
    assert torch.autograd.gradgradcheck(loss.critic_loss, (real, fake))
    assert torch.autograd.gradcheck(loss.generator_loss, (fake, real))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in NAMES if not name.startswith("f-")),
        *((name, {"label_smoothing": 0.1}) for name in ("minimax", "non-saturating", "least-squares")),
        ("energy", {"margin": 2.5}),
    ],
)
def test_derivatives_of_the_critics_loss(name: str, options: dict[str, float], dtype: torch.dtype) -> None:
    """As autograd has them: at ordinary scores, far out, at kinks, at NaN and infinity, for columns of scores."""
    loss = losses.get(name, **options)
    kinks = [-2.5, -1.0, 0.0, 1.0, 1.0000001, -0.9999999, 2.5]
    for more in (kinks, [1e3, -1e3, 1e-30], [float("nan")], [float("inf")]):
        for columns in (False, True):
            real, fake = (
                torch.tensor([*scores, *more], dtype=dtype, requires_grad=True)
                for scores in (REAL, [*FAKE, 0.3][: len(REAL)])
            )
            given = [x[:, None] if columns else x for x in (real, fake)]
            expected = torch.autograd.grad(loss.critic_loss(*given), given)
            got = loss.critic_derivatives(*(x.detach() for x in given))  # type: ignore[attr-defined]
            # As a rounding of the largest: softmax and sigmoid round once more on one of the two ways.
            for ours, theirs in zip(got, expected, strict=True):
                bound = 4 * torch.finfo(dtype).eps
                torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound / 100, equal_nan=True)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("f-kl", "f-hellinger", "f-reverse-kl")])
def test_far_scores_stay_finite(name: str) -> None:
    """All rows but those whose loss is an exponential of the score."""
    loss = losses.get(name)
    for sign in (-1.0, 1.0):
        real = torch.tensor([sign * 3e4, 1.0], requires_grad=True)
        fake = torch.tensor([-sign * 3e4, 2.0], requires_grad=True)
        for value in (loss.critic_loss(real, fake), loss.generator_loss(fake, real), loss.estimate(real, fake)):
            assert value.isfinite()
            for gradient in torch.autograd.grad(value, (real, fake), allow_unused=True):
                assert gradient is None or gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_types_are_summed_in_float32(name: str, dtype: torch.dtype) -> None:
    loss = losses.get(name)
    # 1000 numbers near 1 do not add up in bfloat16, and squares of 300 leave float16.
    real, fake = (1 + torch.rand(1000)).to(dtype), torch.rand(1000).to(dtype)
    if name in ("least-squares", "hinge", "minimax"):
        real = real * 300
    for function, arguments in (
        (loss.critic_loss, (real, fake)),
        (loss.generator_loss, (fake, real)),
        (loss.estimate, (real, fake)),
    ):
        value = function(*arguments)
        assert value.dtype == torch.float32
        assert value == function(*(scores.float() for scores in arguments))
        assert value.isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_tails_of_the_logistic_are_exact(dtype: torch.dtype) -> None:
    """log(1 + exp(x)) is x from about 17 on in float32, and from about 37 on in float64: no earlier."""
    fake = torch.tensor([25.0], dtype=dtype)
    loss = losses.get("non-saturating")
    eps = torch.finfo(dtype).eps
    exact = math.log1p(math.exp(-25))
    assert float(loss.generator_loss(fake)) == pytest.approx(exact, rel=2 * eps)
    assert float(loss.generator_loss(-fake)) == pytest.approx(25 + exact, rel=2 * eps)


# What the estimates bound, of densities p and q on a grid: the integrand, and the critic's best score.
CLAIMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "least-squares": (lambda p, q: (p - q) ** 2 / (p + q), lambda p, q: p / (p + q)),
    "hinge": (lambda p, q: (p - q).abs(), lambda p, q: (p - q).sign()),
    "energy": (lambda p, q: 0.5 * (p - q).abs(), lambda p, q: ((p - q).sign() - 1) / 2),
    "kl-wgan": (lambda p, q: p * (p / q).log(), lambda p, q: (p / q).log() - 3),
    **{
        name: (lambda p, q: p * (2 * p / (p + q)).log() + q * (2 * q / (p + q)).log(), lambda p, q: (p / q).log())
        for name in ("minimax", "non-saturating")
    },
}


@pytest.mark.parametrize("name", list(CLAIMS))
def test_the_estimate_is_a_bound_that_the_best_critic_reaches(name: str) -> None:
    """Two distributions on 8 points whose masses are multiples of 1/100: samples of 100 without any noise."""
    counts = torch.tensor([[30, 20, 10, 10, 10, 10, 5, 5], [5, 10, 10, 20, 5, 10, 15, 25]])
    p, q = counts.double() / 100
    integrand, best = CLAIMS[name]
    loss, scores = losses.get(name), best(p, q)
    points = torch.arange(8)
    real, fake = (points.repeat_interleave(row) for row in counts)
    truth = integrand(p, q).sum().item()
    assert loss.estimate(scores[real], scores[fake]).item() == pytest.approx(truth, rel=1e-12)
    for size in (0.1, 1.0):
        other = scores + size * torch.randn(8, dtype=torch.float64)
        assert loss.estimate(other[real], other[fake]).item() <= truth + 1e-12
    if name != "kl-wgan":
        # The best critic is where the loss has no slope, so training the critic drives the estimate to the bound.
        assert loss.critic_loss(scores[real], scores[fake]) <= loss.critic_loss(other[real], other[fake])


def test_what_the_relativistic_critic_estimates() -> None:
    """All pairs of two samples: the Jensen-Shannon divergence of p(x) q(y) and q(x) p(y), at log(p / q) + constant."""
    p, q = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]], dtype=torch.float64)
    real, fake = zip(*itertools.product([0, 0, 1, 2], [0, 1, 2, 2]), strict=True)
    first, second = torch.outer(p, q), torch.outer(q, p)
    middle = (first + second) / 2
    truth = 0.5 * (first * (first / middle).log() + second * (second / middle).log()).sum().item()
    loss, scores = losses.get("relativistic"), (p / q).log() + 2
    assert loss.estimate(scores[list(real)], scores[list(fake)]).item() == pytest.approx(truth, rel=1e-12)
    other = scores + torch.tensor([0.1, 0, -0.1], dtype=torch.float64)
    assert loss.estimate(other[list(real)], other[list(fake)]).item() < truth


def test_a_wasserstein_critic_reaches_the_distance_of_two_point_masses() -> None:
    """Critics of slope at most 1 on the line, from slope 0: their estimate grows to the distance, 3."""
    slope = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([slope], lr=0.1)
    loss = losses.get("wasserstein")
    real, fake = torch.full((5,), 2.0), torch.full((7,), -1.0)
    for _ in range(10):
        optimizer.zero_grad()
        loss.critic_loss(slope * real, slope * fake).backward()
        optimizer.step()
        with torch.no_grad():
            slope.clamp_(-1, 1)
    assert loss.estimate(slope * real, slope * fake).item() == 3


@pytest.mark.parametrize("name", NAMES)
def test_the_estimate_is_the_same_with_the_loss_at_hand(name: str) -> None:
    real, fake = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for options in ({}, {"label_smoothing": 0.2}, {"margin": 0.7}):
        try:
            loss = losses.get(name, **options)
        except ValueError:
            continue
        estimate = loss.estimate(real, fake)
        torch.testing.assert_close(
            loss.estimate(real, fake, loss.critic_loss(real, fake)), estimate, rtol=1e-13, atol=0
        )


@pytest.mark.parametrize("name", [f"f-{name}" for name in divergences.names()])
def test_f_gans_estimate_their_bound(name: str) -> None:
    loss, divergence = losses.get(name), divergences.get(name[2:])
    real, fake = torch.randn(7), torch.randn(5)
    assert loss.estimate(real, fake) == divergence.variational_bound(real, fake) == -loss.critic_loss(real, fake)
    # The saturating generator minimizes what the critic maximizes.
    scores = torch.randn(5, dtype=torch.float64, requires_grad=True)
    (against,) = torch.autograd.grad(loss.critic_loss(real.double(), scores), scores)
    (of_generator,) = torch.autograd.grad(losses.get(name, saturating=True).generator_loss(scores), scores)
    torch.testing.assert_close(of_generator, -against)
    expected = -divergence.activation(scores.detach()).mean()
    torch.testing.assert_close(loss.generator_loss(scores).detach(), expected)


def test_the_gan_rows_are_the_minimax_game() -> None:
    real, fake = torch.randn(7, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    minimax = losses.get("minimax")
    for name, shift in (("f-gan", 0), ("f-jensen-shannon", math.log(4))):
        difference = minimax.critic_loss(real, fake) - losses.get(name).critic_loss(real, fake)
        assert difference.item() == pytest.approx(shift, abs=1e-14)
    saturating = losses.get("f-gan", saturating=True)
    torch.testing.assert_close(saturating.generator_loss(fake), minimax.generator_loss(fake))
    non_saturating = losses.get("non-saturating")
    torch.testing.assert_close(losses.get("f-gan").generator_loss(fake), non_saturating.generator_loss(fake))


def test_the_second_loss_of_the_generator_has_a_gradient_where_the_critic_is_sure() -> None:
    slopes = {}
    for name in ("minimax", "non-saturating"):
        fake = torch.full((1,), -30.0, requires_grad=True)
        (slope,) = torch.autograd.grad(losses.get(name).generator_loss(fake), fake)
        slopes[name] = slope.item()
    assert -1e-12 < slopes["minimax"] < 0
    assert slopes["non-saturating"] == pytest.approx(-1)


@pytest.mark.parametrize("name", NAMES)
def test_processes_average_to_the_joined_batch_where_a_loss_is_a_mean_over_samples(name: str) -> None:
    """What docs/howto/many-gpus.md promises of all but one."""
    loss = losses.get(name)
    torch.manual_seed(3)
    real, fake = (torch.randn(8, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def values(rows: slice) -> Tensor:
        return torch.stack([loss.critic_loss(real[rows], fake[rows]), loss.generator_loss(fake[rows], real[rows])])

    joined, apart = values(slice(8)), (values(slice(4)) + values(slice(4, 8))) / 2
    for which in (0, 1):
        error = (apart - joined)[which].abs().detach()
        for sample in (real, fake):
            ours, theirs = (
                torch.autograd.grad(x[which], sample, retain_graph=True, materialize_grads=True)[0]
                for x in (apart, joined)
            )
            error = torch.maximum(error, (ours - theirs).abs().max())
        assert (error > 1e-3) if name == "kl-wgan" else (error < 1e-14), which


def test_kl_wgan_has_the_gradients_of_the_donsker_varadhan_bound() -> None:
    loss = losses.get("kl-wgan")
    real = torch.tensor(REAL, dtype=torch.float64, requires_grad=True)
    fake = torch.tensor(FAKE, dtype=torch.float64, requires_grad=True)
    bound = real.mean() - fake.exp().mean().log()
    assert loss.estimate(real, fake).item() == pytest.approx(bound.item(), rel=1e-13)
    to_real, to_fake = torch.autograd.grad(bound, (real, fake))
    critic = torch.autograd.grad(loss.critic_loss(real, fake), (real, fake))
    torch.testing.assert_close(critic, (-to_real, -to_fake))
    (generator,) = torch.autograd.grad(loss.generator_loss(fake), fake)
    torch.testing.assert_close(generator, to_fake)
    # E r = 1: the weights of the paper, times the batch.
    assert -len(FAKE) * generator.mean().item() == pytest.approx(1)
    # The reweighted objective is smaller than the bound, by KL(r q | q).
    assert -loss.critic_loss(real, fake) < bound


def test_label_smoothing_is_one_sided() -> None:
    real, fake = torch.randn(6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    for name in ("minimax", "non-saturating"):
        smooth = losses.get(name, label_smoothing=0.1)
        labels = torch.full_like(real, 0.9)
        expected = nn.functional.binary_cross_entropy_with_logits(real, labels) + (
            nn.functional.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))
        )
        torch.testing.assert_close(smooth.critic_loss(real, fake), expected)
        torch.testing.assert_close(smooth.generator_loss(fake), losses.get(name).generator_loss(fake))
        torch.testing.assert_close(smooth.estimate(real, fake), losses.get(name).estimate(real, fake))
    squares = losses.get("least-squares", label_smoothing=0.2)
    expected = 0.5 * ((real - 0.8).square().mean() + fake.square().mean())
    torch.testing.assert_close(squares.critic_loss(real, fake), expected)
    torch.testing.assert_close(squares.generator_loss(fake), losses.get("least-squares").generator_loss(fake))
    # The best critic of p = q is 0.4 everywhere; of separate p and q it is 0.8 and 0. The bound is 0 and 2 again.
    same = torch.full((3,), 0.4, dtype=torch.float64)
    assert squares.estimate(same, same).item() == pytest.approx(0, abs=1e-14)
    assert squares.estimate(2 * same, 0 * same).item() == pytest.approx(2)


def test_the_margin_of_the_energies() -> None:
    loss = losses.get("energy", margin=10)
    energies_real, energies_fake = torch.tensor([0.5, 1.5]), torch.tensor([4.0, 12.0])
    assert loss.critic_loss(-energies_real, -energies_fake).item() == pytest.approx(1 + 3)
    assert loss.generator_loss(-energies_fake).item() == pytest.approx(8)
    assert loss.estimate(-energies_real, -energies_fake).item() == pytest.approx(0.6)
    # A critic that is no autoencoder gains nothing by scores above 0, and still pushes fake ones down from there.
    real, fake = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    to_real, to_fake = torch.autograd.grad(loss.critic_loss(real, fake), (real, fake))
    assert (to_real == 0).all()
    assert (to_fake == 0.5).all()


def test_the_relativistic_loss_asks_for_pairs() -> None:
    loss = losses.get("relativistic")
    with pytest.raises(ValueError, match="real_scores must be given"):
        loss.generator_loss(torch.zeros(3))
    for call in (loss.critic_loss, loss.estimate, lambda real, fake: loss.generator_loss(fake, real)):
        # (1,) would broadcast.
        with pytest.raises(ValueError, match=r"real_scores must have the shape of fake_scores, \(3,\), got \(1,\)"):
            call(torch.zeros(1), torch.zeros(3))


def test_options() -> None:
    assert losses.get("energy", margin=2.0) == losses.Energy(margin=2.0)
    assert losses.get("energy") == losses.Energy(margin=1.0)
    assert losses.get("f-kl", saturating=True) == losses.FGAN(divergences.get("kl"), saturating=True)
    with pytest.raises(ValueError, match=r"loss 'hinge' has no option 'margin'; losses that have it: energy$"):
        losses.get("hinge", margin=1.0)
    with pytest.raises(ValueError, match=r"losses that have it: least-squares, minimax, non-saturating$"):
        losses.get("wasserstein", label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"loss 'minimax' has no option 'smooth'; losses that have it: none$"):
        losses.get("minimax", smooth=0.1)
    # It is the name that says which divergence.
    with pytest.raises(ValueError, match="loss 'f-kl' has no option 'divergence'"):
        losses.get("f-kl", divergence=divergences.get("pearson"))
    with pytest.raises(ValueError, match="'paired'"):
        losses.get("hinge", paired=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        losses.Energy().margin = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "option", "value", "error"),
    [
        ("minimax", "label_smoothing", 1.0, ValueError),
        ("non-saturating", "label_smoothing", -0.1, ValueError),
        ("least-squares", "label_smoothing", math.nan, ValueError),
        ("minimax", "label_smoothing", "0.1", TypeError),
        ("minimax", "label_smoothing", True, TypeError),
        ("energy", "margin", 0, ValueError),
        ("energy", "margin", math.inf, ValueError),
        ("energy", "margin", math.nan, ValueError),
        ("energy", "margin", None, TypeError),
        ("f-gan", "saturating", 1, TypeError),
    ],
)
def test_values_out_of_range_are_named(name: str, option: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{option} must .*, got {value!r}$"):
        losses.get(name, **{option: value})
