"""One run from the command line: a progress bar, and a folder whose files all tell of the same step."""

import json
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from lipgan import _signals, recipes
from lipgan._checks import check_count
from lipgan._files import write_atomically
from lipgan.training import config, distributed, report
from lipgan.training.evaluation import Evaluation
from lipgan.training.pictures import curves, samples_shown
from lipgan.training.showing import picture_of
from lipgan.training.trainer import Row, Trainer

__all__ = ["CHECKPOINT", "CONFIG", "FILES", "Run"]

CHECKPOINT = "checkpoint.pt"
CONFIG = "config.toml"
FILES = (CHECKPOINT, CONFIG, "metrics.jsonl", "metrics.json", "samples.png", "curves.png", "report.html")
BOARD = "tensorboard"


class Run:
    """Trains up to a step and keeps the results in a folder.

    Files: checkpoint.pt, config.toml (the effective configuration, as ``--config`` reads it), metrics.jsonl (one line
    per row of the trainer's history), metrics.json (summary), samples.png (samples of the averaged generator from
    fixed noise), curves.png, report.html (all of that on a page, `lipgan.training.report`), samples (a folder with
    the samples of every step that was written). Each is replaced atomically, the checkpoint first: whatever moment a
    crash picks, the folder can be resumed. Where TensorBoard is installed, the rows go to the folder tensorboard as
    well.

    In a `torch.distributed` group every process runs this, and the first one writes.

    Args:
        trainer: fresh or loaded.
        out: the folder; made when missing.
        steps: the step to train up to.
        save_every: steps between two writes of the folder.
        evaluate_every: steps between two evaluations (`lipgan.training.evaluation`), whose metrics join the row of the
            history; None for none.

    Attributes:
        evaluated: step and metrics of the last evaluation; None before the first one.

    Raises:
        ValueError: ``save_every`` below 1, ``evaluate_every`` that is not a multiple of the trainer's ``log_every``, or
            a trainer that is past ``steps``.
    """

    def __init__(
        self, trainer: Trainer, out: Path, *, steps: int, save_every: int, evaluate_every: int | None = None
    ) -> None:
        check_count("save_every", save_every)
        if evaluate_every is not None and (evaluate_every < 1 or evaluate_every % trainer.log_every):
            raise ValueError(
                f"evaluate_every must be a multiple of log_every, {trainer.log_every}, got {evaluate_every}"
            )
        if trainer.step > steps:
            raise ValueError(f"{out} is at step {trainer.step} already, which is past --steps {steps}")
        self.trainer, self.out, self.steps, self.save_every = trainer, out, steps, save_every
        self.evaluate_every = evaluate_every
        self.evaluated: tuple[int, dict[str, float]] | None = None
        self.signal: int | None = None
        self._leads = distributed.rank() == 0
        self._evaluation = Evaluation(trainer.system.target) if evaluate_every is not None and self._leads else None
        self._started_at = trainer.step
        self._began: float | None = None

    def execute(self) -> bool:
        """Train, writing the folder at the start, every ``save_every`` steps, and at the end.

        The first write makes a run resumable from its first moment, and finds out about an unwritable folder
        or a full disk before time is spent on training.

        Returns:
            True when step ``steps`` was reached, False when Ctrl-C, SIGTERM or SIGHUP stopped the run earlier (it is
            then ``signal``); the folder is whole and current in both cases.

        Raises:
            OSError: a file cannot be written; it stays as the last write left it.
            TrainingDiverged: a loss or weight became NaN or infinite; likewise.
        """
        if self._leads:
            self.out.mkdir(parents=True, exist_ok=True)
        self._write()
        if self.trainer.step < self.steps:
            with self._stopping(), _progress(self.trainer, self.steps) as bar, self._board() as board:

                def after_step(trainer: Trainer) -> None:
                    bar.update()
                    # Of a signal that came before the first step.
                    if self.signal is not None:
                        trainer.stop()
                    if self._evaluation is not None and trainer.step % (self.evaluate_every or 1) == 0:
                        self.evaluated = trainer.step, self._evaluation(trainer)
                        trainer.history[-1] |= self.evaluated[1]
                    if trainer.step % trainer.log_every == 0:
                        bar.set_postfix_str(_postfix(trainer.history[-1]), refresh=False)
                        board(trainer.history[-1])
                    if trainer.step % self.save_every == 0 and trainer.step < self.steps:
                        self._write()

                self._began = time.perf_counter()
                self.trainer.fit(self.steps - self.trainer.step, callbacks=[after_step])
                bar.close()
                self._write(last=self.trainer.step == self.steps)
        return self.trainer.step == self.steps

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """Let a signal end the run between two steps, and the folder be written; a second Ctrl-C interrupts at once.

        Other signals do not: a system that shuts down, or torchrun, may well send several.
        """

        def stop(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and number in received:
                raise _signals.Stopped(number)
            received.append(number)
            self.signal = received[0]
            self.trainer.stop()

        received: list[int] = []

        with _signals.handling(stop):
            yield

    @contextmanager
    def _board(self) -> Iterator[Callable[[Row], None]]:
        """A function that gives a row of the history to TensorBoard, or does nothing where there is none."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            yield lambda row: None
            return
        if not self._leads:
            yield lambda row: None
            return
        # What a killed run wrote after its last checkpoint is written again.
        writer = SummaryWriter(str(self.out / BOARD), purge_step=self.trainer.step + 1)

        def write(row: Row) -> None:
            for name, value in row.items():
                if name != "step" and value is not None:
                    writer.add_scalar(name, value, row["step"])

        try:
            yield write
        finally:
            writer.close()

    def _write(self, last: bool = False) -> None:
        trainer = self.trainer
        trainer.save(self.out / CHECKPOINT)
        if not self._leads:
            return
        settings, summary = self._config(), self._summary()
        write_atomically(self.out / CONFIG, config.dumps(settings).encode())
        lines = "".join(json.dumps(row) + "\n" for row in trainer.history)
        write_atomically(self.out / "metrics.jsonl", lines.encode())
        self._write_json("metrics.json", summary)
        title = f"{trainer.recipe.name} on {trainer.data.name}, step {trainer.step}"
        classes, sentences = getattr(trainer.ema, "classes", 0), bool(getattr(trainer.ema, "captions", ()))
        number = samples_shown(trainer.data.shape, classes, sentences=sentences)
        shown = picture_of(trainer.ema, number, trainer.seed, trainer.system.target, title)
        lines_drawn = curves(trainer.history, title)
        write_atomically(self.out / "samples.png", shown)
        write_atomically(self.out / "curves.png", lines_drawn)
        frames = report.add_frame(self.out, trainer.step, shown)
        # Bounds take seconds: once, at the end.
        verdict = report.lipschitz_verdict(trainer) if last else "Computed at the last step of the run."
        page = report.render(title, settings, trainer.history, summary, lines_drawn, frames, verdict)
        write_atomically(self.out / "report.html", page.encode())

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        write_atomically(self.out / name, (json.dumps(value, indent=2) + "\n").encode())

    def _config(self) -> dict[str, Any]:
        trainer = self.trainer
        run = {
            "recipe": trainer.recipe.name,
            "data": trainer.data.name,
            "size": trainer.data.shape[-1] if len(trainer.data.shape) == 3 else None,
            "steps": self.steps,
            "seed": trainer.seed,
            "device": str(trainer.device),
            "log_every": trainer.log_every,
            "save_every": self.save_every,
            "evaluate_every": self.evaluate_every,
        }
        # Without the recipe's steps, which a run that is scheduled over its own steps takes from those above.
        return run | {
            name: value
            for name, value in trainer.recipe.as_dict().items()
            if name in recipes.FIELDS.keys() - run.keys()
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
            "environment": {
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }


def _progress(trainer: Trainer, steps: int) -> "tqdm[Any]":
    # A log file has no cursor to move back: every refresh is another line of it.
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=steps,
        initial=trainer.step,
        desc=trainer.recipe.name,
        unit=" steps",
        mininterval=interval,
        disable=distributed.rank() != 0,
    )


def _postfix(row: Row) -> str:
    text = f"critic {row['critic_loss']:.3f}, generator {row['generator_loss']:.3f}"
    for key, short in _SHORT.items():
        if row.get(key) is not None:
            text += f", {short} {row[key]:.3g}"
    return text


# What the progress bar shows beside the losses, and as what.
_SHORT = {
    "estimate": "estimate",
    "sigma": "sigma",
    "penalty": "penalty",
    "critic_gradient_norm": "|g| critic",
    "generator_gradient_norm": "generator",
}
