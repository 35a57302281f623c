"""Benchmarks: correctness first, then times of interleaved variants, then ratios.

Each module has ``run(seed, seconds)``, which returns tables of times on the CPU, and ``plot(tables, axes)``. Where
there is a form for GPUs, ``run_on(device, seed, seconds)`` returns tables of times there.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import torch

from lipgan._choices import BENCHMARKS
from lipgan._files import check_destination, write_atomically
from lipgan.bench import device as on_device
from lipgan.bench.harness import Table, machine
from lipgan.commands.console import find_device


def main(args: argparse.Namespace) -> None:
    """Run the benchmarks that ``args.which`` names; print tables, write ``args.json`` and pictures in ``args.plot``."""
    device = find_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # whose streams take the events
    names = BENCHMARKS if args.which == "all" else (args.which,)
    modules = {name: importlib.import_module(f"lipgan.bench.{name.replace('-', '_')}") for name in names}
    if device.type != "cpu" and args.device is not None and not any(hasattr(m, "run_on") for m in modules.values()):
        raise ValueError(f"lipgan bench {args.which} has no form for {args.device}: it times the CPU (--device cpu)")
    if args.json is not None:
        check_destination(args.json)
    if args.plot is not None:
        Path(args.plot).mkdir(parents=True, exist_ok=True)
        check_destination(Path(args.plot) / f"{BENCHMARKS[0]}.png")
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    facts = machine() if device.type == "cpu" else {**machine(), "device": on_device.name_of(device)}
    print(", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    results = {}
    for name, module in modules.items():
        if device.type == "cpu":
            tables = module.run(seed=args.seed or 0, seconds=args.seconds)
        elif hasattr(module, "run_on"):
            tables = module.run_on(device, seed=args.seed or 0, seconds=args.seconds)
        elif args.device is not None:
            print(f"\n{name} has no form for {args.device}, and is left out.", flush=True)
            continue
        else:
            print(f"\n{name} has no form for {device}: these are times of the CPU.", flush=True)
            tables = module.run(seed=args.seed or 0, seconds=args.seconds)
        for table in tables:
            print(f"\n{table.render()}", flush=True)
        results[name] = [asdict(table) for table in tables]
        if args.plot is not None:
            _plot(module, tables, Path(args.plot) / f"{name}.png")
    if args.json is not None:
        text = json.dumps({"machine": facts, "results": results}, indent=2)
        write_atomically(args.json, text.encode())


def _plot(module: ModuleType, tables: list[Table], path: Path) -> None:
    from matplotlib.figure import Figure  # takes a second, and only plots need it

    figure = Figure(figsize=(7, 4), layout="constrained")
    module.plot(tables, figure.subplots())
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomically(path, picture.getvalue())
