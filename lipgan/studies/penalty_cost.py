"""Time and memory of a critic's step with a gradient penalty, by the way its derivatives are computed."""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from lipgan.penalties.gradient_penalty import gradient_penalty
from lipgan.studies import figures, networks
from lipgan.studies.rows import crossed, values, where
from lipgan.studies.study import Analysis, Claim, Finding, Finished, Settings, Study, Table, Unit, judge, spread

__all__ = ["STUDY"]

_METHODS = ("double backward", "tape", "plan")
_SOURCE = "lecture 000, “Wasserstein GAN with Gradient Penalty”, algorithm 1"
# Rounding of float32 through some ten layers, and a sum over a batch.
_ROUNDING = 1e-3
# Calls after which a plan has been recorded.
_WARM = 4

_CLAIMS = (
    Claim(
        "same",
        "The gradient of the penalty in the weights, a derivative of a derivative, can be had without differentiating "
        "a backward pass: a recorded forward pass and its derivative along one direction give the same.",
        _SOURCE + " (line 7); Pearlmutter 1994",
        f"penalty and gradients by tape and by plan differ from those of the double backward by at most "
        f"{_ROUNDING:g} of their norm, for each depth and batch; in every seed",
    ),
    Claim(
        "time",
        "That takes less time.",
        _SOURCE + " (lines 2 to 10: the critic's step is most of the work)",
        "the median over rounds of the plan's time over that of the double backward, one after the other in each "
        "round, is below 1, for each depth and batch; in every seed",
    ),
    Claim(
        "memory",
        "And no more memory.",
        _SOURCE,
        "the peak of resident memory above what was there before a step is by plan at most 1.1 times that by double "
        "backward, at the largest depth and batch; in every seed, where it can be told",
    ),
)


def _units(settings: Settings, seeds: Sequence[int]) -> list[dict[str, Any]]:
    return crossed(seeds, depth=settings["depths"], batch=settings["batches"])


def _step(method: str, critic: nn.Module, real: Tensor, fake: Tensor) -> Callable[[], tuple[float, Tensor]]:
    """A function that computes the penalty and its gradients: the value, and the gradients in one row."""
    # A function, in place of the module, has no plan.
    judged = critic.forward if method == "tape" else critic
    engine = "autograd" if method == "double backward" else "fused"

    def run() -> tuple[float, Tensor]:
        critic.zero_grad()
        random = torch.Generator().manual_seed(0)
        penalty = gradient_penalty(judged, real, fake, engine=engine, generator=random)
        penalty.backward()  # type: ignore[no-untyped-call]
        found = [p.grad.flatten() for p in critic.parameters() if p.grad is not None and p.ndim > 1]
        return float(penalty.detach()), torch.cat(found)

    return run


def _run(settings: Settings, unit: Unit) -> dict[str, Any]:
    critic = networks.critic(unit["depth"], settings["width"])
    real, fake = torch.randn(2, unit["batch"], *networks.SHAPE).unbind()
    steps = {method: _step(method, critic, real, fake) for method in _METHODS}
    value, expected = steps["double backward"]()
    results: dict[str, Any] = {"error": 0.0}
    for run in steps.values():
        for _ in range(_WARM):
            penalty, gradients = run()
        off = float((gradients - expected).norm() / expected.norm())
        results["error"] = max(results["error"], off, abs(penalty / value - 1))
    seconds: dict[str, list[float]] = {method: [] for method in _METHODS}
    for _ in range(settings["rounds"]):
        # Interleaved: what else the machine does slows all of them.
        for method, run in steps.items():
            # CPU time of this process: a wait for the core does not count.
            start = time.process_time()
            run()
            seconds[method].append(time.process_time() - start)
    for method, run in steps.items():
        ratios = [a / b for a, b in zip(seconds[method], seconds["double backward"], strict=True)]
        results |= {f"{method} ms": 1e3 * min(seconds[method]), f"{method} ratio": statistics.median(ratios)}
        results[f"{method} MB"] = _peak(run) / 1e6
    return results


