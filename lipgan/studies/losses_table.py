"""The recipes on digits: quality and time per step, mean and spread over seeds."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lipgan import data, recipes
from lipgan.recipes import is_scheduled
from lipgan.studies import figures
from lipgan.studies.rows import by_seed, crossed, over, values, where
from lipgan.studies.study import Analysis, Claim, Finding, Finished, Settings, Study, Table, Unit, spread
from lipgan.studies.trainers import FAILED, LEARNED, UNLEARNED, adapted, fit, judge_learned, judged
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
# What has not converged in the time of the others is also trained for longer; costly steps first.
_LONGER = (
    *("cramer", "projection", "sngan-resnet", "sagan", "lipschitz", "wgan-gp", "wgan-lp", "unrolled", "wgan", "avb"),
    *("vae-gan", "alpha-gan", "veegan", "ali", "began", "gngan", "dragan", "mode-regularized", "ebgan"),
    *("minibatch-discrimination", "lapgan", "historical-averaging", "gan", "minimax"),
)
# Better is what is below this share of the best before.
_GAIN = 0.05

_CLAIMS = (
    Claim(
        "clipping",
        "Weight clipping is a terrible way to enforce a Lipschitz constraint.",
        "lecture 001, “Wasserstein GAN”: “Weight clipping is a clearly terrible way to enforce a Lipschitz constraint”",
        f"the FID of wgan is higher than that of wgan-gp, and than that of sngan; in every seed; {UNLEARNED}",
    ),
    Claim(
        "collapse",
        "WGAN suffers less from mode collapse.",
        "lecture 003, “WGAN advantages”: “suffer less from mode collapsing”",
        "the recall of wgan-gp is higher than that of dcgan; in every seed; where not both have an FID of at most "
        f"{LEARNED:.0f}, nothing can be told",
    ),
)


def _units(settings: Settings, seeds: Sequence[int]) -> list[dict[str, Any]]:
    longer = crossed(seeds[:1], recipe=settings["longer"]["recipes"], length=["longer"])
    return [*crossed(seeds, recipe=settings["recipes"]), *longer]


def _run(settings: Settings, unit: Unit) -> dict[str, Any]:
    recipe = adapted(unit["recipe"], {**settings, "batch": recipes.get(unit["recipe"]).batch_size})
    scheduled = is_scheduled(recipe)
    limits = settings["longer"] if "length" in unit else settings
    steps: int = settings["scheduled"] if scheduled else limits["steps"]
    found: list[dict[str, float]] = []
    spent = 0.0
    since = time.process_time()
    reason = "steps"

    def watch(trainer: Trainer) -> None:
        nonlocal spent, since, reason
        late = spent + time.process_time() - since > limits["seconds"] and not scheduled
        if trainer.step % settings["every"] and trainer.step != steps and not late:
            return
        spent += time.process_time() - since
        found.append({**judged(trainer, settings["samples"]), "step": trainer.step})
        since = time.process_time()
        stale = converged([row["fid"] for row in found], limits["patience"])
        if trainer.step < steps and not scheduled and (late or stale):
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


def converged(fids: Sequence[float], patience: int) -> bool:
    """Whether the last so many judgements of a training are no better than the best before them."""
    before, last = fids[:-patience], fids[-patience:]
    return bool(before) and min(last) > (1 - _GAIN) * min(before)


def _analyse(settings: Settings, rows: Sequence[Finished]) -> Analysis:
    equal, longer = _of_length(rows)
    seeds = by_seed(equal, "recipe")
    fids = {name: over(equal, "fid", recipe=name) for name in settings["recipes"]}
    findings = (
        Finding(
            "clipping",
            judge_learned(
                [r["wgan"]["fid"] > max(r["wgan-gp"]["fid"], r["sngan"]["fid"]) for r in seeds],
                [min(r[name]["fid"] for name in ("wgan", "wgan-gp", "sngan")) for r in seeds],
            ),
            f"FID: wgan {fids['wgan']}, wgan-gp {fids['wgan-gp']}, sngan {fids['sngan']}",
        ),
        Finding(
            "collapse",
            judge_learned(
                [r["wgan-gp"]["recall"] > r["dcgan"]["recall"] for r in seeds],
                [max(r[name]["fid"] for name in ("wgan-gp", "dcgan")) for r in seeds],
            ),
            f"recall: wgan-gp {over(equal, 'recall', recipe='wgan-gp')}, dcgan {over(equal, 'recall', recipe='dcgan')}",
        ),
    )
    table, other = (summary(settings["recipes"], part, settings["every"]) for part in (equal, longer))
    extended = tuple((f"{row[0]}, longer", *row[1:]) for row in other.rows)
    return Analysis(findings, Table(table.columns, table.rows + extended))


def tables(settings: Settings, rows: Sequence[Finished]) -> tuple[Table, Table]:
    """The `summary` of the trainings of equal length, and that of the longer ones."""
    equal, longer = _of_length(rows)
    every: int = settings["every"]
    return summary(settings["recipes"], equal, every), summary(settings["recipes"], longer, every)


def _of_length(rows: Sequence[Finished]) -> tuple[list[Finished], list[Finished]]:
    return [row for row in rows if "length" not in row.unit], where(rows, length="longer")


def summary(names: Sequence[str], rows: Sequence[Finished], every: int) -> Table:
    """A row for each of the recipes that have a finished unit: means and spreads over the seeds that it has.

    The lowest FID of a training stands beside the last, with the step after which it was found (the mean of the
    seeds'); judgements are ``every`` so many steps apart.
    """
    entries: list[tuple[str | float | int, ...]] = []
    for name in names:
        found = where(rows, recipe=name)
        if found:
            reasons = Counter(str(row.result["stopped"]) for row in found)
            fid, *numbers = (over(rows, key, recipe=name) for key in ("fid", "precision", "recall", "steps", "ms"))
            best, steps = zip(*(_best(row.result, every) for row in found), strict=True)
            stopped = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
            lowest = f"{spread(best)} ({np.mean(steps):.0f})"
            entries.append((name, fid, lowest, *numbers, stopped, len(found)))
    columns = (
        *("recipe", "FID of digits", "lowest FID (step)", "precision", "recall", "steps", "CPU ms a step"),
        *("ended by", "seeds"),
    )
    return Table(columns, tuple(entries))


def _best(result: Mapping[str, Any], every: int) -> tuple[float, int]:
    """The lowest FID of a training, and the step after which it was judged so."""
    trace: list[float] = result["trace"]
    place = trace.index(min(trace))
    return trace[place], result["steps"] if place == len(trace) - 1 else every * (place + 1)


def _draw(settings: Settings, rows: Sequence[Finished]) -> Figure:
    rows, _ = _of_length(rows)
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
    "after so many seconds of one core (time); what has a schedule runs to the end of it. Recipes whose steps cost "
    "most are also trained for longer, with one seed, until ten judgements in a row are not better. Samples are judged "
    "by FID, precision and recall in the features of lipgan's classifier of digits. Times are those of this machine.",
    full={
        "recipes": list(_RECIPES),
        "size": 8,
        "steps": 1500,
        "scheduled": 700,
        "seconds": 20,
        "patience": 3,
        "longer": {"recipes": list(_LONGER), "steps": 6000, "seconds": 600, "patience": 10},
        "every": 100,
        "faster": 1.0,
        "samples": 1500,
    },
    quick={
        "recipes": ["gan", "lsgan", "dragan", *_NEEDED],
        "steps": 60,
        "scheduled": 60,
        "seconds": 600,
        "longer": {"recipes": [], "steps": 60, "seconds": 600, "patience": 10},
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
