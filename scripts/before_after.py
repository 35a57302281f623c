#!/usr/bin/env python3
"""Whether a change made anything slower: the same calls in the builds of several environments, in turns.

    python scripts/before_after.py OLD/bin/python NEW/bin/python [NAMES] [--rounds N] [--json FILE]

Each interpreter stays one process that holds one case at a time and waits. A round times a case in each of them, one
after another, so that a drift of the machine's speed meets all alike. Printed are the medians of milliseconds and, for
each later interpreter, the median of the ratios of a round, with its quartiles: above 1 the later one is faster. The
results of the first call must agree within 1e-3, relative, or the case says so. Cases use the public API alone; one
that a build lacks is absent.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Case = Callable[[], Callable[[], Any]]


def _spectral(model: str, grouped: bool) -> Case:
    def make() -> Callable[[], Any]:
        import torch

        import lipgan

        shapes = {
            "mlp": [(512, 2), (512, 512), (512, 512), (1, 512)],
            "sngan-32": [(128, 3, 3, 3), *[(128, 128, 3, 3)] * 7, (128, 3, 1, 1), (128, 128, 1, 1), (1, 128)],
            "resnet-128": [
                shape
                for narrow, wide in [(3, 64), (64, 128), (128, 256), (256, 512), (512, 1024), (1024, 1024)]
                for shape in [(wide, narrow, 3, 3), (wide, wide, 3, 3), (wide, narrow, 1, 1)]
            ],
        }[model]
        layers: list[Any] = [
            torch.nn.Linear(shape[1], shape[0]) if len(shape) == 2 else torch.nn.Conv2d(shape[1], shape[0], shape[2])
            for shape in shapes
        ]
        network = torch.nn.Sequential(*layers)
        group = lipgan.group_spectral_norm(network) if grouped else None
        if not grouped:
            for layer in network:
                lipgan.spectral_norm(layer)
        parameters = [layer.parametrizations.weight.original for layer in network]
        incoming = [torch.randn(shape) for shape in shapes]

        def call() -> Any:
            weights = group.normalize() if group is not None else [layer.weight for layer in network]
            return torch.autograd.grad(weights, parameters, incoming)[-1].sum()

        return call

    return make


def _penalty(critic: str) -> Case:
    def make() -> Callable[[], Any]:
        import torch
        from torch import nn

        import lipgan

        def perceptron(*widths: int, activation: Callable[[], Any], norm: bool = False) -> Any:
            layers: list[Any] = []
            for narrow, wide in itertools.pairwise(widths):
                layers += [nn.Linear(narrow, wide), *([nn.LayerNorm(wide)] if norm else []), activation()]
            return nn.Sequential(*layers[: -2 if norm else -1])

        def dcgan(activation: Callable[[], Any], norm: Callable[[int], Any] | None = None) -> Any:
            layers: list[Any] = []
            for narrow, wide in [(3, 64), (64, 128), (128, 256)]:
                layers += [nn.Conv2d(narrow, wide, 4, 2, 1), *([norm(wide)] if norm else []), activation()]
            return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * 16, 1))

        class Recurrent(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.head = nn.LSTM(16, 64, batch_first=True), nn.Linear(64, 1)

            def forward(self, x: Any) -> Any:
                return self.head(self.body(x)[0][:, -1])

        leaky = lambda: nn.LeakyReLU(0.2)  # noqa: E731
        network, shape = {
            "dcgan-32": lambda: (dcgan(leaky), (64, 3, 32, 32)),
            "dcgan-32-instance": lambda: (dcgan(leaky, lambda c: nn.InstanceNorm2d(c, affine=True)), (64, 3, 32, 32)),
            "dcgan-32-silu": lambda: (dcgan(nn.SiLU), (64, 3, 32, 32)),
            "mlp": lambda: (perceptron(2, 128, 128, 128, 1, activation=leaky), (256, 2)),
            "tanh": lambda: (perceptron(2, 128, 128, 1, activation=nn.Tanh), (64, 2)),
            "tiny-tanh": lambda: (perceptron(2, 16, 16, 1, activation=nn.Tanh), (64, 2)),
            "layer-norm": lambda: (perceptron(2, 128, 128, 1, activation=nn.GELU, norm=True), (64, 2)),
            "lstm": lambda: (Recurrent(), (32, 20, 16)),
        }[critic]()
        real, fake = torch.randn(shape), torch.randn(shape)
        parameters = list(network.parameters())

        def call() -> Any:
            penalty = lipgan.gradient_penalty(network, real, fake, kind="r1")
            torch.autograd.grad(penalty, parameters, allow_unused=True)
            return penalty.detach()

        return call

    return make


def _covariances(d: int, spectrum: str) -> Any:
    import torch

    values = {
        "flat": torch.ones(d, dtype=torch.float64),
        "1/k": 1 / torch.arange(1, d + 1, dtype=torch.float64),
        "1/k2": 1 / torch.arange(1, d + 1, dtype=torch.float64) ** 2,
        "deficient": (torch.arange(d) < d // 2).double(),
    }[spectrum]

    def one() -> Any:
        basis = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]
        cov = (basis * (values * (0.5 + torch.rand(d, dtype=torch.float64)))) @ basis.T
        return (cov + cov.T) / 2

    return torch.zeros(d, dtype=torch.float64), one(), torch.ones(d, dtype=torch.float64) / d, one()


def _frechet(d: int, spectrum: str) -> Case:
    def make() -> Callable[[], Any]:
        import lipgan

        given = _covariances(d, spectrum)
        return lambda: lipgan.frechet_distance(*given)

    return make


def _metric(name: str) -> Case:
    def make() -> Callable[[], Any]:
        import torch

        from lipgan import metrics

        small, large = torch.randn(2, 2000, 64), torch.randn(2, 4000, 512)
        large[1] += 0.05
        return {
            "kernel-distance": lambda: metrics.kernel_distance(large[0], large[1], subsets=10, subset_size=1000)[0],
            "prdc": lambda: metrics.prdc(large[0], large[1])["density"],
            "wasserstein": lambda: metrics.wasserstein_distance(small[0, :500], small[1, :500]),
            "sliced-wasserstein": lambda: metrics.sliced_wasserstein_distance(
                small[0], small[1], generator=torch.Generator().manual_seed(0)
            ),
            "inception-score": lambda: metrics.inception_score(large[0].softmax(1))[0],
            "feature-stats": lambda: metrics.FeatureStats(512).update(large[0]).cov[0, 0],
        }[name]

    return make


def _root(name: str) -> Case:
    def make() -> Callable[[], Any]:
        import torch

        import lipgan

        x = torch.randn(512, 1024, dtype=torch.float64)
        a = (x @ x.T / 1024).requires_grad_()
        layer = lipgan.nn.orthogonal(torch.nn.Linear(256, 256))

        def orthogonal() -> Any:
            return torch.autograd.grad(layer.weight.square().sum(), list(layer.parameters())[-1])[0].sum()

        def sqrtm() -> Any:
            return torch.autograd.grad(lipgan.linalg.sqrtm(a).sum(), a)[0].sum()

        return {"sqrtm": sqrtm, "orthogonal": orthogonal}[name]

    return make


def _training(recipe: str, dataset: str, steps: int) -> Case:
    def make() -> Callable[[], Any]:
        import lipgan

        trainer = lipgan.Trainer.from_recipe(recipe, data=dataset, seed=0)

        def call() -> Any:
            trainer.fit(steps)

        return call

    return make


def _command(*arguments: str) -> Case:
    def make() -> Callable[[], Any]:
        def call() -> None:
            # Elsewhere: "-m" takes what lies in the working directory.
            command = [sys.executable, "-m", "lipgan", *arguments]
            subprocess.run(command, cwd=tempfile.gettempdir(), capture_output=True, check=True)

        return call

    return make


CASES: dict[str, Case] = {
    **{
        f"spectral-norm {model} {'grouped' if grouped else 'per layer'}": _spectral(model, grouped)
        for model in ("mlp", "sngan-32", "resnet-128")
        for grouped in (True, False)
    },
    **{
        f"penalty {critic}": _penalty(critic)
        for critic in (
            *("dcgan-32", "dcgan-32-instance", "dcgan-32-silu", "mlp"),
            *("tanh", "tiny-tanh", "layer-norm", "lstm"),
        )
    },
    **{f"frechet {d} {spectrum}": _frechet(d, spectrum) for d, spectrum in ((64, "flat"), (512, "flat"), (512, "1/k"))},
    **{f"frechet 2048 {spectrum}": _frechet(2048, spectrum) for spectrum in ("flat", "1/k", "1/k2", "deficient")},
    **{
        name: _metric(name)
        for name in (
            *("kernel-distance", "prdc", "wasserstein", "sliced-wasserstein", "inception-score", "feature-stats"),
        )
    },
    **{name: _root(name) for name in ("sqrtm", "orthogonal")},
    **{
        f"train {recipe} {data}": _training(recipe, data, steps)
        for recipe, data, steps in (("sngan", "digits", 2), ("wgan-gp", "digits", 2), ("gan", "ring", 50))
    },
    "start: --help": _command("--help"),
    "start: doctor": _command("doctor"),
}


def serve() -> None:
    """Read names and orders from standard input, answer with a line of JSON each."""
    import torch

    torch.set_num_threads(2)
    call: Callable[[], Any] | None = None
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if "case" in order:
                call = None
                torch.manual_seed(0)
                call = CASES[order["case"]]()
                value = call()
                reply = {"value": None if value is None else float(value)}
            else:
                assert call is not None
                time.sleep(0.02)  # the threads of the process before still spin for a while
                until = time.perf_counter() + 0.02
                while time.perf_counter() < until:  # caches are another's, and threads have to wake up
                    call()
                start = time.perf_counter()
                for _ in range(order["calls"]):
                    call()
                reply = {"seconds": (time.perf_counter() - start) / order["calls"]}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:200]}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


class _Build:
    def __init__(self, python: str) -> None:
        command = [python, __file__, "--serve"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def ask(self, **order: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


def compare(name: str, builds: list[_Build], rounds: int) -> dict[str, Any]:
    """The milliseconds of a case in each build, and the ratios to the first."""
    first = [build.ask(case=name) for build in builds]
    row: dict[str, Any] = {"case": name, "errors": [answer.get("error") for answer in first]}
    there = [index for index, error in enumerate(row["errors"]) if error is None]
    values = [first[index]["value"] for index in there]
    if any(v is not None and abs(v - values[0]) > 1e-3 * max(1.0, abs(values[0])) for v in values):
        row["differ"] = values
    once = [builds[index].ask(calls=1).get("seconds", 1.0) for index in there]
    calls = max(1, min(200, int(0.05 / max([*once, 1e-6]))))
    rounds = max(3, min(rounds, int(20 / max(sum(once) * (1 + calls), 1e-6))))
    seconds: dict[int, list[float]] = {index: [] for index in there}
    for turn in range(rounds):
        for index in there if turn % 2 == 0 else reversed(there):
            seconds[index].append(builds[index].ask(calls=calls)["seconds"])
    row["ms"] = {index: 1e3 * statistics.median(values) for index, values in seconds.items()}
    row["ratios"] = {}
    for index in there[1:]:
        ratios = [a / b for a, b in zip(seconds[there[0]], seconds[index], strict=True)]
        row["ratios"][index] = statistics.quantiles(ratios, n=4)
    return row


def main() -> None:
    if sys.argv[1:] == ["--serve"]:
        serve()
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("given", nargs="+", metavar="PYTHON|NAME", help="interpreters, then beginnings of cases' names")
    parser.add_argument("--rounds", type=int, default=21, metavar="N", help="at most (default: 21)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    arguments = parser.parse_args()
    pythons = [given for given in arguments.given if "/" in given]
    wanted = tuple(given for given in arguments.given if "/" not in given)
    names = [name for name in CASES if not wanted or name.startswith(wanted)]
    if len(pythons) < 2 or not names:
        parser.error("two interpreters or more, as paths, and beginnings of cases' names if any")
    for python in pythons:
        if not Path(python).is_file():
            parser.error(f"PYTHON must be an interpreter, got {python!r}")
    builds = [_Build(python) for python in pythons]
    rows = []
    for name in names:
        row = compare(name, builds, arguments.rounds)
        rows.append(row)
        times = " ".join(f"{row['ms'][i]:9.3f}" if i in row["ms"] else "   absent" for i in range(len(builds)))
        ratios = "  ".join(f"{mid:5.2f} ({low:.2f}..{high:.2f})" for low, mid, high in row["ratios"].values())
        told = [error for error in row["errors"] if error] + (
            [f"results differ: {row['differ']}"] if "differ" in row else []
        )
        print(f"{name:36s} ms {times}   ratio {ratios}  {'; '.join(told)}", flush=True)
        if arguments.json:
            partial = arguments.json.with_suffix(".partial")
            partial.write_text(json.dumps(rows, indent=1))
            partial.replace(arguments.json)


if __name__ == "__main__":
    main()