def _peak(run: Callable[[], object]) -> float:
    """Bytes by which the resident memory rises in a call; NaN where Linux does not tell."""
    status = Path("/proc/self/status")
    try:
        # Memory that was freed before would hide what the call takes.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _kilobytes(status, "VmRSS")
        run()
        return 1024.0 * max(0, _kilobytes(status, "VmHWM") - before)
    except (OSError, AttributeError, StopIteration):
        return math.nan


def _kilobytes(status: Path, name: str) -> int:
    return int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith(name)))


def _analyse(settings: Settings, rows: Sequence[Finished]) -> Analysis:
    largest = where(rows, depth=max(settings["depths"]), batch=max(settings["batches"]))
    memory = [(row.result["plan MB"], row.result["double backward MB"]) for row in largest]
    told = all(math.isfinite(plan) and double > 0 for plan, double in memory)
    ratios = values(rows, "plan ratio")
    findings = (
        Finding(
            "same",
            judge([row.result["error"] <= _ROUNDING for row in rows]),
            f"the largest difference is {max(values(rows, 'error')):.1e}",
        ),
        Finding(
            "time",
            judge([ratio < 1 for ratio in ratios]),
            f"time by plan over that by double backward: {min(ratios):.3g} to {max(ratios):.3g}, by tape "
            f"{min(values(rows, 'tape ratio')):.3g} to {max(values(rows, 'tape ratio')):.3g}",
        ),
        Finding(
            "memory",
            judge([plan <= 1.1 * double for plan, double in memory] if told else []),
            f"at the largest depth and batch: {spread([plan for plan, _ in memory])} MB by plan, "
            f"{spread([double for _, double in memory])} MB by double backward",
        ),
    )
    columns = [f"{method} {unit}" for unit in ("ms", "ratio", "MB") for method in _METHODS]
    columns.remove("double backward ratio")
    table = Table(
        ("depth", "batch", *columns),
        tuple(
            (depth, batch, *(spread(values(where(rows, depth=depth, batch=batch), key)) for key in columns))
            for depth in settings["depths"]
            for batch in settings["batches"]
        ),
    )
    return Analysis(findings, table)


def _draw(settings: Settings, rows: Sequence[Finished]) -> Figure:
    figure, axes = figures.panels(1, 2, 3.1)
    batch = max(settings["batches"])
    for axis, key, names in ((axes[0], "ratio", _METHODS[1:]), (axes[1], "MB", _METHODS)):
        for name in names:
            index = _METHODS.index(name)
            table = [values(where(rows, depth=depth, batch=batch), f"{name} {key}") for depth in settings["depths"]]
            figures.error_bars(axis, settings["depths"], np.asarray(table), index, name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(settings["depths"], [str(depth) for depth in settings["depths"]])
        axis.minorticks_off()
        axis.set_xlabel("convolutions of the critic")
        axis.set_ylim(0, None)
    axes[0].axhline(1, color=figures.COLOURS[0], linewidth=1)
    axes[0].set_ylim(0, max(1.1, axes[0].get_ylim()[1]))
    axes[0].set_ylabel("time / time by double backward")
    axes[0].set_title(f"time, batch of {batch}")
    axes[1].set_ylabel("peak of memory in a step (MB)")
    axes[1].set_title(f"memory, batch of {batch}")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


STUDY = Study(
    name="penalty-cost",
    title="What a gradient penalty costs: double backward, tape, plan",
    claims=_CLAIMS,
    method="A penalty and its gradients in the weights of convolutional critics for digits, by PyTorch's double "
    "backward (engine “autograd”), by lipgan's tape of the forward pass, and by a plan, which is a recording of the "
    "tape's operations. On one thread of this machine, one method after the other in every round; what else runs on "
    "the machine moves the times, and the ratios of a round less. Times are CPU times, the least over the rounds.",
    full={"depths": [2, 4, 8, 16], "batches": [16, 64, 256], "width": 32, "rounds": 31},
    quick={"depths": [2, 4, 8], "batches": [16, 64], "width": 16, "rounds": 9},
    seeds=(5, 2),
    units=_units,
    run=_run,
    analyse=_analyse,
    draw=_draw,
    caption="For the largest batch, against the depth of the critic: left, the time of penalty and gradients over that "
    "of the double backward (line at 1); right, by how much the resident memory of the process rises meanwhile.",
)
