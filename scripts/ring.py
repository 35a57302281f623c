"""What recipes make of the ring of eight modes, as docs/recipes.md has it::

    python scripts/ring.py wgan-gp dragan
    python scripts/ring.py --steps 500        # every recipe that serves points
    python scripts/ring.py gan sngan --picture docs/images/ring.png

One line for each: the modes with at least 20 of 2,000 samples within ten standard deviations, the share of samples so
close to a mode, and seconds. What translates the ring is judged by the modes of the ring where it is to be. The picture
has the samples of each recipe, over the data.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from lipgan import data, recipes
from lipgan.data import Dataset
from lipgan.metrics import mode_coverage
from lipgan.studies import figures
from lipgan.training import Trainer, TrainingDiverged, config

COLUMNS = 5
# The modes have radius 2.
REACH = 2.6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes; all without")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, metavar="FILE", help="PNG of the samples")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ring = data.load("ring")
    drawn: list[tuple[str, Dataset, Tensor]] = []
    for name in arguments.names or recipes.names():
        began = time.process_time()
        try:
            recipe = config.recipe_of({"recipe": name, "steps": arguments.steps}, ring.shape)
            trainer = Trainer.from_recipe(recipe, ring, seed=arguments.seed).fit(arguments.steps)
        except (ValueError, TrainingDiverged) as error:
            print(f"| {name} | {error} |", flush=True)
            continue
        target, samples = trainer.system.target, trainer.sample(2000)
        assert target.modes is not None
        assert target.mode_std is not None
        found = mode_coverage(samples, target.modes, target.mode_std, radius=10, min_samples=20)
        seconds = time.process_time() - began
        print(f"| {name} | {found.covered} ({100 * found.high_quality:.0f} %) | {seconds:.0f} s |", flush=True)
        drawn.append((f"{name}: {found.covered}", target, samples))
    if arguments.picture is not None:
        arguments.picture.write_bytes(picture(drawn))


def picture(drawn: list[tuple[str, Dataset, Tensor]]) -> bytes:
    """A panel for each title, with its data and samples."""
    rows = math.ceil(len(drawn) / COLUMNS)
    with figures.style():
        figure, panels = figures.panels(rows, COLUMNS, 1.45 * rows + 0.3)
        for axes in panels[len(drawn) :]:
            axes.set_visible(False)
        for axes, (title, target, samples) in zip(panels, drawn, strict=False):
            axes.scatter(*target.samples[:1000].T, s=9, color="0.65", linewidths=0, label="data")
            axes.scatter(*samples.T, s=1.5, color=figures.COLOURS[0], linewidths=0, alpha=0.6, label="samples")
            centre = target.samples.mean(0)
            axes.set_xlim(float(centre[0]) - REACH, float(centre[0]) + REACH)
            axes.set_ylim(float(centre[1]) - REACH, float(centre[1]) + REACH)
            axes.set(aspect="equal", title=title, xticks=[], yticks=[])
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, markerscale=3)
        return figures.as_png(figure)


if __name__ == "__main__":
    main()
