"""``lipgan bench compiled-penalty``: penalties by torch.compile, against the textbook compiled, and against plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import lipgan
from lipgan.bench.gradient_penalty import CASES, MORE_CASES, Case
from lipgan.bench.harness import Table, in_fresh_process, interleave

COMPILED = (
    "DCGAN-32, batch 64",
    "DCGAN-32, instance norm",
    "U-Net, batch 16",
    "transformer of 2 blocks, 16 steps, batch 16",
    "MLP 2-128-128-1, layer norm and GELU, batch 256",
    "MLP 2-16-16-1, tanh, batch 64",
)

# A value, and a gradient for each parameter, None for zeros.
Step = Callable[[], tuple[Any, ...]]


def _textbook(critic: nn.Module, x: Tensor, *, compiled: bool) -> Step:
    """R1 by double backward, as a function of the weights; the whole of it can be traced and compiled."""
    names = [name for name, _ in critic.named_parameters()]

    def function(x: Tensor, *weights: Tensor) -> tuple[Any, ...]:
        with torch.enable_grad():
            leaves = [weight.detach().requires_grad_() for weight in weights]
            points = x.detach().requires_grad_()
            scores = torch.func.functional_call(critic, dict(zip(names, leaves, strict=True)), (points,))
            (gradient,) = torch.autograd.grad(scores.sum(), points, create_graph=True)
            penalty = 5 * gradient.flatten(1).square().sum(1).mean()
            return penalty.detach(), *torch.autograd.grad(penalty, leaves, allow_unused=True, materialize_grads=True)

    weights = [p.detach() for p in critic.parameters()]
    if not compiled:
        return lambda: function(x, *weights)
    traced = torch.compile(make_fx(function)(x, *weights), dynamic=False)

    def run() -> tuple[Any, ...]:
        with torch.no_grad():
            return traced(x, *weights)  # type: ignore[no-any-return]

    return run


def _lipgan(critic: nn.Module, x: Tensor, *, compiled: bool) -> Step:
    parameters = [*critic.parameters()]

    def run() -> tuple[Any, ...]:
        penalty = lipgan.gradient_penalty(critic, x, kind="r1", engine="fused", compile=compiled)
        return penalty.detach(), *torch.autograd.grad(penalty, parameters, allow_unused=True)

    return run


def _times(name: str, seed: int, seconds: float) -> dict[str, float]:
    """Seconds of each way, after their results were compared."""
    case: Case = replace(CASES[name] if name in CASES else MORE_CASES[name], kind="r1")
    steps: dict[str, Step] = {}
    for way, make in (("torch", _textbook), ("lipgan", _lipgan)):
        for compiled in (False, True):
            torch.manual_seed(seed)
            critic, x = case.critic().eval(), torch.randn(case.shape)
            steps[f"{way}, compiled" if compiled else way] = make(critic, x, compiled=compiled)
    return interleave(steps, seconds=seconds, warmup=3, check=_check)


def _check(results: dict[str, tuple[Any, ...]], bound: float = 1e-3) -> None:
    """The ways agree, or nothing is timed."""
    truth = results["torch"]
    scale = max(float(tensor.abs().max()) for tensor in truth)
    for way, result in results.items():
        for ours, theirs in zip(result, truth, strict=True):
            error = float((theirs if ours is None else ours - theirs).abs().max()) / scale
            if not error < bound:
                raise AssertionError(f"{way}: the value or its gradients are off by {error:.1e}, relative")


def run(seed: int = 0, seconds: float = 1.0) -> list[Table]:
    """The table of the benchmark.

    Args:
        seed: of weights and samples.
        seconds: for each critic, beside some minutes of compilation.
    """
    table = Table(
        "R1, value and parameter gradients, compiled and not, float32, CPU",
        ["critic", "torch ms", "torch compiled ms", "lipgan ms", "lipgan compiled ms", "ratio", "ratio compiled"],
        notes=[
            "torch: double backward; compiled: traced by make_fx, then torch.compile. lipgan: a plan; compiled: the",
            "same with compile=True. ratio: of the best of torch to lipgan, and to lipgan compiled.",
        ],
    )
    for name in COMPILED:
        times = in_fresh_process(_times, name, seed, seconds)
        best = min(times["torch"], times["torch, compiled"])
        ratios = {"ratio": best / times["lipgan"], "ratio compiled": best / times["lipgan, compiled"]}
        row = {f"{way.replace(',', '')} ms": 1e3 * value for way, value in times.items()}
        table.rows.append({"critic": name, **row, **ratios})
    return [table]


def plot(tables: list[Table], axes: Any) -> None:
    """A bar for each critic: how many times faster than the best of torch."""
    rows = tables[0].rows
    axes.barh([row["critic"] for row in rows], [row["ratio compiled"] for row in rows])
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set(xlabel="time of the best of torch / time of lipgan, compiled", title=tables[0].title)
    axes.invert_yaxis()
