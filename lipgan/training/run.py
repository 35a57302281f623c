"""One run from the command line: a progress bar, and a folder whose files all tell of the same step."""

import dataclasses
import json
import platform
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from lipgan.training.checkpoint import write_atomically
from lipgan.training.pictures import curves, image_bytes, sample_grid
from lipgan.training.trainer import Trainer

__all__ = ["CHECKPOINT", "CONFIG", "Run"]

CHECKPOINT = "checkpoint.pt"
CONFIG = "config.json"
SAMPLES = 64


class Run:
    """Trains up to a step and keeps the results in a folder.

    Files: checkpoint.pt, config.json (the effective configuration), metrics.jsonl (one line per row of the
    trainer's history), metrics.json (summary), samples.png (64 samples of the averaged generator from fixed
    noise), curves.png. Each is replaced atomically, the checkpoint first: whatever moment a crash picks, the
    folder can be resumed.

    Args:
        trainer: fresh or loaded.
        out: the folder; made when missing.
        steps: the step to train up to.
        save_every: steps between two writes of the folder.

    Raises:
        ValueError: ``save_every`` below 1, or a trainer that is past ``steps``.
    """

    def __init__(self, trainer: Trainer, out: Path, *, steps: int, save_every: int) -> None:
        if save_every < 1:
            raise ValueError(f"save_every must be at least 1, got {save_every}")
        if trainer.step > steps:
            raise ValueError(f"{out} is at step {trainer.step} already, which is past --steps {steps}")
        self.trainer, self.out, self.steps, self.save_every = trainer, out, steps, save_every
        self._started_at = trainer.step
        self._began: float | None = None

    def execute(self) -> bool:
        """Train, writing the folder at the start, every ``save_every`` steps, and at the end.

        The first write makes a run resumable from its first moment, and finds out about an unwritable folder
        or a full disk before time is spent on training.

        Returns:
            True when step ``steps`` was reached, False when Ctrl-C stopped the run earlier; the folder is
            whole and current in both cases.

        Raises:
            OSError: a file cannot be written; it stays as the last write left it.
            TrainingDiverged: a loss or weight became NaN or infinite; likewise.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        self._write()
        if self.trainer.step < self.steps:
            with _progress(self.trainer, self.steps) as bar, self._stopping_on_interrupt():

                def after_step(trainer: Trainer) -> None:
                    bar.update()
                    if trainer.step % trainer.log_every == 0:
                        bar.set_postfix_str(_postfix(trainer.history[-1]), refresh=False)
                    if trainer.step % self.save_every == 0 and trainer.step < self.steps:
                        self._write()

                self._began = time.perf_counter()
                self.trainer.fit(self.steps - self.trainer.step, callbacks=[after_step])
            self._write()
        return self.trainer.step == self.steps

    @contextmanager
    def _stopping_on_interrupt(self) -> Iterator[None]:
        """Let the first Ctrl-C end the run between two steps; a second one interrupts at once."""

        def stop(signum: int, frame: FrameType | None) -> None:
            signal.signal(signal.SIGINT, before)
            self.trainer.stop()

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _write(self) -> None:
        trainer = self.trainer
        trainer.save(self.out / CHECKPOINT)
        self._write_json(CONFIG, self._config())
        lines = "".join(json.dumps(row) + "\n" for row in trainer.history)
        write_atomically(self.out / "metrics.jsonl", lines.encode())
        self._write_json("metrics.json", self._summary())
        title = f"{trainer.recipe.name} on {trainer.data.name}, step {trainer.step}"
        write_atomically(self.out / "samples.png", image_bytes(sample_grid(trainer.sample(SAMPLES))))
        write_atomically(self.out / "curves.png", curves(trainer.history, title))

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        write_atomically(self.out / name, (json.dumps(value, indent=2) + "\n").encode())

    def _config(self) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "recipe": dataclasses.asdict(trainer.recipe),
            "data": trainer.data.name,
            "shape": list(trainer.data.shape),
            "steps": self.steps,
            "seed": trainer.seed,
            "device": str(trainer.device),
            "log_every": trainer.log_every,
            "save_every": self.save_every,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }

    def _summary(self) -> dict[str, Any]:
        trainer = self.trainer
        # Of this process, writing included: what a resumed run took before is not known to it.
        seconds = 0.0 if self._began is None else time.perf_counter() - self._began
        trained = trainer.step - self._started_at
        return {
            "step": trainer.step,
            "steps": self.steps,
            "last": trainer.history[-1] if trainer.history else None,
            "sigmas": trainer.group.sigmas() if trainer.group is not None else {},
            "seconds": seconds,
            "steps_per_second": trained / seconds if seconds else None,
        }


def _progress(trainer: Trainer, steps: int) -> "tqdm[Any]":
    # A log file has no cursor to move back: every refresh is another line of it.
    interval = 0.1 if sys.stderr.isatty() else 10.0
    name = trainer.recipe.name
    return tqdm(total=steps, initial=trainer.step, desc=name, unit=" steps", mininterval=interval)


def _postfix(row: dict[str, Any]) -> str:
    text = f"critic {row['critic_loss']:.3f}, generator {row['generator_loss']:.3f}"
    for key in ("sigma", "penalty"):
        if row[key] is not None:
            text += f", {key} {row[key]:.3f}"
    return text
