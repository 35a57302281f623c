"""`lipgan.gradient_penalty`: values of all kinds, by both engines."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from penalty_critics import (
    ENGINES,
    FAKE,
    KINDS,
    REAL,
    Conditional,
    Linear,
    Quadratic,
    assert_same,
    draws,
    grads_of,
    image_critic,
    samples,
    with_dropout,
)
from torch import Tensor, nn

import lipgan
from lipgan import gradient_penalty
from lipgan.penalties import explain


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_linear_critic_in_closed_form(kind: str, engine: str) -> None:
    critic = Linear((3, 4, 4))
    with torch.no_grad():
        critic.w.div_(critic.w.norm() / 1.7)  # above every target here, so that "lp" is not zero
    w, weight, target = critic.w.detach(), 3.0, 0.6
    penalty = gradient_penalty(
        critic, REAL, FAKE, kind=kind, weight=weight, target=target, engine=engine, generator=draws()
    )
    if kind in ("r1", "r2", "r1+r2"):
        factor = weight * (2 if kind == "r1+r2" else 1)
        value, slope = factor * 1.7**2 / 2, factor * w
    else:
        value, slope = weight * (1.7 - target) ** 2, 2 * weight * (1.7 - target) * w / 1.7
    assert penalty.shape == ()
    assert penalty.dtype == torch.float64
    torch.testing.assert_close(penalty.item(), value, rtol=1e-13, atol=0)
    assert_same(grads_of(penalty, critic), [slope], 1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_sided_penalty_below_the_target_is_zero(engine: str) -> None:
    critic = Linear((5,))
    penalty = gradient_penalty(critic, samples(4, 5), samples(4, 5), kind="lp", target=1e3, engine=engine)
    assert penalty.item() == 0
    assert grads_of(penalty, critic)[0].abs().max() == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_quadratic_critic_in_closed_form(engine: str) -> None:
    """Of gradients that differ from sample to sample: which mean, maximum or batch is taken shows."""
    critic, real, fake = Quadratic(), samples(5, 4), samples(5, 4, seed=8)
    a = 1.5
    norms = {"real": real.norm(dim=1), "fake": fake.norm(dim=1)}
    options: dict[str, Any] = {"weight": 2.0, "engine": engine}
    for kind, value in (
        ("r1", a**2 * norms["real"].square().mean()),
        ("r2", a**2 * norms["fake"].square().mean()),
        ("r1+r2", a**2 * (norms["real"].square().mean() + norms["fake"].square().mean())),
    ):
        penalty = gradient_penalty(critic, real, fake, kind=kind, **options)
        torch.testing.assert_close(penalty, value)
        assert_same(grads_of(penalty, critic), [2 * value / a])
    eps = torch.rand(5, generator=draws(), dtype=torch.float64)[:, None]
    n = a * (eps * real + (1 - eps) * fake).norm(dim=1)
    for kind, value, slope in (
        ("wgan-gp", 2 * (n - 0.5).square().mean(), (4 * (n - 0.5) * n / a).mean()),
        ("lp", 2 * (n - 2).clamp_min(0).square().mean(), (4 * (n - 2).clamp_min(0) * n / a).mean()),
        ("max", 2 * (n.max() - 0.5).square(), 4 * (n.max() - 0.5) * n.max() / a),
    ):
        target = 2.0 if kind == "lp" else 0.5
        assert kind != "lp" or 0 < (n > 2).sum() < 5
        penalty = gradient_penalty(critic, real, fake, kind=kind, target=target, generator=draws(), **options)
        torch.testing.assert_close(penalty, value)
        assert_same(grads_of(penalty, critic), [slope])


@pytest.mark.parametrize("engine", ENGINES)
def test_norms_of_pixels(engine: str) -> None:
    critic = Quadratic()
    penalty = gradient_penalty(critic, REAL, kind="dragan", norm="pixel", generator=draws(), engine=engine)
    noise = torch.rand(REAL.shape, generator=draws(), dtype=torch.float64)
    x = REAL + noise * REAL.std(correction=0) / 2
    n = 1.5 * x.norm(dim=1)
    assert n.shape == (6, 4, 4)
    torch.testing.assert_close(penalty, 10 * (n - 1).square().mean())
    assert_same(grads_of(penalty, critic), [(20 * (n - 1) * n / 1.5).mean()])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["sample", "pixel"])
def test_engines_agree(kind: str, norm: str) -> None:
    critic = image_critic()
    results = []
    for engine in (*ENGINES, "auto"):
        options: dict[str, Any] = {"kind": kind, "norm": norm, "generator": draws(), "engine": engine}
        penalty = gradient_penalty(critic, REAL, FAKE, **options)
        results.append([penalty.detach(), *grads_of(penalty, critic)])
    assert_same(results[0], results[1])
    assert_same(results[2], results[0], 0)


class Seen(Linear):
    """Keeps what it was called with."""

    def forward(self, x: Tensor) -> Tensor:
        self.x = x.detach().clone()
        return super().forward(x)


@pytest.mark.parametrize("engine", ENGINES)
def test_points(engine: str) -> None:
    critic = Seen((3, 4, 4))
    for kind, points in (("r1", REAL), ("r2", FAKE), ("r1+r2", torch.cat([REAL, FAKE]))):
        gradient_penalty(critic, REAL, FAKE, kind=kind, engine=engine)
        assert torch.equal(critic.x, points)
    for kind in ("wgan-gp", "lp", "max"):
        gradient_penalty(critic, REAL, FAKE, kind=kind, generator=draws(), engine=engine)
        eps = torch.rand(6, generator=draws(), dtype=torch.float64).view(6, 1, 1, 1)
        torch.testing.assert_close(critic.x, eps * REAL + (1 - eps) * FAKE)
        torch.testing.assert_close(critic.x, lipgan.interpolate(REAL, FAKE, generator=draws()), rtol=0, atol=0)
    gradient_penalty(critic, REAL, kind="dragan", generator=draws(), engine=engine)
    noise = (critic.x - REAL) / (0.5 * REAL.std(correction=0))
    torch.testing.assert_close(noise, torch.rand(REAL.shape, generator=draws(), dtype=torch.float64))


def test_one_uniform_number_for_each_sample() -> None:
    eps = lipgan.interpolate(torch.ones(2000, 3), torch.zeros(2000, 3), generator=draws())
    assert torch.equal(eps[:, :1].expand(-1, 3), eps)
    assert eps[:, 0].unique().numel() > 1900
    quantiles = eps[:, 0].sort().values
    # Kolmogorov-Smirnov: beyond 1.95 / sqrt(n) with probability 0.001; the seed is fixed.
    assert (quantiles - (torch.arange(2000) + 0.5) / 2000).abs().max() < 1.95 / math.sqrt(2000)


def test_generators() -> None:
    critic = image_critic()

    def value(generator: torch.Generator | None = None, engine: str = "fused") -> float:
        return gradient_penalty(critic, REAL, FAKE, generator=generator, engine=engine).item()

    state = torch.get_rng_state()
    assert value(draws(1)) == value(draws(1))
    assert value(draws(1)) != value(draws(2))
    assert torch.equal(torch.get_rng_state(), state), "with a generator the global one is not used"
    generator = draws(1)
    assert value(generator) != value(generator), "the generator goes on"
    torch.manual_seed(9)
    first = value()
    torch.manual_seed(9)
    assert value() == first


@pytest.mark.parametrize("make", [image_critic, with_dropout])
@pytest.mark.parametrize("kind", ["wgan-gp", "dragan", "r1"])
def test_engines_draw_the_same_global_random_numbers(make: Callable[[], nn.Module], kind: str) -> None:
    critic, after, results = make(), [], []
    for engine in (*ENGINES, "auto"):
        torch.manual_seed(11)
        penalty = gradient_penalty(critic, REAL, FAKE, kind=kind, engine=engine)
        after.append(torch.rand(3))
        results.append([penalty.detach(), *grads_of(penalty, critic)])
    assert torch.equal(after[0], after[1])
    assert torch.equal(after[0], after[2])
    assert_same(results[0], results[1])
    state = torch.get_rng_state()
    assert explain(critic, REAL) is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("norm", ["sample", "pixel"])
def test_r1_and_r2_in_one_batch_equal_two_calls(engine: str, norm: str) -> None:
    critic = Conditional().double()
    real, fake = samples(4, 5), samples(4, 5, seed=8)
    shared = torch.linspace(-1, 1, 6, dtype=torch.float64).requires_grad_()
    args = (torch.tensor([0, 1, 2, 1]), shared, 0.7)
    options: dict[str, Any] = {"weight": 1.3, "engine": engine, "norm": norm, "critic_args": args}

    def all_grads(penalty: Tensor) -> list[Tensor]:
        shared.grad = None
        return [penalty.detach(), *grads_of(penalty, critic), shared.grad]

    together = all_grads(gradient_penalty(critic, real, fake, kind="r1+r2", **options))
    r1 = gradient_penalty(critic, real, fake, kind="r1", **options)
    apart = all_grads(r1 + gradient_penalty(critic, real, fake, kind="r2", **options))
    assert_same(together, apart, 1e-12)
    assert together[-1].abs().max() > 0


@pytest.mark.parametrize("engine", ENGINES)
def test_which_output_counts(engine: str) -> None:
    critic = image_critic()
    plain = gradient_penalty(critic, REAL, kind="r1", engine=engine)
    for outcome, output in (
        (lambda x: (None, critic(x)), 1),
        (lambda x: {"features": x, "scores": critic(x)}, "scores"),
        (lambda x: torch.cat([critic(x) / 2, critic(x) / 2], 1), lambda scores: scores.sum(1)),
    ):
        penalty = gradient_penalty(outcome, REAL, kind="r1", engine=engine, output=output)
        assert_same([penalty.detach(), *grads_of(penalty, critic)], [plain.detach(), *grads_of(plain, critic)], 1e-12)
        plain = gradient_penalty(critic, REAL, kind="r1", engine=engine)
