"""lipgan.divergences: the table of f-GAN, against its definitions."""

import copy
import dataclasses
import math
import pickle
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor, nn

from lipgan.objectives import divergences
from lipgan.objectives.divergences import Divergence

NAMES = divergences.names()

Function = Callable[[mpmath.mpf], mpmath.mpf]

# The table of the paper, in exact arithmetic: f, f', f*, g.
TABLE: dict[str, tuple[Function, Function, Function, Function]] = {
    "kl": (
        lambda u: u * mpmath.log(u) if u else mpmath.mpf(0),
        lambda u: 1 + mpmath.log(u),
        lambda t: mpmath.exp(t - 1),
        lambda v: v,
    ),
    "reverse-kl": (
        lambda u: -mpmath.log(u),
        lambda u: -1 / u,
        lambda t: -1 - mpmath.log(-t),
        lambda v: -mpmath.exp(-v),
    ),
    "pearson": (lambda u: (u - 1) ** 2, lambda u: 2 * (u - 1), lambda t: t * t / 4 + t, lambda v: v),
    "hellinger": (
        lambda u: (mpmath.sqrt(u) - 1) ** 2,
        lambda u: 1 - 1 / mpmath.sqrt(u),
        lambda t: t / (1 - t),
        lambda v: 1 - mpmath.exp(-v),
    ),
    "jensen-shannon": (
        lambda u: -(u + 1) * mpmath.log((1 + u) / 2) + (u * mpmath.log(u) if u else 0),
        lambda u: mpmath.log(2 * u / (1 + u)),
        lambda t: -mpmath.log(2 - mpmath.exp(t)),
        lambda v: mpmath.log(2) - mpmath.log1p(mpmath.exp(-v)),
    ),
    "gan": (
        lambda u: (u * mpmath.log(u) if u else 0) - (u + 1) * mpmath.log(u + 1),
        lambda u: mpmath.log(u / (1 + u)),
        lambda t: -mpmath.log(1 - mpmath.exp(t)),
        lambda v: -mpmath.log1p(mpmath.exp(-v)),
    ),
}


def inside(divergence: Divergence) -> Tensor:
    """Points of the domain of f*, from far below to close under its upper end."""
    top = min(divergence.upper, 3.0)
    return top - torch.logspace(-4, 1, 41, dtype=torch.float64)


