"""The command line: exit statuses, one-line errors, and runs that are stopped or killed half-way."""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from processes import Command
from system_checks import assert_same

from lipgan import _signals, data, recipes
from lipgan.__main__ import main
from lipgan.data.chords import midi
from lipgan.training import Trainer, config
from lipgan.training.run import Run

QUICK = [
    "train",
    "--recipe",
    "sngan",
    "--data",
    "digits",
    "--size",
    "8",
    "--batch-size",
    "8",
    "--log-every",
    "2",
]
FILES = ["checkpoint.pt", "config.toml", "curves.png", "metrics.json", "metrics.jsonl", "report.html", "samples"]
FILES += ["samples.png"]


pytestmark = pytest.mark.usefixtures("single_thread")


def train(out: Path, *arguments: str) -> int:
    return main([*QUICK, "--out", str(out), *arguments])


def resume(out: Path, *arguments: str) -> int:
    return main(["train", "--out", str(out), "--resume", *arguments])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_line_error(capsys: pytest.CaptureFixture[str]) -> str:
    """What stderr holds: a single line, without a traceback."""
    error = capsys.readouterr().err
    lines = error.splitlines()
    assert len(lines) == 1, error
    assert lines[0].startswith("lipgan")
    return lines[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps. Read only: the tests that change a run make their own."""
    out = tmp_path_factory.mktemp("runs") / "done"
    assert train(out, "--steps", "6") == 0
    return out


# --- train


def test_train_fills_the_folder(run: Path) -> None:
    assert sorted(path.name for path in run.iterdir()) == FILES
    effective = config.read(run / "config.toml")
    assert effective["recipe"] == "sngan"
    assert effective["batch_size"] == 8, "the effective value, not the recipe's"
    assert effective["critic_lr"] == 2e-4
    assert [effective[name] for name in ("data", "size", "steps", "seed")] == ["digits", 8, 6, 0]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    summary = json.loads((run / "metrics.json").read_text())
    assert summary["step"] == 6
    assert summary["last"] == rows[-1]
    assert max(summary["sigmas"].values()) == pytest.approx(rows[-1]["sigma"])
    for name in ("samples.png", "curves.png"):
        with Image.open(run / name) as picture:
            picture.load()
            assert min(picture.size) > 300


def test_progress_shows_losses_and_sigma(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", "--steps", "2") == 0
    output = capsys.readouterr()
    for word in ("2/2", "critic", "generator", "sigma"):
        assert word in output.err
    assert "samples.png" in output.out


def test_same_seed_same_run(run: Path, tmp_path: Path) -> None:
    torch.manual_seed(12345)
    assert train(tmp_path / "again", "--steps", "6", "--seed", "0") == 0
    assert train(tmp_path / "other", "--steps", "6", "--seed", "1") == 0
    for name in ("metrics.jsonl", "samples.png"):
        assert (tmp_path / "again" / name).read_bytes() == (run / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (run / name).read_bytes()


def test_resuming_continues_to_the_same_bits(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(out, "--steps", "3") == 0
    assert resume(out, "--steps", "6") == 0
    assert_same(
        torch.load(out / "checkpoint.pt", weights_only=True),
        torch.load(run / "checkpoint.pt", weights_only=True),
    )
    for name in ("metrics.jsonl", "samples.png", "config.toml"):
        assert (out / name).read_bytes() == (run / name).read_bytes()


def test_resuming_a_finished_run_has_nothing_to_do(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(out, "--steps", "2") == 0
    before = torch.load(out / "checkpoint.pt", weights_only=True)
    assert resume(out) == 0, "without --steps the target is the one of config.toml"
    assert_same(torch.load(out / "checkpoint.pt", weights_only=True), before)


def test_an_existing_run_is_refused_unless_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train(out, "--steps", "2") == 0
    before = contents(out)
    capsys.readouterr()
    assert train(out, "--steps", "2") == 2
    error = one_line_error(capsys)
    assert "--resume" in error
    assert "--overwrite" in error
    assert contents(out) == before
    assert train(out, "--steps", "3", "--overwrite") == 0
    assert json.loads((out / "metrics.json").read_text())["step"] == 3


# --- TensorBoard


class Board:
    """What is asked of torch.utils.tensorboard.SummaryWriter, and a list of all that they were given."""

    rows: ClassVar[list[tuple[str, float, int]]] = []
    calls: ClassVar[list[tuple[str, int]]] = []
    closed: ClassVar[int] = 0

    def __init__(self, log_dir: str, purge_step: int) -> None:
        type(self).calls.append((Path(log_dir).name, purge_step))

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        type(self).rows.append((tag, value, step))

    def close(self) -> None:
        type(self).closed += 1


def test_rows_go_to_tensorboard_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Board  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(Board, "rows", [])
    monkeypatch.setattr(Board, "calls", [])
    monkeypatch.setattr(Board, "closed", 0)
    out = tmp_path / "run"
    assert train(out, "--steps", "4") == 0
    assert resume(out, "--steps", "6") == 0
    # What a killed run has written after its last checkpoint is cleared away.
    assert Board.calls == [("tensorboard", 1), ("tensorboard", 5)]
    assert Board.closed == 2
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    expected = [(k, v, row["step"]) for row in rows for k, v in row.items() if k != "step" and v is not None]
    assert expected == Board.rows
    assert {step for _, _, step in expected} == {2, 4, 6}


def test_training_needs_no_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train(tmp_path / "run", "--steps", "2") == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == FILES


# --- runs that end early


def wait_until(condition: Callable[[], bool], process: Command) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def step_of(out: Path) -> int:
    """The step of the folder's last write, -1 before the first."""
    try:
        return int(json.loads((out / "metrics.json").read_text())["step"])
    except FileNotFoundError:
        return -1


def heed_signals() -> None:
    """In a process to be: what these tests inherit from nohup, or from the background of a script, is not for it."""
    for number in _signals.STOPPING:
        signal.signal(number, signal.SIG_DFL)


def start(out: Path, *arguments: str) -> Command:
    """A run that would take hours, and writes its folder every five steps."""
    return Command([*QUICK, "--out", str(out), "--steps", "1000000", "--save-every", "5", *arguments])


def assert_resumes_as_if_never_killed(out: Path, whole: Path) -> None:
    """The run in ``out`` ends in the bits of an uninterrupted one, which goes to ``whole``."""
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["step"] >= 5
    steps = state["step"] + 7
    assert resume(out, "--steps", str(steps)) == 0
    # Not by the command line, which would have schedules end at this step.
    recipe = recipes.from_dict(state["recipe"])
    trainer = Trainer.from_recipe(recipe, data.load("digits", 8), log_every=2).fit(steps)
    Run(trainer, whole, steps=steps, save_every=5).execute()
    assert_same(
        torch.load(out / "checkpoint.pt", weights_only=True),
        torch.load(whole / "checkpoint.pt", weights_only=True),
    )
    for name in ("metrics.jsonl", "samples.png"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_a_killed_run_with_all_that_is_random_resumes_to_the_bits_of_an_uninterrupted_one(tmp_path: Path) -> None:
    out = tmp_path / "killed"
    arguments = ["--recipe", "wgan-gp", "--n-critic", "2", "--accumulation", "2", "--instance-noise", "0.5"]
    process = start(out, *arguments, "--lr-decay", "linear", "--precision", "bfloat16")
    wait_until(lambda: step_of(out) >= 5, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert_resumes_as_if_never_killed(out, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_saves_and_says_how_to_go_on(name: str, status: int, tmp_path: Path) -> None:
    out = tmp_path / "my run"
    process = start(out)
    wait_until(lambda: step_of(out) >= 5, process)
    process.send_signal(getattr(signal, name))
    if name != "SIGINT":
        # Whoever shuts a system down may send it again.
        time.sleep(0.1)
        process.send_signal(getattr(signal, name))
    _, error = process.communicate()
    assert process.returncode == status, error
    assert "Traceback" not in error
    last = error.splitlines()[-1]
    step = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
    assert f"stopped at step {step} " in last
    assert f"lipgan train --resume --steps 1000000 --out '{out}'" in last
    assert step_of(out) == step
    assert sorted(path.name for path in out.iterdir()) == FILES, "no temporary file is left"


def test_ctrl_c_before_the_first_step_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("lipgan.data.load", interrupted)
    assert train(tmp_path / "run", "--steps", "2") == 130
    assert one_line_error(capsys) == "lipgan: stopped"
    assert list(tmp_path.iterdir()) == []


def test_signals_that_are_ignored_stay_ignored() -> None:
    """As under nohup, and as in the background of a script."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    others = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        with _signals.handling(_signals.leave):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) == _signals.leave
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == others
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_during_the_imports_is_one_line(name: str, status: int, tmp_path: Path) -> None:
    """An exception in the middle of an import comes out as another one."""
    (tmp_path / "torch.py").write_text(
        "import os, signal, time\n"
        "try:\n"
        f"    os.kill(os.getpid(), signal.{name})\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    raise ImportError('half of it') from None\n"
    )
    command = [sys.executable, "-m", "lipgan", "train", "--out", str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = subprocess.run(
        command, env=environment, text=True, capture_output=True, timeout=50, preexec_fn=heed_signals
    )
    assert (process.returncode, process.stderr) == (status, "lipgan: stopped\n")


def test_a_signal_that_comes_out_as_another_exception_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ImportError("half of scikit-learn") from None

    monkeypatch.setattr("lipgan.data.load", interrupted)
    assert train(tmp_path / "run", "--steps", "2") == 143
    assert one_line_error(capsys) == "lipgan: stopped"


@pytest.mark.slow
def test_two_runs_in_one_folder_are_refused_and_a_killed_one_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    process = start(out)
    try:
        wait_until(lambda: step_of(out) >= 5, process)
        for arguments in ([], ["--overwrite"], ["--resume"]):
            assert main(["train", "--out", str(out), *arguments]) == 2
            error = one_line_error(capsys)
            assert f"{out} is in use by process {process.pid} on {socket.gethostname()} since 2" in error
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finally:
        process.kill()
    # What a process that was killed leaves behind: its lock, and a file half-written.
    assert (out / ".lock").exists()
    (out / ".checkpoint.pt.abcd_123").write_bytes(b"half")
    (out / ".checkpoint.pt.kept").write_bytes(b"not ours")
    assert_resumes_as_if_never_killed(out, tmp_path / "whole")
    assert sorted(path.name for path in out.iterdir()) == [".checkpoint.pt.kept", *FILES]


@pytest.mark.slow
def test_a_full_disk_keeps_the_previous_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit on the size of files stands in for the full disk: the write itself fails, half-way."""
    resource = pytest.importorskip("resource")
    out = tmp_path / "run"
    assert train(out, "--steps", "2") == 0
    before = contents(out)
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["checkpoint.pt"]) // 2, hard))
    try:
        status = resume(out, "--steps", "4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2
    error = one_line_error(capsys)
    assert "checkpoint.pt" in error
    assert "too large" in error
    assert contents(out) == before
    assert resume(out, "--steps", "4") == 0


OUT_OF_MEMORY = {
    "python": MemoryError(),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    "accelerator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
}


@pytest.mark.slow
def test_out_of_memory_keeps_the_previous_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(out, "--steps", "2") == 0
    before = torch.load(out / "checkpoint.pt", weights_only=True)
    for whose, error in OUT_OF_MEMORY.items():
        capsys.readouterr()

        def full(self: Trainer, error: Exception = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_train_step", full)
            assert resume(out, "--steps", "4") == 2, whose
        assert "lipgan: error: out of memory; try a smaller batch" in capsys.readouterr().err, whose
        assert_same(torch.load(out / "checkpoint.pt", weights_only=True), before)
    assert resume(out, "--steps", "4") == 0


def test_networks_that_no_memory_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.Module, "register_parameter", lambda *args: torch.empty(1 << 50))
    assert train(tmp_path / "run", "--steps", "1") == 2
    assert one_line_error(capsys).startswith("lipgan: error: out of memory")
    assert list(tmp_path.iterdir()) == []


def test_divergence_is_one_line_and_keeps_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train(out, "--steps", "50", "--generator-lr", "1e38", "--save-every", "1") == 2
    assert "training diverged" in (error := capsys.readouterr().err.splitlines()[-1])
    assert "at step" in error
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    for tensor in state["generator"].values():
        assert tensor.isfinite().all()


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: must be a whole number of at least 1, got '0'"),
        (["--steps", "-5"], "got '-5'"),
        (["--steps", "1e3"], "got '1e3'"),
        (["--batch-size", "0"], "--batch-size: must be a whole number of at least 1"),
        (
            ["--batch-size", "4294967295"],
            "--batch-size: must be a whole number of at most 1048576, got '4294967295'",
        ),
        (["--size", "16385"], "--size: must be a whole number of at most 16384, got '16385'"),
        (["--seed", "9" * 40], f"--seed: must be a whole number of at most {2**63 - 1}, got '{'9' * 40}'"),
        (["--seed", "9" * 5000], "--seed: must be a whole number of at least 0, got '9999"),
        (["--lr", "nan"], "unrecognized arguments: --lr nan"),
        (["--save-every", "0"], "--save-every"),
        (["--seed", "-1"], "--seed: must be a whole number of at least 0"),
        (["--critic-lr", "fast"], "--critic-lr: invalid float value: 'fast'"),
        (["--resume", "--overwrite"], "not allowed with"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_arguments_that_do_not_parse(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--out", str(tmp_path / "run"), *arguments])
    assert caught.value.code == 2
    assert message in one_line_error(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "sngam"], "unknown recipe 'sngam'; did you mean sngan"),
        (["--data", "digit"], "unknown data set 'digit'; did you mean digits?"),
        (["--size", "10"], "size must be a multiple of 4 from 8 to 128, got 10"),
        (["--size", "4"], "at least 8"),
        (["--critic-lr", "-1"], "critic_lr must be positive and finite, got -1.0"),
        (["--ema-decay", "1"], "ema_decay must lie in [0, 1), got 1.0"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
        (["--device", "meta"], "device 'meta' cannot be used here: Tensor.item() cannot be called on meta tensors"),
        (["--device", "privateuseone"], "device 'privateuseone' cannot be used here"),
        (["--resume"], "holds no checkpoint.pt to resume from"),
        (["--resume", "--recipe", "sngam"], "did you mean sngan"),
        (["--resume", "--data", "digit"], "did you mean digits?"),
    ],
)
def test_input_that_cannot_be_met(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--out", str(tmp_path / "run"), "--steps", "1", *arguments]) == 2
    assert message in one_line_error(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "9"], "made with --batch-size 8, so it cannot be resumed with --batch-size 9"),
        (["--size", "16"], "made with --size 8"),
        (["--seed", "1"], "made with --seed 0"),
        (["--recipe", "wgan"], "made with --recipe sngan, so it cannot be resumed with --recipe wgan"),
        (["--data", "patches"], "made with --data digits"),
        (["--steps", "5"], "at step 6 already, which is past --steps 5"),
    ],
)
def test_a_run_is_not_resumed_as_another(
    run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    assert resume(run, *arguments) == 2
    assert message in one_line_error(capsys)
    assert contents(run) == before


def test_out_has_to_be_a_folder_that_can_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert train(out, "--steps", "1") == 2
        assert str(tmp_path / "file") in one_line_error(capsys)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_damaged_checkpoint_stops_the_resumption(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes()[:5000])
    before = contents(tmp_path)
    assert resume(tmp_path, "--steps", "9") == 2
    assert "truncated or damaged" in one_line_error(capsys)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("steps = = 9", [], "config.toml is not TOML"),
        ("steps = = 9", ["--steps", "9"], "config.toml is not TOML"),
        ("stops = 9", [], "config.toml"),
        ('steps = "9"', [], "config.toml must be of type int"),
        ("seed = 0", [], "config.toml does not say how many steps the run takes: give --steps"),
        (None, [], "config.toml is missing, which says how many steps the run takes: give --steps"),
    ],
)
def test_a_run_whose_configuration_is_broken_is_not_resumed(
    run: Path,
    tmp_path: Path,
    text: str | None,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes())
    if text is not None:
        (tmp_path / "config.toml").write_text(text)
    before = contents(tmp_path)
    monkeypatch.delattr(Trainer, "_train_step")  # the steps of the recipe would take minutes
    assert resume(tmp_path, *arguments) == 2
    assert message in one_line_error(capsys)
    assert contents(tmp_path) == before


def test_a_run_that_was_killed_before_its_configuration_was_written_is_resumed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes())
    assert resume(tmp_path, "--steps", "7") == 0
    assert (tmp_path / "config.toml").exists()


