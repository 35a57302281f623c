"""The checks of scripts/gpu_acceptance.py that need a graph, on the device without hardware."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_device import DEVICE
from emulated_graph import EmulatedGraph

CHECKS = Path(__file__).parents[2] / "scripts" / "gpu_checks.py"


@pytest.fixture(scope="module")
def checks() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_checks", CHECKS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def capture(call: Callable[[], Any], device: torch.device) -> tuple[EmulatedGraph, list[torch.Tensor]]:
    for _ in range(3):
        call()
    graph = EmulatedGraph(call)
    outcome = graph.outcome
    return graph, [tensor for item in outcome for tensor in (item if isinstance(item, list) else [item])]


@pytest.mark.parametrize(
    "name", ["spectral-norm-forward", "spectral-norm-backward", "penalty", "perceptron", "critic-step"]
)
def test_a_replay_gives_what_a_call_gives(checks: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(checks, "_capture", capture)
    monkeypatch.setattr(checks, "times", lambda run, device: (1.0, 1.0))
    (table,) = checks.CHECKS[f"graph-{name}"](DEVICE)
    assert [row["what"] for row in table.rows] == ["called", "replayed"]
