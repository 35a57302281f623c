"""Quality against learning rates and betas, by constraint (Miyato et al. 2018, figure 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lipgan import data, models
from lipgan.studies import figures, networks
from lipgan.studies.rows import by_seed, crossed, over, values, where
from lipgan.studies.study import Analysis, Claim, Finding, Finished, Settings, Study, Table, Unit, spread
from lipgan.studies.trainers import LEARNED, UNLEARNED, adapted, fit, judge_learned, judged

__all__ = ["STUDY"]

_METHODS = {"clipping": "wgan", "penalty": "wgan-gp", "spectral norm": "sngan"}
#: Learning rate, betas of Adam and critic updates in a step: table 1 of Miyato et al. (2018).
_CONSTANTS: Mapping[str, tuple[float, tuple[float, float], int]] = MappingProxyType(
    {
        "A": (1e-4, (0.5, 0.9), 5),
        "B": (1e-4, (0.5, 0.999), 1),
        "C": (2e-4, (0.5, 0.999), 1),
        "D": (1e-3, (0.5, 0.9), 5),
        "E": (1e-3, (0.5, 0.999), 5),
        "F": (1e-3, (0.9, 0.999), 5),
    }
)
_AGGRESSIVE = ("D", "E", "F")
_SOURCE = "lecture 000, “Spectral Normalization GAN”, the figure for (a) CIFAR-10 and (b) STL-10"

_CLAIMS = (
    Claim(
        "robust",
        "Spectral normalization does not depend on the learning rate and on the betas of Adam as much as others do.",
        _SOURCE + "; Miyato et al. 2018, figure 1",
        "its FID at the constants that are worst for it is lower than those of clipping and of the penalty at the "
        f"constants that are worst for them; in every seed; {UNLEARNED}",
    ),
    Claim(
        "aggressive",
        "With high learning rates and momentum a gradient penalty fails and spectral normalization does not.",
        _SOURCE + "; Miyato et al. 2018, section 4.1",
        f"at each of the constants D, E and F its FID is lower than that of the penalty, and at most {LEARNED:.0f}; in "
        f"every seed; {UNLEARNED}",
    ),
)


def _units(settings: Settings, seeds: Sequence[int]) -> list[dict[str, Any]]:
    return crossed(seeds, method=list(_METHODS), constants=list(_CONSTANTS))


def _run(settings: Settings, unit: Unit) -> dict[str, Any]:
    lr, betas, updates = _CONSTANTS[unit["constants"]]
    changes = {"generator_lr": lr, "critic_lr": lr, "betas": betas, "n_critic": updates, "optimizer": "adam"}
    recipe = adapted(_METHODS[unit["method"]], {**settings, "faster": 1.0}, **changes)
    pair = models.build("conv", networks.SHAPE, width=settings["width"])
    dataset = data.load("digits", networks.SHAPE[-1])
    return judged(fit(recipe, dataset, unit["seed"], settings["steps"], networks=pair), settings["samples"])


def _analyse(settings: Settings, rows: Sequence[Finished]) -> Analysis:
    seeds = by_seed(rows, "method", "constants")
    worst = {method: [max(found[method, c]["fid"] for c in _CONSTANTS) for found in seeds] for method in _METHODS}

    def survives(found: Mapping[Any, Mapping[str, Any]]) -> bool:
        pairs = [(found["spectral norm", c]["fid"], found["penalty", c]["fid"]) for c in _AGGRESSIVE]
        return all(spectral < penalty and spectral <= LEARNED for spectral, penalty in pairs)

    aggressive = [min(r[m, c]["fid"] for m in ("spectral norm", "penalty") for c in _AGGRESSIVE) for r in seeds]

    findings = (
        Finding(
            "robust",
            judge_learned(
                [s < min(c, p) for c, p, s in zip(*(worst[method] for method in _METHODS), strict=True)],
                [min(found) for found in zip(*worst.values(), strict=True)],
            ),
            "FID at the worst constants: " + ", ".join(f"{name} {spread(found)}" for name, found in worst.items()),
        ),
        Finding(
            "aggressive",
            judge_learned([survives(found) for found in seeds], aggressive),
            "; ".join(
                f"{c}: FID {over(rows, 'fid', method='spectral norm', constants=c)} with spectral norm, "
                f"{over(rows, 'fid', method='penalty', constants=c)} with the penalty"
                for c in _AGGRESSIVE
            ),
        ),
    )
    table = Table(
        ("constants", "learning rate", "betas", "critic updates", *(f"FID, {method}" for method in _METHODS)),
        tuple(
            (
                *(name, f"{lr:g}", f"{betas[0]:g}, {betas[1]:g}", updates),
                *(over(rows, "fid", method=method, constants=name) for method in _METHODS),
            )
            for name, (lr, betas, updates) in _CONSTANTS.items()
        ),
    )
    return Analysis(findings, table)


def _draw(settings: Settings, rows: Sequence[Finished]) -> Figure:
    figure, (axis,) = figures.panels(1, 1, 3.2)
    for index, method in enumerate(_METHODS):
        table = np.asarray([values(where(rows, method=method, constants=c), "fid") for c in _CONSTANTS])
        shown = np.where(np.isfinite(table), table, np.nan)
        offset = 0.12 * (index - 1)
        figures.error_bars(axis, range(len(_CONSTANTS)), shown, index, method, line="none", offset=offset)
    labels = [f"{name}\n{lr:g}\n{b[0]:g}, {b[1]:g}\n{n}" for name, (lr, b, n) in _CONSTANTS.items()]
    axis.set_xticks(range(len(_CONSTANTS)), labels)
    axis.set_xlabel("constants: learning rate, betas of Adam, critic updates in a step")
    axis.set_ylabel("FID of digits (lower is better)")
    axis.set_yscale("log")
    figures.plain_ticks(axis.yaxis)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


STUDY = Study(
    name="learning-rates",
    title="Learning rates and betas: which constraint is robust to them",
    claims=_CLAIMS,
    method="The convolutional networks of the recipes wgan (but with Adam), wgan-gp and sngan learn digits of 8 x 8 "
    "pixels with the six sets of constants of Miyato et al. 2018, all for as many updates of the generator. FID is in "
    "the features of lipgan's classifier of digits.",
    full={"steps": 10000, "batch": 64, "width": 32, "samples": 1000},
    quick={"steps": 60, "batch": 32, "width": 8, "samples": 300},
    seeds=(3, 2),
    units=_units,
    run=_run,
    analyse=_analyse,
    draw=_draw,
    caption="FID after training with each set of constants, mean and standard deviation over seeds; a training that "
    "diverged has no point.",
)
