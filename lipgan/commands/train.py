"""``lipgan train``: a recipe on a data set, into a folder."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from lipgan import data, recipes
from lipgan._files import remove_leftovers
from lipgan.commands.console import find_device, list_images
from lipgan.training import Trainer, config, distributed
from lipgan.training.evaluation import SAMPLES
from lipgan.training.lock import FolderInUseError, locked
from lipgan.training.pictures import LABELS
from lipgan.training.run import CHECKPOINT, CONFIG, FILES, Run

__all__ = ["main"]


def main(args: argparse.Namespace) -> int:
    """Train as the arguments say; the exit status.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: bad input, in one sentence.
        TrainingDiverged: a loss or weight became NaN or infinite; the folder holds the last good state.
    """
    given = {} if args.config is None else config.read(args.config)
    flags = {name: value for name in _fields() if (value := getattr(args, name, None)) is not None}
    if "options" in flags:
        flags["options"] = {**given.get("options", {}), **flags["options"]}
    given |= flags
    if "betas" in given:
        given["betas"] = list(given["betas"])
    with distributed.group(find_device(given.get("device"))) as mine:
        try:
            return _execute(args, given, mine)
        except (ValueError, ArithmeticError):
            # Bad input and divergence are the same in every process: the first one tells.
            if distributed.rank() == 0:
                raise
            return 2


def _execute(args: argparse.Namespace, given: dict[str, Any], device: torch.device) -> int:
    out: Path = args.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is not a folder")
    with ExitStack() as stack:
        # Before the checkpoint is read: the run that is writing it may be alive.
        if out.is_dir():
            stack.enter_context(_locked(out, device))
            return _train(args, given, device)
        return _train(args, given, device, lambda: stack.enter_context(_locked(out, device)))


def _train(
    args: argparse.Namespace, given: dict[str, Any], device: torch.device, lock: Callable[[], None] = lambda: None
) -> int:
    out: Path = args.out
    existing = out / CHECKPOINT
    values = {name: default for name, (_, default) in config.RUN_FIELDS.items()}
    if args.resume:
        planned = _planned(out)
        trainer = _resumed(given, existing, planned, device)
        values |= planned | given
        if values["steps"] is None:
            says = "does not say" if (out / CONFIG).exists() else "is missing, which says"
            raise ValueError(f"{out / CONFIG} {says} how many steps the run takes: give --steps")
    else:
        _refuse_existing(args)
        values |= given
        trainer = _fresh(values, device)
    steps = values["steps"] or trainer.recipe.steps
    if trainer.recipe.lr_decay != "none" and steps > trainer.recipe.steps:
        raise ValueError(
            f"--steps {steps} is past the {trainer.recipe.steps} over which --lr-decay {trainer.recipe.lr_decay} "
            "took the learning rates to 0"
        )
    run = Run(trainer, out, steps=steps, save_every=values["save_every"], evaluate_every=values["evaluate_every"])
    lock()
    if not args.resume:
        _refuse_existing(args)
    # Nobody writes before everybody has looked at what is there.
    distributed.wait()
    finished = run.execute()
    if distributed.rank() > 0:
        return 0
    if not finished:
        again = f"lipgan train --resume --steps {steps} --out {shlex.quote(str(out))}"
        print(f"lipgan: stopped at step {trainer.step} and saved; continue with: {again}", file=sys.stderr)
        return 128 + (run.signal or signal.SIGINT)
    if run.evaluated is not None:
        step, metrics = run.evaluated
        words = ", ".join(f"{LABELS.get(name, name)}: {value:.4g}" for name, value in metrics.items())
        print(f"{SAMPLES} samples of step {step}: {words}")
    print(f"step {trainer.step}: see {out / 'samples.png'}, {out / 'curves.png'}, {out / 'metrics.json'}")
    return 0


def _refuse_existing(args: argparse.Namespace) -> None:
    if (args.out / CHECKPOINT).exists() and not args.overwrite:
        raise ValueError(f"{args.out} holds a run already: continue it with --resume, replace it with --overwrite")


@contextmanager
def _locked(out: Path, device: torch.device) -> Iterator[None]:
    """The first process holds the lock of the folder, which is made; an error of its is one of all."""
    failure: Exception | None = None
    with ExitStack() as stack:
        if distributed.rank() == 0:
            try:
                out.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(out))
                remove_leftovers(out, FILES)
            except (OSError, FolderInUseError) as error:
                failure = error
        if distributed.in_any(failure is not None, device):
            raise failure or FolderInUseError(f"{out} cannot be locked")
        yield


def _fields() -> list[str]:
    return list(dict(config.RUN_FIELDS) | dict(recipes.FIELDS))


def _planned(out: Path) -> dict[str, Any]:
    """The configuration of the run in a folder, or nothing where a run was killed before its first was written.

    Raises:
        OSError: it cannot be read.
        ValueError: as `config.read`.
    """
    try:
        return config.read(out / CONFIG)
    except FileNotFoundError:
        return {}


def _fresh(values: dict[str, Any], device: torch.device) -> Trainer:
    # What is wrong with the recipe is told before data are read.
    config.recipe_of(values)
    dataset = data.load(values["data"], values["size"])
    recipe = config.recipe_of(values, dataset.shape)
    own = recipes.for_shape(recipe.name, dataset.shape)
    changed = {name: value for name, value in own.items() if name not in values}
    if changed and distributed.rank() == 0:
        words = ", ".join(f"{name} {value}" for name, value in changed.items())
        print(f"for vectors, where neither flags nor --config say otherwise: {words}")
    if distributed.rank() == 0 and values["data"] not in data.names() and Path(values["data"]).is_dir():
        list_images(values["data"])
    return Trainer.from_recipe(recipe, dataset, seed=values["seed"], device=device, log_every=values["log_every"])


def _resumed(given: dict[str, Any], path: Path, planned: dict[str, Any], device: torch.device) -> Trainer:
    # Names that nothing has come before those that this run has not.
    if "recipe" in given:
        recipes.get(given["recipe"])
    if given.get("data", "") not in ("", planned.get("data")):
        data.load(given["data"], given.get("size"))
    if not path.exists():
        raise ValueError(f"{path.parent} holds no {path.name} to resume from; leave --resume out to start a run")
    trainer = Trainer.load(path, device=device)
    shape = trainer.data.shape
    saved = trainer.recipe.as_dict() | {
        "recipe": trainer.recipe.name,
        "data": trainer.data.name,
        "size": shape[-1] if len(shape) == 3 else None,
        "seed": trainer.seed,
        "log_every": trainer.log_every,
    }
    for name, wanted in given.items():
        if name in ("steps", "save_every", "evaluate_every", "device"):
            continue
        value = saved[name]
        same = wanted.items() <= value.items() if name == "options" else wanted == value
        if not same:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{path} was made with {option} {value}, so it cannot be resumed with {option} {wanted}")
    return trainer
