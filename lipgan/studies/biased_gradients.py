"""Gradients of the Wasserstein distance from samples are biased, those of the Cramer distance are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.special import comb

from lipgan.metrics.wasserstein import wasserstein_distance
from lipgan.objectives.regularizers import energy_distance
from lipgan.studies import figures
from lipgan.studies.study import Analysis, Claim, Finding, Finished, Settings, Study, Table, Unit, judge, spread

__all__ = ["STUDY"]

_SOURCE = "lecture 004, “WGAN: problems”; Bellemare et al. 2017"
_ROUNDING, _BIAS, _AWAY, _NEAR = 1e-9, 0.1, 0.05, 0.03

_CLAIMS = (
    Claim(
        "distances",
        "For Bernoulli distributions, W of a sample with mean s and of the model with probability θ is |s - θ|, and "
        "the Cramer distance (s - θ)²; twice that is the energy distance.",
        _SOURCE,
        f"lipgan's distances of samples agree with both within {_ROUNDING:g}",
    ),
    Claim(
        "bias",
        "The expected gradient of W from a sample differs from the gradient of W: the one is 1 - 2 P(s > θ) where the "
        "other is the sign of θ - θ*.",
        _SOURCE + ": “The expected EMD gradients can differ from the true gradients”",
        f"summed over the binomial distribution, the two differ by more than {_BIAS} at some θ for every sample size",
    ),
    Claim(
        "cramer",
        "The gradient of the Cramer distance from a sample has no bias.",
        _SOURCE,
        f"the same sum differs from the gradient of the Cramer distance by less than {_ROUNDING:g} at every θ",
    ),
    Claim(
        "solution",
        "The bias moves the solution: stochastic gradient descent on W ends away from θ*, at the median of s, even for "
        "a Bernoulli distribution; on the Cramer distance it ends at θ*.",
        _SOURCE + ": “This leads to problems even for Bernoulli distribution”",
        f"for every pair of θ* and sample size, the mean of the last half of the steps is more than {_AWAY} away from "
        f"θ* with W, and within {_NEAR} of θ* with Cramer; in every seed",
    ),
)


def _units(settings: Settings, seeds: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {"theta": theta, "m": m, "seed": seed, "loss": loss}
        for seed in seeds
        for theta, m in settings["pairs"]
        for loss in ("wasserstein", "cramer")
    ]


def _bernoulli(ones: int, n: int) -> torch.Tensor:
    """``[n, 1]``: a sample with so many ones."""
    return (torch.arange(n, dtype=torch.float64) < ones).double()[:, None]


def _run(settings: Settings, unit: Unit) -> dict[str, Any]:
    m, steps = unit["m"], settings["steps"]
    random = np.random.default_rng([unit["seed"], m, round(1000 * unit["theta"])])
    means = random.binomial(m, unit["theta"], steps) / m
    theta, path = 0.5, []
    for step, mean in enumerate(means):
        # What is minimized is |s - theta| or (s - theta)^2, which the unit below checks.
        slope = np.sign(theta - mean) if unit["loss"] == "wasserstein" else 2 * (theta - mean)
        theta = float(np.clip(theta - settings["lr"] * slope, 0.0, 1.0))
        if step % settings["every"] == 0:
            path.append(theta)
    # The formulas, against lipgan's distances of a few samples.
    error = 0.0
    for ones in range(0, m + 1):
        for of_model in (1, 7, 12):
            x, y = _bernoulli(ones, m), _bernoulli(of_model, 20)
            gap = abs(ones / m - of_model / 20)
            error = max(
                error,
                abs(wasserstein_distance(x, y) - gap),
                abs(float(energy_distance(x, y, estimator="biased")) / 2 - gap**2),
            )
    return {"path": path, "end": float(np.mean(path[len(path) // 2 :])), "error": error}


def _shares(theta_star: float, m: int) -> np.ndarray[Any, Any]:
    """How probable 0, 1, ..., m ones in a sample are."""
    counts = np.arange(m + 1)
    return np.asarray(comb(m, counts) * theta_star**counts * (1 - theta_star) ** (m - counts))


def _median(theta_star: float, m: int) -> float:
    """Of the mean of a sample."""
    return int(np.searchsorted(_shares(theta_star, m).cumsum(), 0.5)) / m


def _expected(theta_star: float, m: int, theta: np.ndarray[Any, Any], loss: str) -> np.ndarray[Any, Any]:
    """The expected gradient from a sample of size m, by a sum over its mean."""
    counts = np.arange(m + 1)
    shares = _shares(theta_star, m)
    gaps = theta[:, None] - counts / m
    return np.asarray((np.sign(gaps) if loss == "wasserstein" else 2 * gaps) @ shares)


def _true(theta_star: float, theta: np.ndarray[Any, Any], loss: str) -> np.ndarray[Any, Any]:
    return np.sign(theta - theta_star) if loss == "wasserstein" else 2 * (theta - theta_star)


def _grid(theta_star: float, m: int) -> np.ndarray[Any, Any]:
    """Points of [0, 1] on which no kink lies."""
    theta = np.linspace(0, 1, 402)[1:-1] + 1e-4
    kinks = np.append(np.arange(m + 1) / m, theta_star)
    return np.asarray(theta[np.abs(theta[:, None] - kinks).min(1) > 1e-6])


def _bias(theta_star: float, m: int, loss: str) -> float:
    theta = _grid(theta_star, m)
    return float(np.abs(_expected(theta_star, m, theta, loss) - _true(theta_star, theta, loss)).max())


def _of(rows: Sequence[Finished], theta: float, m: int, loss: str) -> list[Finished]:
    return [row for row in rows if (row.unit["theta"], row.unit["m"], row.unit["loss"]) == (theta, m, loss)]


def _ends(rows: Sequence[Finished], theta: float, m: int, loss: str) -> str:
    return spread([row.result["end"] for row in _of(rows, theta, m, loss)])


def _analyse(settings: Settings, rows: Sequence[Finished]) -> Analysis:
    seeds = sorted({row.unit["seed"] for row in rows})
    error = max(row.result["error"] for row in rows)
    cases = [(theta, m) for theta in sorted({theta for theta, _ in settings["pairs"]}) for m in settings["sizes"]]
    biases = {loss: [_bias(theta, m, loss) for theta, m in cases] for loss in ("wasserstein", "cramer")}

    def passes(row: Finished) -> bool:
        gap = abs(float(row.result["end"]) - float(row.unit["theta"]))
        return gap > _AWAY if row.unit["loss"] == "wasserstein" else gap <= _NEAR

    ends = [
        f"θ* = {theta}, samples of {m}: W {_ends(rows, theta, m, 'wasserstein')}, "
        f"Cramer {_ends(rows, theta, m, 'cramer')}"
        for theta, m in settings["pairs"]
    ]
    findings = (
        Finding("distances", judge([error <= _ROUNDING]), f"the largest difference is {error:.1e}"),
        Finding(
            "bias",
            judge([min(biases["wasserstein"]) > _BIAS]),
            f"the largest bias over θ is {min(biases['wasserstein']):.2f} to {max(biases['wasserstein']):.2f} for "
            f"samples of {min(settings['sizes'])} to {max(settings['sizes'])}",
        ),
        Finding(
            "cramer",
            judge([max(biases["cramer"]) < _ROUNDING]),
            f"the largest difference is {max(biases['cramer']):.1e}",
        ),
        Finding(
            "solution",
            judge([all(passes(row) for row in rows if row.unit["seed"] == seed) for seed in seeds]),
            "; ".join(ends),
        ),
    )
    table = Table(
        ("θ*", "sample size", "median of s", "end with W", "end with Cramer", "largest bias, W"),
        tuple(
            (
                theta,
                m,
                _median(theta, m),
                _ends(rows, theta, m, "wasserstein"),
                _ends(rows, theta, m, "cramer"),
                _bias(theta, m, "wasserstein"),
            )
            for theta, m in settings["pairs"]
        ),
    )
    return Analysis(findings, table)


def _draw(settings: Settings, rows: Sequence[Finished]) -> Figure:
    pairs = settings["pairs"]
    figure, axes = figures.panels(2, len(pairs), 4.4, sharey="row")
    for column, (theta_star, m) in enumerate(pairs):
        gradients, paths = axes[column], axes[column + len(pairs)]
        theta = _grid(theta_star, m)
        for loss, index in (("wasserstein", 1), ("cramer", 0)):
            style: dict[str, Any] = {"color": figures.COLOURS[index], "linestyle": figures.DASHES[index]}
            name = "W" if loss == "wasserstein" else "Cramer"
            gradients.plot(
                theta, _expected(theta_star, m, theta, loss), label=f"{name}, expected from samples", **style
            )
            for row in _of(rows, theta_star, m, loss):
                steps = settings["every"] * np.arange(len(row.result["path"]))
                paths.plot(steps, row.result["path"], linewidth=1, **style)
        gradients.plot(theta, _true(theta_star, theta, "wasserstein"), color="0.55", linewidth=1, label="W, true")
        for plot in (gradients, paths):
            line = plot.axvline if plot is gradients else plot.axhline
            line(theta_star, color="black", linewidth=0.8, linestyle=":")
        gradients.set_title(f"θ* = {theta_star}, samples of {m}")
        gradients.set_xlabel("θ (probability)")
        paths.set_xlabel("step")
        paths.set_xticks([0, settings["steps"] // 2, settings["steps"]])
        paths.set_ylim(0.35, 1.03)
    axes[0].set_ylabel("gradient in θ")
    axes[len(pairs)].set_ylabel("θ (probability)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


STUDY = Study(
    name="biased-gradients",
    title="Biased gradients: Wasserstein against Cramer",
    claims=_CLAIMS,
    method="Data are coins with probability θ*, of which each step sees a small sample with mean s; the model is a "
    "coin with probability θ, known exactly. Expected gradients are sums over the binomial distribution of s; descent "
    "takes fresh samples, from θ = 0.5, with a fixed step length, and θ stays in [0, 1].",
    full={
        "pairs": [[0.6, 1], [0.6, 4], [0.9, 5]],
        "sizes": [1, 2, 4, 8, 16, 32, 64],
        "steps": 40000,
        "every": 40,
        "lr": 1e-3,
    },
    quick={"steps": 10000, "every": 20},
    seeds=(10, 3),
    units=_units,
    run=_run,
    analyse=_analyse,
    draw=_draw,
    caption="Above: the gradient of W that samples give on average (dashed) against the true one (grey), and that of "
    "the Cramer distance, which has no bias. Below: descent with such samples, all seeds; the dotted line is θ*.",
)
