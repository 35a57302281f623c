"""Networks drawn at random, each trained as a GAN and as WGAN-GP (Gulrajani et al. 2017, table 2)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lipgan import data
from lipgan.studies import figures, networks
from lipgan.studies.rows import by_seed, crossed
from lipgan.studies.study import Analysis, Claim, Finding, Finished, Settings, Study, Table, Unit
from lipgan.studies.trainers import LEARNED, UNLEARNED, adapted, fit, judge_learned, judged

__all__ = ["STUDY"]

_METHODS = {"GAN": "dcgan", "WGAN-GP": "wgan-gp"}
_SOURCE = "lecture 000, “Wasserstein GAN with Gradient Penalty” (the table of architectures); Gulrajani et al. 2017"
_COLUMNS = ("only GAN", "only WGAN-GP", "both succeeded", "both failed")

_CLAIMS = (
    Claim(
        "more",
        "WGAN-GP trains many architectures that a GAN fails on, and hardly any fails the other way round.",
        _SOURCE + ", table 2",
        f"at each bound on FID of at most {LEARNED:.0f} that one of the two alone reaches on some network, WGAN-GP "
        "alone does on more than twice as many as the GAN alone, and there is such a bound; where no network comes to "
        f"{LEARNED:.0f}, nothing can be told",
    ),
    Claim(
        "sensitive",
        "A Wasserstein critic is less sensitive to the architecture.",
        "lecture 003, “Wasserstein GAN (WGAN)”: “less sensitive to model architecture/hyperparameters”",
        "the standard deviation of log FID over the networks is smaller with WGAN-GP; by the two medians, " + UNLEARNED,
    ),
)


def _architecture(settings: Settings, seed: int) -> dict[str, Any]:
    """Drawn from the seed: a value of each row of the paper's table 1, for the generator (G) and the critic (D)."""
    draw = random.Random(seed)
    sides = ("G", "D")
    chosen: dict[str, Any] = {f"nonlinearity {side}": draw.choice(list(networks.NONLINEARITIES)) for side in sides}
    chosen |= {f"depth {side}": draw.choice(settings["depths"]) for side in sides}
    chosen |= {f"norm {side}": draw.choice((True, False)) for side in sides}
    return chosen | {f"width {side}": draw.choice(settings["widths"]) for side in sides}


def _units(settings: Settings, seeds: Sequence[int]) -> list[dict[str, Any]]:
    return crossed(seeds, method=list(_METHODS))


def _run(settings: Settings, unit: Unit) -> dict[str, Any]:
    chosen = _architecture(settings, unit["seed"])
    recipe = adapted(_METHODS[unit["method"]], settings)
    norm = "layer" if recipe.penalty != "none" else "batch"
    arguments = [
        (
            chosen[f"depth {side}"],
            chosen[f"width {side}"],
            chosen[f"nonlinearity {side}"],
            kind if chosen[f"norm {side}"] else "none",
        )
        for side, kind in (("G", "batch"), ("D", norm))
    ]
    pair = networks.generator(*arguments[0]), networks.critic(*arguments[1])
    trainer = fit(recipe, data.load("digits", 8), unit["seed"], settings["steps"], networks=pair)
    return {**judged(trainer, settings["samples"]), "architecture": chosen}


def _counts(pairs: Sequence[tuple[float, float]], most: float) -> list[int]:
    """How many networks reach an FID only as GAN, only as WGAN-GP, as both, as neither."""
    reached = [(a <= most, b <= most) for a, b in pairs]
    return [reached.count(case) for case in ((True, False), (False, True), (True, True), (False, False))]


def _pairs(rows: Sequence[Finished]) -> list[tuple[float, float]]:
    return [(found["GAN"]["fid"], found["WGAN-GP"]["fid"]) for found in by_seed(rows, "method")]


def _deviation(distances: Sequence[float]) -> float:
    """Of the logarithm; infinite if one training has diverged."""
    logarithms = [math.log(distance) for distance in distances]
    if not all(map(math.isfinite, logarithms)):
        return math.inf
    return float(np.std(logarithms, ddof=1)) if len(distances) > 1 else 0.0


