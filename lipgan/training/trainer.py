"""The training loop of a two-player game, and nothing else: no files but the checkpoint, no printing, no
signals."""

import copy
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lipgan import data as datasets
from lipgan import losses, models
from lipgan.data import BatchOrder, Dataset
from lipgan.nn import group_spectral_norm
from lipgan.penalties import gradient_penalty
from lipgan.recipes import Recipe
from lipgan.recipes import get as get_recipe
from lipgan.training import checkpoint
from lipgan.training.checkpoint import CheckpointError
from lipgan.training.random import PrivateRandom

__all__ = ["Trainer", "TrainingDiverged", "draw", "load_generator"]

Row = dict[str, Any]

# Offsets that turn one seed into independent streams.
_ORDER, _NOISE, _GLOBAL = 1, 2, 3
_DRAW_BATCH = 256


class TrainingDiverged(ArithmeticError):
    """A loss or a weight became NaN or infinite. ``step`` is the first step where it showed."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"training diverged: {what} at step {step}")
        self.step = step


class Trainer:
    """Trains a generator against a critic as a recipe says.

    One step is ``n_critic`` updates of the critic, one of the generator, one of the moving average. Real
    and fake samples go through the critic as one batch: one normalization of the weights instead of two. The
    networks may be float32 or float64; samples and noise follow the generator.

    A run is a function of the seed alone, whatever the user draws from torch's global generators, and a run
    that is saved, loaded and continued gives the same bits as one that was never interrupted (same device,
    build and number of threads).

    Args:
        generator: maps noise ``[B, latent_dim]`` to samples and has an integer attribute ``latent_dim``.
        critic: maps samples to scores ``[B]``; normalized in place when the recipe says so.
        recipe: a `Recipe`, or the name of one.
        data: a `Dataset`, or the name of one.
        seed: of initial singular vectors, noise, data order, and whatever the modules draw themselves.
        device: where to train; the modules are moved there.
        log_every: steps per row of ``history``.
        penalty_engine: the ``engine`` of `lipgan.gradient_penalty`, for recipes with a penalty.

    Attributes:
        step: generator updates so far.
        ema: the moving average of the generator, which is what gets sampled (Yazici et al. 2019,
            arXiv:1806.04498).
        history: one row per ``log_every`` steps: step, mean critic_loss (without the penalty), mean
            generator_loss, sigma (the largest spectral norm among the critic's weights before division; None
            without spectral normalization), mean penalty (None without one).

    Raises:
        ValueError: an unknown recipe or data set, ``log_every`` below 1, a generator without ``latent_dim``.
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
        if log_every < 1:
            raise ValueError(f"log_every must be at least 1, got {log_every}")
        self.recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
        self.data = datasets.load(data) if isinstance(data, str) else data
        self.seed, self.log_every, self.penalty_engine = seed, log_every, penalty_engine
        self.device = torch.device(device)
        self.latent_dim = _latent_dim(generator)
        self._random = PrivateRandom(seed + _GLOBAL, self.device)

        self.generator = _placed(generator, self.device)
        self.critic = _placed(critic, self.device)
        with self._random.active():
            self.group = group_spectral_norm(self.critic) if self.recipe.critic_norm == "spectral" else None
        self.ema = copy.deepcopy(self.generator).eval().requires_grad_(False)
        self._averages = _Averages(self.ema, self.generator)

        self.loss = losses.get(self.recipe.loss)
        self.generator_optimizer = self._adam(self.generator, self.recipe.generator_lr)
        self.critic_optimizer = self._adam(self.critic, self.recipe.critic_lr)
        self._dtype = next(generator.parameters()).dtype
        self._samples = self.data.samples.to(self.device, self._dtype)
        self._order = BatchOrder(len(self.data), seed + _ORDER)
        self._noise = torch.Generator().manual_seed(seed + _NOISE)

        self.step = 0
        self.history: list[Row] = []
        # The losses of the critic and the generator and the penalty, [3], for every step since the last row.
        self._unlogged: list[Tensor] = []
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
        recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
        data = datasets.load(data) if isinstance(data, str) else data
        with PrivateRandom(seed, torch.device("cpu")).active():
            generator, critic = models.build(recipe.architecture, data.shape)
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
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self._stopping = False
        with self._random.active():
            for _ in range(steps):
                self._train_step()
                if self.step % self.log_every == 0:
                    self._log()
                for callback in callbacks:
                    callback(self)
                if self._stopping:
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
        """Write a checkpoint, atomically.

        Raises:
            TrainingDiverged: the state holds NaN or infinite numbers; a file at ``path`` stays as it is.
            OSError: the file cannot be written; a file at ``path`` stays as it is.
        """
        self._check_finite()
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
            CheckpointError: not a whole checkpoint, or one that does not fit the networks or the data.
        """
        state = checkpoint.read(path)
        with _explaining(path):
            recipe = _recipe(state)
            if data is None:
                data = datasets.load(state["data"], state["shape"][-1])
            elif list(data.shape) != state["shape"]:
                raise ValueError(f"it was trained on samples of shape {state['shape']}, got {list(data.shape)}")
            if (generator is None) != (critic is None):
                raise ValueError("pass both generator and critic, or neither")
            if generator is None or critic is None:
                generator, critic = models.build(recipe.architecture, tuple(state["shape"]))
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
            "recipe": dataclasses.asdict(self.recipe),
            "data": self.data.name,
            "shape": list(self.data.shape),
            "seed": self.seed,
            "log_every": self.log_every,
            "step": self.step,
            "generator": self.generator.state_dict(),
            "critic": self.critic.state_dict(),
            "ema": self.ema.state_dict(),
            "generator_optimizer": self.generator_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "order": self._order.state_dict(),
            "noise": self._noise.get_state(),
            "random": self._random.state(),
            "history": self.history,
            "unlogged": [pair.cpu() for pair in self._unlogged],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.generator.load_state_dict(state["generator"])
        self.critic.load_state_dict(state["critic"])
        self.ema.load_state_dict(state["ema"])
        self.generator_optimizer.load_state_dict(state["generator_optimizer"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self._order.load_state_dict(state["order"])
        self._noise.set_state(state["noise"])
        self._random.load_state(state["random"])
        self.history = list(state["history"])
        self._unlogged = [pair.to(self.device) for pair in state["unlogged"]]
        self.step = state["step"]

    def _adam(self, module: nn.Module, lr: float) -> torch.optim.Adam:
        # Fused: one pass over all weights instead of a dozen small operations for each.
        return torch.optim.Adam(module.parameters(), lr=lr, betas=self.recipe.betas, fused=True)

    def _train_step(self) -> None:
        for _ in range(self.recipe.n_critic):
            critic_loss, penalty = self._critic_step()
        generator_loss = self._generator_step()
        self.step += 1
        # Early on the average would be mostly the random start, so it begins short and grows.
        self._averages.update(min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step)))
        self._unlogged.append(torch.stack([critic_loss, generator_loss, penalty]).detach())

    def _critic_step(self) -> tuple[Tensor, Tensor]:
        real = self._samples[self._order.next(self.recipe.batch_size).to(self.device)]
        with torch.no_grad():
            fake = self.generator(self._draw_noise())
        real_scores, fake_scores = self.critic(torch.cat([real, fake])).chunk(2)
        loss = self.loss.critic_loss(real_scores, fake_scores)
        penalty = self._penalty(real, fake)
        self.critic_optimizer.zero_grad()
        (loss + penalty).backward()  # type: ignore[no-untyped-call]
        self.critic_optimizer.step()
        return loss, penalty

    def _penalty(self, real: Tensor, fake: Tensor) -> Tensor:
        recipe = self.recipe
        if recipe.penalty == "none":
            return torch.zeros((), dtype=real.dtype, device=real.device)
        return gradient_penalty(
            self.critic,
            real,
            fake,
            kind=recipe.penalty,
            weight=recipe.penalty_weight,
            target=recipe.penalty_target,
            engine=self.penalty_engine,
            generator=self._noise,
        )

    def _generator_step(self) -> Tensor:
        # The critic's weights need no gradients here, which saves a third of its backward pass.
        trainable = [p for p in self.critic.parameters() if p.requires_grad]
        for p in trainable:
            p.requires_grad_(False)
        loss = self.loss.generator_loss(self.critic(self.generator(self._draw_noise())))
        self.generator_optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.generator_optimizer.step()
        for p in trainable:
            p.requires_grad_(True)
        return loss

    def _draw_noise(self) -> Tensor:
        # Drawn on the CPU so that a seed means the same noise on every device.
        return torch.randn(self.recipe.batch_size, self.latent_dim, generator=self._noise).to(self.device, self._dtype)

    def _log(self) -> None:
        # The only place where the loop waits for an accelerator.
        self._check_losses()
        critic_loss, generator_loss, penalty = torch.stack(self._unlogged).double().mean(0).tolist()
        sigma = max(self.group.sigmas().values()) if self.group is not None else None
        self.history.append(
            {
                "step": self.step,
                "critic_loss": critic_loss,
                "generator_loss": generator_loss,
                "sigma": sigma,
                "penalty": None if self.recipe.penalty == "none" else penalty,
            }
        )
        self._unlogged.clear()

    def _check_losses(self) -> None:
        if not self._unlogged:
            return
        finite = torch.stack(self._unlogged).isfinite().tolist()
        for step, fine in enumerate(finite, start=self.step - len(finite) + 1):
            if not all(fine):
                names = ("the critic's loss", "the generator's loss", "the gradient penalty")
                raise TrainingDiverged(step, f"{names[fine.index(False)]} is not finite")

    def _check_finite(self) -> None:
        self._check_losses()
        for role, module in (("generator", self.generator), ("critic", self.critic), ("average", self.ema)):
            for name, tensor in module.state_dict().items():
                if not bool(tensor.isfinite().all()):
                    raise TrainingDiverged(self.step, f"{name} of the {role} is not finite")


class _Averages:
    """Keeps ``ema`` an exponential moving average of ``module``, of its batch-norm statistics too."""

    def __init__(self, ema: nn.Module, module: nn.Module) -> None:
        pairs = list(zip(ema.state_dict().values(), module.state_dict().values(), strict=True))
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counters = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        averages, values = (list(side) for side in zip(*self._floats, strict=True))
        torch._foreach_lerp_(averages, values, 1 - decay)
        for average, value in self._counters:
            average.copy_(value)


@torch.no_grad()
def draw(generator: nn.Module, n: int, seed: int) -> Tensor:
    """``n`` samples of a generator in eval mode: ``[n, ...]``, float32, on the CPU.

    The noise is a function of the seed alone.

    Raises:
        ValueError: ``n`` below 1, or a generator without ``latent_dim``.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    first = next(generator.parameters())
    noise = torch.randn(n, _latent_dim(generator), generator=torch.Generator().manual_seed(seed))
    return torch.cat([generator(z.to(first)).float().cpu() for z in torch.split(noise, _DRAW_BATCH)])


