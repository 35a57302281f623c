"""The checks of scripts/gpu_acceptance.py: each runs in a process of its own and ends with a line of JSON.

python scripts/gpu_checks.py parity --device cuda
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "harness"))

from tolerance import assert_as_accurate  # noqa: E402 -- of the tests, which are not installed

import lipgan  # noqa: E402
from lipgan.ops import (  # noqa: E402
    explain,
    gradient_penalty,
    interpolate,
    matrix_sqrt,
    mlp_gradient_penalty,
    spectral_norm_group,
)
from lipgan.ops.nearest_neighbours import ball_counts, nearest_neighbours  # noqa: E402

Tensors = tuple[Tensor, ...]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# A layer of each kind: tiny, odd, a convolution, tall, wide.
WEIGHTS = [(1, 1), (7, 13), (16, 3, 3, 3), (130, 33), (33, 515), (64, 64, 3, 3)]
GRADIENTS = [(1, 1), (3, 7), (5, 3, 8, 8), (2, 16401), (2, 4099), (33, 65)]  # of the fourth one blocks share a row
POINTS = [(1, 1, 1), (17, 31, 3), (65, 129, 16), (130, 70, 33)]


class NotHere(Exception):
    """Why a check cannot run on this device."""


# ---- what a check tells ----


@dataclasses.dataclass
class Table:
    title: str
    columns: list[str]
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add(self, **cells: Any) -> None:
        self.rows.append({key.replace("_", " "): value for key, value in cells.items()})


def sentence(error: Exception) -> str:
    """What an error says, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def times(run: Callable[[], object], device: torch.device, seconds: float = 0.3) -> tuple[float, float]:
    """Microseconds of a call: of the device (of a GPU, by events around many), and of the host until it returns."""
    for _ in range(3):
        run()
    sync(device)
    begin = time.perf_counter()
    run()
    sync(device)
    calls = max(5, min(1000, int(seconds / max(1e-6, time.perf_counter() - begin))))
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        taken = 1e6 * (time.perf_counter() - begin) / calls
        return taken, taken
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin = time.perf_counter()
    first.record()
    for _ in range(calls):
        run()
    last.record()
    host = 1e6 * (time.perf_counter() - begin) / calls
    last.synchronize()
    return 1e3 * first.elapsed_time(last) / calls, host


def on(device: torch.device, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return [on(device, item) for item in value] if isinstance(value, list | tuple) else value


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in flat(item)]


# ---- parity ----


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of an op: the function of a backend and of the inputs, made on the CPU; what its outputs may differ by."""

    op: str
    name: str
    run: Callable[..., Any]
    inputs: list[Any]
    roundings: float
    exact: bool = False
    # Of the terms that an output is a sum of, where they may cancel: from the outputs in float64, one for each.
    scales: Callable[[list[Tensor]], list[float]] | None = None


def normalized_and_back(weights: list[Tensor], us: list[Tensor], vs: list[Tensor], backend: str | None) -> list[Tensor]:
    """The normalized weights, sigma, u and v, and the gradients of the weights for given gradients."""
    leaves = [weight.detach().requires_grad_() for weight in weights]
    ys, sigma, new_us, new_vs = spectral_norm_group(leaves, us, vs, 1, backend=backend)
    grads = torch.autograd.grad(ys, leaves, [torch.cos(y.detach()) for y in ys])
    return [*ys, sigma, *new_us, *new_vs, *grads]


def normalized_and_back_twice(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], backend: str | None
) -> list[Tensor]:
    """Sigma, and the gradients of the weights of numbers that hang on such gradients, as a penalty's do."""
    leaves = [weight.detach().requires_grad_() for weight in weights]
    ys, sigma, _, _ = spectral_norm_group(leaves, us, vs, 1, backend=backend)
    given = [torch.cos(y.detach()) for y in ys]
    grads = torch.autograd.grad(ys, leaves, given, create_graph=True)
    return [sigma.detach(), *torch.autograd.grad(grads, leaves, [torch.sin(3.0 * y.detach()) for y in ys])]


