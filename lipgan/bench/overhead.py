"""``lipgan bench overhead``: the host's time of a call, without what it computes.

For the GPU's ops the launches are left out: what remains is what Python does before a kernel could start. For layers
and penalties on the CPU the tensors are so small that there is hardly any arithmetic.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn.utils import parametrizations

import lipgan
from lipgan.bench.harness import Table, in_fresh_process, interleave
from lipgan.ops import _backend, mlp_gradient_penalty
from lipgan.ops.gradient_penalty import undispatched
from lipgan.ops.spectral_norm.backends import bwd, fwd

#: Microseconds that a call of an op may take before its launches.
BUDGETS = {
    "spectral_norm, forward": 25.0,
    "spectral_norm, backward": 20.0,
    "gradient_penalty": 25.0,
    "mlp_gradient_penalty": 200.0,
}

# A convolution's weight, and the gradients of a critic at a batch of images.
WEIGHT = (128, 64, 3, 3)
GRADIENTS = (64, 3, 32, 32)
GROUP = 12  # weights of one call, as of a critic
# A perceptron of three hidden layers, whose products are PyTorch's and are computed.
PERCEPTRON = (4, 4, 4, 4, 1)
_PRODUCTS = 4 * (len(PERCEPTRON) - 2)


@contextlib.contextmanager
def without_launches() -> Iterator[list[str]]:
    """Inside, Triton kernels are not run but noted by name, and CPU tensors go the way of a GPU's."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from lipgan.kernels.spectral_norm import tables  # Triton takes a second to import

    launched: list[str] = []

    def note(kernel: Any, *args: Any, **kwargs: Any) -> None:
        launched.append(kernel.fn.__name__)

    with contextlib.ExitStack() as stack:
        for kind in (JITFunction, InterpretedFunction):
            stack.enter_context(mock.patch.object(kind, "run", note))
        stack.enter_context(mock.patch.object(_backend, "interpreted", return_value=True))
        for forget in (_backend._resolve.cache_clear, tables.forget_addresses):
            forget()
            stack.callback(forget)
        yield launched


def _ops(count: int, seed: int) -> dict[str, Callable[[], object]]:
    """A call of each op, of ``count`` weights where it takes a group."""
    torch.manual_seed(seed)
    weights = [torch.randn(WEIGHT) for _ in range(count)]
    us, vs = [torch.randn(WEIGHT[0]) for _ in weights], [torch.randn(weights[0][0].numel()) for _ in weights]
    dims, grads = [0] * count, torch.randn(GRADIENTS)
    ys, sigma, uv = fwd(weights, us, vs, 1, 1e-12, dims, "triton")
    layers = [torch.randn(after, before) for before, after in itertools.pairwise(PERCEPTRON)]
    x, biases, hidden = torch.randn(2, PERCEPTRON[0]), [torch.randn(len(w)) for w in layers], len(layers) - 1
    perceptron = x, layers, biases, [0.2] * hidden, [None] * hidden, "two-sided", 10.0, 1.0
    return {
        "spectral_norm, forward": lambda: fwd(weights, us, vs, 1, 1e-12, dims, "triton"),
        "spectral_norm, backward": lambda: bwd(weights, None, ys, sigma, uv, dims, "triton"),
        "gradient_penalty": lambda: undispatched(grads, "two-sided", 10.0, 1.0, "sample", "triton"),
        "mlp_gradient_penalty": lambda: mlp_gradient_penalty.penalize(*perceptron, backend="triton"),
    }


def _op_times(count: int, seed: int, seconds: float) -> dict[str, tuple[float, int]]:
    """Seconds and launches of a call of each op."""
    with without_launches() as launched:
        ops = _ops(count, seed)
        launches = {}
        for name, run in ops.items():
            run()
            launched.clear()
            run()
            launches[name] = len([kernel for kernel in launched if kernel != "fill_kernel"])
        times = interleave(ops, seconds=seconds, warmup=20)
    return {name: (times[name], launches[name]) for name in ops}


