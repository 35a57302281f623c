"""``lipgan bench spectral-norm``: every weight of a model normalized and differentiated, against PyTorch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lipgan
from lipgan.bench.harness import Table, copy_bandwidth, interleave, peak_memory

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
        return torch.autograd.grad(self.forward(), self.parameters, self.grads)

    def set_state(self, other: _Variant) -> None:
        self.model.load_state_dict(other.model.state_dict())


def _torch(model: nn.Sequential) -> None:
    for layer in model:
        parametrizations.spectral_norm(layer)


def _per_layer(model: nn.Sequential) -> None:
    for layer in model:
        lipgan.spectral_norm(layer)


def _variants(shapes: Shapes, seed: int) -> dict[str, _Variant]:
    torch.manual_seed(seed)
    base = _model(shapes)
    grads = [torch.randn(shape) for shape in shapes]
    variants = {
        "torch": _Variant(base, _torch, grads),
        "per layer": _Variant(base, _per_layer, grads),
        "grouped": _Variant(base, lipgan.group_spectral_norm, grads),
    }
    for variant in variants.values():
        variant.set_state(variants["torch"])
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


def run(seed: int = 0, seconds: float = 3.0) -> list[Table]:
    """The tables of the benchmark.

    Args:
        seed: of the weights.
        seconds: for each model.
    """
    bandwidth = copy_bandwidth()
    speed = Table(
        "Spectral normalization of all weights, forward and backward, float32, CPU",
        ["model", "weights", "M numbers", "torch ms", "per layer ms", "ratio", "grouped ms", "ratio grouped", "copy"],
        notes=[
            "ratio: torch.nn.utils.parametrizations.spectral_norm over lipgan, medians of one interleaved run.",
            "copy: bytes per second of the grouped form (forward: W twice, Y; backward: dY twice, Y, dW) as a share of",
            f"the {bandwidth / 1e9:.1f} GB/s of a large Tensor.copy_; above 1 where caches serve the second reading.",
        ],
    )
    memory = Table(
        "Memory of the largest model beyond weights and incoming gradients, in copies of the weights",
        ["variant", "forward", "forward and backward"],
        notes=["Forward returns one copy (the normalized weights), backward another (their gradients)."],
    )
    for name, shapes in MODELS.items():
        variants = _variants(shapes(), seed)
        _check(variants)
        times = interleave({key: variant.step for key, variant in variants.items()}, seconds=seconds)
        numbers = sum(parameter.numel() for parameter in variants["torch"].parameters)
        speed.rows.append(
            {
                "model": name,
                "weights": len(shapes()),
                "M numbers": numbers / 1e6,
                "torch ms": 1e3 * times["torch"],
                "per layer ms": 1e3 * times["per layer"],
                "ratio": times["torch"] / times["per layer"],
                "grouped ms": 1e3 * times["grouped"],
                "ratio grouped": times["torch"] / times["grouped"],
                "copy": 7 * 4 * numbers / times["grouped"] / bandwidth,
            }
        )
        if name == list(MODELS)[-1]:
            for key, variant in variants.items():
                forward, both = peak_memory(variant.forward), peak_memory(variant.step)
                if forward is not None and both is not None:
                    copies = {"forward": forward / (4 * numbers), "forward and backward": both / (4 * numbers)}
                    memory.rows.append({"variant": key, **copies})
    return [speed, memory, _growth(seed, seconds)]


def _growth(seed: int, seconds: float) -> Table:
    """Cost against the number of weights."""
    table = Table(
        "Cost of n weights of 128 x 1152, forward and backward",
        ["n", "torch us per weight", "per layer us per weight", "grouped us per weight"],
    )
    for n in COUNTS:
        variants = _variants([(128, 128, 3, 3)] * n, seed)
        times = interleave({key: variant.step for key, variant in variants.items()}, seconds=seconds / len(COUNTS))
        per_weight = {f"{key} us per weight": 1e6 * value / n for key, value in times.items()}
        table.rows.append({"n": n, **per_weight})
    return table


def plot(tables: list[Table], axes: Any) -> None:
    """Bars of the ratios, into a matplotlib axes."""
    rows = tables[0].rows
    positions = range(len(rows))
    axes.bar([x - 0.2 for x in positions], [row["ratio"] for row in rows], 0.4, label="per layer")
    axes.bar([x + 0.2 for x in positions], [row["ratio grouped"] for row in rows], 0.4, label="grouped")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(list(positions), [row["model"] for row in rows])
    axes.set_ylabel("times as fast as torch")
    axes.set_title("Spectral normalization, forward and backward, CPU")
    axes.legend()
