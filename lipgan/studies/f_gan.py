"""The six variational bounds of f-GAN, and the Gaussians that minimize the divergences from a mixture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.optimize import minimize
from torch import Tensor, nn

from lipgan.models.mlp import MLPCritic
from lipgan.objectives import divergences
from lipgan.objectives.losses import FGAN
from lipgan.studies import critics, figures
from lipgan.studies.study import Analysis, Claim, Finding, Finished, Settings, Study, Table, Unit, judge, spread

__all__ = ["STUDY", "divergence_of", "optimum"]

_SOURCE = "lecture 001, “Variational divergence estimation”; Nowozin et al. 2016"

# The mixture: weights, means, standard deviations.
_WEIGHTS, _MEANS, _STDS = (0.33, 0.67), (-1.0, 2.0), (0.25, math.sqrt(2.0))
# Nearly all of the mass, of tails too, for any Gaussian that is met here.
_LEAST, _LARGEST, _POINTS = -20.0, 22.0, 4201

# Mean, standard deviation and divergence of the nearest Gaussian, by another quadrature.
_KNOWN = {
    "kl": (1.0100, 1.8304, 0.2881),
    "reverse-kl": (1.5841, 1.6294, 0.2507),
    "jensen-shannon": (1.3125, 1.7525, 0.1298),
    "pearson": (0.5663, 1.9268, 0.6616),
}
_NAMES = ("kl", "reverse-kl", "pearson", "hellinger", "jensen-shannon", "gan")
_ROUNDING, _TIGHT, _EXCESS = 5e-4, 0.8, 0.1

_CLAIMS = (
    Claim(
        "optima",
        "Each divergence has its own nearest Gaussian: KL covers both modes of the mixture, reverse KL the larger one, "
        "JS stands between.",
        _SOURCE + ", supplement; the optima are known by quadrature",
        f"mean, standard deviation and divergence of the four known optima agree within {_ROUNDING:g}, and the "
        "standard deviations fall from Pearson over KL and JS to reverse KL",
    ),
    Claim(
        "tight",
        "At T* = f'(p/q) the variational bound is the divergence, for all six.",
        _SOURCE + ": “The lower bound is tight for T* = f'(π/p)”",
        "E_p T* - E_q f*(T*) by quadrature agrees with the divergence within 1e-6",
    ),
    Claim(
        "bound",
        "A trained critic bounds each divergence from below, from samples alone, and comes near.",
        _SOURCE + ": “To evaluate lower bound we only need samples”",
        "at the Gaussian that was fitted, the bound on fresh samples is at most the divergence by quadrature and three "
        f"standard errors, and at least {_TIGHT} of it (both less their value at p = q); in every seed and divergence",
    ),
    Claim(
        "fit",
        "A generator trained against such a critic minimizes the divergence of its name.",
        _SOURCE + ": “we could fit implicit generative model”",
        f"the divergence of the fitted Gaussian, by quadrature, exceeds the optimum by at most {100 * _EXCESS:.0f} %; "
        "in every seed and divergence",
    ),
)


def _units(settings: Settings, seeds: Sequence[int]) -> list[dict[str, Any]]:
    return [{"divergence": name, "seed": seed} for seed in seeds for name in _NAMES]


def _log_normal(x: Tensor, mean: float, std: float) -> Tensor:
    return -0.5 * ((x - mean) / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))


@lru_cache(maxsize=1)
def _grid() -> tuple[Tensor, Tensor]:
    """Points of the line, and log p there."""
    x = torch.linspace(_LEAST, _LARGEST, _POINTS, dtype=torch.float64)
    parts = [math.log(w) + _log_normal(x, m, s) for w, m, s in zip(_WEIGHTS, _MEANS, _STDS, strict=True)]
    return x, torch.logaddexp(*parts)


def divergence_of(name: str, mean: float, std: float) -> float:
    """``D_f(p | q)`` of the mixture p and the Gaussian q, by the trapezoid rule."""
    x, log_p = _grid()
    log_q = _log_normal(x, mean, std)
    values = log_q.exp() * divergences.get(name).f((log_p - log_q).exp())
    return float(torch.trapezoid(values, x))


def _at_optimal_critic(name: str, mean: float, std: float) -> float:
    """The variational bound at T*, by the same rule."""
    x, log_p = _grid()
    log_q = _log_normal(x, mean, std)
    divergence = divergences.get(name)
    scores = divergence.optimal_score(log_p - log_q)
    real = log_p.exp() * divergence.activation(scores)
    fake = log_q.exp() * divergence.conjugate_of_activation(scores)
    return float(torch.trapezoid(real - fake, x))


@cache
def optimum(name: str) -> tuple[float, float, float]:
    """Mean, standard deviation and divergence of the Gaussian that minimizes ``D_f(p | q)``."""
    found = minimize(
        lambda at: divergence_of(name, at[0], math.exp(at[1])),
        (1.0, math.log(1.8)),
        method="Nelder-Mead",
        options={"xatol": 1e-5, "fatol": 1e-9},
    )
    return float(found.x[0]), math.exp(float(found.x[1])), float(found.fun)


def _at_equality(name: str) -> float:
    """``f(1)``: the value where p and q agree, 0 but for "gan"."""
    return float(divergences.get(name).f(torch.ones((), dtype=torch.float64)))


def _mixture(n: int, generator: torch.Generator) -> Tensor:
    """``[n, 1]``."""
    second = (torch.rand(n, generator=generator) >= _WEIGHTS[0]).long()
    noise = torch.randn(n, generator=generator)
    return (torch.tensor(_MEANS)[second] + torch.tensor(_STDS)[second] * noise)[:, None]


class _Gaussian(nn.Module):
    """``mean + std z``, from mean 0 and standard deviation 1."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(()))
        self.log_std = nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        return self.mean + self.log_std.exp() * z


