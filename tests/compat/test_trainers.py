"""The worked examples of docs/examples run, save, and resume to what an uninterrupted run comes to."""

import contextlib
import io
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from peers import peer
from processes import run

from lipgan.__main__ import main

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


def execute(name: str, *arguments: object) -> str:
    """Run an example as ``python name arguments`` would; what it prints."""
    before = sys.argv
    sys.argv = [name, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    finally:
        sys.argv = before
    return said.getvalue()


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def assert_same(a: Path, b: Path, error: float = 0.0) -> None:
    first, second = (list(tensors(torch.load(path, weights_only=True))) for path in (a, b))
    assert len(first) > 10
    for ours, theirs in zip(first, second, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=error, atol=error)


def test_plain(tmp_path: Path) -> None:
    once, twice = tmp_path / "once.pt", tmp_path / "twice.pt"
    assert execute("plain.py", "--steps", 6, "--checkpoint", once).startswith("step 6: critic ")
    execute("plain.py", "--steps", 4, "--checkpoint", twice)
    execute("plain.py", "--steps", 6, "--checkpoint", twice)
    assert_same(once, twice)
    # Nothing is left to do.
    assert execute("plain.py", "--steps", 6, "--checkpoint", twice) == ""


def test_lightning(tmp_path: Path) -> None:
    peer("lightning")
    once, twice = tmp_path / "once", tmp_path / "twice"
    few = ["--batches", 3]
    execute("with_lightning.py", "--epochs", 2, *few, "--folder", once)
    execute("with_lightning.py", "--epochs", 1, *few, "--folder", twice)
    before = torch.load(twice / "last.ckpt", weights_only=True)
    execute("with_lightning.py", "--epochs", 2, *few, "--folder", twice)
    after, whole = (torch.load(folder / "last.ckpt", weights_only=True) for folder in (twice, once))
    assert (before["epoch"], after["epoch"], whole["epoch"]) == (0, 1, 1)
    # Two optimizers step in each batch. Lightning does not keep the order of a loader, so the numbers differ.
    assert (before["global_step"], after["global_step"], whole["global_step"]) == (6, 12, 12)
    assert before["state_dict"].keys() == after["state_dict"].keys()
    for name, value in before["state_dict"].items():
        assert after["state_dict"][name].isfinite().all()
        assert name.endswith(("_u", "_v")) or not torch.equal(value, after["state_dict"][name]), name
    steps = [state["state"][0]["step"] for state in after["optimizer_states"]]
    assert steps == [6, 6]


def test_accelerate(tmp_path: Path) -> None:
    peer("accelerate")
    folder = tmp_path / "states"
    assert execute("with_accelerate.py", "--epochs", 1, "--folder", folder).startswith("epoch 1: critic ")
    before = dict(torch.load(folder / "custom_checkpoint_0.pkl", weights_only=True))
    said = execute("with_accelerate.py", "--epochs", 2, "--folder", folder)
    assert (before, said.count("epoch"), said.startswith("epoch 2: critic ")) == ({"epoch": 1}, 1, True)
    optimizer = torch.load(folder / "optimizer_1.bin", weights_only=True)
    assert optimizer["state"][0]["step"] == 2 * -(-len(_ring()) // 512)


def _ring() -> torch.Tensor:
    from lipgan import data

    return data.load("ring").samples


def _torchrun(rank: int, ports: list[int], folder: Path) -> None:
    """What torchrun starts three times."""
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE="2")

    def status(steps: int, path: Path) -> Any:
        # Of its own, or a process may meet the one that another is about to leave.
        os.environ["MASTER_PORT"] = str(ports.pop())
        with pytest.raises(SystemExit) as ended:
            execute("with_torchrun.py", "--steps", steps, "--checkpoint", path)
        return ended.value.code

    assert status(6, folder / "once.pt") == 0
    # SIGTERM comes to one of the processes, in its third step; both end after it.
    forward = torch.nn.Linear.forward
    calls = []

    def counted(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if rank == 1 and len(calls) == 13:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, x)

    torch.nn.Linear.forward = counted  # type: ignore[method-assign]
    assert status(1000000, folder / "twice.pt") == 143
    torch.nn.Linear.forward = forward  # type: ignore[method-assign]
    step = torch.load(folder / "twice.pt", weights_only=True)["step"]
    assert 1 < step < 6
    assert status(6, folder / "twice.pt") == 0
    os._exit(0)


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(3)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        ports = [int(probe.getsockname()[1]) for probe in probes]
    run(_torchrun, ports, tmp_path)
    # How DistributedDataParallel lays out its messages changes after the first step, and with it the last bits.
    assert_same(tmp_path / "once.pt", tmp_path / "twice.pt", 1e-6)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_slurm(tmp_path: Path) -> None:
    """With stand-ins for SLURM's commands, and for python, which notes how it is called."""
    script = EXAMPLES / "slurm.sh"
    stand_ins = {
        "srun": 'SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=8 exec "$@"',
        "scontrol": 'if [ "$1" = show ]; then printf "one\\ntwo\\n"; else echo "$@" >>requeued; fi',
        "python": 'printf "%s\\n" "$@" >called; echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT" >group; '
        "exit $STATUS",
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def submitted(status: int) -> list[str]:
        environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "STATUS": str(status)}
        environment |= {"SLURM_JOB_ID": "70123", "SLURM_JOB_NODELIST": "node[1-2]"}
        new = ["my run", "--recipe", "gan", "--data", "ring", "--batch-size", "8", "--steps", "3"]
        done = subprocess.run(["bash", script, *new], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (status, "")
        module, name, *arguments = (tmp_path / "called").read_text().splitlines()
        assert (module, name) == ("-m", "lipgan")
        return arguments

    first = submitted(143)
    assert (tmp_path / "group").read_text() == "3 1 8 one 20123\n"
    assert (tmp_path / "requeued").read_text() == "requeue 70123\n"
    with contextlib.chdir(tmp_path) if hasattr(contextlib, "chdir") else pytest.MonkeyPatch.context() as patch:
        if patch is not None:
            patch.chdir(tmp_path)
        assert main(first) == 0
        second = submitted(0)
        assert second == [*first, "--resume"]
        assert main([*second, "--steps", "5"]) == 0
    assert torch.load(tmp_path / "my run" / "checkpoint.pt", weights_only=True)["step"] == 5
    # It has ended by itself, and does not come again.
    assert (tmp_path / "requeued").read_text() == "requeue 70123\n"
    directives = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --signal=TERM@60", "#SBATCH --requeue"} <= set(directives)
