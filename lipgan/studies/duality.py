"""Which critics bound the Wasserstein distance of two samples, and how tightly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lipgan import data
from lipgan.lipschitz.bounds import bounds
from lipgan.metrics.wasserstein import wasserstein_distance
from lipgan.studies import critics, figures
from lipgan.studies.rows import crossed, where
from lipgan.studies.study import Analysis, Claim, Finding, Finished, Settings, Study, Table, Unit, judge, spread

__all__ = ["STUDY"]

_METHODS = ("clipping 0.01", "clipping 0.1", "penalty", "spectral norm", "GroupSort")
_SOURCE = "lecture 001, “Kantorovich-Rubinstein duality”, “Wasserstein GAN”"
# Scores are float32, and means of some hundred of them.
_ROUNDING = 1e-5
_TIGHT = 0.9

_CLAIMS = (
    Claim(
        "bound",
        "K W is the largest difference of mean scores that a K-Lipschitz function can have: with a certified K, the "
        "estimate of any critic over K is at most the exact distance.",
        _SOURCE,
        f"estimate / K is at most W (1 + {_ROUNDING:g}) for every critic, with W by an assignment and K by "
        "lipgan.lipschitz.bounds; in every seed",
    ),
    Claim(
        "tight",
        "The bound is reached: a critic of orthogonal layers and GroupSort, which is 1-Lipschitz and keeps the norms "
        "of gradients, finds the distance.",
        "lecture 001, “Kantorovich-Rubinstein duality”; Anil et al. 2019",
        f"its estimate over its certified K is at least {_TIGHT} W; in every seed",
    ),
    Claim(
        "spectral",
        "Spectral normalization gives a 1-Lipschitz critic, and so a lower bound.",
        "lecture 000, “Spectral Normalization GAN”: “we will get ‖f‖_L ≤ 1”",
        "its certified K, after training with one power iteration a step, is at most 1.05, and its estimate at most "
        "1.05 W; in every seed",
    ),
    Claim(
        "penalty",
        "A gradient penalty only encourages slopes of 1 on lines between samples: the critic is not 1-Lipschitz.",
        "lecture 000, “Gradient penalty”: “sufficient to enforce it only along these straight lines”",
        "the steepest slope that is found exceeds 1.01; in every seed",
    ),
    Claim(
        "clipping",
        "Clipped weights give a K-Lipschitz critic with unknown K: its estimate is not the distance.",
        "lecture 001, “Wasserstein GAN”; lecture 004, “Kantorovich-Rubinstein duality only mimicked”",
        "for each clip value, the estimate differs from W by more than 10 %; in every seed",
    ),
)


def _units(settings: Settings, seeds: Sequence[int]) -> list[dict[str, Any]]:
    return crossed(seeds, method=list(_METHODS))


def _samples(settings: Settings, seed: int) -> tuple[Tensor, Tensor]:
    """Points of the ring, and of a Gaussian in its middle."""
    generator = torch.Generator().manual_seed(seed)
    ring = data.load("ring").samples
    real = ring[torch.randperm(len(ring), generator=generator)[: settings["samples"]]]
    return real, torch.randn(settings["samples"], 2, generator=generator)


def _run(settings: Settings, unit: Unit) -> dict[str, Any]:
    real, fake = _samples(settings, unit["seed"])
    constraint = critics.CONSTRAINTS[unit["method"]]
    critic = critics.build(constraint, 2, settings["width"])
    curve: list[tuple[int, float]] = []

    def estimate() -> float:
        with torch.no_grad():
            return float(critic(real).double().mean() - critic(fake).double().mean())

    def watch(step: int) -> None:
        if step % settings["every"] == 0:
            critic.eval()
            curve.append((step, estimate()))
            critic.train()

    generator = torch.Generator().manual_seed(unit["seed"])
    critics.train(
        critic,
        lambda: (real, fake),
        "wasserstein",
        constraint,
        steps=settings["steps"],
        lr=settings["lr"],
        generator=generator,
        watch=watch,
    )
    found = bounds(critic, torch.cat([real, fake]))
    return {
        "exact": wasserstein_distance(real, fake),
        "estimate": estimate(),
        "upper": found.upper,
        "lower": found.lower,
        "curve": curve,
    }


def _ratio(row: Finished) -> float:
    """The estimate over the exact distance."""
    return float(row.result["estimate"] / row.result["exact"])


def _certified(row: Finished) -> float:
    """What the critic proves of the distance, over the distance."""
    return float(row.result["estimate"] / (row.result["upper"] * row.result["exact"])) if row.result["upper"] else 0.0


def _analyse(settings: Settings, rows: Sequence[Finished]) -> Analysis:
    sort, spectral, penalty = (where(rows, method=name) for name in ("GroupSort", "spectral norm", "penalty"))
    clipped = [row for row in rows if row.unit["method"].startswith("clipping")]
    # A theorem: one critic beyond it would be a fault of the certificate.
    beyond = max(map(_certified, rows))
    findings = (
        Finding(
            "bound",
            judge([beyond <= 1 + _ROUNDING]),
            f"the largest estimate / K over all {len(rows)} critics is {beyond:.4f} W",
        ),
        Finding(
            "tight",
            judge([_certified(row) >= _TIGHT for row in sort]),
            f"estimate / K is {spread([_certified(row) for row in sort])} W",
        ),
        Finding(
            "spectral",
            judge([row.result["upper"] <= 1.05 and _ratio(row) <= 1.05 for row in spectral]),
            f"K is at most {spread([row.result['upper'] for row in spectral])}, the estimate "
            f"{spread([_ratio(row) for row in spectral])} W",
        ),
        Finding(
            "penalty",
            judge([row.result["lower"] > 1.01 for row in penalty]),
            f"steepest slope found {spread([row.result['lower'] for row in penalty])}, estimate "
            f"{spread([_ratio(row) for row in penalty])} W",
        ),
        Finding(
            "clipping",
            judge([abs(_ratio(row) - 1) > 0.1 for row in clipped]),
            "; ".join(
                f"{name}: estimate {spread([_ratio(row) for row in where(rows, method=name)])} W"
                for name in _METHODS[:2]
            ),
        ),
    )
    table = Table(
        ("critic", "exact W", "estimate", "estimate / W", "certified K", "steepest slope found", "estimate / (K W)"),
        tuple(
            (
                method,
                spread([row.result["exact"] for row in group]),
                spread([row.result["estimate"] for row in group]),
                spread([_ratio(row) for row in group]),
                spread([row.result["upper"] for row in group]),
                spread([row.result["lower"] for row in group]),
                spread([_certified(row) for row in group]),
            )
            for method in _METHODS
            if (group := where(rows, method=method))
        ),
    )
    return Analysis(findings, table)


def _draw(settings: Settings, rows: Sequence[Finished]) -> Figure:
    figure, (curves, final) = figures.panels(1, 2, 3.2, width_ratios=(3, 2))
    for index, method in enumerate(_METHODS):
        group = where(rows, method=method)
        steps = [step for step, _ in group[0].result["curve"]]
        values = torch.tensor([[value / row.result["exact"] for _, value in row.result["curve"]] for row in group])
        style: dict[str, Any] = {"color": figures.COLOURS[index], "linestyle": figures.DASHES[index % 4]}
        curves.plot(steps, values.mean(0), label=method, **style)
        certified = [_certified(row) for row in group]
        final.plot(certified, [index] * len(group), figures.MARKERS[index], color=figures.COLOURS[index])
    for axes, line in ((curves, curves.axhline), (final, final.axvline)):
        line(1.0, color="black", linewidth=0.8)
        axes.set_axisbelow(True)
    top = max(1.0, *(value / row.result["exact"] for row in rows for _, value in row.result["curve"]))
    curves.set_ylim(-0.05, min(1.1 * top, 5.0))
    curves.set_xlabel("step of the critic")
    curves.set_ylabel("estimate / exact W")
    curves.set_title("what the critic says")
    final.set_yticks(range(len(_METHODS)), _METHODS)
    final.set_ylim(len(_METHODS) - 0.5, -0.5)
    final.set_xscale("log")
    final.set_xlim(5e-3, 2)
    final.set_xlabel("estimate / (K W), K certified")
    final.set_title("what it proves")
    figure.legend(*curves.get_legend_handles_labels(), loc="outside lower center", ncols=5, columnspacing=1.2)
    return figure


STUDY = Study(
    name="duality",
    title="Duality: which critics bound the Wasserstein distance",
    claims=_CLAIMS,
    method="Real points are of a ring of eight Gaussians, generated ones of a standard Gaussian in its middle; the "
    "samples stay the same, so that their exact distance is that of an assignment. A critic of each kind is trained on "
    "all of them. Its estimate is the difference of its mean scores; K is a certified upper bound on its Lipschitz "
    "constant, and the steepest slope found a lower one.",
    full={"samples": 500, "steps": 4000, "every": 100, "width": 64, "lr": 2e-3},
    quick={"samples": 200, "steps": 400, "every": 20, "width": 32},
    seeds=(5, 2),
    units=_units,
    run=_run,
    analyse=_analyse,
    draw=_draw,
    caption="Left: the estimates of five critics over the exact Wasserstein distance during training, mean over seeds; "
    "what lies above 1 is no lower bound. Right: what each critic proves at the end, its estimate over its certified "
    "Lipschitz constant and the exact distance, for each seed; 1 is the distance itself.",
)
