"""Estimates of Wasserstein distance and Jensen-Shannon divergence along a training, beside the quality of samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import nn

from lipgan import data, models
from lipgan.studies import figures, networks
from lipgan.studies.rows import crossed, where
from lipgan.studies.study import Analysis, Claim, Finding, Finished, Settings, Study, Table, Unit, judge, spread
from lipgan.studies.trainers import adapted, fit, quality
from lipgan.training.trainer import Trainer

__all__ = ["STUDY"]

# The recipe, and by what its estimate has to be multiplied: 2 JS for a discriminator.
_METHODS = {"WGAN-GP": ("wgan-gp", 1.0), "WGAN": ("wgan", 1.0), "GAN": ("gan", 0.5)}
_NAMES = {"WGAN-GP": "W, WGAN-GP", "WGAN": "W times unknown K, WGAN", "GAN": "JS, GAN"}
_HIGH, _POOR, _NEAR = 0.8, 0.5, 0.2

_CLAIMS = (
    Claim(
        "wasserstein",
        "The estimate of the Wasserstein distance is highly correlated with the quality of samples.",
        "lecture 001, “Wasserstein GAN”: “W(π||p) is highly correlated with the sample quality”; Arjovsky et al. 2017, "
        "figure 3",
        f"for WGAN and for WGAN-GP, Spearman's rank correlation of estimate and FID over the evaluations is at least "
        f"{_HIGH}; in every seed",
    ),
    Claim(
        "jensen-shannon",
        "The Jensen-Shannon divergence correlates poorly with the quality of samples.",
        "lecture 001, “Wasserstein GAN”: “JSD(π||p) correlates poorly with the sample quality”; Arjovsky et al. 2017, "
        "figure 4",
        f"the same correlation of the discriminator's estimate is below {_POOR}; in every seed",
    ),
    Claim(
        "constant",
        "The estimate of the Jensen-Shannon divergence stays constant nearly at its maximum, log 2.",
        "lecture 001, “Wasserstein GAN”: “Stays constant nearly maximum value log 2 ≈ 0.69”",
        f"at every evaluation from the first quarter on it is within {100 * _NEAR:g} % of log 2; in every seed",
    ),
)


def _units(settings: Settings, seeds: Sequence[int]) -> list[dict[str, Any]]:
    return crossed(seeds, method=list(_METHODS))


def _run(settings: Settings, unit: Unit) -> dict[str, Any]:
    """At evenly spaced steps: the mean estimate since the last one, and the FID."""
    name, factor = _METHODS[unit["method"]]
    steps = [round(settings["steps"] * k / settings["points"]) for k in range(1, settings["points"] + 1)]
    shown = {steps[round(share * (len(steps) - 1))] for share in (0, 1 / 3, 2 / 3, 1)}
    points: list[dict[str, Any]] = []
    frames: list[Any] = []

    def watch(trainer: Trainer) -> None:
        since = points[-1]["step"] if points else 0
        estimates = [row["estimate"] for row in trainer.history if row["step"] > since]
        samples = trainer.sample(settings["samples"])
        points.append(
            {"step": trainer.step, "fid": quality(samples)["fid"], "estimate": factor * float(np.mean(estimates))}
        )
        if trainer.step in shown:
            frames.append(((samples[:4, 0].clamp(-1, 1) + 1) * 127.5).round().int().tolist())

    pair = models.build("dcgan", networks.SHAPE, width=settings["width"])
    # In the paper's figures the generator is a perceptron; the critic has no batch norm, as the recipes have it.
    generator = models.MLPGenerator(networks.SHAPE, width=settings["mlp_width"])
    networks.replaced(pair[1], nn.BatchNorm2d, lambda layer: nn.Identity())
    dataset = data.load("digits", networks.SHAPE[-1])
    fit(
        adapted(name, settings),
        dataset,
        unit["seed"],
        settings["steps"],
        networks=(generator, pair[1]),
        at=steps,
        watch=watch,
        log_every=math.gcd(*steps),
    )
    return {"points": points, "frames": frames}


def _series(row: Finished, key: str) -> list[float]:
    return [float(point[key]) for point in row.result["points"]]


def _correlation(row: Finished) -> float:
    """Spearman's; 0 where a side does not change."""
    sides = [_series(row, key) for key in ("estimate", "fid")]
    return float(spearmanr(*sides).statistic) if all(len(set(side)) > 1 for side in sides) else 0.0


