"""Critics whose weights are sharded: a clear refusal, after which they work as before."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from penalty_critics import samples
from processes import leave, run
from torch import Tensor, nn

import lipgan
from lipgan.penalties import explain


def critic() -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1)]
    return nn.Sequential(*layers).double()


def _shard(module: nn.Module, where: str) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in module.children():
        if where == "layers" and isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    if where == "whole":
        fully_shard(module, mesh=mesh)
    return module


def _said(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def _worker(rank: int, path: str) -> None:
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=2)
    x = samples(6, 5)
    said: dict[str, Any] = {}
    for where in ("whole", "layers"):
        for kind in ("r1", "r1+r2"):
            for engine in ("auto", "fused", "autograd"):
                module = _shard(critic(), where)
                before = [buffer.clone() for buffer in module.buffers()]
                options: dict[str, Any] = {"kind": kind, "engine": engine}
                said[f"{where} {kind} {engine}"] = _said(
                    lambda m=module, o=options: lipgan.gradient_penalty(m, x, x, **o)
                )
                assert all(torch.equal(a, b) for a, b in zip(module.buffers(), before, strict=True))
                module(x).sum().backward()
        module = _shard(critic(), where)
        said[f"{where} explained"] = "", explain(module, x)

        def function(x: Tensor, module: nn.Module = module) -> Any:
            return module(x)

        for engine in ("auto", "autograd"):
            options = {"kind": "r1", "engine": engine}
            said[f"{where} function {engine}"] = _said(lambda f=function, o=options: lipgan.gradient_penalty(f, x, **o))
            module(x).sum().backward()
            assert all(p.grad is not None for p in module.parameters())
    module = critic()
    lipgan.group_spectral_norm(module)
    said["group"] = _said(lambda: _shard(module, "layers")(x))
    # What needs no whole critic works: other modules, and layers that normalize themselves.
    assert lipgan.gradient_penalty(critic(), x, kind="r1", engine="fused").item() > 0
    module, whole = critic(), critic()
    for network in (module, whole):
        for k in (0, 3, 5):
            torch.manual_seed(k)
            lipgan.spectral_norm(network[k])
    _shard(module, "layers")
    for _ in range(2):  # with the u and v that the first step has left
        for network in (module, whole):
            network.zero_grad()
            network(x).square().sum().backward()
        for part, other in zip(module.parameters(), whole.parameters(), strict=True):
            # Each process has the same samples: the average of the gradients is that of one.
            grad = part.grad.full_tensor() if hasattr(part.grad, "full_tensor") else part.grad
            torch.testing.assert_close(grad, other.grad, rtol=1e-10, atol=1e-12)
    torch.save(said, os.path.join(path, f"{rank}.pt"))
    leave()


@pytest.mark.slow
def test_sharded_critics_are_refused_before_anything_changes(tmp_path: Path) -> None:
    pytest.importorskip("torch.distributed.fsdp")
    run(_worker, str(tmp_path))
    for rank in range(2):
        said = torch.load(tmp_path / f"{rank}.pt")
        assert said.pop("group") == (
            "ValueError",
            "model must hold whole weights when its forward begins, got a part of 0.weight, sharded by fully_shard: "
            "normalize each layer by lipgan.spectral_norm instead",
        )
        assert len(said) == 18
        for case, (kind, words) in said.items():
            assert kind == ("" if "explained" in case else "ValueError"), (case, kind, words)
            assert words.startswith("critic must not be sharded (FSDP), got "), case
            assert "DistributedDataParallel" in words
