"""The training loop of a generator against a critic, and nothing else: no files but the checkpoint, no printing, no
signals."""

import copy
import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lipgan import data as datasets
from lipgan import recipes, systems
from lipgan._checks import check_count, check_range
from lipgan._transfer import to_device
from lipgan.data import BatchOrder, Dataset
from lipgan.recipes import Recipe
from lipgan.systems import Batch, latents
from lipgan.training import checkpoint, distributed
from lipgan.training.average import MovingAverage
from lipgan.training.checkpoint import explaining
from lipgan.training.networks import build_networks, normalized, placed
from lipgan.training.random import PrivateRandom
from lipgan.training.sampling import draw
from lipgan.training.updater import NetworkUpdater

__all__ = ["Trainer", "TrainingDiverged"]

Row = dict[str, Any]

# Offsets that turn one seed into independent streams.
_ORDER, _NOISE, _GLOBAL = 1, 2, 3


class TrainingDiverged(ArithmeticError):
    """A loss or a weight became NaN or infinite. ``step`` is the first step where it showed."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"training diverged: {what} at step {step}")
        self.step = step


class Trainer:
    """Trains a generator against a critic as a recipe says.

    One step is ``n_critic`` updates of the critic, one of the generator, one of the moving average. What an update
    minimizes is the business of the recipe's system (`lipgan.systems`). The networks may be float32 or float64;
    samples and noise follow the generator.

    A run is a function of the seed alone, whatever the user draws from torch's global generators, and a run
    that is saved, loaded and continued gives the same bits as one that was never interrupted (same device,
    build and number of threads).

    Within a `torch.distributed` group each process computes its part of every batch, and gradients and logged losses
    are averaged: the same training as one process on the whole batch, but for layers that mix the samples of a batch or
    draw random numbers, for penalties of the kind "max", and for objectives that are no means over samples (feature
    matching, "kl-wgan"). The same holds for the parts of gradient accumulation.

    Args:
        generator: maps noise ``[B, latent_dim]`` to samples and has an integer attribute ``latent_dim``; with
            ``classes``, if the recipe has a conditioning, it takes labels ``[B]`` as well.
        critic: maps samples (and labels) to scores ``[B]``; normalized in place when the recipe says so.
        recipe: a `Recipe`, or the name of one, which then has the values for samples of such a shape
            (`lipgan.recipes.for_shape`).
        data: a `Dataset`, or the name of one.
        seed: of initial singular vectors, noise, data order, and whatever the modules draw themselves.
        device: where to train; the modules are moved there.
        log_every: steps per row of ``history``.
        penalty_engine: the ``engine`` of `lipgan.gradient_penalty`, for recipes with a penalty.

    Attributes:
        step: generator updates so far.
        ema: the moving average of the generator, which is what gets sampled.
        system: the losses, see `lipgan.systems.System`.
        history: one row per ``log_every`` steps: step; the means of critic_loss (the objective alone), generator_loss,
            penalty (None without one) and whatever else the system logs, such as estimate, what the critic estimates;
            sigma (the largest spectral norm among the critic's weights before division; None without spectral
            normalization); critic_gradient_norm and generator_gradient_norm, of the last updates.

    Raises:
        ValueError: an unknown recipe or data set, ``log_every`` below 1, a ``seed`` that is negative or of more than 63
            bits, a generator without ``latent_dim``, a batch
            that cannot be divided among the processes, a recipe that needs labels for data without.
    """

    def __init__(
        self,
        generator: nn.Module,
        critic: nn.Module,
        recipe: Recipe | str,
        data: Dataset | str,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        log_every: int = 20,
        penalty_engine: str = "auto",
    ) -> None:
        check_count("log_every", log_every)
        check_range("seed", seed)
        self.data = datasets.load(data) if isinstance(data, str) else data
        self.recipe = recipes.get(recipe, self.data.shape) if isinstance(recipe, str) else recipes.check(recipe)
        _check_labels(self.recipe, self.data)
        self._parts = self.recipe.accumulation * distributed.world_size()
        if self.recipe.batch_size % self._parts:
            raise ValueError(
                f"batch_size must be a multiple of accumulation times processes, {self._parts}, "
                f"got {self.recipe.batch_size}"
            )
        self.seed, self.log_every = seed, log_every
        self.device = torch.device(device)
        latents(generator, 1, torch.Generator())  # refuses a generator without latent_dim
        self._random = PrivateRandom(seed + _GLOBAL, self.device)

        with self._random.active():
            self.generator, _ = normalized(placed(generator, self.device), self.recipe.generator_norm)
            self.critic, self.group = normalized(placed(critic, self.device), self.recipe.critic_norm)
            self.system = systems.get(self.recipe.system)(
                self.recipe, self.generator, self.critic, self.data, penalty_engine=penalty_engine
            )
            self.system.average = distributed.average
        self.ema = copy.deepcopy(self.generator).eval().requires_grad_(False)
        self._average = MovingAverage(self.ema, self.generator)
        self._generator_updater = NetworkUpdater(self.generator, self.recipe, self.recipe.generator_lr)
        self._critic_updater = NetworkUpdater(self.critic, self.recipe, self.recipe.critic_lr)

        self._dtype = next(generator.parameters()).dtype
        self._samples = self.data.samples.to(self.device, self._dtype)
        self._labels = None if self.data.labels is None else self.data.labels.to(self.device)
        self._order = BatchOrder(len(self.data), seed + _ORDER)
        self._noise = torch.Generator().manual_seed(seed + _NOISE)

        self.step = 0
        self.history: list[Row] = []
        # What is logged of every step since the last row, and the gradient norms of the last.
        self._unlogged: list[dict[str, Tensor]] = []
        self._norms: dict[str, Tensor] = {}
        self._stopping = False

    @classmethod
    def from_recipe(
        cls,
        recipe: Recipe | str,
        data: Dataset | str,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        log_every: int = 20,
        penalty_engine: str = "auto",
    ) -> "Trainer":
        """A trainer of fresh networks of the recipe's architecture, initialized from the seed.

        Raises:
            ValueError: as `Trainer`, or samples of a shape that the architecture does not serve.
        """
        check_range("seed", seed)
        data = datasets.load(data) if isinstance(data, str) else data
        recipe = recipes.get(recipe, data.shape) if isinstance(recipe, str) else recipes.check(recipe)
        _check_labels(recipe, data)
        with PrivateRandom(seed, torch.device("cpu")).active():
            generator, critic = systems.get(recipe.system).build(recipe, data.shape, data.classes)
        return cls(
            generator,
            critic,
            recipe,
            data,
            seed=seed,
            device=device,
            log_every=log_every,
            penalty_engine=penalty_engine,
        )

    @property
    def generator_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the generator."""
        return self._generator_updater.optimizer

    @property
    def critic_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the critic."""
        return self._critic_updater.optimizer

    def fit(self, steps: int, *, callbacks: Sequence[Callable[["Trainer"], None]] = ()) -> "Trainer":
        """Train for ``steps`` more steps, or until `stop` is called.

        Args:
            steps: at least 1.
            callbacks: each is called after every step; a new row in ``history`` tells that it was a logged
                one.

        Raises:
            ValueError: ``steps`` below 1.
            TrainingDiverged: a loss became NaN or infinite; noticed at the next logged step or `save`.
        """
        check_count("steps", steps)
        self._stopping = False
        with self._random.active():
            for _ in range(steps):
                self._train_step()
                if self.step % self.log_every == 0:
                    self._log()
                for callback in callbacks:
                    callback(self)
                if distributed.in_any(self._stopping, self.device):
                    break
        return self

    def stop(self) -> None:
        """Make `fit` return after the step that is under way; for callbacks and signal handlers."""
        self._stopping = True

    def sample(self, n: int, *, seed: int | None = None) -> Tensor:
        """Draw ``n`` samples from the averaged generator: ``[n, ...]``, float32, on the CPU.

        The noise depends on ``seed`` alone (the trainer's own by default), so the same call after more
        training shows the same points of the latent space.

        Raises:
            ValueError: ``n`` below 1.
        """
        return draw(self.ema, n, self.seed if seed is None else seed)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint, atomically. In a `torch.distributed` group, all call this and the first one writes.

        Raises:
            TrainingDiverged: the state holds NaN or infinite numbers; a file at ``path`` stays as it is.
            OSError: the file cannot be written; a file at ``path`` stays as it is.
        """
        self._check_finite()
        if distributed.world_size() > 1 and self._unlogged:
            # One file for any number of processes: what is logged of them all.
            means = distributed.average(_stacked(self._unlogged))
            self._unlogged = [
                dict(zip(terms, row, strict=True)) for terms, row in zip(self._unlogged, means, strict=True)
            ]
        if distributed.rank() == 0:
            checkpoint.write(path, self.state_dict())

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        generator: nn.Module | None = None,
        critic: nn.Module | None = None,
        data: Dataset | None = None,
        device: torch.device | str = "cpu",
    ) -> "Trainer":
        """Continue where `save` stood.

        Args:
            path: the checkpoint. Nothing in it is executed.
            generator, critic: needed (both, freshly built) when the saved ones were not of the recipe's
                architecture.
            data: needed when the saved trainer had a data set that `lipgan.data.load` does not know.
            device: may differ from the one that saved; the bits then differ too.

        Raises:
            OSError: the file cannot be read.
            CheckpointError: not a whole checkpoint, or one that does not fit the networks or the data: other values in
                a folder or a file of the same name are noticed.
        """
        state = checkpoint.read(path)
        with explaining(path):
            recipe = recipes.from_dict(state["recipe"])
            # What this package makes itself from a seed may differ between processors, in the last bits.
            compared = data is not None or not datasets.is_built_in(state["data"])
            if data is None:
                data = datasets.load(state["data"], _image_size(state["shape"]))
            elif list(data.shape) != state["shape"]:
                raise ValueError(f"it was trained on samples of shape {state['shape']}, got {list(data.shape)}")
            # Checkpoints of earlier versions have none.
            if compared and state.get("digest", data.digest) != data.digest:
                raise ValueError(
                    f"the data set {data.name!r} has other samples or labels than those that it was trained on "
                    f"(SHA-256 {data.digest[:16]}..., it was {str(state['digest'])[:16]}...)"
                )
            if (generator is None) != (critic is None):
                raise ValueError("pass both generator and critic, or neither")
            if generator is None or critic is None:
                generator, critic = build_networks(state, recipe)
            trainer = cls(
                generator,
                critic,
                recipe,
                data,
                seed=state["seed"],
                device=device,
                log_every=state["log_every"],
            )
            trainer.load_state_dict(state)
        return trainer

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, in values that ``torch.load(weights_only=True)`` reads."""
        return {
            "recipe": self.recipe.as_dict(),
            "data": self.data.name,
            "digest": self.data.digest,
            "shape": list(self.data.shape),
            "classes": self.data.classes,
            "seed": self.seed,
            "log_every": self.log_every,
            "step": self.step,
            "generator": self.generator.state_dict(),
            "critic": self.critic.state_dict(),
            "ema": self.ema.state_dict(),
            "generator_player": self._generator_updater.state_dict(),
            "critic_player": self._critic_updater.state_dict(),
            "system": self.system.state_dict(),
            "order": self._order.state_dict(),
            "noise": self._noise.get_state(),
            "random": self._random.state(),
            "history": self.history,
            "unlogged": [{name: value.cpu() for name, value in terms.items()} for terms in self._unlogged],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.generator.load_state_dict(state["generator"])
        self.critic.load_state_dict(state["critic"])
        self.ema.load_state_dict(state["ema"])
        self._generator_updater.load_state_dict(state["generator_player"])
        self._critic_updater.load_state_dict(state["critic_player"])
        self.system.load_state_dict(state["system"])
        self._order.load_state_dict(state["order"])
        self._noise.set_state(state["noise"])
        self._random.load_state(state["random"])
        self.history = list(state["history"])
        self._unlogged = [{name: value.to(self.device) for name, value in terms.items()} for terms in state["unlogged"]]
        self.step = state["step"]

    def _train_step(self) -> None:
        recipe, system = self.recipe, self.system
        system.progress = min(1.0, self.step / recipe.steps)
        if recipe.lr_decay == "linear":
            for updater in (self._critic_updater, self._generator_updater):
                updater.set_lr(1 - system.progress)
        system.begin_step()
        for _ in range(recipe.n_critic):
            with self._generator_updater.frozen():
                critic_terms = self._update(self._critic_updater, "critic", self._order.next(recipe.batch_size))
            system.after_critic_update()
        # Real samples that only the generator's objective compares with; the critic's are one pass over the data.
        compared = torch.randint(len(self.data), (recipe.batch_size,), generator=self._noise)
        with self._critic_updater.frozen():
            generator_terms = self._update(self._generator_updater, "generator", compared)
        system.after_generator_update()
        self.step += 1
        # Early on the average would be mostly the random start, so it begins short and grows.
        self._average.update(min(recipe.ema_decay, (1 + self.step) / (10 + self.step)))
        self._unlogged.append(critic_terms | generator_terms)

    def _update(self, updater: NetworkUpdater, name: str, indices: Tensor) -> dict[str, Tensor]:
        """One update of a network on the samples at ``indices``: what is logged of it."""
        loss_of = self.system.critic_loss if name == "critic" else self.system.generator_loss
        z = latents(self.generator, len(indices), self._noise)
        parts = self.recipe.accumulation
        state = self._noise.get_state() if parts > 1 else None
        rows = []
        for part in range(parts):
            if state is not None:
                # Each part draws what it would draw within the whole batch.
                self._noise.set_state(state)
            with self._autocast():
                outcome = loss_of(self._part(indices, z, distributed.rank() * parts + part))
            updater.backward(outcome.loss if parts == 1 else outcome.loss / parts)
            rows.append({key: term.detach() for key, term in outcome.terms.items()})
        norm = updater.update(measure=(self.step + 1) % self.log_every == 0)
        if norm is not None:
            self._norms[f"{name}_gradient_norm"] = norm
        if len(rows) == 1:
            return rows[0]
        return {key: torch.stack([row[key] for row in rows]).mean(0) for key in rows[0]}

    def _part(self, indices: Tensor, z: Tensor, part: int) -> Batch:
        indices = to_device(indices, self.device)
        if self._parts == 1:
            # Drawn on the CPU so that a seed means the same noise on every device.
            z = to_device(z, self.device, self._dtype)
            return _WholeBatch.at(indices, self._samples, self._labels, z, self._noise)
        size = len(indices) // self._parts
        start = part * size
        mine = indices[start : start + size]
        return Batch(
            real=self._samples[mine],
            labels=None if self._labels is None else self._labels[mine],
            z=to_device(z[start : start + size], self.device, self._dtype),
            random=self._noise,
            before=start,
            after=len(indices) - start - size,
            whole=self._samples[indices],
        )

    def _autocast(self) -> Any:
        if self.recipe.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.recipe.precision))

    def _log(self) -> None:
        # The only place where the loop waits for an accelerator.
        means = distributed.average(self._checked_losses().double().mean(0))
        row: Row = {
            "step": self.step,
            "sigma": max(self.group.sigmas().values()) if self.group is not None else None,
            "penalty": None,
        }
        row |= dict(zip(self._unlogged[-1], means.tolist(), strict=True))
        # In float16 a gradient may overflow: that update was left out, and there is no norm to tell.
        norms = {name: float(norm) for name, norm in self._norms.items()}
        self.history.append(row | {name: norm if math.isfinite(norm) else None for name, norm in norms.items()})
        self._unlogged.clear()

    def _checked_losses(self) -> Tensor:
        """What is logged of every step since the last row, ``[steps, terms]``, in this process."""
        # Every process has to see what one of them sees, or the others would wait for it.
        ours = _stacked(self._unlogged)
        values = distributed.average(ours)
        first = self.step - len(self._unlogged) + 1
        for step, (terms, fine) in enumerate(zip(self._unlogged, values.isfinite().tolist(), strict=True), start=first):
            broken = [name for name, good in zip(terms, fine, strict=True) if not good]
            if broken:
                raise TrainingDiverged(step, f"{_IN_WORDS.get(broken[0], broken[0])} is not finite")
        return ours

    def _check_finite(self) -> None:
        if self._unlogged:
            self._checked_losses()
        for role, module in (("generator", self.generator), ("critic", self.critic), ("average", self.ema)):
            for name, tensor in module.state_dict().items():
                if not bool(tensor.isfinite().all()):
                    raise TrainingDiverged(self.step, f"{name} of the {role} is not finite")


class _WholeBatch(Batch):
    """A batch of one process, whose samples and labels are looked up when a loss reads them."""

    @classmethod
    def at(cls, indices: Tensor, samples: Tensor, labels: Tensor | None, z: Tensor, random: torch.Generator) -> Batch:
        batch = object.__new__(cls)
        batch.__dict__.update(z=z, random=random, _of={"real": samples, "labels": labels}, _indices=indices)
        return batch

    def __getattr__(self, name: str) -> Any:
        # Fields have no value yet, and everything else is not there.
        if name not in ("real", "labels"):
            raise AttributeError(name)
        values = self._of[name]
        found = self.__dict__[name] = None if values is None else values[self._indices]
        return found


def _check_labels(recipe: Recipe, data: Dataset) -> None:
    if recipe.conditioning != "none" and data.labels is None:
        raise ValueError(f"conditioning {recipe.conditioning!r} needs labels, which {data.name!r} lacks")


_WIDE = (torch.float32, torch.float64)
_IN_WORDS = {
    "critic_loss": "the critic's loss",
    "generator_loss": "the generator's loss",
    "penalty": "the gradient penalty",
}


def _stacked(rows: list[dict[str, Tensor]]) -> Tensor:
    """``[rows, terms]``, float32, or float64 where there is one."""
    terms = [term if term.dtype in _WIDE else term.float() for row in rows for term in row.values()]
    return torch.stack(terms).view(len(rows), -1)


def _image_size(shape: list[int]) -> int | None:
    return shape[-1] if len(shape) == 3 else None
