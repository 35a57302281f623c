"""Benchmarks: correctness first, then times of interleaved variants, then ratios.

Each module has ``run(seed, seconds)``, which returns tables of times on the CPU, and ``plot(tables, axes)``. Where
there is a form for GPUs, ``run_on(device, seed, seconds)`` returns tables of times there.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lipgan._choices import BENCHMARKS
from lipgan._files import check_destination, write_atomically
from lipgan.bench import device as on_device
from lipgan.bench.harness import Table, machine, prepare_processes, take_quartiles
from lipgan.commands.console import find_device

# What calls import when they are first made: PyTorch's first gradient takes seconds for it, in every process.
_LATE = ("torch.fx.experimental.symbolic_shapes", "lipgan.nn", "lipgan.penalties", "lipgan.ops.mlp_gradient_penalty")


def main(args: argparse.Namespace) -> int:
    """Run the benchmarks that ``args.which`` names; print tables, write ``args.json`` and pictures in ``args.plot``.

    A benchmark that fails, or whose results are wrong, does not keep the next ones from being run.

    Returns:
        The exit status: 1 if a benchmark has failed.
    """
    device = find_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # whose streams take the events
    names = BENCHMARKS if args.which == "all" else (args.which,)
    modules = load(names)
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
    record: dict[str, Any] = {"machine": facts, "results": {}, "quartiles": {}, "seconds": {}}
    failed = []
    for name, module in modules.items():
        runs_there = device.type != "cpu" and hasattr(module, "run_on")
        if device.type != "cpu" and not runs_there:
            if args.device is not None:
                print(f"\n{name} has no form for {args.device}, and is left out.", flush=True)
                continue
            print(f"\n{name} has no form for {device}: these are times of the CPU.", flush=True)
        how = {"seed": args.seed or 0, "seconds": args.seconds}
        take_quartiles()
        begin = time.perf_counter()
        try:
            tables = module.run_on(device, **how) if runs_there else module.run(**how)
        except Exception as error:
            if len(modules) == 1:
                raise
            failed.append(name)
            traceback.print_exception(error)
            continue
        taken = time.perf_counter() - begin
        for table in tables:
            print(f"\n{table.render()}", flush=True)
        print(f"\n{name} took {taken:.0f} seconds.", flush=True)
        record["results"][name] = [asdict(table) for table in tables]
        record["quartiles"][name], record["seconds"][name] = take_quartiles(), taken
        if args.plot is not None:
            _plot(module, tables, Path(args.plot) / f"{name}.png")
    if args.json is not None:
        write_atomically(args.json, json.dumps(record, indent=2).encode())
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def load(names: Iterable[str]) -> dict[str, ModuleType]:
    """The modules of benchmarks, which the processes of cases begin with."""
    places = {name: f"lipgan.bench.{name.replace('-', '_')}" for name in names}
    prepare_processes((*_LATE, *places.values()))  # meanwhile, they are imported here
    return {name: importlib.import_module(place) for name, place in places.items()}


def _plot(module: ModuleType, tables: list[Table], path: Path) -> None:
    # matplotlib takes a second to import, and only plots need it.
    from matplotlib.figure import Figure

    from lipgan.training import style

    with style.style():
        figure = Figure(figsize=(style.WIDTH, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.set_prop_cycle(color=style.COLOURS, marker=style.MARKERS)
        module.plot(tables, axes)
        figure.suptitle(axes.get_title())  # which may be wider than the axes
        axes.set_title("")
        picture = style.as_png(figure)
    write_atomically(path, picture)