def _scales_of_gradients(truth: list[Tensor]) -> list[float]:
    """Of the outputs of `normalized_and_back`: a gradient is a difference of two terms of up to 1 / sigma."""
    count = (len(truth) - 1) // 4
    gradients = [1.0 / float(sigma) for sigma in truth[count]]
    return [*(float(value.abs().max()) for value in truth[: 3 * count + 1]), *gradients]


def penalty_and_back(grads: Tensor, kind: str, backend: str | None, norm: str = "sample") -> list[Tensor]:
    leaf = grads.detach().requires_grad_()
    penalty, norms = gradient_penalty(leaf, kind, weight=10.0, norm=norm, backend=backend)
    return [penalty, norms, *torch.autograd.grad(penalty, leaf)]


def cases(small: bool) -> list[Case]:
    """Ragged sizes of every op and dtype; ``small``: one of each, for tools that slow a kernel down a hundredfold."""
    torch.manual_seed(0)
    found = []
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        shapes = WEIGHTS[1:3] if small else WEIGHTS
        weights = [torch.randn(shape).to(dtype) for shape in shapes]
        us = [nn.functional.normalize(torch.randn(shape[0]), dim=0).to(dtype) for shape in shapes]
        vs = [nn.functional.normalize(torch.randn(math.prod(shape[1:])), dim=0).to(dtype) for shape in shapes]
        # A sum of n products is off by about sqrt(n) roundings; the gradient adds a second one.
        largest = max(math.prod(shape) for shape in shapes)
        found.append(Case("spectral_norm", f"{name}, {len(shapes)} weights",
                          lambda ws, u, v, backend: normalized_and_back(ws, u, v, backend),
                          [weights, us, vs], 8 + 4 * largest**0.5, scales=_scales_of_gradients))  # fmt: skip
        # With r = 1 / sigma: r^2 times a product of n terms of size 1, times an entry of u v^T, some n^-1/2.
        found.append(Case("spectral_norm", f"{name}, {len(shapes)} weights, second order",
                          lambda ws, u, v, backend: normalized_and_back_twice(ws, u, v, backend), [weights, us, vs], 64,
                          scales=lambda truth, size=16 * largest**0.5: [
                              1.0, *(size / float(sigma) ** 2 for sigma in truth[0])]))  # fmt: skip
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        # Rows that several blocks share cost a tool, and the interpreter, much more than the others: once.
        gradients = GRADIENTS[1 : 4 if dtype == torch.float32 else 3] if small else GRADIENTS
        for shape in gradients:
            real, fake, mix = (
                torch.randn(shape).to(dtype),
                torch.randn(shape).to(dtype),
                torch.rand(shape[0], dtype=wide),
            )
            where = f"{name}, {list(shape)}"
            found.append(Case("interpolate", where, lambda a, b, m, backend: interpolate(a, b, m, backend=backend),
                              [real, fake, mix], 4))  # fmt: skip
            found += [Case("gradient_penalty", f"{where}, {kind}",
                           lambda g, backend, kind=kind: penalty_and_back(g, kind, backend), [real],
                           8 + 4 * math.prod(shape) ** 0.5)
                      for kind in ("two-sided", "one-sided", "squared", "max")]  # fmt: skip
            if len(shape) > 2:
                found += [Case("gradient_penalty", f"{where}, {kind}, by pixels",
                               lambda g, backend, kind=kind: penalty_and_back(g, kind, backend, "pixel"), [real],
                               8 + 4 * shape[1] ** 0.5) for kind in ("two-sided", "max")]  # fmt: skip
    for dtype in (torch.float32, torch.float64):
        found += [perceptron_case(dtype, curve, small) for curve in ("tanh", "gelu")]
    for m, n, d in POINTS[1:2] if small else POINTS:
        # Whole numbers: every order of summation gives the same distances.
        x, y = torch.randint(-3, 4, (m, d)).double(), torch.randint(-3, 4, (n, d)).double()
        radii = [torch.full((count,), 4.5 * d**0.5, dtype=torch.float64) for count in (m, n)]
        k, where = min(3, n), f"float64, {m} x {n} x {d}"
        found.append(
            Case(
                "nearest_neighbours",
                where,
                lambda x, y, backend, k=k: nearest_neighbours(x, y, k, backend=backend),
                [x, y],
                0,
                True,
            )
        )
        found.append(Case("ball_counts", where, lambda x, y, r, s, backend: ball_counts(x, y, r, s, backend=backend),
                          [x, y, *radii], 0, True))  # fmt: skip
    return found