def _run(settings: Settings, unit: Unit) -> dict[str, Any]:
    name, batch = unit["divergence"], settings["batch"]
    generator = torch.Generator().manual_seed(unit["seed"])
    # What is minimized is the bound itself, not what the paper puts in its place for images.
    loss = FGAN(divergences.get(name), saturating=True)
    critic, model = MLPCritic((1,), settings["width"]), _Gaussian()
    optimizers = [
        torch.optim.Adam(network.parameters(), lr=rate, betas=(0.5, 0.9))
        for network, rate in ((critic, settings["lr"]), (model, settings["model_lr"]))
    ]
    path = []
    for step in range(settings["steps"]):
        for optimizer, rate in zip(optimizers, (settings["lr"], settings["model_lr"]), strict=True):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / settings["steps"])
        for _ in range(settings["critic_steps"]):
            real, z = _mixture(batch, generator), torch.randn(batch, 1, generator=generator)
            optimizers[0].zero_grad()
            loss.critic_loss(critic(real), critic(model(z).detach())).backward()  # type: ignore[no-untyped-call]
            optimizers[0].step()
        optimizers[1].zero_grad()
        loss.generator_loss(critic(model(torch.randn(batch, 1, generator=generator)))).backward()  # type: ignore[no-untyped-call]
        optimizers[1].step()
        path.append((model.mean.item(), model.log_std.item()))
    mean, log_std = np.mean(path[-(len(path) // 5) :], 0).tolist()
    std = math.exp(log_std)

    def draw(n: int = batch) -> tuple[Tensor, Tensor]:
        return _mixture(n, generator), mean + std * torch.randn(n, 1, generator=generator)

    critics.train(
        critic,
        draw,
        f"f-{name}",
        critics.CONSTRAINTS["none"],
        steps=settings["last_steps"],
        lr=settings["lr"],
        generator=generator,
    )
    with torch.no_grad():
        real, fake = (critic(x).double() for x in draw(settings["test_samples"]))
    of_real, of_fake = loss.divergence.activation(real), loss.divergence.conjugate_of_activation(fake)
    return {
        "mean": mean,
        "std": std,
        "divergence": divergence_of(name, mean, std),
        "bound": float(loss.estimate(real, fake)),
        "error": math.sqrt(float(of_real.var() / len(real) + of_fake.var() / len(fake))),
        "path": path[:: max(1, settings["steps"] // 50)],
    }


def _of(rows: Sequence[Finished], name: str) -> list[Finished]:
    return [row for row in rows if row.unit["divergence"] == name]


def _excess(row: Finished) -> float:
    """By how much the fit misses the optimum, as a share of the optimum."""
    name = row.unit["divergence"]
    best = optimum(name)[2]
    return (float(row.result["divergence"]) - best) / (best - _at_equality(name))


def _share(row: Finished) -> float:
    """The bound over the divergence, both from their value at p = q on."""
    base = _at_equality(row.unit["divergence"])
    return (float(row.result["bound"]) - base) / (float(row.result["divergence"]) - base)


def _below(row: Finished) -> bool:
    return bool(row.result["bound"] <= row.result["divergence"] + 3 * row.result["error"])


def _analyse(settings: Settings, rows: Sequence[Finished]) -> Analysis:
    seeds = sorted({row.unit["seed"] for row in rows})
    off = max(abs(a - b) for name, known in _KNOWN.items() for a, b in zip(optimum(name), known, strict=True))
    stds = [optimum(name)[1] for name in ("pearson", "kl", "jensen-shannon", "reverse-kl")]
    gap = max(abs(_at_optimal_critic(name, *optimum(name)[:2]) - optimum(name)[2]) for name in _NAMES)
    findings = (
        Finding(
            "optima",
            judge([off <= _ROUNDING and stds == sorted(stds, reverse=True)]),
            f"the largest difference is {off:.1e}; the standard deviations are "
            + ", ".join(f"{value:.3f}" for value in stds),
        ),
        Finding("tight", judge([gap <= 1e-6]), f"the largest difference is {gap:.1e}"),
        Finding(
            "bound",
            judge([all(_below(r) and _share(r) >= _TIGHT for r in rows if r.unit["seed"] == seed) for seed in seeds]),
            f"{sum(not _below(row) for row in rows)} of {len(rows)} bounds lie above; shares of the divergence: "
            + ", ".join(f"{name} {spread([_share(row) for row in _of(rows, name)])}" for name in _NAMES),
        ),
        Finding(
            "fit",
            judge([all(_excess(row) <= _EXCESS for row in rows if row.unit["seed"] == seed) for seed in seeds]),
            "excess in %: "
            + ", ".join(f"{name} {spread([100 * _excess(row) for row in _of(rows, name)])}" for name in _NAMES),
        ),
    )
    table = Table(
        (
            "divergence",
            "best mean",
            "best std",
            "least divergence",
            "fitted mean",
            "fitted std",
            "divergence of the fit",
            "bound by the critic",
        ),
        tuple(
            (name, *optimum(name), *(spread([row.result[key] for row in _of(rows, name)]) for key in keys))
            for keys in [("mean", "std", "divergence", "bound")]
            for name in _NAMES
        ),
    )
    return Analysis(findings, table)


def _draw(settings: Settings, rows: Sequence[Finished]) -> Figure:
    figure, (densities, fits) = figures.panels(1, 2, 3.4)
    x, log_p = (values[1500:2800:5] for values in _grid())
    densities.fill_between(x, log_p.exp(), color="0.85", label="mixture p")
    shown = ("pearson", "kl", "jensen-shannon", "reverse-kl")
    for index, name in enumerate(shown):
        mean, std, _ = optimum(name)
        densities.plot(
            x,
            _log_normal(x, mean, std).exp(),
            color=figures.COLOURS[index],
            linestyle=figures.DASHES[index],
        )
    densities.set_xlim(-4, 7)
    densities.set_xlabel("x (units of length)")
    densities.set_ylabel("density (per unit of length)")
    densities.set_title("the nearest Gaussian by each divergence")
    keys: list[Line2D] = []
    for index, name in enumerate((*shown, "hellinger")):
        mean, std, _ = optimum(name)
        colour = figures.COLOURS[index]
        style: dict[str, Any] = {"color": colour, "marker": figures.MARKERS[index]}
        keys.append(Line2D([], [], **style, linestyle=figures.DASHES[index] if name in shown else "none", label=name))
        for row in _of(rows, name):
            path = np.asarray(row.result["path"])
            fits.plot(path[:, 0], np.exp(path[:, 1]), color=colour, linewidth=0.6, alpha=0.5)
            fits.plot(row.result["mean"], row.result["std"], linestyle="none", **style)
        fits.plot(mean, std, "+", color="black", markersize=9, label=None if index else "optimum", zorder=4)
    fits.set_xlabel("mean (units of length)")
    fits.set_ylabel("standard deviation (units of length)")
    fits.set_title("what f-GAN fits")
    others = [axes.get_legend_handles_labels()[0][0] for axes in (densities, fits)]
    figure.legend(handles=[others[0], *keys, others[1]], loc="outside lower center", ncols=4)
    return figure


STUDY = Study(
    name="f-gan",
    title="f-GAN: six variational bounds, and what minimizes the divergences",
    claims=_CLAIMS,
    method="Data are of the mixture 0.33 N(-1, variance 0.0625) + 0.67 N(2, variance 2); the model is a Gaussian with "
    "a mean and a standard deviation to learn, from 0 and 1. Divergences are integrals by the trapezoid rule. A critic "
    "and the model are trained in turn on fresh samples, on the bound itself; the fit is the mean over the last fifth "
    "of the steps. Then the critic alone is trained on, and its bound is taken on samples that it has not seen.",
    full={
        "steps": 4000,
        "critic_steps": 5,
        "last_steps": 4000,
        "batch": 1024,
        "width": 64,
        "lr": 1e-3,
        "model_lr": 5e-3,
        "test_samples": 100000,
    },
    quick={"steps": 300, "critic_steps": 2, "last_steps": 150, "batch": 256, "width": 32, "lr": 3e-3, "model_lr": 2e-2}
    | {"test_samples": 20000},
    seeds=(5, 2),
    units=_units,
    run=_run,
    analyse=_analyse,
    draw=_draw,
    caption="Left: the mixture, and the Gaussian that minimizes each divergence from it. Right: what f-GAN fits in "
    "each seed (markers, with their paths from mean 0 and standard deviation 1) against these optima (crosses).",
)