def _analyse(settings: Settings, rows: Sequence[Finished]) -> Analysis:
    pairs = _pairs(rows)
    counts = {most: _counts(pairs, most) for most in settings["bounds"]}
    alone = [found[:2] for most, found in counts.items() if most <= LEARNED and any(found[:2])]
    gan, penalized = ([pair[k] for pair in pairs] for k in (0, 1))
    medians = [float(np.median(found)) for found in (gan, penalized)]
    findings = (
        Finding(
            "more",
            judge_learned([bool(alone) and all(b > 2 * a for a, b in alone)], [min(*gan, *penalized)]),
            "; ".join(f"FID {most:g}: {a} only as GAN, {b} only as WGAN-GP" for most, (a, b, *_) in counts.items())
            + f"; of {len(pairs)} networks",
        ),
        Finding(
            "sensitive",
            judge_learned([_deviation(penalized) < _deviation(gan)], [min(medians)]),
            f"standard deviation of log FID: {_deviation(gan):.3g} as GAN, {_deviation(penalized):.3g} as WGAN-GP; "
            f"median FID {medians[0]:.4g} and {medians[1]:.4g}",
        ),
    )
    return Analysis(findings, Table(("FID of at most", *_COLUMNS), tuple((k, *found) for k, found in counts.items())))


def _draw(settings: Settings, rows: Sequence[Finished]) -> Figure:
    figure, (left, right) = figures.panels(1, 2, 3.3)
    pairs = np.asarray(_pairs(rows))
    finite = pairs[np.isfinite(pairs).all(1)]
    low, high = (0.8 * finite.min(), 1.25 * finite.max()) if len(finite) else (1.0, 1000.0)
    left.plot([low, high], [low, high], color="0.5", linewidth=1)
    left.plot(finite[:, 0], finite[:, 1], "o", color=figures.COLOURS[0], alpha=0.7)
    left.set_xscale("log")
    left.set_yscale("log")
    figures.plain_ticks(left.xaxis)
    figures.plain_ticks(left.yaxis)
    left.set_aspect("equal")
    left.set_xlim(low, high)
    left.set_ylim(low, high)
    left.set_xlabel("FID of digits, as GAN")
    left.set_ylabel("FID of digits, as WGAN-GP")
    left.set_title("a point for each network")
    bounds = settings["bounds"]
    counts = np.asarray([_counts(_pairs(rows), most) for most in bounds])
    base = np.zeros(len(bounds))
    for index, name in enumerate(_COLUMNS):
        colour = "0.85" if name == "both failed" else figures.COLOURS[index]
        hatch = ("//", "\\\\", "", "..")[index]
        right.bar(
            range(len(bounds)), counts[:, index], bottom=base, color=colour, hatch=hatch, edgecolor="white", label=name
        )
        base += counts[:, index]
    right.set_xticks(range(len(bounds)), [f"{most:g}" for most in bounds])
    right.set_xlabel("FID of at most")
    right.set_ylabel("networks")
    right.set_title("which of the two succeed")
    right.grid(False)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


STUDY = Study(
    name="random-architectures",
    title="Random architectures: which of them train as a GAN, and which as WGAN-GP",
    claims=_CLAIMS,
    method="A seed draws a pair of convolutional networks for digits of 8 x 8 pixels: the nonlinearities, depths and "
    "widths of both, and whether they are normalized (by batch norm; the critic of WGAN-GP by layer norm). Each pair "
    "is trained from scratch by the recipes dcgan and wgan-gp. Success is an FID, in the features of lipgan's "
    "classifier of digits, of at most a bound, in place of an Inception Score of at least one: the classifier is sure "
    "of noise, too, so that even the first samples of a network score 3 to 5.",
    full={"depths": [4, 8, 12, 20], "widths": [16, 32, 64], "steps": 5000, "batch": 64, "faster": 1.0}
    | {"samples": 1000, "bounds": [800, 400, 200, 100, 50]},
    quick={"depths": [2, 3, 4], "widths": [8, 16], "steps": 80, "batch": 32, "faster": 5.0, "samples": 500},
    seeds=(200, 12),
    units=_units,
    run=_run,
    analyse=_analyse,
    draw=_draw,
    caption="Left: the FID that each network reaches with the one method and with the other; below the diagonal "
    "WGAN-GP is better. Right: on how many networks one, both or none of the two reach an FID.",
)