def perceptron_case(dtype: torch.dtype, curve: str, small: bool) -> Case:
    """A perceptron with one smooth activation throughout, whose z rounding moves over no kink, with a loss."""
    sizes, batch = ([3, 17, 5, 1], 9) if small else ([130, 257, 64, 1], 100)
    weights = [(torch.randn(b, a) / a**0.5).to(dtype) for a, b in itertools.pairwise(sizes)]
    biases, hidden = [torch.randn(size).to(dtype) for size in sizes[1:]], len(sizes) - 2

    def run(x: Tensor, ws: list[Tensor], bs: list[Tensor], loss: Tensor, backend: str | None) -> Any:
        common = x, ws, bs, [0.0] * hidden, [None] * hidden, "two-sided", 10.0, 1.0, loss, range(batch // 2)
        smooth: Any = {"curves": [curve] * hidden, "constants": [0.0] * 3 * hidden}
        return mlp_gradient_penalty.penalize_with_loss(*common, **smooth, backend=backend)

    # Four passes through all layers, each a sum of products that is off by about the root of their number.
    roundings = 8 * sum(size**0.5 for size in (*sizes, batch))
    name = f"{str(dtype).removeprefix('torch.')}, {batch} x {'-'.join(map(str, sizes))}, {curve}"
    inputs = [torch.randn(batch, sizes[0]).to(dtype), weights, biases, torch.randn(batch).to(dtype)]
    return Case("mlp_gradient_penalty", name, run, inputs, roundings)


def widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return [widened(item) for item in value]


@functools.cache
def _cases(small: bool) -> list[Case]:
    return cases(small)


def _judge(index: int, small: bool, device: torch.device) -> list[tuple[str, str, str | None]]:
    """Of a case, by its place: the op, each backend, and what is wrong with it."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is not written with NaN
    case = _cases(small)[index]
    # The interpreter takes minutes for all of them.
    backends = ("native", "triton", "cuda") if small or device.type != "cpu" else ("native",)
    backends = tuple(backend for backend in backends if explain(case.op, backend, device.type) is None)
    if not backends:
        return []
    truth = [value.detach() for value in flat(case.run(*widened(case.inputs), backend="reference"))]
    peer = flat(case.run(*on(device, case.inputs), backend="reference"))
    return [(case.op, backend, _outcome(case, backend, device, truth, peer)) for backend in backends]


def _start_worker() -> None:
    torch.set_num_threads(1)
    exact_products()


def _judged(device: torch.device, small: bool) -> Iterator[list[tuple[str, str, str | None]]]:
    """All cases. In processes side by side, since most of the time goes to the compiler of the kernels."""
    if small:  # a tool watches this process
        yield from (_judge(index, small, device) for index in range(len(_cases(small))))
        return
    # On a CPU the interpreter's cases come last.
    work = [(index, False) for index in range(len(_cases(False)))]
    work += [(index, True) for index in range(len(_cases(True))) if device.type == "cpu"]
    workers, context = min(8, os.cpu_count() or 1), multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker)
    try:
        for future in [pool.submit(_judge, index, some, device) for index, some in work]:
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # a kernel that hangs is not waited for


def parity(device: torch.device, small: bool = False) -> list[Table]:
    """Each backend against float64 on the CPU, by the error of the reference in the dtype; twice the same bits."""
    table = Table("Parity of the ops", ["op", "backend", "cases", "failed", "first failure"])
    counts: dict[tuple[str, str], list[str | None]] = {}
    if small:
        # What a kernel reads before it is written has to look so to a tool.
        torch.utils.deterministic.fill_uninitialized_memory = False
    stopped = ""
    try:
        for found in _judged(device, small):
            for op, backend, outcome in found:
                counts.setdefault((op, backend), []).append(outcome)
    except KeyboardInterrupt:
        stopped = "interrupted before the last case"
    for (op, backend), outcomes in counts.items():
        bad = [outcome for outcome in outcomes if outcome is not None]
        table.add(
            op=op, backend=backend, cases=len(outcomes), failed=len(bad), first_failure=bad[0] if bad else stopped
        )
    if not counts:
        raise NotHere(stopped or f"no backend but the reference serves {device.type}")
    return [table]


def _outcome(case: Case, backend: str, device: torch.device, truth: list[Tensor], peer: list[Tensor]) -> str | None:
    """None where a backend is right, else why not."""
    try:
        first, again = (flat(case.run(*on(device, case.inputs), backend=backend)) for _ in range(2))
        scales = [None] * len(truth) if case.scales is None else case.scales(truth)
        for value, repeated, expected, reference, scale in zip(first, again, truth, peer, scales, strict=True):
            assert torch.equal(value, repeated), "two calls give different bits"
            if case.exact:
                assert torch.equal(value.cpu(), expected), "not the numbers of the definition"
            else:
                assert_as_accurate(value, reference, expected, roundings=case.roundings, c=4, scale=scale)
    except Exception as error:  # what a case raises is its outcome
        return f"{case.name}: {sentence(error)}"
    return None


# ---- the other checks ----


def modules(device: torch.device, wanted: Sequence[str] = ()) -> list[Table]:
    """What is installed; a module that could be built and is not there is a failure."""
    table = Table("What is installed", ["module", "state"])
    table.add(module="lipgan", state=str(Path(lipgan.__file__).parent))
    for backend, name in (("native", "lipgan._C"), ("triton", "triton"), ("cuda", "lipgan._cuda")):
        missing = explain("spectral_norm", backend, "cpu" if backend == "native" else "cuda")
        table.add(module=name, state=missing or "there", failed=missing is not None and backend in wanted)
    return [table]


def ceilings(device: torch.device) -> list[Table]:
    """What the device reaches: a copy of memory, and products of matrices."""
    on_gpu = device.type == "cuda"
    table = Table("Ceilings", ["what", "rate", "unit"])
    numbers = 2**28 if on_gpu else 2**24
    source, target = torch.ones(numbers, device=device), torch.empty(numbers, device=device)
    table.add(
        what="copy, read and written",
        rate=round(8e-3 * numbers / times(lambda: target.copy_(source), device)[0]),
        unit="GB/s",
    )
    n = 8192 if on_gpu else 512
    kinds = [(torch.float32, False), (torch.float64, False)]
    if on_gpu:
        kinds += [(torch.float32, True), (torch.bfloat16, False)]
    for dtype, tf32 in kinds:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        taken = times(lambda a=a, b=b: a @ b, device)[0]
        name = "TF32" if tf32 else str(dtype).removeprefix("torch.")
        table.add(what=f"product of {n} x {n}, {name}", rate=round(2e-6 * n**3 / taken, 2), unit="TFLOP/s")
    torch.backends.cuda.matmul.allow_tf32 = False
    return [table]


def _sngan(device: torch.device) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    shapes = [(128, 27), (128, 1152), (128, 3), *[(128, 1152)] * 7, (1, 128)]
    weights = [torch.randn(shape, device=device) for shape in shapes]
    us = [nn.functional.normalize(torch.randn(h, device=device), dim=0) for h, _ in shapes]
    return weights, us, [nn.functional.normalize(torch.randn(w, device=device), dim=0) for _, w in shapes]


def _critic(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    critic = nn.Sequential(
        nn.Linear(64, 256), nn.LeakyReLU(0.2), nn.Linear(256, 256), nn.LeakyReLU(0.2), nn.Linear(256, 1)
    )
    return critic.to(device)


def _graphed(name: str) -> Callable[[torch.device], list[Table]]:
    """A call is captured; with other numbers in its inputs and other tensors in between, replays give what it gives."""

    def check(device: torch.device) -> list[Table]:
        if device.type == "cpu":
            raise NotHere("a CPU has no graphs")
        changing, state, call = _captured(name, device)
        graph, outputs = _capture(call, device)
        for replay in range(4):
            for tensor in changing:
                tensor.copy_(torch.randn_like(tensor))
            before = [tensor.clone() for tensor in state]
            # What was freed since the capture is given to others and written over.
            churn = [torch.full((size,), math.nan, device=device) for size in (1, 7, 64, 1000, 65536, 1 << 20) * 8]
            if device.type == "cuda":
                churn += [torch.full((size,), -1, dtype=torch.int64).pin_memory() for size in (1, 8, 64, 512) * 8]
            del churn
            torch.cuda.empty_cache()
            graph.replay()
            got = [tensor.clone() for tensor in (*outputs, *state)]
            for tensor, content in zip(state, before, strict=True):
                tensor.copy_(content)
            for value, expected in zip(got, [*flat(call()), *state], strict=True):
                torch.testing.assert_close(value, expected, msg=lambda text, k=replay: f"replay {k}: {text}")
        device_time, host_time = times(graph.replay, device)
        eager, eager_host = times(call, device)
        table = Table(f"CUDA graph of {name}", ["what", "device us", "host us"])
        table.add(what="called", device_us=round(eager, 1), host_us=round(eager_host, 1))
        table.add(what="replayed", device_us=round(device_time, 1), host_us=round(host_time, 1))
        return [table]

    return check


def _capture(call: Callable[[], Any], device: torch.device) -> tuple[Any, list[Tensor]]:
    """A CUDA graph of a call that has been made three times on another stream, and the call's outputs in it."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = flat(call())
    return graph, outputs


def _captured(name: str, device: torch.device) -> tuple[list[Tensor], list[Tensor], Callable[[], Any]]:
    """The inputs that change between replays, what the call itself changes, and the call."""
    if name.startswith("spectral-norm"):
        weights, us, vs = _sngan(device)
        if name.endswith("forward"):
            return weights, [], lambda: spectral_norm_group(weights, us, vs)[:2]
        return weights, [], lambda: normalized_and_back(weights, us, vs, None)
    if name == "penalty":
        grads = torch.randn(64, 3, 32, 32, device=device)
        kinds = "two-sided", "max"  # which may be Triton's and CUDA's
        return [grads], [], lambda: [penalty_and_back(grads, kind, None) for kind in kinds]
    if name == "perceptron":
        case = perceptron_case(torch.float32, "gelu", small=False)
        inputs = on(device, case.inputs)
        return [inputs[0], inputs[3]], [], lambda: case.run(*inputs, backend=None)
    critic = _critic(device)
    lipgan.group_spectral_norm(critic)
    real, fake = torch.randn(64, 64, device=device), torch.randn(64, 64, device=device)

    def step() -> list[Tensor]:
        loss = critic(fake).mean() - critic(real).mean() + lipgan.gradient_penalty(critic, real, fake, kind="r1")
        return [loss, *torch.autograd.grad(loss, list(critic.parameters()))]

    # Every forward pass goes on with the iteration of the norms.
    return [real, fake], list(critic.buffers()), step


def graphed_step(device: torch.device) -> list[Table]:
    """Steps of lipgan.graphed_critic_step take a critic where the steps take it that they stand for."""
    table = Table("lipgan.graphed_critic_step", ["critic", "kind", "as it is us", "graphed us"])
    image = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 32, 3, 2, 1), nn.SiLU(), nn.Flatten()),
        nn.Linear(32 * 64, 1),
    ).to(device)
    lipgan.group_spectral_norm(image)
    shapes = {"perceptron": (_critic(device), (64,)), "images, spectral norm": (image, (3, 32, 32))}
    for name, (critic, shape) in shapes.items():
        for kind in ("r1", "wgan-gp"):
            real, fake = torch.randn(64, *shape, device=device), torch.randn(64, *shape, device=device)
            critics = [critic, copy.deepcopy(critic)]
            on_gpu = device.type == "cuda"
            optimizers = [torch.optim.Adam(c.parameters(), 1e-4, capturable=on_gpu) for c in critics]
            graphed = lipgan.graphed_critic_step(critics[0], optimizers[0], "hinge", kind=kind)

            def plain(
                critic: nn.Module = critics[1],
                optimizer: torch.optim.Optimizer = optimizers[1],
                kind: str = kind,
                samples: Sequence[Tensor] = (real, fake),
            ) -> lipgan.penalties.CriticLoss:
                optimizer.zero_grad()
                result = lipgan.critic_loss(critic, *samples, "hinge", kind=kind)
                result.total.backward()
                optimizer.step()
                return result

            for k in range(8):
                for tensor in (real, fake):
                    tensor.normal_()
                torch.manual_seed(k)
                ours = graphed(real, fake)
                if kind == "r1":  # the same random numbers, where there are none
                    torch.testing.assert_close(ours.total, plain().total.detach(), rtol=1e-3, atol=1e-4)
                assert ours.total.isfinite()
            once = times(plain, device)[0]
            table.add(critic=name, kind=kind, as_it_is_us=round(once, 1), graphed_us=round(times(
                lambda step=graphed, x=real, y=fake: step(x, y), device)[0], 1))  # fmt: skip
    return [table]


