"""``lipgan bench spectral-norm``: every weight of a model normalized and differentiated, against PyTorch."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lipgan
from lipgan.bench import device as on_device
from lipgan.bench.harness import Caches, Table, copy_bandwidth, in_fresh_process, interleave, peak_memory

Shapes = list[tuple[int, ...]]


def mlp() -> Shapes:
    """2-512-512-512-1."""
    return [(512, 2), (512, 512), (512, 512), (1, 512)]


def sngan_32() -> Shapes:
    """The critic of SNGAN for 32 x 32 images (Miyato et al. 2018, table 4): 1.05 million numbers."""
    first = [(128, 3, 3, 3), (128, 128, 3, 3), (128, 3, 1, 1)]
    second = [(128, 128, 3, 3), (128, 128, 3, 3), (128, 128, 1, 1)]
    return [*first, *second, *[(128, 128, 3, 3)] * 4, (1, 128)]


def resnet_128() -> Shapes:
    """A residual critic for 128 x 128 images: six blocks of two 3 x 3 convolutions and a 1 x 1 shortcut, a head."""
    widths = [3, 64, 128, 256, 512, 1024, 1024]
    shapes: Shapes = []
    for narrow, wide in itertools.pairwise(widths):
        shapes += [(wide, narrow, 3, 3), (wide, wide, 3, 3)]
        if narrow != wide:
            shapes.append((wide, narrow, 1, 1))
    return [*shapes, (1, widths[-1])]


MODELS: dict[str, Callable[[], Shapes]] = {
    "MLP 2-512-512-512-1": mlp,
    "SNGAN-32 critic": sngan_32,
    "ResNet-128 critic": resnet_128,
}


# Of equal weights, to show how the cost grows.
COUNTS = [1, 2, 4, 8, 16, 32, 64]


def _model(shapes: Shapes) -> nn.Sequential:
    layers: list[nn.Module] = []
    for shape in shapes:
        if len(shape) == 2:
            layers.append(nn.Linear(shape[1], shape[0], bias=False))
        else:
            layers.append(nn.Conv2d(shape[1], shape[0], shape[2], bias=False))
    return nn.Sequential(*layers)


class _Incoming(torch.autograd.Function):
    """A scalar of the normalized weights, whose backward hands each of them a gradient that is there already.

    So the gradients arrive as from the layers of a model: ``torch.autograd.grad`` with one ``grad_outputs`` for each
    weight checks all of them first, which takes longer than to normalize a small model.
    """

    @staticmethod
    def forward(ctx: Any, grads: list[Tensor], *weights: Tensor) -> Tensor:
        ctx.grads = grads
        return weights[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.grads)


class _Variant:
    """A model whose weights are normalized in one way."""

    def __init__(self, base: nn.Sequential, apply: Callable[[nn.Sequential], Any], grads: list[Tensor]) -> None:
        self.model = copy.deepcopy(base)
        self.group = apply(self.model)
        self.grads = grads
        self.parameters = [layer.get_parameter("parametrizations.weight.original") for layer in self.model]

    def forward(self) -> list[Tensor]:
        if isinstance(self.group, lipgan.SpectralNormGroup):
            return self.group.normalize()
        return [layer.weight for layer in self.model]  # type: ignore[misc]

    def step(self) -> tuple[Tensor, ...]:
        scalar = _Incoming.apply(self.grads, *self.forward())  # type: ignore[no-untyped-call]
        return torch.autograd.grad(scalar, self.parameters)

    def set_state(self, other: _Variant) -> None:
        self.model.load_state_dict(other.model.state_dict())


def _torch(model: nn.Sequential) -> None:
    for layer in model:
        parametrizations.spectral_norm(layer)


def _per_layer(model: nn.Sequential) -> None:
    for layer in model:
        lipgan.spectral_norm(layer)


VARIANTS: dict[str, Callable[[nn.Sequential], Any]] = {
    "torch": _torch,
    "per layer": _per_layer,
    "grouped": lipgan.group_spectral_norm,
}


def _variants(shapes: Shapes, seed: int, only: str | None = None) -> dict[str, _Variant]:
    """The variants, or one of them, with equal weights and vectors."""
    torch.manual_seed(seed)
    base = _model(shapes)
    grads = [torch.randn(shape) for shape in shapes]
    names = VARIANTS if only is None else [only]
    variants = {name: _Variant(base, VARIANTS[name], grads) for name in names}
    first = next(iter(variants.values()))
    for variant in variants.values():
        variant.set_state(first)
    return variants


def _placed(variants: dict[str, _Variant], device: torch.device) -> dict[str, _Variant]:
    for variant in variants.values():
        variant.model.to(device)
        variant.grads = [grad.to(device) for grad in variant.grads]
        variant.parameters = [layer.get_parameter("parametrizations.weight.original") for layer in variant.model]
    return variants


def _check(variants: dict[str, _Variant]) -> None:
    """The variants agree with PyTorch in the normalized weights and in the gradients, or nothing is timed."""
    truth_weights, truth_grads = variants["torch"].forward(), variants["torch"].step()
    for name in ("per layer", "grouped"):
        weights, grads = variants[name].forward(), variants[name].step()
        for kind, ours, theirs in (("weight", weights, truth_weights), ("gradient", grads, truth_grads)):
            for layer, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                error = ((a - b).abs().max() / b.abs().max()).item()
                if not error < 1e-4:
                    raise AssertionError(f"{name}: the {kind} of layer {layer} is off by {error:.1e}, relative")


def run(seed: int = 0, seconds: float = 1.0) -> list[Table]:
    """The tables of the benchmark.

    Args:
        seed: of the weights.
        seconds: for each model.
    """
    bandwidth = in_fresh_process(copy_bandwidth)
    speed = Table(
        "Spectral normalization of all weights, forward and backward, float32, CPU",
        ["model", "weights", "M numbers", "torch ms", "per layer ms", "ratio", "grouped ms", "ratio grouped", "copy"],
        notes=[
            "ratio: torch.nn.utils.parametrizations.spectral_norm over lipgan, medians of interleaved runs; each model",
            "in a fresh process. copy: bytes per second of the grouped form (forward: 2 W, Y; backward: 2 dY, Y, and",
            f"dW) as a share of the {bandwidth / 1e9:.1f} GB/s of a large Tensor.copy_; above 1 where caches serve.",
        ],
    )
    cold = Table(
        "The same between other work, which leaves the caches to others",
        ["model", "torch ms", "per layer ms", "ratio", "grouped ms", "ratio grouped"],
        notes=["Before each call, outside of its time, 64 MB are read and written: what the rest of a step does."],
    )
    memory = Table(
        f"Memory that the {list(MODELS)[-1]} takes beyond weights and incoming gradients, in copies of the weights",
        ["variant", "forward", "forward and backward"],
        notes=[
            "Forward returns one copy (the normalized weights), backward another (their gradients); of lipgan in the",
            "memory of the first, which nobody holds any more.",
        ],
    )
    for name, shapes in MODELS.items():
        times = in_fresh_process(_times, shapes(), seed, seconds)
        numbers = sum(math.prod(shape) for shape in shapes())
        cold.rows.append({"model": name, **_cells(in_fresh_process(_times, shapes(), seed, seconds, True))})
        speed.rows.append(
            {
                "model": name,
                "weights": len(shapes()),
                "M numbers": numbers / 1e6,
                **_cells(times),
                "copy": 7 * 4 * numbers / times["grouped"] / bandwidth,
            }
        )
    for key in VARIANTS:
        peaks = in_fresh_process(_peaks, shapes(), seed, key)
        if None not in peaks:
            memory.rows.append({"variant": key, **dict(zip(memory.columns[1:], peaks, strict=True))})
    growth = Table(
        "Cost of n weights of 128 x 1152, forward and backward, in microseconds per weight",
        ["n", *VARIANTS],
        notes=["A flat column is a cost that grows linearly in the number of weights."],
    )
    for n in COUNTS:
        times = in_fresh_process(_times, [(128, 128, 3, 3)] * n, seed, seconds / 2)
        growth.rows.append({"n": n, **{key: 1e6 * value / n for key, value in times.items()}})
    return [speed, cold, memory, growth]


def _cells(times: dict[str, float]) -> dict[str, float]:
    return {
        "torch ms": 1e3 * times["torch"],
        "per layer ms": 1e3 * times["per layer"],
        "ratio": times["torch"] / times["per layer"],
        "grouped ms": 1e3 * times["grouped"],
        "ratio grouped": times["torch"] / times["grouped"],
    }


def run_on(device: torch.device, seed: int = 0, seconds: float = 3.0, timer: Any = None) -> list[Table]:
    """The table of the benchmark on a GPU: its time and that of the host apart.

    Args:
        device: the GPU.
        seed: of the weights.
        seconds: for each model.
        timer: what takes the times; None for `lipgan.bench.device.Timer`.
    """
    timer = on_device.Timer(device) if timer is None else timer
    table = Table(
        f"Spectral normalization of all weights, forward and backward, float32, {on_device.name_of(device)}",
        ["model", "weights", "M numbers", *on_device.columns(VARIANTS), "ratio", "ratio grouped"],
        notes=[*on_device.NOTES, "ratio: torch over lipgan, of device times."],
    )
    for name, shapes in MODELS.items():
        variants = _placed(_variants(shapes(), seed), device)
        _check(variants)
        times = timer.interleave({key: variant.step for key, variant in variants.items()}, seconds=seconds)
        numbers = sum(math.prod(shape) for shape in shapes())
        table.rows.append(
            {
                "model": name,
                "weights": len(shapes()),
                "M numbers": numbers / 1e6,
                **on_device.cells(times),
                "ratio": times["torch"].device / times["per layer"].device,
                "ratio grouped": times["torch"].device / times["grouped"].device,
            }
        )
    return [table]


def _times(shapes: Shapes, seed: int, seconds: float, cold: bool = False) -> dict[str, float]:
    """Seconds of a forward and backward of each variant."""
    variants = _variants(shapes, seed)
    _check(variants)
    between = Caches().empty if cold else None
    return interleave(
        {key: variant.step for key, variant in variants.items()}, seconds=seconds, warmup=5, between=between
    )


def _peaks(shapes: Shapes, seed: int, key: str) -> tuple[float | None, ...]:
    """Peak memory of a first forward, and of a first forward and backward, in copies of the weights."""
    copy_of_weights = 4 * sum(math.prod(shape) for shape in shapes)
    peaks: list[float | None] = []
    for name in ("forward", "step"):
        variant = _variants(shapes, seed, only=key)[key]
        lipgan.ops.empty_cache()
        peak = peak_memory(getattr(variant, name))
        peaks.append(None if peak is None else peak / copy_of_weights)
    return tuple(peaks)


def plot(tables: list[Table], axes: Any) -> None:
    """Bars of the ratios, into a matplotlib axes."""
    rows = tables[0].rows
    positions = range(len(rows))
    axes.bar([x - 0.2 for x in positions], [row["ratio"] for row in rows], 0.4, label="per layer")
    axes.bar([x + 0.2 for x in positions], [row["ratio grouped"] for row in rows], 0.4, label="grouped")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(list(positions), [row["model"] for row in rows])
    axes.set_ylabel("times as fast as torch")
    axes.set_title(tables[0].title)
    axes.legend()