def supremum(function: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> float:
    """The largest value of a concave function between two points, without derivatives."""
    grid = np.linspace(low, high, 2001)
    best = int(np.argmax(function(grid)))
    ends = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    found = scipy.optimize.minimize_scalar(
        lambda x: -function(np.array([x]))[0], bounds=ends, method="bounded", options={"xatol": 1e-10}
    )
    return -float(found.fun)


def test_the_table_has_the_six_rows_of_the_paper() -> None:
    assert set(NAMES) == set(TABLE)
    assert all(divergences.get(name).name == name for name in NAMES)
    with pytest.raises(ValueError, match=r"unknown divergence 'helinger'; did you mean hellinger\?"):
        divergences.get("helinger")


@pytest.mark.parametrize("name", NAMES)
def test_f_is_convex_and_zero_where_the_two_agree(name: str) -> None:
    divergence = divergences.get(name)
    at_one = float(divergence.f(torch.ones((), dtype=torch.float64)))
    # The table's GAN is shifted by its minimum.
    assert at_one == pytest.approx(-math.log(4) if name == "gan" else 0, abs=1e-15)
    values = divergence.f(torch.linspace(0.01, 9, 900, dtype=torch.float64))
    assert (values[2:] - 2 * values[1:-1] + values[:-2] > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_conjugate_is_the_supremum(name: str) -> None:
    divergence = divergences.get(name)
    for t in inside(divergence)[::4].tolist():
        if name == "pearson":  # over all real u, as in the paper

            def gain(u: np.ndarray, t: float = t) -> np.ndarray:
                return u * t - (u - 1) ** 2

            found = supremum(gain, -30, 30)
        else:

            def gain(log_u: np.ndarray, t: float = t) -> np.ndarray:
                u = torch.from_numpy(np.exp(log_u))
                return (u * t - divergence.f(u)).numpy()

            found = supremum(gain, -25, 25)
        value = float(divergence.conjugate(torch.tensor(t, dtype=torch.float64)))
        # minimize_scalar leaves x off by the root of eps, which is eps in the value, times the curvature.
        assert found == pytest.approx(value, rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_the_conjugate_of_the_conjugate_is_f(name: str) -> None:
    divergence = divergences.get(name)
    for u in (1e-3, 0.2, 0.9, 1.0, 1.1, 3.0, 40.0):

        def gain(scores: np.ndarray, u: float = u) -> np.ndarray:
            t = divergence.activation(torch.from_numpy(scores))
            return (u * t - divergence.conjugate(t)).numpy()

        value = float(divergence.f(torch.tensor(u, dtype=torch.float64)))
        assert supremum(gain, -100 if name == "pearson" else -12, 100 if name == "pearson" else 12) == pytest.approx(
            value, rel=1e-8, abs=1e-8
        )


@pytest.mark.parametrize("name", NAMES)
def test_the_conjugate_is_infinite_outside_its_domain(name: str) -> None:
    divergence = divergences.get(name)
    assert divergence.conjugate(inside(divergence)).isfinite().all()
    if divergence.upper < math.inf:
        outside = divergence.upper + torch.tensor([0.0, 1e-3, 1.0, 1e3], dtype=torch.float64)
        assert (divergence.conjugate(outside) == math.inf).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_bound_is_tight_at_the_optimum_and_only_there(name: str) -> None:
    divergence = divergences.get(name)
    u = torch.logspace(-3, 3, 61, dtype=torch.float64)
    t = divergence.optimal(u)
    torch.testing.assert_close(u * t - divergence.conjugate(t), divergence.f(u), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(divergence.activation(divergence.optimal_score(u.log())), t, rtol=1e-12, atol=1e-12)
    for shifted in (divergence.optimal_score(u.log()) - 0.1, divergence.optimal_score(u.log()) + 0.1):
        lower = u * divergence.activation(shifted) - divergence.conjugate_of_activation(shifted)
        assert (lower < divergence.f(u)).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_activation_increases_from_end_to_end_of_the_domain(name: str) -> None:
    divergence = divergences.get(name)
    values = divergence.activation(torch.linspace(-12, 12, 97, dtype=torch.float64))
    assert (values.diff() > 0).all()
    assert (values < divergence.upper).all()
    ends = divergence.activation(torch.tensor([-1e4, 1e4], dtype=torch.float64))
    assert ends[0] <= -1e4 + 1
    assert ends[1] == pytest.approx(1e4 if divergence.upper == math.inf else divergence.upper, abs=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str) -> None:
    divergence = divergences.get(name)
    u = torch.tensor([0.03, 0.4, 1.0, 1.7, 30.0], dtype=torch.float64, requires_grad=True)
    t = inside(divergence)[[0, 10, 20, 30, 40]].requires_grad_()
    v = torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(divergence.f(u).sum(), u)
    torch.testing.assert_close(gradient, divergence.derivative(u).detach(), rtol=1e-12, atol=1e-14)
    # f*' is the inverse of f'.
    points = divergence.derivative(u).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(divergence.conjugate(points).sum(), points)
    torch.testing.assert_close(gradient, u.detach(), rtol=1e-11, atol=1e-12)
    for function, x in (
        (divergence.f, u),
        (divergence.derivative, u),
        (divergence.conjugate, t),
        (divergence.activation, v),
        (divergence.conjugate_of_activation, v),
        (divergence.optimal_score, v),
    ):
        # The step of the differences must be small beside the distance from the end of the domain.
        assert torch.autograd.gradcheck(function, x, eps=1e-8, atol=1e-4, rtol=1e-4)
    assert torch.autograd.gradgradcheck(divergence.conjugate_of_activation, v)
    assert torch.autograd.gradgradcheck(divergence.activation, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_accuracy_over_the_whole_range(name: str, dtype: torch.dtype) -> None:
    """A few roundings of the result, of the argument (times the slope), and for g and f*(g) of the constant log 2."""
    divergence = divergences.get(name)
    f, derivative, conjugate, activation = TABLE[name]
    info = torch.finfo(dtype)
    one = torch.tensor(1.0, dtype=dtype)
    near_one = torch.stack([one.nextafter(2 * one), one.nextafter(0 * one), one + 1e-3, one - 1e-3, one])
    u = torch.cat([torch.logspace(-30, 15, 46, dtype=dtype), near_one, torch.tensor([info.tiny, 1e30], dtype=dtype)])
    t = torch.cat([inside(divergence).to(dtype), torch.tensor([-1e-6, -1e-3, -30, -60], dtype=dtype)])
    v = torch.cat([torch.linspace(-60, 60, 49, dtype=dtype), torch.tensor([-1e-4, 1e-4], dtype=dtype)])
    cases: list[tuple[Callable[[Tensor], Tensor], Function, Tensor, float]] = [
        (divergence.f, f, u, 0),
        (divergence.derivative, derivative, u, 0),
        (divergence.conjugate, conjugate, t, 0),
        (divergence.activation, activation, v, 1),
        (divergence.conjugate_of_activation, lambda x: conjugate(activation(x)), v, 1),
    ]
    with mpmath.workdps(80):
        for ours, exact, points, constant in cases:
            for x, value in zip(points.tolist(), ours(points).tolist(), strict=True):
                argument = mpmath.mpf(x)
                truth = exact(argument)
                if abs(truth) > info.max:
                    continue
                slope = mpmath.diff(exact, argument, h=abs(argument) * mpmath.mpf(10) ** -30) if x else 0
                scale = abs(truth) + abs(argument * slope) + constant
                assert abs(value - truth) <= 6 * info.eps * scale + info.tiny, (ours, x)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gan"])
def test_what_is_zero_at_one_keeps_its_digits_beside_it(name: str) -> None:
    divergence = divergences.get(name)
    u = torch.tensor(1 + 2.0**-20, dtype=torch.float64)
    with mpmath.workdps(80):
        f, derivative = (float(function(mpmath.mpf(u.item()))) for function in TABLE[name][:2])
    assert divergence.derivative(u).item() == pytest.approx(derivative, rel=1e-14, abs=0)
    # f of Jensen-Shannon is a difference of two numbers near u - 1, so that it has half the digits.
    assert divergence.f(u).item() == pytest.approx(f, rel=1e-8 if name == "jensen-shannon" else 1e-14, abs=0)


def test_the_conjugate_of_the_gan_has_a_gradient_beside_the_end_of_its_domain() -> None:
    t = torch.tensor(-1e-20, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(divergences.get("gan").conjugate(t), t)
    assert gradient.item() == pytest.approx(1e20)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_extreme_arguments(dtype: torch.dtype) -> None:
    far = 1e4
    v = torch.tensor([-far, far], dtype=dtype)
    composed = {name: divergences.get(name).conjugate_of_activation(v).tolist() for name in NAMES}
    # By way of the rounded g, the first three would be infinite on at least one side.
    assert composed["reverse-kl"] == pytest.approx([-far - 1, far - 1], rel=1e-3)
    assert composed["gan"] == pytest.approx([0, far], rel=1e-3)
    assert composed["jensen-shannon"] == pytest.approx([-math.log(2), far - math.log(2)], rel=1e-3)
    assert composed["hellinger"][0] == -1
    assert composed["kl"][0] == 0
    at_zero = {name: float(divergences.get(name).f(torch.zeros((), dtype=dtype))) for name in NAMES}
    expected = {"kl": 0, "reverse-kl": math.inf, "pearson": 1, "hellinger": 1, "jensen-shannon": math.log(2), "gan": 0}
    assert at_zero == pytest.approx(expected, rel=1e-3)
    slopes = {name: float(divergences.get(name).derivative(torch.zeros((), dtype=dtype))) for name in NAMES}
    assert slopes == {name: -2 if name == "pearson" else -math.inf for name in NAMES}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_types_round_once(name: str, dtype: torch.dtype) -> None:
    divergence = divergences.get(name)
    u, v = torch.linspace(0.05, 4, 50).to(dtype), torch.linspace(-4, 4, 50).to(dtype)
    t = inside(divergence)[8:].to(dtype)
    for function, x in (
        (divergence.f, u),
        (divergence.optimal, u),
        (divergence.conjugate, t),
        (divergence.activation, v),
        (divergence.conjugate_of_activation, v),
        (divergence.optimal_score, v),
    ):
        assert function(x).dtype == dtype
        assert torch.equal(function(x), function(x.float()).to(dtype))
    bound = divergence.variational_bound(v, v)
    assert bound.dtype == torch.float32
    assert bound == divergence.variational_bound(v.float(), v.float())


def test_whole_numbers_are_refused() -> None:
    divergence = divergences.get("kl")
    with pytest.raises(TypeError, match=r"u must have a real floating-point dtype, got torch\.int64"):
        divergence.f(torch.arange(3))
    with pytest.raises(TypeError, match=r"fake_scores must have a real floating-point dtype, got torch\.int64"):
        divergence.variational_bound(torch.zeros(3), torch.arange(3))


def test_a_divergence_is_frozen_and_is_copied_by_its_name() -> None:
    divergence = divergences.get("pearson")
    with pytest.raises(dataclasses.FrozenInstanceError):
        divergence.upper = 0.0  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(divergence)) is divergence
    assert copy.deepcopy(divergence) is divergence


@pytest.mark.parametrize("name", NAMES)
def test_the_bound_of_two_distributions_on_three_points(name: str) -> None:
    """p = (1/2, 1/4, 1/4) and q = (1/4, 1/4, 1/2), as samples of four."""
    divergence = divergences.get(name)
    log_ratios = torch.tensor([math.log(2), 0, -math.log(2)], dtype=torch.float64)
    real, fake = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 2, 2])
    best = divergence.optimal_score(log_ratios)
    with mpmath.workdps(30):
        truth = float(sum(q * TABLE[name][0](mpmath.mpf(u)) for q, u in ((0.25, 2), (0.25, 1), (0.5, 0.5))))
    assert float(divergence.variational_bound(best[real], best[fake])) == pytest.approx(truth, rel=1e-13)
    for _ in range(20):
        scores = best + 0.5 * torch.randn(3, dtype=torch.float64)
        assert float(divergence.variational_bound(scores[real], scores[fake])) < truth


def normal_log_density(x: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    std = torch.as_tensor(std, dtype=x.dtype)
    return -0.5 * ((x - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)


# The integrals of the table, corrected where they disagree with their f.
INTEGRANDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": lambda p, q: p * (p / q).log(),
    "reverse-kl": lambda p, q: q * (q / p).log(),
    "pearson": lambda p, q: (p - q) ** 2 / q,
    "hellinger": lambda p, q: (p.sqrt() - q.sqrt()) ** 2,
    "jensen-shannon": lambda p, q: p * (2 * p / (p + q)).log() + q * (2 * q / (p + q)).log(),
    "gan": lambda p, q: p * (p / (p + q)).log() + q * (q / (p + q)).log(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_trained_critic_reaches_the_divergence_of_two_gaussians(name: str) -> None:
    """p = N(0, 1), q = N(0.7, 1.1^2): the bound of a small network, within 1 % of the integral."""
    divergence = divergences.get(name)
    x = torch.linspace(-15, 15, 6001, dtype=torch.float64)
    p, q = normal_log_density(x, 0, 1).exp(), normal_log_density(x, 0.7, 1.1).exp()
    truth = float(INTEGRANDS[name](p, q).sum()) * 0.005
    assert float((q * divergence.f(p / q)).sum()) * 0.005 == pytest.approx(truth, rel=1e-9)

    # One sample in the middle of each of n strips of equal mass: means without the noise of random samples.
    n = 2000
    strips = (torch.arange(n) + 0.5) / n
    real = torch.special.ndtri(strips)[:, None]
    fake = 0.7 + 1.1 * real
    critic = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-2)
    bound = torch.zeros(())
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 3e-2 * (1 - step / 200)
        optimizer.zero_grad()
        bound = divergence.variational_bound(critic(real).flatten(), critic(fake).flatten())
        (-bound).backward()
        optimizer.step()
    # The shift of the GAN is most of its value.
    shift = math.log(4) if name == "gan" else 0
    assert bound.item() + shift == pytest.approx(truth + shift, rel=0.01)


@pytest.mark.parametrize(
    ("name", "mean", "std", "value"),
    [
        ("kl", 1.0100, 1.8304, 0.2881),
        ("reverse-kl", 1.5841, 1.6294, 0.2507),
        ("jensen-shannon", 1.3125, 1.7525, 0.1298),
        ("pearson", 0.5663, 1.9268, 0.6616),
    ],
)
def test_the_gaussian_nearest_to_a_mixture(name: str, mean: float, std: float, value: float) -> None:
    """The experiment of the paper's supplement: 0.33 N(-1, 0.0625) + 0.67 N(2, 2), by quadrature, to four decimals.

    For KL the answer is known: the mixture's own mean 1.01 and variance 3.3504.
    """
    divergence = divergences.get(name)
    x = torch.linspace(-14, 18, 6401, dtype=torch.float64)
    parts = [
        math.log(0.33) + normal_log_density(x, -1, 0.25),
        math.log(0.67) + normal_log_density(x, 2, math.sqrt(2)),
    ]
    log_p = torch.logaddexp(*parts)

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = torch.from_numpy(theta).requires_grad_()
        log_q = normal_log_density(x, parameters[0], parameters[1].exp())
        total = (log_q.exp() * divergence.f((log_p - log_q).exp())).sum() * 0.005
        (gradient,) = torch.autograd.grad(total, parameters)
        return total.item(), gradient.numpy()

    found = scipy.optimize.minimize(objective, np.array([1.0, math.log(1.8)]), jac=True, options={"gtol": 1e-9})
    assert [found.x[0], math.exp(found.x[1]), found.fun] == pytest.approx([mean, std, value], abs=0.5001e-4)