# --- sample


def test_sample_draws_a_grid(run: Path, tmp_path: Path) -> None:
    first, again, other = (tmp_path / name for name in ("first.png", "again.png", "other.png"))
    assert main(["sample", str(run / "checkpoint.pt"), "-n", "64", "-o", str(first)]) == 0
    assert main(["sample", str(run), "-n", "64", "-o", str(again)]) == 0
    assert main(["sample", str(run), "-n", "64", "-o", str(other), "--seed", "1"]) == 0
    with Image.open(first) as grid, Image.open(run / "samples.png") as samples:
        assert grid.tobytes() == samples.tobytes(), "the same seed draws the same digits as the run did"
    assert first.read_bytes() == again.read_bytes()
    assert first.read_bytes() != other.read_bytes()


def test_classes_have_columns_in_the_pictures_of_a_run_and_of_sample(tmp_path: Path) -> None:
    out, drawn = tmp_path / "run", tmp_path / "drawn.png"
    assert train(out, "--conditioning", "auxiliary", "--steps", "1") == 0
    assert main(["sample", str(out), "-n", "80", "-o", str(drawn)]) == 0
    with Image.open(drawn) as grid, Image.open(out / "samples.png") as samples:
        assert grid.tobytes() == samples.tobytes()
        # Ten columns of eight digits, and a strip of half a cell above.
        assert samples.height / samples.width == pytest.approx(8.5 / 10, rel=0.01)


