"""Power iteration against the SVD, and the spectra of layers that are trained under each constraint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from lipgan import data
from lipgan.lipschitz.bounds import bounds
from lipgan.nn.spectral_norm import spectral_norm
from lipgan.studies import critics, figures
from lipgan.studies.rows import crossed, where
from lipgan.studies.study import Analysis, Claim, Finding, Finished, Settings, Study, Table, Unit, judge, spread

__all__ = ["STUDY"]

_METHODS = ("none", "clipping 0.1", "penalty", "spectral norm")
_SOURCE = "lecture 000, “Spectral Normalization GAN”; Miyato et al. 2018"
_ROUNDING, _CLOSE, _ONE = 1e-9, 0.02, 0.05

_CLAIMS = (
    Claim(
        "iteration",
        "Power iteration from a random vector approximates sigma(W), the largest singular value.",
        _SOURCE + ": “sigma(W) ≈ uᵀWv”",
        f"u and v are unit vectors, so uᵀWv is at most sigma, but for {_ROUNDING:g} of it, after each iteration; and "
        f"it is within {100 * _CLOSE:.0f} % of sigma by the SVD after the last one; for every matrix and seed",
    ),
    Claim(
        "one",
        "One iteration at each update is enough, with the vectors of the update before: weights change slowly.",
        _SOURCE + ", algorithm 1",
        f"at every recorded step of training from the second on, uᵀWv of each hidden layer is within {100 * _ONE:.0f} "
        "% of sigma by the SVD; in every seed",
    ),
    Claim(
        "product",
        "The Lipschitz constant of a critic is at most the product of the sigma of its layers; with W / sigma(W) it is "
        "at most 1.",
        _SOURCE + ": “Critic spectral norm”",
        "the steepest slope found is at most the product, by the SVD, for every critic, and with spectral "
        f"normalization it is at most 1 + {_ONE}; in every seed",
    ),
    Claim(
        "spectra",
        "Clipping leaves few singular values of a layer that are not small, spectral normalization many.",
        _SOURCE + ", figure 3",
        "the share Σ s² / (n max s²) of the hidden layers is larger with spectral normalization than with clipping; in "
        "every seed",
    ),
)


def _units(settings: Settings, seeds: Sequence[int]) -> list[dict[str, Any]]:
    return crossed(seeds, matrix=settings["shapes"]) + crossed(seeds, method=_METHODS)


def _run(settings: Settings, unit: Unit) -> dict[str, Any]:
    return _iterate(settings, unit) if "matrix" in unit else _train(settings, unit)


def _iterate(settings: Settings, unit: Unit) -> dict[str, Any]:
    """The estimate of sigma over sigma, after each iteration."""
    generator = torch.Generator().manual_seed(unit["seed"])
    h, w = unit["matrix"]
    layer = nn.Linear(w, h, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(h, w, generator=generator, dtype=torch.float64))
    sigma = float(torch.linalg.svdvals(layer.weight.detach())[0])
    spectral_norm(layer)
    # Fifteen iterations have been made already, as in PyTorch: start anew. As there, an iteration starts with v.
    for name, size in (("_u", h), ("_v", w)):
        vector = torch.randn(size, generator=generator, dtype=torch.float64)
        dict(layer.named_buffers())[f"parametrizations.weight.0.{name}"].copy_(vector / vector.norm())
    return {"ratios": [_estimate(layer) / sigma for _ in range(settings["iterations"])]}


def _estimate(layer: nn.Module) -> float:
    """What the layer takes for sigma, from its two weights; in training mode this iterates once."""
    original = dict(layer.named_parameters())["parametrizations.weight.original"]
    with torch.no_grad():
        normalized = getattr(layer, "weight")  # noqa: B009
        return float(original.norm() / normalized.norm())


def _hidden(critic: nn.Module) -> list[nn.Linear]:
    """Its square layers."""
    return [m for m in critic.modules() if isinstance(m, nn.Linear) and m.in_features == m.out_features]


def _linear(critic: nn.Module) -> list[nn.Linear]:
    return [m for m in critic.modules() if isinstance(m, nn.Linear)]


def _singular_values(layer: nn.Linear) -> Tensor:
    values: Tensor = torch.linalg.svdvals(layer.weight.detach().double())
    return values


def _train(settings: Settings, unit: Unit) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(unit["seed"])
    constraint = critics.CONSTRAINTS[unit["method"]]
    critic = critics.build(constraint, 2, settings["width"])
    ring = data.load("ring").samples
    followed: list[tuple[int, float]] = []

    def draw() -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(ring), (settings["batch"],), generator=generator)
        return ring[chosen], torch.randn(settings["batch"], 2, generator=generator)

    def watch(step: int) -> None:
        if constraint.spectral and step % settings["every"] == 0:
            # In eval mode the vectors stay as they are: those of the last update, for weights that it has changed.
            critic.eval()
            errors = []
            for layer in _hidden(critic):
                original = dict(layer.named_parameters())["parametrizations.weight.original"].detach().double()
                errors.append(abs(_estimate(layer) / float(torch.linalg.svdvals(original)[0]) - 1))
            followed.append((step, max(errors)))
            critic.train()

    critics.train(
        critic,
        draw,
        settings["loss"],
        constraint,
        steps=settings["steps"],
        lr=settings["lr"],
        generator=generator,
        watch=watch,
    )
    spectra = [_singular_values(layer) for layer in _hidden(critic)]
    real, fake = draw()
    return {
        "spectra": [values.tolist() for values in spectra],
        "shares": [float((values / values[0]).square().mean()) for values in spectra],
        "product": math.prod(float(_singular_values(layer)[0]) for layer in _linear(critic)),
        "steepest": bounds(critic, torch.cat([real, fake])).lower,
        "followed": followed,
    }


def _share(row: Finished) -> float:
    return float(sum(row.result["shares"]) / len(row.result["shares"]))


def _lag(row: Finished) -> float:
    return float(max(error for _, error in row.result["followed"][1:]))


def _analyse(settings: Settings, rows: Sequence[Finished]) -> Analysis:
    matrices = [row for row in rows if "matrix" in row.unit]
    trained = [row for row in rows if "method" in row.unit]
    seeds = sorted({row.unit["seed"] for row in trained})
    above = max(max(row.result["ratios"]) for row in matrices) - 1
    last = [row.result["ratios"][-1] for row in matrices]
    lags = [_lag(row) for row in where(rows, method="spectral norm")]
    slopes = [row.result["steepest"] for row in where(rows, method="spectral norm")]
    steeper = [row for row in trained if row.result["steepest"] > row.result["product"] * (1 + 1e-6)]
    shares = {method: [_share(row) for row in where(rows, method=method)] for method in _METHODS}
    findings = (
        Finding(
            "iteration",
            judge([above <= _ROUNDING and min(last) >= 1 - _CLOSE]),
            f"the estimate exceeds sigma by at most {max(above, 0):.1e} of it; after {settings['iterations']} "
            f"iterations it is at least {min(last):.5f} sigma",
        ),
        Finding("one", judge([lag <= _ONE for lag in lags]), f"largest error in training: {spread(lags)}"),
        Finding(
            "product",
            judge([not steeper and slope <= 1 + _ONE for slope in slopes]),
            f"{len(steeper)} of {len(trained)} critics are steeper than the product; with spectral normalization the "
            f"steepest slope is {spread(slopes)}",
        ),
        Finding(
            "spectra",
            judge([sn > clipped for sn, clipped in zip(shares["spectral norm"], shares["clipping 0.1"], strict=True)]),
            "; ".join(f"{method}: {spread(values)}" for method, values in shares.items()),
        ),
    )
    assert len(seeds) == len(slopes)
    table = Table(
        ("constraint", "share Σ s² / (n max s²)", "product of sigma", "steepest slope found"),
        tuple(
            (
                method,
                spread(shares[method]),
                spread([row.result["product"] for row in where(rows, method=method)]),
                spread([row.result["steepest"] for row in where(rows, method=method)]),
            )
            for method in _METHODS
        ),
    )
    return Analysis(findings, table)


def _draw(settings: Settings, rows: Sequence[Finished]) -> Figure:
    figure, (power, spectra) = figures.panels(1, 2, 3.3)
    shapes = settings["shapes"]
    for index, (h, w) in enumerate(shapes):
        for number, row in enumerate(row for row in rows if row.unit.get("matrix") == [h, w]):
            errors = [max(1 - ratio, 1e-16) for ratio in row.result["ratios"]]
            power.plot(
                range(1, len(errors) + 1),
                errors,
                color=figures.COLOURS[index],
                linestyle=figures.DASHES[index % 4],
                linewidth=1,
                label=None if number else f"{h} x {w}",
            )
    power.set_xscale("log")
    power.set_yscale("log")
    power.set_ylim(1e-8, 2)
    power.set_xlabel("power iterations")
    power.set_ylabel("1 - estimate / sigma by the SVD")
    power.set_title("random matrices, from a random vector")
    power.legend(loc="lower left")
    for index, method in enumerate(_METHODS):
        values = torch.tensor([row.result["spectra"] for row in where(rows, method=method)])
        scaled = (values / values[..., :1]).flatten(0, 1)
        spectra.plot(
            range(1, scaled.shape[1] + 1),
            scaled.mean(0),
            color=figures.COLOURS[index],
            linestyle=figures.DASHES[index % 4],
            label=method,
        )
    spectra.set_xlabel("singular value, by size")
    spectra.set_ylabel("singular value / sigma")
    spectra.set_title("hidden layers after training")
    spectra.set_ylim(-0.02, 1.02)
    spectra.legend(loc="upper right")
    return figure


STUDY = Study(
    name="spectral-norm",
    title="Spectral norm: power iteration against the SVD, and spectra of layers",
    claims=_CLAIMS,
    method="First, power iteration of Gaussian matrices in float64 from random vectors, as lipgan.spectral_norm makes "
    "it. Then critics of three hidden layers are trained to tell the ring of eight Gaussians from a Gaussian in its "
    "middle, each with one constraint, and their weights, as they are applied, are decomposed. How quality depends on "
    "learning rates and betas is the study learning-rates.",
    full={
        "shapes": [[64, 64], [128, 512], [1024, 1024]],
        "iterations": 200,
        "width": 128,
        "loss": "hinge",
        "steps": 4000,
        "every": 50,
        "batch": 256,
        "lr": 1e-3,
    },
    quick={"shapes": [[64, 64], [128, 512]], "width": 64, "steps": 600, "every": 20, "batch": 128},
    seeds=(5, 2),
    units=_units,
    run=_run,
    analyse=_analyse,
    draw=_draw,
    caption="Left: by how much the estimate of power iteration misses the largest singular value of random matrices, a "
    "line for each seed. Right: the singular values of the square hidden layers of critics, over the largest, mean "
    "over layers and seeds.",
)
