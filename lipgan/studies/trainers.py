"""How the studies train generators, with the trainer of `lipgan train`, and judge their samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lipgan import data, recipes
from lipgan.data import Dataset
from lipgan.metrics.features.digits import DigitFeatures
from lipgan.metrics.frechet import frechet_distance_from_features
from lipgan.metrics.inception_score import inception_score
from lipgan.metrics.modes import ModeCoverage, mode_coverage
from lipgan.metrics.prdc import prdc
from lipgan.recipe import Recipe
from lipgan.studies.study import UNKNOWN, Settings, judge
from lipgan.training.trainer import Trainer, TrainingDiverged

__all__ = [
    *("COVERED", "FAILED", "LEARNED", "UNLEARNED", "adapted", "coverage", "fit", "judge_learned", "judged", "quality"),
]

#: What `quality` says of a training that has diverged.
FAILED = {"fid": math.inf, "score": 1.0, "precision": 0.0, "recall": 0.0}

#: An FID of digits above which samples are no digits yet: real ones without four of the ten classes have 287 +- 42.
LEARNED = 300.0

#: In words the rule of `judge_learned`, where several are compared.
UNLEARNED = f"where none of those compared comes to {LEARNED:.0f}, nothing can be told"

#: In words what counts as a mode in `coverage`.
COVERED = "a mode counts that has 1 % of the samples within ten of its standard deviations"

_NEIGHBOURS = 5


@cache
def _digits() -> tuple[DigitFeatures, Tensor]:
    """The classifier, and its features of all real digits."""
    features = DigitFeatures()
    return features, features((data.load("digits", 8).samples + 1) / 2)


def quality(samples: Tensor) -> dict[str, float]:
    """FID, Inception Score (1 to 10), precision and recall of digits, in the features of lipgan's classifier.

    Args:
        samples: ``[n, 1, size, size]`` in [-1, 1], more than 5 of them; compared with all 1,797 digits.
    """
    if not bool(samples.isfinite().all()):
        return dict(FAILED)
    network, real = _digits()
    images = ((samples + 1) / 2).clamp(0, 1)
    fake = network(images)
    mean, _ = inception_score(network.probabilities(images), splits=1)
    balls = prdc(real, fake, _NEIGHBOURS)
    return {
        "fid": float(frechet_distance_from_features(real, fake)),
        "score": float(mean),
        "precision": balls["precision"],
        "recall": balls["recall"],
    }


def coverage(samples: Tensor, dataset: Dataset) -> ModeCoverage:
    """The modes of a mixture that samples reach, see `COVERED`."""
    assert dataset.modes is not None
    assert dataset.mode_std is not None
    return mode_coverage(samples, dataset.modes, dataset.mode_std, radius=10.0, min_samples=max(1, len(samples) // 100))


def fit(
    recipe: Recipe,
    dataset: Dataset,
    seed: int,
    steps: int,
    *,
    networks: tuple[nn.Module, nn.Module] | None = None,
    at: Iterable[int] = (),
    watch: Callable[[Trainer], None] = lambda trainer: None,
    log_every: int = 10,
) -> Trainer | None:
    """Train as a recipe says; None if a loss or a sample is not finite any more.

    Args:
        networks: generator and critic in place of the recipe's.
        at: steps after which ``watch`` is called with the trainer; 0 is the start.
        log_every: steps of a row of the trainer's history.
    """
    options: dict[str, Any] = {"seed": seed, "log_every": log_every}
    if networks is None:
        trainer = Trainer.from_recipe(recipe, dataset, **options)
    else:
        trainer = Trainer(*networks, recipe, dataset, **options)
    moments = set(at)
    if 0 in moments:
        watch(trainer)

    def after(trainer: Trainer) -> None:
        if trainer.step in moments:
            watch(trainer)

    try:
        trainer.fit(steps, callbacks=[after])
    except TrainingDiverged:
        return None
    return trainer if bool(trainer.sample(1).isfinite().all()) else None


def adapted(recipe: Recipe | str, settings: Settings, **changes: Any) -> Recipe:
    """A recipe with the batch size of the settings, and learning rates that are ``faster`` times its own.

    The moving average is short enough for short runs.
    """
    recipe = recipes.get(recipe) if isinstance(recipe, str) else recipe
    rates = {name: settings["faster"] * getattr(recipe, name) for name in ("generator_lr", "critic_lr")}
    return replace(recipe, **{"batch_size": settings["batch"], "ema_decay": 0.99, **rates, **changes})


def judge_learned(passed: Sequence[bool], fids: Sequence[float]) -> str:
    """`judge` of what was asked of every seed, or "cannot be told" where the generators have not learned by then.

    Which of two makes the better noise says which is faster at first, and nothing of where they end.

    Args:
        passed: of each seed.
        fids: of each seed the FID of digits that must be at most `LEARNED`: of what is compared the lowest, unless both
            have to be digits.
    """
    return judge(passed) if all(fid <= LEARNED for fid in fids) else UNKNOWN


def judged(trainer: Trainer | None, samples: int) -> dict[str, float]:
    """The `quality` of what a trainer's averaged generator draws, or `FAILED`."""
    with torch.no_grad():
        return dict(FAILED) if trainer is None else quality(trainer.sample(samples))