def test_a_run_on_sentences_shows_them_in_its_pictures(tmp_path: Path) -> None:
    out, drawn = tmp_path / "run", tmp_path / "drawn.png"
    arguments = ["--recipe", "gan-cls", "--data", "sentences", "--size", "16", "--batch-size", "4", "--steps", "1"]
    arguments += ["--option", "pretraining=2"]
    assert main(["train", *arguments, "--out", str(out)]) == 0
    assert main(["sample", str(out), "-n", "60", "-o", str(drawn)]) == 0
    with Image.open(drawn) as page, Image.open(out / "samples.png") as samples:
        assert page.tobytes() == samples.tobytes()
        # Ten columns of six rows, each with two lines of text, and four strips.
        assert page.size == (10 * 130, 6 * 162 + 4 * 178)


def test_a_run_on_chords_becomes_music(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mido")
    out, music = tmp_path / "run", tmp_path / "music.mid"
    arguments = ["--recipe", "seqgan", "--batch-size", "4", "--steps", "2"]
    assert main(["train", *arguments, "--data", "chords", "--out", str(out)]) == 0
    assert main(["sample", str(out), "-n", "2", "-o", str(music)]) == 0
    assert music.read_bytes() == midi(Trainer.load(out / "checkpoint.pt").sample(2, seed=0))
    assert main(["sample", str(out), "-n", "2", "-o", str(tmp_path / "phrases.png")]) == 0
    capsys.readouterr()
    assert main(["eval", str(out)]) == 2
    assert "lipgan eval compares images and vectors, and the generator of" in capsys.readouterr().err
    assert main(["train", *arguments, "--data", "ring", "--out", str(tmp_path / "ring")]) == 2
    error = capsys.readouterr().err
    assert "the system 'seqgan' needs sequences" in error
    assert error.count("\n") == 1


def test_sample_refuses_bad_input(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "foreign.pt").write_bytes(b"PK\x03\x04 and so on")
    endless, state = tmp_path / "endless.pt", torch.load(run / "checkpoint.pt", weights_only=True)
    state["ema"] = {
        key: value * torch.nan if value.is_floating_point() else value for key, value in state["ema"].items()
    }
    torch.save(state, endless)
    for arguments, message in (
        ([str(tmp_path / "nothing.pt")], "nothing.pt: No such file"),
        ([str(tmp_path / "foreign.pt")], "not a lipgan checkpoint"),
        ([str(run), "-o", str(tmp_path / "grid.docx")], "image format"),
        ([str(run), "-o", str(tmp_path / "grid.mid")], "is for music, and the generator of"),
        ([str(run), "-o", str(tmp_path / "grid.xbm")], "grid.xbm cannot be written (cannot write mode RGB as XBM)"),
        ([str(run), "-o", str(tmp_path / "missing" / "grid.png")], "missing is not a folder"),
        ([str(endless), "-o", str(tmp_path / "grid.png")], "endless.pt makes samples that are not finite"),
    ):
        assert main(["sample", *arguments]) == 2
        assert message in one_line_error(capsys)
    with pytest.raises(SystemExit) as caught:
        main(["sample", str(run), "-n", "0"])
    assert caught.value.code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["endless.pt", "foreign.pt"]


# --- the rest


@pytest.mark.parametrize("command", ["train", "sample", "fid", "eval", "bench", "doctor"])
def test_help_has_an_example_and_the_common_flags(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for word in (f"example:\n  lipgan {command}", "--seed", "--device"):
        assert word in text


@pytest.mark.parametrize(("module", "command"), [("lipgan.bench", "bench"), ("lipgan.commands.doctor", "doctor")])
def test_hooks_pass_arguments(module: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(importlib.import_module(module), "main", calls.append)
    assert main([command, "--seed", "3", "--device", "cpu"]) == 0
    assert (calls[0].seed, calls[0].device) == (3, "cpu")


def test_bench_takes_its_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(importlib.import_module("lipgan.bench"), "main", calls.append)
    assert main(["bench", "spectral-norm", "--json", "b.json", "--plot", "plots", "--threads", "2"]) == 0
    assert main(["bench"]) == 0
    assert (calls[0].which, calls[0].json, calls[0].plot, calls[0].threads) == (
        "spectral-norm",
        Path("b.json"),
        Path("plots"),
        2,
    )
    assert (calls[1].which, calls[1].json, calls[1].threads) == ("all", None, None)
    with pytest.raises(SystemExit) as caught:
        main(["bench", "everything"])
    assert caught.value.code == 2
    assert "everything" in one_line_error(capsys)


@pytest.mark.parametrize("seconds", ["nan", "-1", "inf", "1e9", "soon"])
def test_bench_takes_seconds_that_pass(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "--seconds", seconds])
    assert caught.value.code == 2
    assert f"--seconds: must be a number from 0 to 3600, got '{seconds}'" in one_line_error(capsys)


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        (["train", "--out", "x"], "--over"),
        (["sample", "x"], "--out"),
        (["fid", "a", "b"], "--down"),
        (["eval", "x"], "--metric"),
        (["bench"], "--thread"),
        (["doctor"], "--dev"),
        ([], "--hel"),
    ],
)
def test_flags_have_one_name(command: list[str], flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, flag])
    assert caught.value.code == 2
    error = one_line_error(capsys)
    assert f"unrecognized arguments: {flag}" in error or not command


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        (["train", "--out", ""], "--out"),
        (["train", "--out", "x", "--config", ""], "--config"),
        (["sample", ""], "CHECKPOINT"),
        (["sample", "x", "-o", ""], "-o/--output"),
        (["fid", "a", "b", "--save-stats", ""], "--save-stats"),
        (["eval", ""], "CHECKPOINT"),
        (["bench", "--plot", ""], "--plot"),
    ],
)
def test_no_name_is_not_the_current_folder(
    command: list[str], flag: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 2
    assert f"argument {flag}: must be the name of a file or folder, got ''" in one_line_error(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("command", "most"), [(["sample", "x"], 2**16), (["eval", "x"], 2**24)])
def test_samples_of_a_command_are_counted(command: list[str], most: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command, "-n", str(most + 1)])
    assert f"must be a whole number of at most {most}, got '{most + 1}'" in one_line_error(capsys)


def test_no_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "COMMAND" in one_line_error(capsys)


def test_training_says_what_it_leaves_out_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for k in range(8):
        Image.new("RGB", (8, 8), (30 * k, 0, 0)).save(images / f"{k}.png")
    arguments = ["train", "--recipe", "gan", "--batch-size", "4", "--steps", "1", "--data", str(images)]
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    assert "skipped" not in capsys.readouterr().err
    for name in ("a.gif", "b.GIF", "c.txt"):
        (images / name).write_bytes(b"")
    assert main([*arguments, "--out", str(tmp_path / "part")]) == 0
    sentence = f"lipgan: skipped: {images}: 3 files of other kinds left out (2 .gif, 1 .txt)"
    assert capsys.readouterr().err.count(sentence) == 1