def load_generator(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> nn.Module:
    """The averaged generator of a checkpoint, in eval mode, without the critic, the optimizers or the data.

    Raises:
        OSError: the file cannot be read.
        CheckpointError: not a whole checkpoint, or its generator is not of the recipe's architecture.
    """
    state = checkpoint.read(path)
    with _explaining(path):
        generator, _ = models.build(_recipe(state).architecture, tuple(state["shape"]))
        generator.load_state_dict(state["ema"])
    return _placed(generator, torch.device(device)).eval().requires_grad_(False)


def _placed(module: nn.Module, device: torch.device) -> nn.Module:
    # Convolutions on the CPU and on tensor cores both want channels last; digits train 1.7 times as fast.
    module.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module


def _latent_dim(generator: nn.Module) -> int:
    latent_dim = getattr(generator, "latent_dim", None)
    if not isinstance(latent_dim, int) or latent_dim < 1:
        raise ValueError(f"the generator needs an attribute latent_dim, an integer >= 1, got {latent_dim!r}")
    return latent_dim


def _recipe(state: dict[str, Any]) -> Recipe:
    return Recipe(**{**state["recipe"], "betas": tuple(state["recipe"]["betas"])})


@contextmanager
def _explaining(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn whatever a checkpoint of other content provokes into one sentence."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(f"checkpoint {path} lacks the entry {error}") from error
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"checkpoint {path} does not fit: {reason[:300]}") from error
