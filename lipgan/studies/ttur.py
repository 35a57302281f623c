"""Two time scales: a game in which they decide whether gradient descent converges, and digits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lipgan import data, models
from lipgan.studies import figures, networks
from lipgan.studies.rows import by_seed, crossed, where
from lipgan.studies.study import Analysis, Claim, Finding, Finished, Settings, Study, Table, Unit, judge, spread
from lipgan.studies.trainers import UNLEARNED, adapted, fit, judge_learned, judged

__all__ = ["STUDY"]

_SOURCE = "lecture 003, “Two-timescale update rule (TTUR)”"
# The game min_x max_y -a x^2 / 2 + x y - b y^2 / 2. Its answer y = x / b makes the value (1 / b - a) x^2 / 2, so that
# (0, 0) is the solution of the minimax game for a b < 1.
_A, _B = 2.0, 0.25
# Critic updates in a step of the usual remedy.
_K = 5

_CLAIMS = (
    Claim(
        "game",
        "Whether simultaneous gradient descent converges can depend on the two learning rates: it helps to have the "
        "generator's smaller.",
        _SOURCE + ": “this helps with convergence if you decay ε_g faster than ε_d”; Heusel et al. 2017, theorem 1",
        "in a game of two numbers with the minimax solution (0, 0), descent comes nearer to it at every ratio of "
        f"rates ε_d / ε_g above {_A / _B:g}, and goes away at every one below, as its linear theory says",
    ),
    Claim(
        "sufficient",
        "Just using two different learning rates, without decay, is sufficient: training gets better.",
        _SOURCE + ": “just using two different learning rates: sufficient”",
        "the best FID of digits with two different rates is lower than the best with equal rates, out of the same "
        f"rates; in every seed; {UNLEARNED}",
    ),
    Claim(
        "high",
        "Two rates allow a much higher learning rate.",
        _SOURCE + ": “allows a much higher learning rate for D and for G”",
        "some pair with the highest rate on one side, and a lower one on the other, has a lower FID than the highest "
        f"rate on both; in every seed; {UNLEARNED}",
    ),
    Claim(
        "steps",
        f"It saves the computation of the usual remedy, {_K} steps of the critic for each of the generator.",
        _SOURCE + ": “much computation wasted if you do multiple D and G steps”",
        f"with as many updates in all, the best FID with two rates and one step each is lower than the best with equal "
        f"rates and {_K} steps of the critic; in every seed; {UNLEARNED}",
    ),
)


def _units(settings: Settings, seeds: Sequence[int]) -> list[dict[str, Any]]:
    rates = settings["rates"]
    # The game draws nothing from its seed but the start.
    return (
        crossed(seeds, ratio=settings["ratios"])
        + crossed(seeds, generator_lr=rates, critic_lr=rates)
        + crossed(seeds, equal=rates)
    )


def _run(settings: Settings, unit: Unit) -> dict[str, Any]:
    if "ratio" in unit:
        return _play(settings, unit)
    dataset = data.load("digits", networks.SHAPE[-1])
    if "equal" in unit:
        rates = {"generator_lr": unit["equal"], "critic_lr": unit["equal"], "n_critic": _K}
    else:
        rates = {"generator_lr": unit["generator_lr"], "critic_lr": unit["critic_lr"], "n_critic": 1}
    recipe = adapted("ttur", {**settings, "faster": 1.0}, **rates)
    # As many updates of both networks together.
    steps = max(1, 2 * settings["steps"] // (recipe.n_critic + 1))
    pair = models.build("dcgan", networks.SHAPE, width=settings["width"])
    return judged(fit(recipe, dataset, unit["seed"], steps, networks=pair), settings["samples"])


def _play(settings: Settings, unit: Unit) -> dict[str, Any]:
    """Simultaneous descent; the distance from the solution at 50 moments."""
    generator_lr = settings["game_lr"]
    critic_lr = unit["ratio"] * generator_lr
    angle = unit["seed"] + 0.5
    x, y = math.cos(angle), math.sin(angle)
    curve = []
    for step in range(settings["game_steps"] + 1):
        if step % (settings["game_steps"] // 50) == 0:
            curve.append((step, math.hypot(x, y)))
        # Where descent goes away it is stopped, before numbers overflow.
        if math.hypot(x, y) > 1e6:
            break
        x, y = x - generator_lr * (y - _A * x), y + critic_lr * (x - _B * y)
    return {"curve": curve, "last": math.hypot(x, y)}


def _fids(found: Mapping[Any, Mapping[str, Any]]) -> dict[Any, float]:
    return {rates: float(result["fid"]) for rates, result in found.items()}


def _analyse(settings: Settings, rows: Sequence[Finished]) -> Analysis:
    games = [row for row in rows if "ratio" in row.unit]
    right = [(row.result["last"] < 1) == (row.unit["ratio"] > _A / _B) for row in games]
    pairs = [_fids(found) for found in by_seed(rows, "generator_lr", "critic_lr")]
    equal = [min(fid for (g, d), fid in found.items() if g == d) for found in pairs]
    different = [min(fid for (g, d), fid in found.items() if g != d) for found in pairs]
    top = max(settings["rates"])
    one_high = [min(fid for (g, d), fid in found.items() if (g == top) != (d == top)) for found in pairs]
    both_high = [found[top, top] for found in pairs]
    many = [min(_fids(found).values()) for found in by_seed(rows, "equal")]

    def lower(some: list[float], others: list[float]) -> str:
        pairs = list(zip(some, others, strict=True))
        return judge_learned([a < b for a, b in pairs], [min(pair) for pair in pairs])

    findings = (
        Finding("game", judge([all(right)]), f"{sum(right)} of {len(right)} games go as the theory says"),
        Finding(
            "sufficient",
            lower(different, equal),
            f"FID {spread(different)} with two rates, {spread(equal)} with equal ones",
        ),
        Finding(
            "high",
            lower(one_high, both_high),
            f"with {top:g} on one side FID {spread(one_high)}, on both {spread(both_high)}",
        ),
        Finding(
            "steps",
            lower(different, many),
            f"FID {spread(different)} with two rates, {spread(many)} with {_K} steps of the critic",
        ),
    )
    rates = settings["rates"]
    table = Table(
        ("FID of digits; rate of the generator", *(f"critic {d:g}" for d in rates), f"critic equal, {_K} steps"),
        tuple(
            (
                f"{g:g}",
                *(spread([found[g, d] for found in pairs]) for d in rates),
                spread([float(row.result["fid"]) for row in where(rows, equal=g)]),
            )
            for g in rates
        ),
    )
    return Analysis(findings, table)


def _draw(settings: Settings, rows: Sequence[Finished]) -> Figure:
    figure, (game, grid) = figures.panels(1, 2, 3.6)
    for index, ratio in enumerate(settings["ratios"]):
        curve = np.asarray(where(rows, ratio=ratio)[0].result["curve"])
        style: dict[str, Any] = {"color": figures.COLOURS[index], "linestyle": figures.DASHES[index % 4]}
        game.plot(curve[:, 0], curve[:, 1], label=f"ε_d / ε_g = {ratio:g}", **style)
    game.set_yscale("log")
    game.set_ylim(1e-3, 1e3)
    game.set_xlabel("step")
    game.set_ylabel("distance from the solution")
    game.set_title("a game of two numbers")
    figure.legend(*game.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    rates = settings["rates"]
    pairs = by_seed(rows, "generator_lr", "critic_lr")
    fids = np.asarray([[np.mean([found[g, d]["fid"] for found in pairs]) for d in rates] for g in rates])
    shown = np.where(np.isfinite(fids), fids, np.nan)
    grid.imshow(np.log(shown), cmap="viridis_r", origin="lower", aspect="auto")
    middle = (np.nanmin(np.log(shown)) + np.nanmax(np.log(shown))) / 2
    for i, j in np.ndindex(fids.shape):
        text = f"{fids[i, j]:.0f}" if math.isfinite(fids[i, j]) else "diverged"
        dark = math.isfinite(fids[i, j]) and math.log(fids[i, j]) > middle
        grid.text(j, i, text, ha="center", va="center", color="white" if dark else "black")
    grid.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    grid.set_yticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    grid.set_xlabel("learning rate of the critic")
    grid.set_ylabel("learning rate of the generator")
    grid.set_title("FID of digits, mean over seeds")
    grid.grid(False)
    return figure


STUDY = Study(
    name="ttur",
    title="Two time scales: learning rates of their own for generator and critic",
    claims=_CLAIMS,
    method=f"First, simultaneous gradient descent on min_x max_y -a x²/2 + x y - b y²/2 with a = {_A:g}, b = {_B:g}. "
    "Its linear theory: the step's matrix has a negative trace, and descent converges, if ε_d b > ε_g a. Then DCGANs "
    "for digits of 8 x 8 pixels with every pair of learning rates, and with equal rates and five steps of the critic. "
    "FID is in the features of lipgan's classifier of digits.",
    full={"ratios": [1, 4, 7, 9, 16, 32], "game_lr": 1e-3, "game_steps": 40000}
    | {"rates": [1e-4, 4e-4, 1.6e-3, 6.4e-3], "steps": 5000, "batch": 64, "width": 32, "samples": 1000},
    quick={"rates": [4e-4, 1.6e-3, 6.4e-3], "steps": 120, "batch": 32, "width": 16, "samples": 500},
    seeds=(3, 2),
    units=_units,
    run=_run,
    analyse=_analyse,
    draw=_draw,
    caption="Left: the distance from the solution of the game for several ratios of learning rates, first seed. Right: "
    "FID after training with each pair of learning rates, lower is better.",
)
