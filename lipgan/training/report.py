"""The page of a run: configuration, curves, samples over time, metrics, bounds on the critic's Lipschitz constant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lipgan._files import write_atomically
from lipgan._html import document, duration, in_words, picture, table
from lipgan.lipschitz.bounds import bounds
from lipgan.training.pictures import LABELS
from lipgan.training.trainer import Trainer

__all__ = ["FRAMES", "add_frame", "frames", "lipschitz_verdict", "render"]

#: The folder of a run with its samples of earlier steps.
FRAMES = "samples"

# Shown on the page; the folder has all.
_SHOWN = 8
# The certificate of a critic with more parameters takes long, as does a search with more samples.
_MOST_PARAMETERS, _SAMPLES, _SEARCH, _PRODUCTS = 3_000_000, 64, 4, 6


def add_frame(folder: Path, step: int, png: bytes) -> list[tuple[int, bytes]]:
    """Keep the samples of a step, forget those of later ones (of a run that was replaced), and return some to show.

    Args:
        folder: of the run.
        step: that the picture is of.
        png: the picture.

    Returns:
        Step and picture of at most eight steps, evenly spread, the first and the last among them.

    Raises:
        OSError: a file cannot be written or removed.
    """
    kept = folder / FRAMES
    kept.mkdir(exist_ok=True)
    for late, path in frames(folder):
        if late > step:
            path.unlink()
    write_atomically(kept / f"{step:08d}.png", png)
    every = frames(folder)
    last = len(every) - 1
    chosen = sorted({round(last * k / (_SHOWN - 1)) for k in range(_SHOWN)})
    return [(every[i][0], every[i][1].read_bytes()) for i in chosen]


def frames(folder: Path) -> list[tuple[int, Path]]:
    """The steps that the folder of a run has samples of, in order."""
    return sorted((int(path.stem), path) for path in (folder / FRAMES).glob("*.png") if path.stem.isdecimal())


def lipschitz_verdict(trainer: Trainer) -> str:
    """What `lipgan.lipschitz.bounds` says of the critic, in a sentence or two."""
    size = sum(parameter.numel() for parameter in trainer.critic.parameters())
    if size > _MOST_PARAMETERS:
        return f"Not computed, for a critic of {size} parameters: see lipgan.lipschitz.bounds."
    system = trainer.system
    if system.JUDGED != "samples":
        return f"There are no bounds for this critic, which judges {system.JUDGED} in place of samples."
    data, labels = system.target.samples[:_SAMPLES].to(trainer.device), None
    if system.critic_labels and system.target.labels is not None:
        labels = system.target.labels[:_SAMPLES].to(trainer.device)
    try:
        found = bounds(trainer.critic, data, labels, steps=_SEARCH, n_iterations=_PRODUCTS)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        return f"There are no bounds for this critic: {error}"
    within = f"The Lipschitz constant of the critic lies between {found.lower:.4g}, a slope that was found, and "
    within += f"{found.upper:.4g}, which is certified."
    if found.upper <= 1.0001:
        return f"{within} The critic is 1-Lipschitz."
    if found.lower > 1.0001:
        return f"{within} It is not 1-Lipschitz."
    return f"{within} Whether it is 1-Lipschitz cannot be told from these."


def render(
    title: str,
    config: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    curves: bytes,
    shown: Sequence[tuple[int, bytes]],
    verdict: str,
) -> str:
    """The page.

    Args:
        title: of the run.
        config: its configuration, as in its config.toml.
        history: of the trainer; the last row and the last evaluation are on the page.
        summary: as in metrics.json.
        curves: a PNG.
        shown: step and PNG of samples, in order.
        verdict: of `lipschitz_verdict`, or why there is none.
    """
    pictures = "".join(
        f"<figure>\n{picture(png, f'samples at step {step}')}\n<figcaption>step {step}</figcaption>\n</figure>\n"
        for step, png in shown
    )
    last: dict[str, Any] = {}
    for row in history:
        last |= {name: value for name, value in row.items() if value is not None}
    metrics = [(LABELS.get(name, name.replace("_", " ")), _number(value)) for name, value in last.items()]
    environment = summary["environment"]
    return document(
        title,
        f"<h1>{escape(title)}</h1>\n"
        f"<p>{summary['step']} of {summary['steps']} steps; the process that ended there took "
        f"{duration(summary['seconds'])}.</p>\n"
        f'<h2>Samples over time</h2>\n<div class="frames">\n{pictures}</div>\n'
        f'<h2>Curves</h2>\n<div class="wide">\n'
        f"{picture(curves, 'losses, metrics and control quantities over the steps')}\n</div>\n"
        f"<h2>Metrics</h2>\n<p>The last value of each.</p>\n{table(('quantity', 'value'), metrics)}"
        f"<h2>Lipschitz constant</h2>\n<p>{escape(verdict)}</p>\n"
        f"<h2>Configuration</h2>\n"
        f"{table(('field', 'value'), [(name, in_words(value) or '(none)') for name, value in config.items()])}"
        f'<p class="small">PyTorch {escape(environment["torch"])}, Python {escape(environment["python"])}, '
        f"{environment['threads']} {'thread' if environment['threads'] == 1 else 'threads'}.</p>\n",
    )


def _number(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
