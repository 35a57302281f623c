"""Data parallelism: two gloo processes train as one does on the joined batch, and `lipgan train` under torchrun."""

import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import Command, leave, run

from lipgan import data, recipes
from lipgan.__main__ import main
from lipgan.systems.gan import GAN
from lipgan.training import Trainer, config, distributed
from lipgan.training.run import FILES

# n_critic is small, and the batch divides; the critics are perceptrons, which do not mix samples.
RUNS: dict[str, dict[str, Any]] = {
    "sngan": {},
    "wgan-gp": {"n_critic": 2},
    "wgan": {"n_critic": 2},
    "dragan": {},
    "cgan": {"accumulation": 2, "instance_noise": 0.5, "max_grad_norm": 0.1},
}


def trained(name: str) -> dict[str, Any]:
    """Three steps in float64: the history and the parameters."""
    row = dataclasses.replace(recipes.get(name), architecture="mlp", batch_size=16, steps=5, **RUNS[name])
    ring = data.load("ring")
    torch.manual_seed(1)
    generator, critic = (network.double() for network in GAN.build(row, ring.shape, ring.classes))
    trainer = Trainer(generator, critic, row, ring, seed=2, log_every=1).fit(3)
    return {
        "history": trainer.history,
        "parameters": [p.detach() for p in (*trainer.generator.parameters(), *trainer.critic.parameters())],
        "average": [p.detach() for p in trainer.ema.parameters()],
    }


# A logged step, and one between two of them.
SPLITS = (2, 3)


def resumable(path: Path | None = None) -> Trainer:
    """A trainer in float64 that logs every second step, fresh or from a checkpoint."""
    row = dataclasses.replace(recipes.get("sngan"), architecture="mlp", batch_size=16, steps=5)
    ring = data.load("ring")
    torch.manual_seed(1)
    generator, critic = (network.double() for network in GAN.build(row, ring.shape, ring.classes))
    if path is None:
        return Trainer(generator, critic, row, ring, seed=2, log_every=2)
    return Trainer.load(path, generator=generator, critic=critic, data=ring)


def outcome(trainer: Trainer) -> dict[str, Any]:
    return {"history": trainer.history, "average": [p.detach() for p in trainer.ema.parameters()]}


