"""``lipgan bench step``: training steps of `lipgan.Trainer`, against a loop in plain PyTorch and a bare one.

The plain loop is what users write: torch's spectral normalization per layer, the critic called on real and on fake
samples in turn, double backward for the gradient penalty, optimizers and memory format as torch makes them. The bare
loop has the pieces of the Trainer and nothing around them, but takes its steps by ``optimizer.step()``, as a loop
written by hand does: below 0 % the Trainer saves more there than it adds.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lipgan
from lipgan import data, recipes
from lipgan.bench.harness import Table, in_fresh_process, interleave
from lipgan.data import BatchOrder, Dataset
from lipgan.objectives import losses
from lipgan.recipes import Recipe
from lipgan.systems.gan import GAN
from lipgan.training import Trainer
from lipgan.training.networks import placed

#: The recipe and the data set of each row, and the ratio that is aimed at.
CASES: dict[str, tuple[str, str, float]] = {
    "SN-GAN on digits": ("sngan", "digits", 1.5),
    "WGAN-GP on digits": ("wgan-gp", "digits", 1.35),
}

#: Rows of the table of overheads; the last one is the worst case, where a step is hardly any arithmetic.
OVERHEADS: dict[str, tuple[str, str]] = {
    "SN-GAN on digits": ("sngan", "digits"),
    "WGAN-GP on digits": ("wgan-gp", "digits"),
    "GAN on the ring": ("gan", "ring"),
}

# What no way to a training step can leave out.
_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)

# Steps that are compared before anything is timed, and by how much their losses may differ, relative, in float64.
_CHECKED, _TOLERANCE = 3, 1e-9
_LOG_EVERY = 20


class _Loop:
    """What the loops below share: the networks, and the numbers that a Trainer of the same seed would draw."""

    def __init__(self, generator: nn.Module, critic: nn.Module, recipe: Recipe, dataset: Dataset, seed: int) -> None:
        self.generator, self.critic, self.recipe = generator, critic, recipe
        first = next(generator.parameters())
        self.dtype = first.dtype
        self.samples = dataset.samples.to(first)
        self.ema = copy.deepcopy(generator).eval().requires_grad_(False)
        # The streams of the Trainer.
        self.order = BatchOrder(len(dataset), seed + 1)
        self.random = torch.Generator().manual_seed(seed + 2)
        self.steps = 0
        self.rows: list[dict[str, Tensor]] = []

    def real(self) -> Tensor:
        return self.samples[self.order.next(self.recipe.batch_size)]

    def noise(self) -> Tensor:
        z = torch.randn(self.recipe.batch_size, self.recipe.latent_dim, generator=self.random)
        return z.to(self.dtype)

    def decay(self) -> float:
        return min(self.recipe.ema_decay, (1 + self.steps) / (10 + self.steps))

    def step(self) -> None:
        """One update of the generator, after those of the critic."""
        for _ in range(self.recipe.n_critic):
            row = self.update_critic()
        # The Trainer draws real samples for the generator's update too, for objectives that compare with them.
        torch.randint(len(self.samples), (self.recipe.batch_size,), generator=self.random)
        row |= self.update_generator()
        self.steps += 1
        self.update_average()
        self.rows.append(row)

    def update_critic(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def update_generator(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def update_average(self) -> None:
        raise NotImplementedError


class Plain(_Loop):
    """The recipe in plain PyTorch.

    Args:
        joined: call the critic on real and fake samples at once. Two calls of a spectrally normalized critic are two
            power iterations, and the weights of the second differ, so that only this form has the Trainer's losses.
    """

    def __init__(self, *args: Any, joined: bool = False) -> None:
        super().__init__(*args)
        self.joined = joined
        self.loss = losses.get(self.recipe.loss)
        betas = self.recipe.betas
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=self.recipe.critic_lr, betas=betas)
        self.generator_optimizer = torch.optim.Adam(
            self.generator.parameters(), lr=self.recipe.generator_lr, betas=betas
        )

    def update_critic(self) -> dict[str, Tensor]:
        real, z = self.real(), self.noise()
        with torch.no_grad():
            fake = self.generator(z)
        self.critic_optimizer.zero_grad()
        if self.joined:
            real_scores, fake_scores = self.critic(torch.cat([real, fake])).chunk(2)
        else:
            real_scores, fake_scores = self.critic(real), self.critic(fake)
        loss = self.loss.critic_loss(real_scores, fake_scores)
        row = {"critic_loss": loss.detach()}
        if self.recipe.penalty != "none":
            penalty = self.penalty(real, fake)
            row["penalty"] = penalty.detach()
            loss = loss + penalty
        loss.backward()  # type: ignore[no-untyped-call]
        self.critic_optimizer.step()
        return row

    def penalty(self, real: Tensor, fake: Tensor) -> Tensor:
        eps = torch.rand(len(real), generator=self.random, dtype=self.dtype).view(-1, *[1] * (real.ndim - 1))
        x_hat = (eps * real + (1 - eps) * fake).requires_grad_()
        scores = self.critic(x_hat)
        (gradient,) = torch.autograd.grad(scores, x_hat, torch.ones_like(scores), create_graph=True)
        norms = gradient.flatten(1).norm(2, dim=1)
        penalty: Tensor = self.recipe.penalty_weight * (norms - self.recipe.penalty_target).square().mean()
        return penalty

    def update_generator(self) -> dict[str, Tensor]:
        self.generator_optimizer.zero_grad()
        loss = self.loss.generator_loss(self.critic(self.generator(self.noise())))
        loss.backward()  # type: ignore[no-untyped-call]
        self.generator_optimizer.step()
        return {"generator_loss": loss.detach()}

    @torch.no_grad()
    def update_average(self) -> None:
        decay = self.decay()
        for average, value in zip(self.ema.parameters(), self.generator.parameters(), strict=True):
            average.lerp_(value, 1 - decay)
        for kept, new in zip(self.ema.buffers(), self.generator.buffers(), strict=True):
            kept.copy_(new)


class Bare(_Loop):
    """The recipe with the pieces of the Trainer, written out."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        recipe = self.recipe
        for module in (self.generator, self.critic, self.ema):
            placed(module, torch.device("cpu"))
        if recipe.critic_norm == "spectral":
            lipgan.group_spectral_norm(self.critic)
        self.loss = losses.get(recipe.loss)
        self.weights = {"critic": list(self.critic.parameters()), "generator": list(self.generator.parameters())}
        self.optimizers = {
            name: torch.optim.Adam(weights, lr=lr, betas=recipe.betas, fused=True)
            for (name, weights), lr in zip(self.weights.items(), (recipe.critic_lr, recipe.generator_lr), strict=True)
        }
        averaged = [(a, b) for a, b in zip(self.ema.buffers(), self.generator.buffers(), strict=True) if a.ndim]
        self.averages = [*self.ema.parameters(), *(a for a, _ in averaged)]
        self.averaged = [*self.weights["generator"], *(b for _, b in averaged)]

    def update(self, name: str, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()

    def update_critic(self) -> dict[str, Tensor]:
        real, z = self.real(), self.noise()
        with torch.no_grad():
            fake = self.generator(z)
        scores = self.critic(torch.cat([real, fake]))
        loss = self.loss.critic_loss(*scores.chunk(2))
        row = {"critic_loss": loss.detach()}
        if self.recipe.penalty != "none":
            penalty = lipgan.gradient_penalty(
                self.critic, real, fake, weight=self.recipe.penalty_weight, generator=self.random
            )
            row["penalty"] = penalty.detach()
            loss = loss + penalty
        self.update("critic", loss)
        return row

    def update_generator(self) -> dict[str, Tensor]:
        for weight in self.weights["critic"]:
            weight.requires_grad_(False)
        loss = self.loss.generator_loss(self.critic(self.generator(self.noise())))
        self.update("generator", loss)
        for weight in self.weights["critic"]:
            weight.requires_grad_(True)
        return {"generator_loss": loss.detach()}

    @torch.no_grad()
    def update_average(self) -> None:
        torch._foreach_lerp_(self.averages, self.averaged, 1 - self.decay())


# ---- what is measured ----


def _loops(
    recipe: Recipe, dataset: Dataset, seed: int, dtype: torch.dtype, *, joined: bool = False
) -> tuple[Trainer, Plain, Bare]:
    """The three, from the same weights and singular vectors."""
    torch.manual_seed(seed)
    generator, critic = GAN.build(recipe, dataset.shape, dataset.classes)
    generator.to(dtype)
    critic.to(dtype)
    networks = [copy.deepcopy((generator, critic)) for _ in range(3)]
    if recipe.critic_norm == "spectral":
        for _, theirs in networks:
            # The Trainer's group takes in what torch has normalized, vectors included.
            torch.manual_seed(seed)
            for layer in theirs.modules():
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    torch.nn.utils.parametrizations.spectral_norm(layer)
    trainer = Trainer(*networks[0], recipe, dataset, seed=seed, log_every=_LOG_EVERY)
    plain = Plain(*networks[1], recipe, dataset, seed, joined=joined)
    return trainer, plain, Bare(*networks[2], recipe, dataset, seed)


def _check(recipe: Recipe, dataset: Dataset, seed: int) -> None:
    """The loops have the losses of the Trainer, or nothing is timed."""
    trainer, *loops = _loops(recipe, dataset, seed, torch.float64, joined=recipe.critic_norm == "spectral")
    trainer.log_every = 1
    trainer.fit(_CHECKED)
    for loop in loops:
        for step in range(_CHECKED):
            loop.step()
            for name, value in loop.rows[step].items():
                ours = trainer.history[step][name]
                error = abs(float(value) - ours) / max(1.0, abs(ours))
                if not error < _TOLERANCE:
                    kind = type(loop).__name__
                    raise AssertionError(f"{name} of step {step + 1}: {kind} and Trainer differ by {error:.1e}")


def _times(case: tuple[str, str], seed: int, seconds: float, *, overhead: bool) -> dict[str, float]:
    """Seconds of a step of the Trainer and of the plain loop, or of the bare one."""
    recipe, dataset = recipes.get(case[0]), data.load(case[1])
    _check(recipe, dataset, seed)
    trainer, plain, bare = _loops(recipe, dataset, seed, torch.float32)
    loop = bare if overhead else plain
    # Over whole intervals of logging, which is part of the overhead.
    steps = _LOG_EVERY if overhead else 1

    def run_loop() -> None:
        for _ in range(steps):
            loop.step()
        loop.rows.clear()

    runs: dict[str, Callable[[], object]] = {"loop": run_loop, "lipgan": lambda: trainer.fit(steps)}
    times = interleave(runs, seconds=seconds)
    return {name: value / steps for name, value in times.items()}


class _Convolutions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the seconds of the convolutions that run within it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _CONVOLUTIONS:
            return func(*args, **(kwargs or {}))
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        self.seconds += time.perf_counter() - start
        return result


def _convolution_times(case: tuple[str, str], seed: int, seconds: float) -> dict[str, float]:
    """Seconds of a step of the plain loop, and of the convolutions of its step ("torch") and of the Trainer's."""
    recipe, dataset = recipes.get(case[0]), data.load(case[1])
    trainer, plain, _ = _loops(recipe, dataset, seed, torch.float32)
    seen: dict[str, list[float]] = {"torch": [], "lipgan": []}

    def timed(name: str, step: Callable[[], object]) -> None:
        with _Convolutions() as convolutions:
            step()
        seen[name].append(convolutions.seconds)

    runs: dict[str, Callable[[], object]] = {
        "loop": plain.step,
        "torch": lambda: timed("torch", plain.step),
        "lipgan": lambda: timed("lipgan", lambda: trainer.fit(1)),
    }
    loop = interleave(runs, seconds=seconds)["loop"]
    return {"loop": loop} | {name: statistics.median(values) for name, values in seen.items()}


def run(seed: int = 0, seconds: float = 1.0) -> list[Table]:
    """The tables of the benchmark.

    Args:
        seed: of weights, noise and batches.
        seconds: for each row.
    """
    speed = Table(
        "Training steps of the Trainer against a loop in plain PyTorch, float32, CPU",
        ["recipe", "torch steps/s", "lipgan steps/s", "ratio", "goal"],
        notes=[
            "A step is one update of the generator, those of the critic before it, and the moving average. torch:",
            "torch.nn.utils.parametrizations.spectral_norm per layer, two calls of the critic per update, double",
            "backward, torch.optim.Adam, contiguous tensors, data in memory, fake samples for the critic without",
            f"gradients. Checked first: the losses of {_CHECKED} steps agree in float64 within {_TOLERANCE:.0e}, where",
            "the critic of SN-GAN is called once, since a second call is a second power iteration.",
        ],
    )
    for name, (recipe, dataset, goal) in CASES.items():
        times = in_fresh_process(_speed_times, (recipe, dataset), seed, seconds)
        speed.rows.append(
            {
                "recipe": name,
                "torch steps/s": 1 / times["loop"],
                "lipgan steps/s": 1 / times["lipgan"],
                "ratio": times["loop"] / times["lipgan"],
                "goal": goal,
            }
        )
    overhead = Table(
        "The Trainer against a bare loop over the same pieces, float32, CPU",
        ["recipe", "bare ms", "Trainer ms", "overhead %"],
        notes=[
            f"Over {_LOG_EVERY} steps at a time, after which the Trainer logs; goal for digits: below 3 %.",
            "The bare loop calls optimizer.step(), the Trainer the same kernel with less around it.",
        ],
    )
    for name, case in OVERHEADS.items():
        times = in_fresh_process(_overhead_times, case, seed, seconds)
        overhead.rows.append(
            {
                "recipe": name,
                "bare ms": 1e3 * times["loop"],
                "Trainer ms": 1e3 * times["lipgan"],
                "overhead %": 100 * (times["lipgan"] / times["loop"] - 1),
            }
        )
    shares = Table(
        "The convolutions of a training step, and what a step of nothing else would reach, float32, CPU",
        ["recipe", "torch ms", "torch convolutions ms", "lipgan convolutions ms", "bound"],
        notes=["bound: a step of the loop in plain PyTorch over the convolutions of a step of the Trainer."],
    )
    for name, (recipe, dataset, _) in CASES.items():
        times = in_fresh_process(_convolution_times, (recipe, dataset), seed, seconds)
        shares.rows.append(
            {
                "recipe": name,
                "torch ms": 1e3 * times["loop"],
                "torch convolutions ms": 1e3 * times["torch"],
                "lipgan convolutions ms": 1e3 * times["lipgan"],
                "bound": times["loop"] / times["lipgan"],
            }
        )
    return [speed, overhead, shares]


def _speed_times(case: tuple[str, str], seed: int, seconds: float) -> dict[str, float]:
    return _times(case, seed, seconds, overhead=False)


def _overhead_times(case: tuple[str, str], seed: int, seconds: float) -> dict[str, float]:
    return _times(case, seed, seconds, overhead=True)


def plot(tables: list[Table], axes: Any) -> None:
    """Bars of the ratios, into a matplotlib axes."""
    rows = tables[0].rows
    axes.barh([row["recipe"] for row in rows], [row["ratio"] for row in rows])
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("times as many steps per second as the loop in plain PyTorch")
    axes.set_title(tables[0].title)