def _layers(seed: int) -> dict[str, Callable[[], object]]:
    torch.manual_seed(seed)
    layers = {"torch": parametrizations.spectral_norm(nn.Linear(4, 4))}
    layers["lipgan"] = lipgan.spectral_norm(nn.Linear(4, 4))
    critic = nn.Sequential(nn.Linear(2, 4), nn.LeakyReLU(0.2), nn.Linear(4, 1))
    wrapped = nn.Sequential(nn.Linear(2, 4), nn.SELU(), nn.Linear(4, 1))
    real, fake = torch.randn(2, 2), torch.randn(2, 2)

    def textbook(critic: nn.Module) -> None:
        mix = torch.rand(2, 1)
        x = (mix * real + (1 - mix) * fake).requires_grad_()
        (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        penalty = 10.0 * (gradient.flatten(1).norm(dim=1) - 1).square().mean()
        torch.autograd.grad(penalty, list(critic.parameters()), allow_unused=True)

    def ours(critic: nn.Module) -> None:
        penalty = lipgan.gradient_penalty(critic, real, fake)
        torch.autograd.grad(penalty, list(critic.parameters()), allow_unused=True)

    x = torch.randn(1, 4)
    runs: dict[str, Callable[[], object]] = {}
    for name, layer in layers.items():
        runs[f"{name}: a layer of 4 x 4, normalized"] = partial(layer, x)
    for what, module in (("a perceptron's", critic), ("another critic's", wrapped)):
        runs[f"torch: {what} penalty and gradients"] = partial(textbook, module)
        runs[f"lipgan: {what} penalty and gradients"] = partial(ours, module)
    return runs


def _layer_times(seed: int, seconds: float) -> dict[str, float]:
    return interleave(_layers(seed), seconds=seconds, warmup=20)


def run(seed: int = 0, seconds: float = 1.0) -> list[Table]:
    """The tables of the benchmark.

    Args:
        seed: of weights and samples.
        seconds: for each table.
    """
    ops = Table(
        f"Host time of the Triton ops with launches left out, microseconds a call, a weight of {_by(WEIGHT)}",
        ["op", "us", "budget us", "within", "launches", f"us of {GROUP} weights"],
        notes=[
            "Checks, allocation of outputs (here of CPU memory), tables and arguments; the launch itself is left out,",
            f"and with it Triton's own launcher. gradient_penalty: gradients of {_by(GRADIENTS)}.",
            f"mlp_gradient_penalty: a perceptron {'-'.join(map(str, PERCEPTRON))}; its {_PRODUCTS} matrix products are",
            "PyTorch's, which are computed, and are not among the launches.",
        ],
    )
    if importlib.util.find_spec("triton") is None:
        ops.notes.append("Not measured: the package triton is not installed.")
    else:
        one, group = (in_fresh_process(_op_times, count, seed, seconds) for count in (1, GROUP))
        for name, budget in BUDGETS.items():
            (time, launches), (grouped, _) = one[name], group[name]
            ops.rows.append(
                {
                    "op": name,
                    "us": 1e6 * time,
                    "budget us": budget,
                    "within": "yes" if 1e6 * time <= budget else "no",
                    "launches": launches,
                    ops.columns[-1]: 1e6 * grouped if name.startswith("spectral_norm") else "-",
                }
            )
    layers = Table(
        "Python's time of a call on the CPU, microseconds, of tensors with hardly any arithmetic",
        ["call", "torch us", "lipgan us", "ratio"],
    )
    times = in_fresh_process(_layer_times, seed, seconds)
    for call in dict.fromkeys(name.split(": ", 1)[1] for name in times):
        theirs, ours = times[f"torch: {call}"], times[f"lipgan: {call}"]
        layers.rows.append({"call": call, "torch us": 1e6 * theirs, "lipgan us": 1e6 * ours, "ratio": theirs / ours})
    return [ops, layers]


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def plot(tables: list[Table], axes: Any) -> None:
    """Bars of the host times beside their budgets, into a matplotlib axes."""
    rows = tables[0].rows
    axes.barh([row["op"] for row in rows], [row["us"] for row in rows], label="measured")
    axes.scatter([row["budget us"] for row in rows], [row["op"] for row in rows], color="black", marker="|", s=400)
    axes.invert_yaxis()
    axes.set(xlabel="microseconds a call; the mark is the budget", title="Host time with launches left out")
