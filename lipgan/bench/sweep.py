"""``lipgan bench sweep``: from the smallest to the largest sizes, and where lipgan is slower than PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lipgan
from lipgan.bench import critics
from lipgan.bench.frechet import by_eigvals
from lipgan.bench.harness import Table, in_fresh_process, interleave
from lipgan.metrics import FeatureStats

WIDTHS = [4, 16, 64, 256, 1024, 4096]
BATCHES = [1, 2, 16, 256, 4096]
ITEMS = [1, 64, 4096, 262_144]  # numbers of a sample
FEATURES = [4, 16, 64, 256, 1024]
# Multiplications of a forward pass, and numbers of a batch, beyond which a row would take a minute.
_MOST_WORK, _MOST_NUMBERS = 2**31, 2**27

TORCH, OURS = "torch ms", "lipgan ms"
# A variant's result, or the parts of it.
Variant = Callable[[], Any]


def _layer(n: int, seed: int) -> tuple[Variant, Variant]:
    """A linear layer's weight, normalized and differentiated."""
    torch.manual_seed(seed)
    incoming = torch.randn(n, n)
    runs = []
    base = nn.Linear(n, n, bias=False)
    for normalize in (parametrizations.spectral_norm, lipgan.spectral_norm):
        layer = nn.Linear(n, n, bias=False)
        layer.load_state_dict(base.state_dict())
        torch.manual_seed(seed)
        normalize(layer)
        original = layer.get_parameter("parametrizations.weight.original")

        def run(layer: nn.Linear = layer, original: Tensor = original) -> tuple[Tensor, Tensor]:
            weight = layer.weight
            return weight.detach(), torch.autograd.grad(weight, original, incoming)[0]

        runs.append(run)
    return runs[0], runs[1]


def _penalty(width: int, batch: int, seed: int) -> tuple[Variant, Variant]:
    """A perceptron's gradient penalty with the gradients of its parameters."""
    torch.manual_seed(seed)
    critic = critics.perceptron(2, width, width, 1)
    real, fake = torch.randn(batch, 2), torch.randn(batch, 2) + 1
    parameters = [p for p in critic.parameters() if p.ndim > 1]  # autograd has no gradients of biases

    def run(engine: str) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        penalty = lipgan.gradient_penalty(critic, real, fake, engine=engine, generator=generator)
        return [penalty.detach(), *torch.autograd.grad(penalty, parameters)]

    return partial(run, "autograd"), partial(run, "auto")


def _mixture(items: int, batch: int, seed: int) -> tuple[Variant, Variant]:
    torch.manual_seed(seed)
    real, fake = torch.randn(batch, items), torch.randn(batch, items)

    def textbook() -> Tensor:
        eps = torch.rand(batch, 1, generator=torch.Generator().manual_seed(seed))
        return eps * real + (1 - eps) * fake

    return textbook, lambda: lipgan.interpolate(real, fake, generator=torch.Generator().manual_seed(seed))


def _distance(d: int, seed: int) -> tuple[Variant, Variant]:
    generator = torch.Generator().manual_seed(seed)
    sides = [FeatureStats(d).update(torch.randn(4 * d + 8, d, generator=generator) + k) for k in range(2)]
    statistics = sides[0].mean, sides[0].cov, sides[1].mean, sides[1].cov
    return partial(by_eigvals, *statistics), partial(lipgan.frechet_distance, *statistics)


def _cases() -> Iterator[tuple[str, str, Callable[[int], tuple[Variant, Variant]]]]:
    """What is computed, at which size, and how it is made of a seed."""
    for n in WIDTHS:
        yield "spectral norm of a weight, with its backward", f"{n} x {n}", partial(_layer, n)
    for width in WIDTHS:
        for batch in BATCHES:
            if batch * width * width <= _MOST_WORK:
                size = f"2-{width}-{width}-1, batch {batch}"
                yield "gradient penalty of a perceptron", size, partial(_penalty, width, batch)
    for items in ITEMS:
        for batch in BATCHES:
            if batch * items <= _MOST_NUMBERS:
                yield "mixtures of samples", f"{batch} x {items}", partial(_mixture, items, batch)
    for d in FEATURES:
        yield "Frechet distance of statistics", f"{d} features", partial(_distance, d)


def _times(make: Callable[[int], tuple[Variant, Variant]], seed: int, seconds: float) -> dict[str, float]:
    """Seconds of both, once they agree."""
    by_torch, ours = make(seed)
    return interleave({TORCH: by_torch, OURS: ours}, seconds=seconds, warmup=3, check=_check)


def _check(results: dict[str, Any]) -> None:
    """Both agree, or nothing is timed."""
    for one, other in zip(*(_tensors(results[name]) for name in (TORCH, OURS)), strict=True):
        bound = 2e-3 * float(other.abs().max()) + 1e-6
        if not float((one - other).abs().max()) <= bound:
            raise AssertionError(f"results differ by {float((one - other).abs().max()):.1e}")


def _tensors(result: Any) -> list[Tensor]:
    return [torch.as_tensor(part) for part in (result if isinstance(result, (list, tuple)) else [result])]


def run(seed: int = 0, seconds: float = 1.0) -> list[Table]:
    """Compare, and time; ``seconds`` for each group of rows."""
    tables: dict[str, Table] = {}
    cases = [*_cases()]
    for what, size, make in cases:
        table = tables.setdefault(what, Table(what, ["size", TORCH, OURS, "ratio"]))
        rows = sum(other == what for other, _, _ in cases)
        times = in_fresh_process(_times, make, seed, seconds / rows)
        ratio = times[TORCH] / times[OURS]
        table.rows.append({"size": size, **{name: 1e3 * taken for name, taken in times.items()}, "ratio": ratio})
    for table in tables.values():
        slower = [f"{row['size']} ({row['ratio']:.2f})" for row in table.rows if row["ratio"] < 1]
        table.notes.append(f"Slower than PyTorch: {', '.join(slower) or 'nowhere'}.")
    return [*tables.values()]


def plot(tables: list[Table], axes: Any) -> None:
    """A mark for the ratio of each row, a line of them for each table, and the size where lipgan is the slowest."""
    for k, table in enumerate(tables):
        axes.plot([row["ratio"] for row in table.rows], [k] * len(table.rows), linestyle="", alpha=0.6)
        least = min(table.rows, key=lambda row: float(row["ratio"]))
        axes.annotate(least["size"], (least["ratio"], k), (0, 7), textcoords="offset points", ha="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(tables)), [table.title.replace(" of ", "\nof ", 1) for table in tables])
    axes.margins(x=0.1, y=0.2)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="time of PyTorch / time of lipgan", title="From the smallest to the largest sizes")