def _steady(row: Finished) -> float:
    """The largest relative distance from log 2, from the first quarter on."""
    estimates = _series(row, "estimate")
    return max(abs(value / math.log(2) - 1) for value in estimates[len(estimates) // 4 :])


def _falls(row: Finished) -> float:
    """The share of evaluations at which the FID is lower than at the one before."""
    changes = [b < a for a, b in pairwise(_series(row, "fid"))]
    return sum(changes) / max(1, len(changes))


def _analyse(settings: Settings, rows: Sequence[Finished]) -> Analysis:
    found = {method: [_correlation(row) for row in where(rows, method=method)] for method in _METHODS}
    off = [_steady(row) for row in where(rows, method="GAN")]
    findings = (
        Finding(
            "wasserstein",
            judge([min(pair) >= _HIGH for pair in zip(found["WGAN"], found["WGAN-GP"], strict=True)]),
            f"rank correlation {spread(found['WGAN'])} for WGAN, {spread(found['WGAN-GP'])} for WGAN-GP",
        ),
        Finding("jensen-shannon", judge([r < _POOR for r in found["GAN"]]), f"rank correlation {spread(found['GAN'])}"),
        Finding("constant", judge([x <= _NEAR for x in off]), f"off log 2 by up to {spread([100 * x for x in off])} %"),
    )
    table = Table(
        ("method", "rank correlation", "last estimate", "last FID", "share of evaluations at which FID falls"),
        tuple(
            (
                _NAMES[method],
                spread(found[method]),
                *(spread([_series(row, key)[-1] for row in where(rows, method=method)]) for key in ("estimate", "fid")),
                spread([_falls(row) for row in where(rows, method=method)]),
            )
            for method in _METHODS
        ),
    )
    return Analysis(findings, table)


def _draw(settings: Settings, rows: Sequence[Finished]) -> Figure:
    figure, axes = figures.panels(2, 3, 4.9, height_ratios=(3, 2))
    for axis, under, method in zip(axes, axes[3:], _METHODS, strict=False):
        found = where(rows, method=method)
        for number, row in enumerate(found):
            steps = _series(row, "step")
            axis.plot(steps, _series(row, "estimate"), color=figures.COLOURS[0], label=None if number else "estimate")
        second = axis.twinx()
        second.spines["right"].set_visible(True)
        for number, row in enumerate(found):
            second.plot(
                _series(row, "step"),
                _series(row, "fid"),
                color=figures.COLOURS[1],
                linestyle=figures.DASHES[1],
                label=None if number else "FID",
            )
        second.set_yscale("log")
        figures.plain_ticks(second.yaxis)
        second.grid(False)
        if method == "GAN":
            axis.axhline(math.log(2), color="black", linewidth=0.8)
            axis.annotate("log 2", (0.02, math.log(2)), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
            axis.set_ylim(-0.1, 0.8)
            second.set_ylabel("FID of digits")
        axis.set_title(_NAMES[method])
        axis.set_xlabel("step (generator updates)")
        if method == "WGAN-GP":
            axis.set_ylabel("estimate of the critic")
            handles = [*axis.get_legend_handles_labels()[0], *second.get_legend_handles_labels()[0]]
        frames = np.asarray(found[0].result["frames"])
        tiles = np.pad(frames, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=96)
        rows_of_moments = [np.concatenate(list(tile), 1) for tile in tiles]
        under.imshow(np.concatenate(rows_of_moments), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        under.set_xticks([])
        under.set_yticks([4, 31], ["first", "last"] if method == "WGAN-GP" else ["", ""])
        under.grid(False)
        under.set_xlabel("samples at four moments")
    figure.legend(handles, ["estimate", "FID"], loc="outside lower center", ncols=2)
    return figure


STUDY = Study(
    name="critic-tracks-quality",
    title="What critics estimate along a training, and how good the samples are",
    claims=_CLAIMS,
    method="A perceptron learns digits of 8 x 8 pixels against a convolutional critic without batch norm, by the "
    "recipes wgan-gp, wgan and gan. At evenly spaced steps, the mean of the critic's estimate since the last one "
    "stands beside the FID of samples, in the features of lipgan's classifier of digits. The discriminator's estimate "
    "is of the Jensen-Shannon divergence: log 2 minus half of its loss.",
    full={"steps": 10000, "points": 40, "batch": 64, "faster": 1.0, "width": 32, "mlp_width": 512, "samples": 1000},
    quick={"steps": 160, "points": 16, "batch": 32, "faster": 5.0, "width": 16, "mlp_width": 64, "samples": 300},
    seeds=(3, 2),
    units=_units,
    run=_run,
    analyse=_analyse,
    draw=_draw,
    caption="Above: the estimate of the critic (left scale) and the FID (right scale, logarithmic) along trainings by "
    "three recipes, a line for each seed. Below: four samples each at four moments, first seed.",
)
