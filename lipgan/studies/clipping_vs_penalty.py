"""What clipping weights does to a critic, and a gradient penalty does not (Gulrajani et al. 2017, figure 1)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from lipgan import data
from lipgan.penalties.points import interpolate
from lipgan.studies import critics, figures
from lipgan.studies.rows import by_seed, crossed, over, where
from lipgan.studies.study import Analysis, Claim, Finding, Finished, Settings, Study, Table, Unit, judge, spread

__all__ = ["STUDY"]

_DATA = {"ring": "8 Gaussians", "grid": "25 Gaussians", "swiss-roll": "Swiss roll"}
_METHODS = ("clipping 0.1", "penalty")
_DEEP = ("clipping 0.1", "clipping 0.01", "clipping 0.001", "penalty")
_SOURCE = "lecture 000, “Weight clipping analysis”"
_DECADE, _NEAR = 10.0, 0.2

_CLAIMS = (
    Claim(
        "moments",
        "A critic with clipped weights ignores higher moments of the data distribution.",
        _SOURCE + ": “The critic ignores higher moments”; Gulrajani et al. 2017, figure 1a",
        "the share of the variance of its scores, over generated points, that no polynomial of degree 2 in the "
        "coordinates explains is at most half of that with a penalty; for each data set, in every seed",
    ),
    Claim(
        "depth",
        "With clipped weights gradients either grow or decay exponentially with depth; a penalty makes them stable.",
        _SOURCE + ": “The gradients either grow or decay exponentially”; Gulrajani et al. 2017, figure 1b",
        f"the mean gradient norm over the hidden layers spans a factor of more than {_DECADE:g} for each clip value, "
        "and of less than that with the penalty; in every seed",
    ),
    Claim(
        "corners",
        "Clipping pushes weights to the corners of their box.",
        _SOURCE + "; Gulrajani et al. 2017, figure 1b",
        "at least half of the weights of the critic of the Swiss roll lie within 1 % of plus or minus the clip value, "
        "and less than a tenth of those with a penalty within 1 % of the largest weight of their layer; in every seed",
    ),
    Claim(
        "norm",
        "The optimal critic has gradient norm 1 almost everywhere on lines between real and generated points; a "
        "penalty leads there, clipping does not.",
        "lecture 000, “Wasserstein GAN with Gradient Penalty”: “f* has gradient norm 1 almost everywhere under π(x) "
        "and p(x)”",
        f"the mean gradient norm at such points is within {_NEAR:g} of 1 with the penalty, and is not with clipped "
        "weights; for each data set, in every seed",
    ),
)


def _units(settings: Settings, seeds: Sequence[int]) -> list[dict[str, Any]]:
    return crossed(seeds, data=list(_DATA), method=_METHODS) + crossed(seeds, deep=_DEEP)


def _run(settings: Settings, unit: Unit) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(unit["seed"])
    deep = "deep" in unit
    real = data.load("swiss-roll" if deep else unit["data"]).samples

    def draw(n: int = settings["batch"]) -> tuple[Tensor, Tensor]:
        """The generator stands still: real points, and others plus noise."""
        chosen = real[torch.randint(len(real), (2, n), generator=generator)]
        return chosen[0], chosen[1] + settings["noise"] * torch.randn(n, 2, generator=generator)

    name = unit["deep"] if deep else unit["method"]
    constraint = critics.CONSTRAINTS["penalty"] if name == "penalty" else critics.Constraint(clip=float(name[9:]))
    critic = _deep(settings) if deep else critics.build(constraint, 2, settings["width"])
    critics.train(
        critic,
        draw,
        "wasserstein",
        constraint,
        steps=settings["deep_steps" if deep else "steps"],
        lr=settings["lr"],
        generator=generator,
    )
    test = draw(settings["test_samples"])
    if deep:
        return {"norms": _norms_by_layer(critic, test[1])}
    with torch.no_grad():
        surface = critic(_plane(real, settings["pixels"]))
        unexplained = _unexplained(test[1], critic(test[1]))
    weights = [layer.weight.detach() for layer in critic.modules() if isinstance(layer, nn.Linear)]
    relative = torch.cat([(w / (constraint.clip or float(w.abs().max()))).flatten() for w in weights])
    return {
        "surface": [round(value, 5) for value in surface.tolist()],
        "unexplained": unexplained,
        "corners": float((relative.abs() >= 0.99).float().mean()),
        "weights": torch.histc(relative, 41, -1, 1).div(len(relative)).tolist(),
        "slope": float(critics.slopes(critic, interpolate(*test, generator=generator)).norm(dim=1).mean()),
    }


def _deep(settings: Settings) -> nn.Module:
    """Many ReLU layers, scores ``[B]``."""
    sizes = [2] + [settings["deep_width"]] * settings["depth"]
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
        nn.init.kaiming_normal_(layers[-2].weight, nonlinearity="relu")  # type: ignore[arg-type]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 1), nn.Flatten(0))


def _norms_by_layer(critic: nn.Module, x: Tensor) -> list[float]:
    """The mean norm of the gradient of a score in the output of each hidden layer."""
    hidden: list[Tensor] = []
    for layer in critic.children():
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            hidden.append(x)
    return [float(g.double().norm(dim=1).mean()) for g in torch.autograd.grad(x.sum(), hidden)]


def _plane(real: Tensor, pixels: int) -> Tensor:
    """Points of a square that holds the data, in rows."""
    ticks = torch.linspace(-1, 1, pixels) * 1.4 * float(real.abs().max())
    return torch.cartesian_prod(ticks, ticks)


def _unexplained(x: Tensor, scores: Tensor) -> float:
    """The share of the variance of scores that a polynomial of degree 2 in ``x [n, 2]`` leaves; 0 for constant ones."""
    x, scores = x.double(), scores.double()[:, None]
    columns = torch.stack([x[:, 0] ** i * x[:, 1] ** j for i in range(3) for j in range(3 - i)], 1)
    left = scores - columns @ torch.linalg.lstsq(columns, scores).solution
    total = float((scores - scores.mean()).square().sum())
    return float(left.square().sum()) / total if total else 0.0


def _span(result: Any) -> float:
    norms = result["norms"]
    return float(max(norms) / max(min(norms), 1e-300))


def _analyse(settings: Settings, rows: Sequence[Finished]) -> Analysis:
    seeds, deep = by_seed(rows, "data", "method"), by_seed(rows, "deep")
    pairs = [tuple(found[name, method] for method in _METHODS) for found in seeds for name in _DATA]
    roll = [tuple(found["swiss-roll", method]["corners"] for method in _METHODS) for found in seeds]
    norms = {name: [_span(found[name]) for found in deep] for name in _DEEP}

    def both(key: str) -> str:
        return "; ".join(
            f"{title}: {over(rows, key, data=name, method='penalty')} with the penalty, "
            f"{over(rows, key, data=name, method='clipping 0.1')} clipped"
            for name, title in _DATA.items()
        )

    findings = (
        Finding("moments", judge([a["unexplained"] <= 0.5 * b["unexplained"] for a, b in pairs]), both("unexplained")),
        Finding(
            "depth",
            judge([all((_span(r[name]) < _DECADE) == (name == "penalty") for name in _DEEP) for r in deep]),
            "largest over least: " + "; ".join(f"{name}: {spread(found)}" for name, found in norms.items()),
        ),
        Finding(
            "corners",
            judge([clipped >= 0.5 and penalized < 0.1 for clipped, penalized in roll]),
            f"share at the corners: {spread([a for a, _ in roll])} clipped, {spread([b for _, b in roll])} with the "
            "penalty",
        ),
        Finding("norm", judge([abs(b["slope"] - 1) <= _NEAR < abs(a["slope"] - 1) for a, b in pairs]), both("slope")),
    )
    table = Table(
        ("data", "critic", "variance left by degree 2", "weights at the corners", "mean gradient norm"),
        tuple(
            (title, method, *(over(rows, key, data=name, method=method) for key in ("unexplained", "corners", "slope")))
            for name, title in _DATA.items()
            for method in _METHODS
        ),
    )
    return Analysis(findings, table)


def _draw(settings: Settings, rows: Sequence[Finished]) -> Figure:
    figure, axes = figures.panels(3, 6, 6.6, height_ratios=(1, 1, 1.15))
    grid = axes[0].get_gridspec()
    assert grid is not None
    for axis in axes:
        axis.remove()
    for i, method in enumerate(_METHODS):
        for j, (name, title) in enumerate(_DATA.items()):
            axis = figure.add_subplot(grid[i, 2 * j : 2 * j + 2])
            real = data.load(name).samples
            n = settings["pixels"]
            ticks = np.asarray(_plane(real, n)[:n, 1])
            surface = np.asarray(where(rows, data=name, method=method)[0].result["surface"]).reshape(n, n).T
            axis.scatter(real[:500, 0], real[:500, 1], s=2, color="0.6", linewidths=0)
            axis.contour(ticks, ticks, surface, levels=10, cmap="viridis", linewidths=1)
            axis.set_aspect("equal")
            axis.grid(False)
            axis.set_title(f"{title}, {method}")
            axis.set_ylabel("y" if j == 0 else "")
            axis.set_xlabel("x" if i == 1 else "")
    left, right = figure.add_subplot(grid[2, :3]), figure.add_subplot(grid[2, 3:])
    for index, name in enumerate(_DEEP):
        norms = np.asarray([row.result["norms"] for row in where(rows, deep=name)])
        figures.error_bars(left, range(1, norms.shape[1] + 1), np.log10(np.maximum(norms, 1e-300)).T, index, name)
    left.set_xlabel("hidden layer")
    left.set_ylabel("log10 of mean gradient norm")
    left.legend(loc="best", handlelength=3)
    edges = np.linspace(-1, 1, 42)
    for index, method in enumerate(_METHODS):
        shares = np.asarray(where(rows, data="swiss-roll", method=method)[0].result["weights"])
        right.stairs(100 * shares, edges, color=figures.COLOURS[index], linestyle=figures.DASHES[index], label=method)
    right.set_xlabel("weight / clip value (penalty: / largest)")
    right.set_ylabel("% of weights")
    right.set_yscale("log")
    right.legend(loc="upper center")
    return figure


STUDY = Study(
    name="clipping-vs-penalty",
    title="Clipping against penalty: what critics see, and their gradients by depth",
    claims=_CLAIMS,
    method="The generator stands still, at real points plus Gaussian noise. Critics of three hidden layers are trained "
    "against it with weights clipped to [-0.1, 0.1] or with a gradient penalty, and critics of many ReLU layers on the "
    "Swiss roll with three clip values and the penalty.",
    full={"noise": 1.0, "batch": 256, "width": 128, "steps": 5000, "lr": 1e-3, "depth": 12, "deep_width": 128}
    | {"deep_steps": 2000, "test_samples": 2000, "pixels": 60},
    quick={"batch": 128, "width": 64, "steps": 400, "lr": 2e-3, "deep_width": 48, "deep_steps": 150, "pixels": 40},
    seeds=(5, 2),
    units=_units,
    run=_run,
    analyse=_analyse,
    draw=_draw,
    caption="Above: contours of the scores of critics, higher ones lighter, over real points (grey), first seed. "
    "Below, left: the gradient of the score in each hidden layer of deep critics. Below, right: weights of the critics "
    "of the Swiss roll, as shares in 41 bins.",
)
