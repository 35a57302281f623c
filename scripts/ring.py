"""What recipes make of the ring of eight modes, as docs/recipes.md has it::

    python scripts/ring.py wgan-gp dragan
    python scripts/ring.py --steps 500        # every recipe that serves points

One line for each: the modes with at least 20 of 2,000 samples within ten standard deviations, the share of samples so
close to a mode, and seconds.
"""

from __future__ import annotations

import argparse
import time

import torch

from lipgan import data, recipes
from lipgan.metrics import mode_coverage
from lipgan.training import Trainer, TrainingDiverged, config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes; all without")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ring = data.load("ring")
    assert ring.modes is not None
    assert ring.mode_std is not None
    for name in arguments.names or recipes.names():
        began = time.process_time()
        try:
            recipe = config.recipe_of({"recipe": name, "steps": arguments.steps}, ring.shape)
            trainer = Trainer.from_recipe(recipe, ring, seed=arguments.seed).fit(arguments.steps)
        except (ValueError, TrainingDiverged) as error:
            print(f"| {name} | {error} |", flush=True)
            continue
        found = mode_coverage(trainer.sample(2000), ring.modes, ring.mode_std, radius=10, min_samples=20)
        seconds = time.process_time() - began
        print(f"| {name} | {found.covered} ({100 * found.high_quality:.0f} %) | {seconds:.0f} s |", flush=True)


if __name__ == "__main__":
    main()
