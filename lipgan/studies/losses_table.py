"""The recipes on digits: quality and time per step, mean and spread over seeds."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lipgan import data, recipes
from lipgan.recipes import is_scheduled
from lipgan.studies import figures
from lipgan.studies.rows import by_seed, crossed, over, values, where
from lipgan.studies.study import Analysis, Claim, Finding, Finished, Settings, Study, Table, Unit, judge
from lipgan.studies.trainers import FAILED, adapted, fit, judged
from lipgan.training.trainer import Trainer

__all__ = ["STUDY"]

_NEEDED = ("dcgan", "wgan", "wgan-gp", "sngan")
# In the order of docs/recipes.md, without what does not draw digits from noise.
_RECIPES = (
    *("gan", "minimax", "lsgan", "rgan", "f-gan-kl", "f-gan-reverse-kl", "f-gan-pearson", "f-gan-hellinger"),
    *("f-gan-jensen-shannon", "f-gan-gan", "kl-wgan", "wgan", "wgan-gp", "wgan-lp", "dragan", "sngan", "gngan"),
    *("lipschitz", "dcgan", "sngan-resnet", "sagan", "r3gan", "cgan", "acgan", "projection", "ttur"),
    *("label-smoothing", "feature-matching", "historical-averaging", "minibatch-discrimination"),
    *("virtual-batch-norm", "instance-noise", "unrolled", "mad-gan", "mode-regularized", "adaptive-divergence"),
    *("cramer", "ebgan", "began", "infogan", "vae-gan", "aae", "ali", "veegan", "progressive", "lapgan"),
    *("avb", "alpha-gan"),
)
# A training has converged when this many judgements in a row are not better than the best before them by this share.
_PATIENCE, _GAIN = 3, 0.05

_CLAIMS = (
    Claim(
        "clipping",
        "Weight clipping is a terrible way to enforce a Lipschitz constraint.",
        "lecture 001, “Wasserstein GAN”: “Weight clipping is a clearly terrible way to enforce a Lipschitz constraint”",
        "the FID of wgan is higher than that of wgan-gp, and than that of sngan; in every seed",
    ),
    Claim(
        "collapse",
        "WGAN suffers less from mode collapse.",
        "lecture 003, “WGAN advantages”: “suffer less from mode collapsing”",
        "the recall of wgan-gp is higher than that of dcgan; in every seed",
    ),
)


def _units(settings: Settings, seeds: Sequence[int]) -> list[dict[str, Any]]:
    return crossed(seeds, recipe=settings["recipes"])


def _run(settings: Settings, unit: Unit) -> dict[str, Any]:
    recipe = adapted(unit["recipe"], {**settings, "batch": recipes.get(unit["recipe"]).batch_size})
    scheduled = is_scheduled(recipe)
    steps: int = settings["scheduled"] if scheduled else settings["steps"]
    found: list[dict[str, float]] = []
    spent = 0.0
    since = time.process_time()
    reason = "steps"

    def watch(trainer: Trainer) -> None:
        nonlocal spent, since, reason
        late = spent + time.process_time() - since > settings["seconds"] and not scheduled
        if trainer.step % settings["every"] and trainer.step != steps and not late:
            return
        spent += time.process_time() - since
        found.append({**judged(trainer, settings["samples"]), "step": trainer.step})
        since = time.process_time()
        if trainer.step < steps and not scheduled and (late or converged([row["fid"] for row in found])):
            reason = "time" if late else "no gain"
            trainer.stop()

    dataset = data.load("digits", settings["size"])
    trainer = fit(replace(recipe, steps=steps), dataset, unit["seed"], steps, at=range(1, steps + 1), watch=watch)
    if trainer is None:
        found.append({**FAILED, "step": found[-1]["step"] if found else 0})
        reason = "diverged"
    last = found[-1]
    taken = int(last.pop("step"))
    trace = [row["fid"] for row in found]
    # A training that diverges before it is first judged has no time per step.
    return {**last, "ms": 1e3 * spent / max(taken, 1), "steps": taken, "stopped": reason, "trace": trace}


def converged(fids: Sequence[float]) -> bool:
    """Whether the last judgements of a training are no better than the best before them."""
    before, last = fids[:-_PATIENCE], fids[-_PATIENCE:]
    return bool(before) and min(last) > (1 - _GAIN) * min(before)


def _analyse(settings: Settings, rows: Sequence[Finished]) -> Analysis:
    seeds = by_seed(rows, "recipe")
    fids = {name: over(rows, "fid", recipe=name) for name in settings["recipes"]}
    findings = (
        Finding(
            "clipping",
            judge([r["wgan"]["fid"] > max(r["wgan-gp"]["fid"], r["sngan"]["fid"]) for r in seeds]),
            f"FID: wgan {fids['wgan']}, wgan-gp {fids['wgan-gp']}, sngan {fids['sngan']}",
        ),
        Finding(
            "collapse",
            judge([r["wgan-gp"]["recall"] > r["dcgan"]["recall"] for r in seeds]),
            f"recall: wgan-gp {over(rows, 'recall', recipe='wgan-gp')}, dcgan {over(rows, 'recall', recipe='dcgan')}",
        ),
    )
    return Analysis(findings, summary(settings["recipes"], rows))


def summary(names: Sequence[str], rows: Sequence[Finished]) -> Table:
    """A row for each of the recipes that have a finished unit: means and spreads over the seeds that it has."""
    entries: list[tuple[str | float | int, ...]] = []
    for name in names:
        found = where(rows, recipe=name)
        if found:
            reasons = Counter(str(row.result["stopped"]) for row in found)
            numbers = [over(rows, key, recipe=name) for key in ("fid", "precision", "recall", "steps", "ms")]
            stopped = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
            entries.append((name, *numbers, stopped, len(found)))
    columns = ("recipe", "FID of digits", "precision", "recall", "steps", "CPU ms a step", "ended by", "seeds")
    return Table(columns, tuple(entries))


def _draw(settings: Settings, rows: Sequence[Finished]) -> Figure:
    names = sorted(settings["recipes"], key=lambda name: float(np.mean(values(where(rows, recipe=name), "fid"))))
    figure, (left, right) = figures.panels(1, 2, 1.2 + 0.17 * len(names), sharey=True, width_ratios=(3, 2))
    for i, name in enumerate(names):
        found = where(rows, recipe=name)
        fids = [fid for fid in values(found, "fid") if math.isfinite(fid)]
        left.plot(fids, [i] * len(fids), "o", color=figures.COLOURS[0], alpha=0.8)
        if not fids:
            left.annotate("diverged", (0.02, i), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        for index, key in enumerate(("precision", "recall"), 1):
            mean = np.mean(values(found, key))
            label = key if i == 0 else None
            right.plot(mean, i, figures.MARKERS[index], color=figures.COLOURS[index], label=label, clip_on=False)
    left.set_xscale("log")
    figures.plain_ticks(left.xaxis)
    left.set_yticks(range(len(names)), names)
    left.set_ylim(len(names) - 0.5, -0.5)
    left.set_xlabel("FID of digits, each seed (lower is better)")
    right.set_xlim(0, 1)
    right.set_xlabel("share, mean over seeds")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


STUDY = Study(
    name="losses-table",
    title="All recipes on digits: quality, and time per step",
    claims=_CLAIMS,
    method="Each recipe with its own networks and constants learns digits of 8 x 8 pixels. A training ends when three "
    "judgements in a row are not better than 0.95 times the lowest FID before them (no gain), after so many steps, or "
    "after so many seconds of one core (time); what has a schedule runs to the end of it. Samples are judged by FID, "
    "precision and recall in the features of lipgan's classifier of digits. Times are those of this machine.",
    full={
        "recipes": list(_RECIPES),
        "size": 8,
        "steps": 1500,
        "scheduled": 700,
        "seconds": 20,
        "every": 100,
        "faster": 1.0,
        "samples": 1500,
    },
    quick={
        "recipes": ["gan", "lsgan", "dragan", *_NEEDED],
        "steps": 60,
        "scheduled": 60,
        "seconds": 600,
        "faster": 3.0,
        "samples": 500,
    },
    seeds=(3, 2),
    units=_units,
    run=_run,
    analyse=_analyse,
    draw=_draw,
    caption="Left: the FID of each seed, recipes in the order of its mean. Right: precision and recall, mean over "
    "seeds.",
)
