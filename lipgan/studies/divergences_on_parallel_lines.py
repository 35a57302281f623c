"""KL, JS and Wasserstein of two parallel lines, exact and as critics estimate them, with the generator's gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure

from lipgan.data.toy import segments
from lipgan.metrics.divergence import jensen_shannon_divergence, kl_divergence, sample_histograms
from lipgan.metrics.wasserstein import wasserstein_distance
from lipgan.objectives import losses
from lipgan.studies import critics, figures
from lipgan.studies.study import Analysis, Claim, Finding, Finished, Settings, Study, Table, Unit, judge, spread

__all__ = ["STUDY"]

_SOURCE = "lecture 001, “Wasserstein distance vs KL vs JSD”; Arjovsky et al. 2017, example 1"
# How near is enough, by the rules below.
_EXACT, _NEAR, _SLOPE, _FLAT = 1e-6, 0.05, 0.1, 0.05

_CLAIMS = (
    Claim(
        "exact",
        "For real points (0, U[0, 1]) and generated points (θ, U[0, 1]), W = |θ|, while JS = log 2 and KL = ∞ for "
        "every θ other than 0; all three are 0 at θ = 0.",
        _SOURCE,
        f"for samples with the same heights, each value is the claimed one within {_EXACT:g}, for every θ and seed",
    ),
    Claim(
        "critics",
        "A 1-Lipschitz critic estimates W, and a discriminator JS, from samples.",
        "lecture 001, “Kantorovich-Rubinstein duality”, “Variational divergence estimation”",
        f"on fresh samples, the estimates lie within {_NEAR} of |θ| and of the JS above, for every θ; in every seed",
    ),
    Claim(
        "gradients",
        "Wasserstein gives the generator a gradient that leads to θ = 0 from any distance; JS, which is constant, "
        "gives none.",
        "lecture 001, “WGAN has non-zero gradients for disjoint supports”; lecture 004, “Vanishing Gradients”",
        f"for every θ other than 0, the critic's derivative in θ lies within {_SLOPE} of the sign of θ, and that of "
        f"the discriminator's JS estimate is at most {_FLAT} in magnitude; in every seed",
    ),
)


def _units(settings: Settings, seeds: Sequence[int]) -> list[dict[str, Any]]:
    return [{"theta": theta, "seed": seed} for seed in seeds for theta in settings["thetas"]]


def _run(settings: Settings, unit: Unit) -> dict[str, Any]:
    theta, n = float(unit["theta"]), settings["samples"]
    x, y = (segments(at, n, seed=unit["seed"]).samples for at in (0.0, theta))
    histograms = sample_histograms(x, y)
    result: dict[str, Any] = {
        "wasserstein": wasserstein_distance(x, y),
        "js": jensen_shannon_divergence(*histograms),
        "kl": kl_divergence(*histograms),
    }
    generator = torch.Generator().manual_seed(unit["seed"])

    def points(at: float, number: int) -> torch.Tensor:
        return torch.stack([torch.full((number,), at), torch.rand(number, generator=generator)], 1)

    for name, loss, constraint in (
        ("critic", "wasserstein", critics.CONSTRAINTS["GroupSort"]),
        ("discriminator", "minimax", critics.CONSTRAINTS["none"]),
    ):
        critic = critics.build(constraint, 2, settings["width"])
        critics.train(
            critic,
            lambda: (points(0.0, settings["batch"]), points(theta, settings["batch"])),
            loss,
            constraint,
            steps=settings["steps"],
            lr=settings["lr"],
            generator=generator,
        )
        real, fake = points(0.0, settings["test_samples"]), points(theta, settings["test_samples"])
        shift = torch.zeros((), requires_grad=True)
        moved = fake + shift * torch.tensor([1.0, 0.0])
        # Twice the Jensen-Shannon divergence is what a discriminator bounds.
        share = 0.5 if loss == "minimax" else 1.0
        estimate = share * losses.get(loss).estimate(critic(real), critic(moved))
        (slope,) = torch.autograd.grad(estimate, shift)
        result[name] = {"estimate": float(estimate.detach()), "slope": float(slope)}
    return result


def _sign(theta: float) -> float:
    return math.copysign(1.0, theta) if theta else 0.0


def _js(theta: float) -> float:
    return math.log(2) if theta else 0.0


def _by_theta(rows: Sequence[Finished]) -> dict[float, list[Finished]]:
    found: dict[float, list[Finished]] = {}
    for row in rows:
        found.setdefault(float(row.unit["theta"]), []).append(row)
    return dict(sorted(found.items()))


def _analyse(settings: Settings, rows: Sequence[Finished]) -> Analysis:
    seeds = sorted({row.unit["seed"] for row in rows})
    exact = [
        max(abs(row.result["wasserstein"] - abs(row.unit["theta"])), abs(row.result["js"] - _js(row.unit["theta"])))
        for row in rows
    ]
    infinite = all((row.result["kl"] == math.inf) == bool(row.unit["theta"]) for row in rows)
    zero = all(abs(row.result["kl"]) <= _EXACT for row in rows if not row.unit["theta"])

    def worst(seed: int, values: Any, apart: bool = False) -> float:
        chosen = (row for row in rows if row.unit["seed"] == seed and (row.unit["theta"] or not apart))
        return float(max(map(values, chosen)))

    wasserstein = [
        worst(seed, lambda row: abs(row.result["critic"]["estimate"] - abs(row.unit["theta"]))) for seed in seeds
    ]
    js = [
        worst(seed, lambda row: abs(row.result["discriminator"]["estimate"] - _js(row.unit["theta"]))) for seed in seeds
    ]
    steep = [
        worst(seed, lambda row: abs(row.result["critic"]["slope"] - _sign(row.unit["theta"])), True) for seed in seeds
    ]
    flat = [worst(seed, lambda row: abs(row.result["discriminator"]["slope"]), True) for seed in seeds]
    findings = (
        Finding(
            "exact",
            judge([max(exact) <= _EXACT and infinite and zero]),
            f"W and JS are off by at most {max(exact):.1e}; KL is {'infinite' if infinite else 'not always infinite'} "
            "off θ = 0",
        ),
        Finding(
            "critics",
            judge([max(pair) <= _NEAR for pair in zip(wasserstein, js, strict=True)]),
            f"largest error over θ: {spread(wasserstein)} of the critic's W, {spread(js)} of the discriminator's JS",
        ),
        Finding(
            "gradients",
            judge([a <= _SLOPE and b <= _FLAT for a, b in zip(steep, flat, strict=True)]),
            f"off θ = 0, the critic's derivative is off the sign of θ by at most {spread(steep)}, and the "
            f"discriminator's is at most {spread(flat)} in magnitude",
        ),
    )
    table = Table(
        ("θ", "W", "W by the critic", "JS", "JS by the discriminator", "KL", "dW/dθ, critic", "dJS/dθ, discriminator"),
        tuple(
            (
                theta,
                group[0].result["wasserstein"],
                spread([row.result["critic"]["estimate"] for row in group]),
                group[0].result["js"],
                spread([row.result["discriminator"]["estimate"] for row in group]),
                "∞" if group[0].result["kl"] == math.inf else group[0].result["kl"],
                spread([row.result["critic"]["slope"] for row in group]),
                spread([row.result["discriminator"]["slope"] for row in group]),
            )
            for theta, group in _by_theta(rows).items()
        ),
    )
    return Analysis(findings, table)


def _draw(settings: Settings, rows: Sequence[Finished]) -> Figure:
    groups = _by_theta(rows)
    thetas = list(groups)
    figure, (values, gradients) = figures.panels(1, 2, 3.2)
    line = [min(0.0, *thetas), 0.0, max(thetas)]
    values.plot(line, [abs(theta) for theta in line], color=figures.COLOURS[0], label="W, exact")
    values.axhline(math.log(2), color=figures.COLOURS[1], linestyle=figures.DASHES[1], label="JS, exact (θ ≠ 0)")
    steps = ([line[0], 0.0, 0.0, line[-1]], [-1.0, -1.0, 1.0, 1.0])
    gradients.plot(*steps, color=figures.COLOURS[0])
    gradients.axhline(0.0, color=figures.COLOURS[1], linestyle=figures.DASHES[1])
    labels = (("critic", "W, by a critic"), ("discriminator", "JS, by a discriminator"))
    for axes, what in ((values, "estimate"), (gradients, "slope")):
        for index, (name, label) in enumerate(labels):
            table = [[row.result[name][what] for row in group] for group in groups.values()]
            figures.error_bars(axes, thetas, table, index, label, line="none")
        axes.set_xlabel("θ, signed distance of the lines")
    values.set_ylabel("divergence (W: length; JS: nats)")
    gradients.set_ylabel("derivative of the estimate in θ")
    values.set_title("what is measured")
    gradients.set_title("what the generator is told")
    figure.legend(*values.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


STUDY = Study(
    name="divergences-on-parallel-lines",
    title="Divergences of two parallel lines",
    claims=_CLAIMS,
    method="For each θ, the divergences of samples with the same heights on both lines; then a critic of orthogonal "
    "layers and GroupSort, which is 1-Lipschitz by construction, is trained with WGAN's loss, and a LeakyReLU "
    "discriminator with that of the first GAN. Both are judged on fresh samples. The generator moves its line by θ; "
    "its gradient is the derivative of the estimate.",
    full={
        "thetas": [-1.0, -0.75, -0.5, -0.25, -0.1, 0.0, 0.1, 0.25, 0.5, 0.75, 1.0],
        "samples": 1000,
        "steps": 2000,
        "batch": 256,
        "test_samples": 4000,
        "width": 32,
        "lr": 2e-3,
    },
    quick={"thetas": [-0.5, 0.0, 0.1, 1.0], "samples": 200, "steps": 250, "batch": 128},
    seeds=(5, 2),
    units=_units,
    run=_run,
    analyse=_analyse,
    draw=_draw,
    caption="Left: Jensen-Shannon divergence and Wasserstein distance of two lines at distance θ, exact (lines) and as "
    "trained critics estimate them (markers). KL is infinite off θ = 0. Right: the derivative of each estimate in θ, "
    "which is what a generator learns from.",
)
