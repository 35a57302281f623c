"""Five methods on six architectures with one set of constants each (Gulrajani et al. 2017, figure 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import nn

from lipgan import data, models
from lipgan.studies import figures, networks
from lipgan.studies.rows import by_seed, crossed, over, values, where
from lipgan.studies.study import Analysis, Claim, Finding, Finished, Settings, Study, Table, Unit, spread
from lipgan.studies.trainers import UNLEARNED, adapted, fit, judge_learned, judged

__all__ = ["STUDY"]

# The recipe of each method, and the normalization of its critics where they have one.
_METHODS = {
    "DCGAN": ("dcgan", "batch"),
    "LSGAN": ("lsgan", "batch"),
    "WGAN": ("wgan", "batch"),
    "WGAN-GP": ("wgan-gp", "layer"),
    "SN-GAN": ("sngan", "none"),
}
_CONSTANT, _MLP = "constant width, no norm in G", "MLP generator"
_ARCHITECTURES = ("baseline", _CONSTANT, _MLP, "no norm", "tanh everywhere", "deep ResNet")
_SOURCE = "lecture 000, “Wasserstein GAN with Gradient Penalty” (the table of samples)"

_CLAIMS = (
    Claim(
        "every",
        "WGAN-GP alone trains every architecture with one set of constants.",
        _SOURCE + "; Gulrajani et al. 2017, figure 2",
        "its FID on the architecture that is worst for it is lower than that of DCGAN, LSGAN and WGAN on those that "
        f"are worst for them; in every seed; {UNLEARNED}",
    ),
    Claim(
        "constant",
        "WGAN converges without batch norm and with a constant number of filters.",
        "lecture 002, “Wasserstein GAN”: “WGAN converged without batch norm and constant number of filters”",
        f"its FID with such a generator is at most 1.5 times its FID on the baseline; in every seed; {UNLEARNED}",
    ),
    Claim(
        "mlp",
        "With a perceptron as generator, WGAN makes samples that are worse than those of its DCGAN, and better than "
        "those of the perceptron of a standard GAN.",
        "lecture 004, “WGAN: results”: “lower quality than the DCGAN, and of higher quality than the MLP of the "
        "standard GAN”",
        "WGAN's FID with it is higher than on the baseline, and lower than that of DCGAN's objective with it; in every "
        f"seed; {UNLEARNED}",
    ),
)


def _units(settings: Settings, seeds: Sequence[int]) -> list[dict[str, Any]]:
    return crossed(seeds, method=list(_METHODS), architecture=_ARCHITECTURES)


def _networks(settings: Settings, architecture: str, norm: str) -> tuple[nn.Module, nn.Module]:
    """Generator and critic; ``norm`` is that of the critic."""
    width, depth = settings["width"], settings["depth"]
    if architecture == "deep ResNet":
        return (
            networks.generator(depth, width, residual=True),
            networks.critic(depth, width, "LeakyReLU", norm, residual=True),
        )
    generator, critic = models.build("dcgan", networks.SHAPE, width=width)
    if architecture == _CONSTANT:
        generator = networks.generator(3, width, norm="none")
    elif architecture == _MLP:
        generator = models.MLPGenerator(networks.SHAPE, width=settings["mlp_width"])
    elif architecture == "tanh everywhere":
        for network in (generator, critic):
            networks.replaced(network, (nn.ReLU, nn.LeakyReLU), lambda layer: nn.Tanh())
    if architecture == "no norm":
        norm = "none"
        networks.replaced(generator, nn.BatchNorm2d, lambda layer: nn.Identity())
    if norm != "batch":
        networks.replaced(critic, nn.BatchNorm2d, lambda layer: networks.NORMS[norm](_channels(layer)))
    return generator, critic


def _channels(layer: nn.Module) -> int:
    assert isinstance(layer, nn.BatchNorm2d)
    return layer.num_features


def _run(settings: Settings, unit: Unit) -> dict[str, Any]:
    name, norm = _METHODS[unit["method"]]
    pair = _networks(settings, unit["architecture"], norm)
    dataset = data.load("digits", networks.SHAPE[-1])
    trainer = fit(adapted(name, settings), dataset, unit["seed"], settings["steps"], networks=pair)
    shown = None if trainer is None else trainer.sample(8)[:, 0]
    images = None if shown is None else ((shown.clamp(-1, 1) + 1) * 127.5).round().int().tolist()
    return {**judged(trainer, settings["samples"]), "images": images}


def _analyse(settings: Settings, rows: Sequence[Finished]) -> Analysis:
    seeds = by_seed(rows, "method", "architecture")

    def worst(found: Any, method: str) -> float:
        return float(max(found[method, architecture]["fid"] for architecture in _ARCHITECTURES))

    def fid(found: Any, method: str, architecture: str) -> float:
        return float(found[method, architecture]["fid"])

    def least(*cells: tuple[str, str]) -> list[float]:
        """Of each seed the lowest FID of some."""
        return [min(fid(found, *cell) for cell in cells) for found in seeds]

    findings = (
        Finding(
            "every",
            judge_learned(
                [worst(r, "WGAN-GP") < min(worst(r, other) for other in ("DCGAN", "LSGAN", "WGAN")) for r in seeds],
                [min(worst(r, method) for method in ("DCGAN", "LSGAN", "WGAN", "WGAN-GP")) for r in seeds],
            ),
            "FID on the worst: " + ", ".join(f"{m} {spread([worst(r, m) for r in seeds])}" for m in _METHODS),
        ),
        Finding(
            "constant",
            judge_learned(
                [fid(r, "WGAN", _CONSTANT) <= 1.5 * fid(r, "WGAN", "baseline") for r in seeds],
                least(("WGAN", _CONSTANT), ("WGAN", "baseline")),
            ),
            f"FID {over(rows, 'fid', method='WGAN', architecture=_CONSTANT)}, on the baseline "
            f"{over(rows, 'fid', method='WGAN', architecture='baseline')}",
        ),
        Finding(
            "mlp",
            judge_learned(
                [fid(r, "WGAN", "baseline") < fid(r, "WGAN", _MLP) < fid(r, "DCGAN", _MLP) for r in seeds],
                least(("WGAN", "baseline"), ("WGAN", _MLP), ("DCGAN", _MLP)),
            ),
            f"FID {over(rows, 'fid', method='WGAN', architecture=_MLP)}, on the baseline "
            f"{over(rows, 'fid', method='WGAN', architecture='baseline')}, of DCGAN's objective "
            f"{over(rows, 'fid', method='DCGAN', architecture=_MLP)}",
        ),
    )
    table = Table(
        ("FID of digits", *_METHODS),
        tuple((name, *(over(rows, "fid", method=m, architecture=name) for m in _METHODS)) for name in _ARCHITECTURES),
    )
    return Analysis(findings, table)


def _draw(settings: Settings, rows: Sequence[Finished]) -> Figure:
    figure, axes = figures.panels(len(_ARCHITECTURES), len(_METHODS), 5.4)
    for i, architecture in enumerate(_ARCHITECTURES):
        for j, method in enumerate(_METHODS):
            axis = axes[i * len(_METHODS) + j]
            found = where(rows, method=method, architecture=architecture)
            images = found[0].result["images"]
            if images is None:
                axis.text(0.5, 0.5, "diverged", ha="center", va="center", transform=axis.transAxes)
            else:
                tiles = np.pad(np.asarray(images), ((0, 0), (0, 1), (0, 1)), constant_values=96)
                grid = np.concatenate([np.concatenate(list(tiles[k : k + 4]), 1) for k in (0, 4)])
                axis.imshow(grid[:-1, :-1], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.grid(False)
            axis.set_xlabel(f"FID {np.mean(values(found, 'fid')):.0f}", labelpad=2)
            if i == 0:
                axis.set_title(method)
            if j == 0:
                axis.set_ylabel(architecture.replace(", ", ",\n"), rotation=0, ha="right", va="center")
    return figure


STUDY = Study(
    name="architectures-grid",
    title="A grid of architectures: which methods train all of them with the same constants",
    claims=_CLAIMS,
    method="The networks of DCGAN for digits of 8 x 8 pixels, and five changes of them, each trained by five methods, "
    "with the constants of the method's recipe throughout. Critics have batch norm, those of WGAN-GP layer norm, those "
    "of SN-GAN none. FID is in the features of lipgan's classifier of digits.",
    full={"steps": 10000, "batch": 64, "faster": 1.0, "width": 32, "mlp_width": 512, "depth": 48, "samples": 1000},
    quick={"steps": 60, "batch": 32, "faster": 5.0, "width": 8, "mlp_width": 64, "depth": 8, "samples": 300},
    seeds=(3, 2),
    units=_units,
    run=_run,
    analyse=_analyse,
    draw=_draw,
    caption="Eight samples of each method (columns) on each architecture (rows), first seed, with the FID, mean over "
    "seeds.",
)