def process(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    torch.save({name: trained(name) for name in RUNS}, folder / f"{rank}.pt")

    # Checkpoints of one process go on with two, and those of two with one.
    continued = {}
    for split in SPLITS:
        resumable().fit(split).save(folder / f"two-{split}")
        distributed.wait()
        for saved in ("one", "two"):
            continued[f"{saved}-{split}"] = outcome(resumable(folder / f"{saved}-{split}").fit(5 - split))
    torch.save(continued, folder / f"{rank}-continued.pt")

    # A stop in one process ends all of them after the same step.
    row = dataclasses.replace(recipes.get("gan"), batch_size=8)
    trainer = Trainer.from_recipe(row, data.load("ring"))
    trainer.fit(50, callbacks=[lambda t: t.stop() if (t.step, rank) == (3, 1) else None])
    assert trainer.step == 3

    # Bad input is one sentence of the first process, and status 2 of all.
    arguments = ["train", "--recipe", "gan", "--data", "ring", "--batch-size", "9", "--out", str(folder / "run")]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert main(arguments) == 2
    (folder / f"{rank}.txt").write_text(said.getvalue())

    # A parameter that has a gradient in one process only moves in both.
    weight = torch.nn.Parameter(torch.zeros(2))
    if rank == 0:
        weight.grad = torch.tensor([2.0, 4.0])
    distributed.average_gradients([weight])
    assert weight.grad is not None
    assert weight.grad.tolist() == [1, 2]
    leave()


def assert_same_rows(rows: list[dict[str, Any]], expected: list[dict[str, Any]], name: str) -> None:
    for row, wanted in zip(rows, expected, strict=True):
        assert row.keys() == wanted.keys()
        for key, value in wanted.items():
            error = 0.0 if value is None else abs(row[key] - value) / max(1.0, abs(value))
            assert error < 1e-10, (name, key, row["step"], error)


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    for split in SPLITS:
        resumable().fit(split).save(tmp_path / f"one-{split}")
    run(process, tmp_path)
    errors = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    sentence = "batch_size must be a multiple of accumulation times processes, 2, got 9"
    assert [line for line in errors[0].splitlines() if "lipgan" in line] == [f"lipgan: error: {sentence}"]
    assert "lipgan: error" not in errors[1]
    assert not (tmp_path / "run").exists()

    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = {name: trained(name) for name in RUNS}
    finally:
        torch.set_num_threads(before)
    for name, expected in alone.items():
        for ours in (first[name], second[name]):
            assert_same_rows(ours["history"], expected["history"], name)
            for part in ("parameters", "average"):
                for a, b in zip(ours[part], expected[part], strict=True):
                    assert float((a - b).abs().max()) < 1e-10, (name, part)

    whole = outcome(resumable().fit(5))
    continued = {f"{rank}": torch.load(tmp_path / f"{rank}-continued.pt", weights_only=True) for rank in (0, 1)}
    continued["alone"] = {
        f"two-{split}": outcome(resumable(tmp_path / f"two-{split}").fit(5 - split)) for split in SPLITS
    }
    for whose, runs in continued.items():
        for name, ours in runs.items():
            assert_same_rows(ours["history"], whole["history"], f"{whose}: {name}")
            for a, b in zip(ours["average"], whole["average"], strict=True):
                assert float((a - b).abs().max()) < 1e-10, (whose, name)


# --- the command line


def torchrun(out: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "lipgan", "train", "--out", str(out), "--log-every", "2", "--device", "cpu", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def step_of(out: Path) -> int:
    try:
        return int(json.loads((out / "metrics.json").read_text())["step"])
    except FileNotFoundError:
        return -1


def test_torchrun_fills_one_folder_stops_and_resumes(tmp_path: Path) -> None:
    """Ctrl-C goes to torchrun, which passes it on to its processes one after the other."""
    out = tmp_path / "run"
    new = ["--recipe", "gan", "--data", "ring", "--batch-size", "8", "--save-every", "5", "--steps", "1000000"]
    # Small steps keep the sums of two processes near those of one.
    process = torchrun(out, *new, "--generator-lr", "2e-4", "--critic-lr", "2e-4")
    try:
        while step_of(out) < 5:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert error.count("lipgan: stopped at step") == 1, error
    step = step_of(out)
    assert f"lipgan: stopped at step {step} and saved" in error
    assert int(torch.load(out / "checkpoint.pt", weights_only=True)["step"]) == step
    assert error.count(" 0/1000000 [") == 1, f"one progress bar, which begins once: {error}"

    process = torchrun(out, "--resume", "--steps", str(step + 4))
    output, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert output.count(f"step {step + 4}: see") == 1
    names = {path.name for path in out.iterdir()} - {"tensorboard"}
    assert names == {*FILES, "samples"}
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(2, step + 5, 2))

    process = torchrun(out, "--resume", "--steps", "1000000", "--save-every", "5")
    try:
        while step_of(out) < step + 10:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    later = step_of(out)
    assert error.count(f"lipgan: stopped at step {later} and saved") == 1, error
    assert int(torch.load(out / "checkpoint.pt", weights_only=True)["step"]) == later

    # The run of one process: that far, sums in another order have changed float32 losses by little.
    values = {**{name: default for name, (_, default) in config.RUN_FIELDS.items()}, **config.read(out / "config.toml")}
    alone = Trainer.from_recipe(config.recipe_of(values), data.load("ring"), seed=values["seed"], log_every=2).fit(4)
    for row, expected in zip(rows, alone.history, strict=False):
        assert abs(row["critic_loss"] - expected["critic_loss"]) < 1e-4
        assert abs(row["generator_loss"] - expected["generator_loss"]) < 1e-4


# --- a process that is lost


def single(rank: int, port: int, out: Path, **environment: str) -> Command:
    """One of two processes that nobody watches, as a launcher other than torchrun starts them."""
    arguments = ["train", "--recipe", "gan", "--data", "ring", "--batch-size", "8", "--steps", "1000000"]
    arguments += ["--save-every", "5", "--log-every", "1", "--device", "cpu", "--out", str(out)]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    return Command(arguments, **group, LOCAL_RANK=str(rank), **environment)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(("lost", "number"), [(0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_process_that_dies_or_stands_still_ends_the_other(tmp_path: Path, lost: int, number: int) -> None:
    out, port = tmp_path / "run", free_port()
    both = [single(rank, port, out, LIPGAN_DISTRIBUTED_TIMEOUT="10") for rank in (0, 1)]
    try:
        while step_of(out) < 5:
            assert all(process.poll() is None for process in both), both[1 - lost].communicate()
            time.sleep(0.05)
        both[lost].send_signal(number)
        _, error = both[1 - lost].communicate(timeout=90)
    finally:
        for process in both:
            process.kill()
    assert both[1 - lost].returncode == 2, error
    assert error.count("lipgan: error: another process of this run died or did not answer") == 1, error
    assert "Traceback" not in error
    # What was saved is whole.
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] >= 5


def test_a_process_that_never_starts_is_missed(tmp_path: Path) -> None:
    alone = single(0, free_port(), tmp_path / "run", LIPGAN_DISTRIBUTED_TIMEOUT="3")
    _, error = alone.communicate(timeout=90)
    assert alone.returncode == 2, error
    assert error.count("lipgan: error: another process of this run died or did not answer") == 1, error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf", "1e9"])
def test_a_time_limit_is_a_number_of_seconds(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LIPGAN_DISTRIBUTED_TIMEOUT", text)
    sentence = f"LIPGAN_DISTRIBUTED_TIMEOUT must be a number of seconds, above 0 and up to 1e6, got '{text}'"
    with pytest.raises(ValueError, match=re.escape(sentence)), distributed.group(torch.device("cpu")):
        pass
