"""Two Gaussians: the optimal discriminator saturates, the critic does not (figure 2 of Arjovsky et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lipgan import data
from lipgan.objectives import losses
from lipgan.studies import critics, figures
from lipgan.studies.rows import crossed, where
from lipgan.studies.study import Analysis, Claim, Finding, Finished, Settings, Study, Table, Unit, judge, spread

__all__ = ["STUDY"]

_SOURCE = "lecture 003, “WGAN advantages”; Arjovsky et al. 2017, figure 2"
_VANISHED, _LEAST, _NEAR = 1e-2, 0.5, 0.2

# What is trained: the loss, and the constraint of `critics`.
_METHODS = {
    "discriminator": ("minimax", "none"),
    "clipping 0.01": ("wasserstein", "clipping 0.01"),
    "penalty": ("wasserstein", "penalty"),
    "GroupSort": ("wasserstein", "GroupSort"),
}

_CLAIMS = (
    Claim(
        "optimal",
        "The optimal discriminator of two Gaussians far apart saturates: where the generated points are, log(1 - D) "
        "has no gradient.",
        _SOURCE,
        f"by the formula, the gradient at the mean of the generated points is below {_VANISHED:g}",
    ),
    Claim(
        "trained",
        "A discriminator that is trained to tell them apart saturates, too.",
        _SOURCE,
        f"the mean gradient norm of log(1 - D) over the generated points is below {_VANISHED:g}; in every seed",
    ),
    Claim(
        "critic",
        "The critic of WGAN has clean gradients on all parts of the space.",
        _SOURCE,
        f"with a gradient penalty, and with GroupSort, the gradient norm is at least {_LEAST} at every point of the "
        f"line through both means, from 2 units before one to 2 behind the other, and within {_NEAR} of 1 at 9 of 10 "
        "points between the means; in every seed",
    ),
    Claim(
        "clipped",
        "Clipping weights to a small box makes the gradient of a critic vanish, too.",
        "lecture 001, “Wasserstein GAN”: “If the clipping parameter is too small, it could lead to vanishing "
        "gradients”",
        f"with weights in [-0.01, 0.01], the largest gradient norm on that line is below {_VANISHED:g}; in every seed",
    ),
)


def _units(settings: Settings, seeds: Sequence[int]) -> list[dict[str, Any]]:
    return crossed(seeds, method=list(_METHODS))


def _line(points: int) -> Tensor:
    return torch.linspace(-4, 4, points)


def _run(settings: Settings, unit: Unit) -> dict[str, Any]:
    loss, name = _METHODS[unit["method"]]
    dataset = data.load("two-gaussians")
    assert dataset.labels is not None
    sides = [dataset.samples[dataset.labels == k] for k in (0, 1)]
    generator = torch.Generator().manual_seed(unit["seed"])

    def draw() -> tuple[Tensor, Tensor]:
        real, fake = (x[torch.randint(len(x), (settings["batch"],), generator=generator)] for x in sides)
        return real, fake

    constraint = critics.CONSTRAINTS[name]
    critic = critics.build(constraint, 2, settings["width"])
    critics.train(critic, draw, loss, constraint, steps=settings["steps"], lr=settings["lr"], generator=generator)
    line = torch.stack([_line(settings["points"]), torch.zeros(settings["points"])], 1)
    objective = losses.get(loss)

    def told(x: Tensor) -> Tensor:
        """What the generator minimizes, of one sample each."""
        scores = critic(x)
        return torch.stack([objective.generator_loss(score[None]) for score in scores])

    with torch.no_grad():
        scores = critic(line)
    fake = sides[1][: settings["test_samples"]]
    return {
        "scores": scores.tolist(),
        "slopes": critics.slopes(told, line).norm(dim=1).tolist(),
        "at_fake": float(critics.slopes(told, fake).norm(dim=1).mean()),
    }


def _optimal_slope(x: float) -> float:
    """Of log(1 - D*), where D* = p / (p + q) has the score log p/q = -4 m x / (2 s^2) for means -m and m."""
    dataset = data.load("two-gaussians")
    assert dataset.modes is not None
    assert dataset.mode_std is not None
    factor = 2 * float(dataset.modes[1, 0]) / dataset.mode_std**2
    return factor * float(torch.sigmoid(torch.tensor(-factor * x, dtype=torch.float64)))


def _analyse(settings: Settings, rows: Sequence[Finished]) -> Analysis:
    line = _line(settings["points"]).numpy()
    between = np.abs(line) <= 2

    def least(row: Finished) -> float:
        return float(min(row.result["slopes"]))

    def near_one(row: Finished) -> float:
        return float(np.mean(np.abs(np.asarray(row.result["slopes"])[between] - 1) <= _NEAR))

    optimal = _optimal_slope(2.0)
    trained = [row.result["at_fake"] for row in where(rows, method="discriminator")]
    free = [*where(rows, method="penalty"), *where(rows, method="GroupSort")]
    clipped = [max(row.result["slopes"]) for row in where(rows, method="clipping 0.01")]
    findings = (
        Finding("optimal", judge([optimal < _VANISHED]), f"the gradient at the mean is {optimal:.1e}"),
        Finding(
            "trained",
            judge([value < _VANISHED for value in trained]),
            f"mean gradient norm at generated points: {spread(trained)}",
        ),
        Finding(
            "critic",
            judge([least(row) >= _LEAST and near_one(row) >= 0.9 for row in free]),
            "; ".join(
                f"{name}: least gradient norm {spread([least(row) for row in where(rows, method=name)])}, near 1 at "
                f"{spread([100 * near_one(row) for row in where(rows, method=name)])} % of the points between"
                for name in ("penalty", "GroupSort")
            ),
        ),
        Finding(
            "clipped",
            judge([value < _VANISHED for value in clipped]),
            f"largest gradient norm on the line: {spread(clipped)}",
        ),
    )
    table = Table(
        ("method", "gradient norm at generated points", "least on the line", "largest on the line"),
        tuple(
            (
                method,
                spread([row.result["at_fake"] for row in where(rows, method=method)]),
                spread([least(row) for row in where(rows, method=method)]),
                spread([max(row.result["slopes"]) for row in where(rows, method=method)]),
            )
            for method in _METHODS
        ),
    )
    return Analysis(findings, table)


def _draw(settings: Settings, rows: Sequence[Finished]) -> Figure:
    line = _line(settings["points"]).numpy()
    figure, (values, gradients) = figures.panels(1, 2, 3.4)
    dataset = data.load("two-gaussians")
    assert dataset.labels is not None
    for k, (name, colour) in enumerate((("real", "0.75"), ("generated", "0.55"))):
        points = dataset.samples[dataset.labels == k, 0].numpy()
        heights, edges = np.histogram(points, bins=40, range=(-4, 4), density=True)
        values.stairs(heights, edges, fill=True, color=colour, alpha=0.7, label=f"density of {name} points")
    transforms: dict[str, Callable[[Any], Any]] = {"discriminator": lambda s: 1 / (1 + np.exp(-np.clip(s, -60, 60)))}
    for index, (method, label) in enumerate(
        (("discriminator", "D(x), discriminator"), ("penalty", "f(x), penalty"), ("GroupSort", "f(x), GroupSort"))
    ):
        style: dict[str, Any] = {"color": figures.COLOURS[index], "linestyle": figures.DASHES[index]}
        found = where(rows, method=method)
        scores = np.asarray(found[0].result["scores"])
        if method in transforms:
            values.plot(line, transforms[method](scores), label=label, **style)
        else:
            # Only differences of a critic's scores count.
            values.plot(line, scores - np.interp(0, line, scores), label=label, **style)
        slopes = np.asarray([row.result["slopes"] for row in found]).mean(0)
        gradients.plot(line, slopes, **style)
    slopes = np.asarray([row.result["slopes"] for row in where(rows, method="clipping 0.01")]).mean(0)
    gradients.plot(line, slopes, color=figures.COLOURS[3], linestyle=figures.DASHES[3])
    values.plot([], [], color=figures.COLOURS[3], linestyle=figures.DASHES[3], label="f(x), clipping 0.01 (right only)")
    gradients.set_yscale("log")
    gradients.set_ylim(1e-10, 1e2)
    values.set_xlabel("x (units of length)")
    gradients.set_xlabel("x (units of length)")
    values.set_ylabel("D(x); f(x) - f(0); density")
    gradients.set_ylabel("gradient norm of the loss")
    values.set_title("what is learned")
    gradients.set_title("what the generator is told")
    figure.legend(*values.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


STUDY = Study(
    name="two-gaussians",
    title="Two Gaussians: a discriminator saturates where a critic has a gradient",
    claims=_CLAIMS,
    method="Real points are of a Gaussian around (-2, 0), generated ones of one around (2, 0), with standard deviation "
    "0.5 (lipgan's data set two-gaussians). Neither moves; critics of three hidden layers are trained to tell them "
    "apart and looked at along the line through both means. The gradient is that of what the generator minimizes: "
    "log(1 - D) for the discriminator, -f for critics.",
    full={"steps": 4000, "batch": 256, "width": 64, "lr": 1e-3, "points": 161, "test_samples": 1000},
    quick={"steps": 400, "batch": 128, "width": 32, "lr": 2e-3, "points": 81, "test_samples": 200},
    seeds=(5, 2),
    units=_units,
    run=_run,
    analyse=_analyse,
    draw=_draw,
    caption="Left: a discriminator and two critics between the densities of real (left) and generated (right) points, "
    "first seed. Right: the norm of the gradient that each gives the generator at x, mean over seeds, on a "
    "logarithmic scale.",
)