def streams(device: torch.device) -> list[Table]:
    """On a stream beside the current one an op gives the same."""
    if device.type != "cuda":
        raise NotHere("a CPU has no streams")
    for case in cases(small=True):
        inputs = on(device, case.inputs)
        expected = flat(case.run(*inputs, backend=None))
        torch.cuda.synchronize(device)
        stream = torch.cuda.Stream(device)
        busy = torch.randn(4096, 4096, device=device)
        with torch.cuda.stream(stream):
            busy = busy @ busy  # what comes after must not overtake it
            values = flat(case.run(*inputs, backend=None))
        stream.synchronize()
        for value, other in zip(values, expected, strict=True):
            assert torch.equal(value, other), f"{case.op}, {case.name}: other bits on a stream of its own"
    return []


def two_devices(device: torch.device) -> list[Table]:
    """Tensors on a GPU that is not the current one."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        raise NotHere(f"there are {torch.cuda.device_count()} GPUs")
    other = torch.device("cuda", 1)
    for case in cases(small=True):
        values = flat(case.run(*on(other, case.inputs), backend=None))
        for value, expected in zip(values, flat(case.run(*on(device, case.inputs), backend=None)), strict=True):
            assert value.device == other, f"{case.op}, {case.name}: an output on {value.device}"
            assert torch.equal(value.cpu(), expected.cpu()), f"{case.op}, {case.name}: other bits on the second GPU"
    return []


def compiled(device: torch.device) -> list[Table]:
    """A normalized critic under torch.compile gives what it gives without."""
    table = Table("torch.compile of a critic with spectral normalization", ["mode", "device us", "host us"])
    modes: dict[str, Callable[[nn.Module], Any]] = {"none": lambda module: module}
    if device.type == "cuda":
        modes["default"] = lambda module: torch.compile(module)
        modes["reduce-overhead"] = lambda module: torch.compile(module, mode="reduce-overhead")
    else:
        modes["aot_eager"] = lambda module: torch.compile(module, backend="aot_eager")
    x, expected = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device), None
    for mode, wrap in modes.items():
        module = _critic(device)
        lipgan.group_spectral_norm(module)
        module.eval()
        called = wrap(module)

        def step(called: Any = called, module: nn.Module = module) -> Tensor:
            loss = called(x).square().mean()
            torch.autograd.grad(loss, list(module.parameters()))
            return loss.detach()

        value = step().clone()
        expected = value if expected is None else expected
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6, msg=lambda text, m=mode: f"{m}: {text}")
        device_time, host_time = times(step, device)
        table.add(mode=mode, device_us=round(device_time, 1), host_us=round(host_time, 1))
    return [table]


def bench(device: torch.device) -> list[Table]:
    """Device and host time of the ops, each backend beside the reference."""
    table = Table("Times of the ops, float32", ["op", "backend", "device us", "host us"])
    weights, us, vs = _sngan(device)
    grads = torch.randn(64, 3, 64, 64, device=device)
    n = 2000 if device.type == "cuda" else 200
    x, y = torch.randn(n, 512, device=device), torch.randn(n, 512, device=device)
    d = 2048 if device.type == "cuda" else 128
    matrix = torch.randn(d, d, device=device, dtype=torch.float64)
    calls: list[tuple[str, str, Callable[..., object]]] = [
        ("spectral_norm", "11 weights of SNGAN-32, forward", lambda b: spectral_norm_group(weights, us, vs, backend=b)),
        ("spectral_norm", "the same, and backward", lambda b: normalized_and_back(weights, us, vs, b)),
        ("gradient_penalty", "64 x 3 x 64 x 64, and backward", lambda b: penalty_and_back(grads, "two-sided", b)),
        ("gradient_penalty", "64 x 3 x 64 x 64, max, and backward", lambda b: penalty_and_back(grads, "max", b)),
        ("nearest_neighbours", f"{n} x {n} x 512, k = 5", lambda b: nearest_neighbours(x, y, 5, backend=b)),
    ]
    for op, what, call in calls:
        for backend in ("reference", "native", "triton", "cuda"):
            if explain(op, backend, device.type) is not None:
                continue
            device_time, host_time = times(lambda call=call, backend=backend: call(backend), device)
            table.add(op=f"{op}: {what}", backend=backend, device_us=round(device_time, 1), host_us=round(host_time, 1))
    gram = matrix @ matrix.T / d
    roots = {"polar_trace": lambda: matrix_sqrt.polar_trace(matrix), "eigvalsh": lambda: torch.linalg.eigvalsh(gram)}
    for name, run in roots.items():
        device_time, host_time = times(run, device, seconds=1)
        table.add(op=f"{name}: {d} x {d}, float64", backend="auto", device_us=round(device_time, 1),
                  host_us=round(host_time, 1))  # fmt: skip
    return [table]


def training(device: torch.device) -> list[Table]:
    """Three recipes for a few steps: finite losses, and the time of a step."""
    from lipgan import data, recipes
    from lipgan.training import Trainer

    steps = 100 if device.type == "cuda" else 10
    table = Table(f"Training, after {steps} steps", ["recipe", "data", "ms a step", "critic loss"])
    for name, samples in (
        ("sngan", data.load("digits", 8)),
        ("wgan-gp", data.load("ring")),
        ("dragan", data.load("ring")),
    ):
        trainer = Trainer.from_recipe(recipes.get(name), samples, device=device, log_every=steps).fit(steps)
        begin = time.perf_counter()
        trainer.fit(steps)
        sync(device)
        loss = trainer.history[-1]["critic_loss"]
        assert math.isfinite(loss), f"{name}: a loss of {loss}"
        taken = 1e3 * (time.perf_counter() - begin) / steps
        table.add(recipe=name, data=samples.name, ms_a_step=round(taken, 2), critic_loss=round(loss, 4))
    return [table]


def exact_products() -> None:
    """No TF32, which cuDNN takes for convolutions unless it is told not to."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


