"""Modes of the ring that a GAN drops, and what the remedies of the lectures find."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from lipgan import data, models, recipes
from lipgan.objectives import losses
from lipgan.studies import figures
from lipgan.studies.rows import by_seed, crossed, over, where
from lipgan.studies.study import Analysis, Claim, Finding, Finished, Settings, Study, Table, Unit, judge, spread
from lipgan.studies.trainers import COVERED, coverage, fit
from lipgan.training.trainer import Trainer

__all__ = ["STUDY", "PackedCritic"]

# The recipe, and what is changed in it beside the settings of the study.
_METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "GAN": ("gan", {}),
        "unrolled GAN": ("unrolled", {}),
        "minibatch discrimination": ("gan", {"minibatch": "discrimination"}),
        "MAD-GAN": ("mad-gan", {}),
        # The weight of the penalty is that of the paper's experiments with points.
        "WGAN-GP": ("wgan-gp", {"penalty_weight": 0.1, "betas": (0.5, 0.9)}),
        "PacGAN": ("gan", {}),
    }
)
_LECTURE = "lecture 003, “Methods to address mode collapse”"
_SOURCES = {
    "unrolled GAN": _LECTURE + "; lecture 004, “Look into the Future: unrolled GANs”; Metz et al. 2017",
    "minibatch discrimination": _LECTURE + ": “reflects sample diversity to discriminator”; Salimans et al. 2016",
    "MAD-GAN": _LECTURE + ": “multiple G's to capture diversity”; Ghosh et al. 2018",
    "WGAN-GP": "lecture 003, “WGAN advantages”: “suffer less from mode collapsing”",
    "PacGAN": _LECTURE + ", as “discriminator considers multiple examples in a minibatch”; Lin et al. 2018",
}
_MODES, _PACKED = 8, 4
_POINT, _SPREAD = 0.5, 0.9

_CLAIMS = (
    Claim(
        "collapse",
        "A GAN drops modes of the data.",
        "lecture 003, “Mode collapse”: “more common: partial mode collapse”; lecture 004, “Mode Collapse”",
        f"it covers fewer than {_MODES} modes of the ring at the end ({COVERED}); in every seed",
    ),
    *(
        Claim(
            method,
            f"{method} finds more modes than the GAN.",
            source,
            "it covers more of them at the end than the GAN of the same seed; in every seed",
        )
        for method, source in _SOURCES.items()
    ),
    Claim(
        "none dropped",
        "No mode collapse was seen with the Wasserstein distance.",
        "lecture 002, “Wasserstein GAN”: “In no experiment did we see evidence of mode collapse for the WGAN "
        "algorithm”",
        f"WGAN-GP covers all {_MODES} modes at the end; in every seed",
    ),
    Claim(
        "maximin",
        "With the generator in the inner loop every z goes to the x that the discriminator believes most likely; with "
        "the discriminator there (minimax) the generator has to draw from the data.",
        "lecture 003, “Mode collapse”: “maximin solution ≠ minimax solution”; lecture 004, “Mode Collapse”: “For fixed "
        "D: G tends to converge to a point”",
        "the standard deviation of samples over their root mean square, which is 1 for the ring, falls to at most "
        f"{_POINT} when the GAN's discriminator stands still while the generator goes on, and is at least {_SPREAD} "
        "at the end of the unrolled GAN, whose discriminator answers first; in every seed",
    ),
)


class PackedCritic(nn.Module):
    """A critic of several samples at once (Lin et al. 2018): each pack has one score, which all its samples get.

    Args:
        critic: of vectors ``[B, packed * d]``.
        packed: how many samples make a pack; divides the size of a batch.
    """

    #: As the layers that compare samples: real and fake ones must not be in one batch.
    mixes_samples = True

    def __init__(self, critic: nn.Module, packed: int) -> None:
        super().__init__()
        self.critic, self.packed = critic, packed

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, d]`` to scores ``[B]``."""
        scores: Tensor = self.critic(x.reshape(len(x) // self.packed, -1))
        return scores.repeat_interleave(self.packed)


def _units(settings: Settings, seeds: Sequence[int]) -> list[dict[str, Any]]:
    return crossed(seeds, method=list(_METHODS))


def _run(settings: Settings, unit: Unit) -> dict[str, Any]:
    name, changes = _METHODS[unit["method"]]
    ring = data.load("ring")
    recipe = recipes.get(name, ring.shape)
    ratio = recipe.critic_lr / recipe.generator_lr
    common = {"generator_lr": settings["lr"], "critic_lr": ratio * settings["lr"], "batch_size": settings["batch"]}
    common |= {"latent_dim": 8, "ema_decay": 0.9, "architecture": "mlp"}
    recipe = replace(recipe, **{**common, **changes})
    frames: list[list[list[float]]] = []
    found: list[int] = []
    shown = {round(share * settings["steps"]) for share in settings["frames"]}
    moments = shown | {settings["steps"] * k // settings["points"] for k in range(settings["points"] + 1)}

    def watch(trainer: Trainer) -> None:
        samples = trainer.sample(2000)
        found.append(coverage(samples, ring).covered)
        if trainer.step in shown:
            frames.append([[round(x, 2), round(y, 2)] for x, y in samples[:200].clamp(-9, 9).tolist()])

    networks: tuple[nn.Module, nn.Module] | None = None
    if unit["method"] == "PacGAN":
        critic = models.build("mlp", (2 * _PACKED,), latent_dim=8, width=settings["width"])[1]
        networks = models.build("mlp", (2,), latent_dim=8, width=settings["width"])[0], PackedCritic(critic, _PACKED)
    elif recipe.system != "mad-gan":
        networks = models.build(
            "mlp", (2,), latent_dim=8, width=settings["width"], minibatch=changes.get("minibatch", "none")
        )
    trainer = fit(recipe, ring, unit["seed"], settings["steps"], networks=networks, at=moments, watch=watch)
    if trainer is None:
        return {"steps": sorted(moments), "modes": found, "frames": frames, "covered": 0, "high_quality": 0.0}
    samples = trainer.sample(2000)
    result = {"steps": sorted(moments), "modes": found, "frames": frames, "covered": found[-1]}
    result |= {"high_quality": coverage(samples, ring).high_quality, "concentration": _concentration(samples)}
    if unit["method"] == "GAN":
        result["alone"] = _concentration(_left_alone(trainer, settings["alone"]))
    return result


def _concentration(samples: Tensor) -> float:
    """Standard deviation over root mean square: 0 for a point, 1 for samples around the origin."""
    rows = samples.double()
    return float((rows - rows.mean(0)).square().sum().sqrt() / rows.square().sum().sqrt())


def _left_alone(trainer: Trainer, steps: int) -> Tensor:
    """Samples of the generator after more steps against the discriminator as it is."""
    generator, optimizer = trainer.generator, trainer.generator_optimizer
    random = torch.Generator().manual_seed(trainer.seed)
    loss = losses.get(trainer.recipe.loss)
    for _ in range(steps):
        optimizer.zero_grad()
        fake = generator(torch.randn(trainer.recipe.batch_size, trainer.recipe.latent_dim, generator=random))
        loss.generator_loss(trainer.critic(fake)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        samples: Tensor = generator(torch.randn(2000, trainer.recipe.latent_dim, generator=random))
    return samples


def _analyse(settings: Settings, rows: Sequence[Finished]) -> Analysis:
    seeds = by_seed(rows, "method")
    modes = {method: [found[method]["covered"] for found in seeds] for method in _METHODS}
    alone = [found["GAN"].get("alone", 0.0) for found in seeds]
    unrolled = [found["unrolled GAN"].get("concentration", 0.0) for found in seeds]
    findings = [Finding("collapse", judge([n < _MODES for n in modes["GAN"]]), f"modes: {spread(modes['GAN'])}")]
    for method in _SOURCES:
        more = [n > m for n, m in zip(modes[method], modes["GAN"], strict=True)]
        findings.append(Finding(method, judge(more), f"modes: {spread(modes[method])}"))
    findings += [
        Finding("none dropped", judge([n == _MODES for n in modes["WGAN-GP"]]), f"modes: {spread(modes['WGAN-GP'])}"),
        Finding(
            "maximin",
            judge([a <= _POINT and b >= _SPREAD for a, b in zip(alone, unrolled, strict=True)]),
            f"{spread([found['GAN'].get('concentration', 0.0) for found in seeds])} at the end of the GAN, "
            f"{spread(alone)} after {settings['alone']} more steps of its generator alone; {spread(unrolled)} at the "
            "end of the unrolled GAN",
        ),
    ]
    table = Table(
        ("method", "modes at the end", "samples near a mode"),
        tuple((m, over(rows, "covered", method=m), over(rows, "high_quality", method=m)) for m in _METHODS),
    )
    return Analysis(tuple(findings), table)


def _draw(settings: Settings, rows: Sequence[Finished]) -> Figure:
    shares = settings["frames"]
    figure, axes = figures.panels(len(_METHODS), len(shares) + 2, 6.4)
    grid = axes[0].get_gridspec()
    assert grid is not None
    real = data.load("ring").samples[:400]
    for i, method in enumerate(_METHODS):
        row = axes[i * (len(shares) + 2) : (i + 1) * (len(shares) + 2)]
        found = where(rows, method=method)
        for axis, share, frame in zip(row, shares, found[0].result["frames"], strict=False):
            points = torch.tensor(frame)
            axis.scatter(real[:, 0], real[:, 1], s=5, color="0.75", linewidths=0, label="data")
            axis.scatter(points[:, 0], points[:, 1], s=2, color=figures.COLOURS[0], linewidths=0, label="samples")
            axis.set_aspect("equal")
            axis.set_xlim(-3, 3)
            axis.set_ylim(-3, 3)
            axis.set_xticks([])
            axis.set_yticks([])
            if not bool((points.abs() <= 3).all(1).any()):
                axis.text(0, 0, "all\noutside", ha="center", va="center", fontsize=8)
            if i == 0:
                axis.set_title(f"step {round(share * settings['steps'])}")
        row[0].set_ylabel(method.replace(" ", "\n"), rotation=0, ha="right", va="center")
        for axis in row[-2:]:
            axis.remove()
        curve = figure.add_subplot(grid[i, len(shares) :])
        for result in (row.result for row in found):
            steps = result["steps"][: len(result["modes"])]
            curve.plot(steps, result["modes"], color=figures.COLOURS[0], marker=".", linewidth=1)
        curve.set_ylim(-0.5, _MODES + 0.5)
        curve.set_yticks([0, 4, 8])
        curve.set_xlim(-0.03 * settings["steps"], 1.03 * settings["steps"])
        if i == 0:
            curve.set_title("modes covered")
        if i < len(_METHODS) - 1:
            curve.tick_params(labelbottom=False)
        else:
            curve.set_xlabel("generator updates")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, markerscale=3)
    return figure


STUDY = Study(
    name="mode-collapse",
    title="Mode collapse: what a GAN drops of the ring, and what finds it",
    claims=_CLAIMS,
    method="Generators of three hidden layers learn the ring of eight Gaussians, all with the same learning rate. Each "
    "method is as its recipe for points has it, and so is the critic's rate: for the unrolled GAN a tenth of the "
    "generator's, as in its paper, and the same for the others. PacGAN's critic sees four samples at once. Then the "
    "discriminator of the GAN stands still, and its generator goes on alone.",
    full={"steps": 10000, "batch": 256, "width": 128, "lr": 1e-3, "points": 40, "alone": 2000}
    | {"frames": [0.0, 0.1, 0.25, 0.5, 1.0]},
    quick={"steps": 1000, "batch": 64, "width": 64, "lr": 2e-3, "points": 10, "alone": 300},
    seeds=(5, 2),
    units=_units,
    run=_run,
    analyse=_analyse,
    draw=_draw,
    caption="A row for each method: samples of the averaged generator (blue) over the data (grey) at five steps, first "
    "seed; right, how many of the eight modes they cover, a line for each seed.",
)