CHECKS: dict[str, Callable[[torch.device], list[Table]]] = {
    "modules": modules,
    "ceilings": ceilings,
    "parity": parity,
    "small": lambda device: parity(device, small=True),
    **{f"graph-{name}": _graphed(name)
       for name in ("spectral-norm-forward", "spectral-norm-backward", "penalty", "perceptron", "critic-step")},
    "graphed-step": graphed_step,
    "streams": streams,
    "two-devices": two_devices,
    "compile": compiled,
    "bench": bench,
    "training": training,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--wanted", default="", help="of the modules: what could be built")
    options = parser.parse_args()
    exact_products()
    told: dict[str, Any] = {"status": "passed", "tables": []}
    try:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise NotHere("torch finds no GPU")
        # With an index: outputs tell theirs.
        device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
        run = CHECKS[options.check]
        tables = modules(device, options.wanted.split(",")) if options.check == "modules" else run(device)
        told["tables"] = [dataclasses.asdict(table) for table in tables]
        failures = [row for table in tables for row in table.rows if row.get("failed")]
        if failures:
            words = [str(value) for key, value in failures[0].items() if key not in ("cases", "failed")]
            told |= {"status": "failed", "reason": f"{' by '.join(words[:-1])}: {words[-1]}"}
    except NotHere as reason:
        told |= {"status": "not here", "reason": str(reason)}
    except Exception as error:
        traceback.print_exc()
        told |= {
            "status": "failed",
            "reason": sentence(error),
        }
    print("RESULT " + json.dumps(told), flush=True)
    # A tool that watches this process, such as compute-sanitizer, tells by the exit status what it found.
    return 0


if __name__ == "__main__":
    sys.exit(main())
