"""scripts/gpu_acceptance.py: every stage ends in passed, failed or not here, whatever is missing or breaks."""

import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def acceptance() -> Any:
    return script("gpu_acceptance")


def python(code: str) -> Any:
    return lambda device, out: [sys.executable, "-c", code]


def test_what_a_process_tells(acceptance: Any, tmp_path: Path) -> None:
    table = {"title": "Times", "columns": ["op", "us"], "rows": [{"op": "a", "us": 1.5}]}
    told = "RESULT " + json.dumps({"status": "passed", "tables": [table]})
    away = "RESULT " + json.dumps({"status": "not here", "reason": "no second GPU"})
    outcomes = {
        "fine": (python(f"print('hello'); print({told!r})"), "passed", ""),
        "away": (python(f"print({away!r})"), "not here", "no second GPU"),
        "broken": (python("raise ValueError('what went wrong')"), "failed", "ValueError: what went wrong"),
        "silent": (python("import os; os._exit(3)"), "failed", "exit status 3"),
        # What a tool around the process found counts, not what the process says of itself.
        "watched": (python(f"print({told!r}); print('1 error'); raise SystemExit(7)"), "failed", "1 error"),
        "no program": (lambda device, out: [str(out / "nothing")], "failed", "it did not start: "),
    }
    for name, (command, status, reason) in outcomes.items():
        result = acceptance.run(acceptance.Stage(name, 30, command), "cpu", tmp_path, 60)
        assert (result.status, result.reason[: len(reason)] if reason else result.reason) == (status, reason), name
        assert result.tables == ([table] if name in ("fine", "watched") else [])
    assert "hello" in (tmp_path / "logs" / "fine.txt").read_text()


def test_a_stage_is_stopped_at_its_limit_with_what_it_started(acceptance: Any, tmp_path: Path) -> None:
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    begin = time.monotonic()
    result = acceptance.run(acceptance.Stage("slow", 3, python(code)), "cpu", tmp_path, 60)
    assert time.monotonic() - begin < 30
    assert (result.status, result.reason) == ("failed", "it took more than its 3 s")
    child = Path("/proc") / (tmp_path / "child").read_text()
    for _ in range(100):
        if not child.exists() or "Z (zombie)" in (child / "status").read_text():
            return
        time.sleep(0.05)
    raise AssertionError("a process that the stage started is still there")


def test_no_time_and_nothing_to_run_with_are_not_here(acceptance: Any, tmp_path: Path) -> None:
    stage = acceptance.Stage("one", 30, python("pass"))
    assert acceptance.run(stage, "cpu", tmp_path, 1).reason == "no time was left"
    stage = acceptance.Stage("two", 30, python("pass"), lambda device: "nvcc is not installed")
    result = acceptance.run(stage, "cpu", tmp_path, 60)
    assert (result.status, result.reason) == ("not here", "nvcc is not installed")


def test_results_are_written_after_each_stage(
    acceptance: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = "import json; print('RESULT ' + json.dumps({'reason': '', 'tables': [{'title': 'Seen', 'columns': ['n'], "
    seen += f"'rows': [{{'n': len(json.load(open({str(tmp_path / 'results.json')!r}))['stages'])}}]}}]}}))"
    stages = [acceptance.Stage("first", 30, python("exit('a | b')")), acceptance.Stage("next", 30, python(seen))]
    monkeypatch.setattr(acceptance, "STAGES", stages)
    assert acceptance.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    stages = json.loads((tmp_path / "results.json").read_text())["stages"]
    assert [(stage["stage"], stage["status"]) for stage in stages] == [("first", "failed"), ("next", "passed")]
    report = (tmp_path / "report.md").read_text()
    assert "| first | failed |" in report
    assert "a / b" in report
    assert "| n |\n|---|\n| 1 |\n" in report
    assert "first" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--stages", "bench,benches"], "--stages must be of build, .*, got 'benches'"),
        (["--seconds", "0"], "--seconds must be positive, got 0.0"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_bad_arguments(acceptance: Any, given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        acceptance.main(["--out", "unused", *given])
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not Path("unused").exists()


def test_without_a_gpu_it_says_so(
    acceptance: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = subprocess.CompletedProcess([], 0, "2.13.0 13.0 0\n", "")
    monkeypatch.setattr(acceptance.subprocess, "run", lambda *args, **kwargs: told)
    assert acceptance.main(["--out", str(tmp_path / "out")]) == 2
    assert "torch 2.13.0 (CUDA 13.0) finds no GPU; --device cpu runs the substitutes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    told.returncode, told.stderr = 1, "ModuleNotFoundError: No module named 'torch'"
    assert acceptance.gpu_missing().endswith("has no torch: ModuleNotFoundError: No module named 'torch'")


def test_a_stage_tells_what_it_has_found_when_its_time_is_over(acceptance: Any, tmp_path: Path) -> None:
    told = "RESULT " + json.dumps({"tables": [{"title": "So far", "columns": ["n"], "rows": [{"n": 3}]}]})
    code = f"import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print({told!r})\n    time.sleep(60)"
    acceptance.GRACE, before = 1, acceptance.GRACE
    try:
        result = acceptance.run(acceptance.Stage("slow", 2, python(code)), "cpu", tmp_path, 60)
    finally:
        acceptance.GRACE = before
    assert (result.status, result.reason) == ("failed", "it took more than its 2 s")
    assert result.tables[0]["rows"] == [{"n": 3}]


def test_what_takes_times_runs_alone(acceptance: Any) -> None:
    stages = [acceptance.Stage(name, 1, python("pass"), beside=name.isupper()) for name in "aBCdE"]
    assert [[stage.name for stage in wave] for wave in acceptance.waves(stages)] == [["a"], ["B", "C"], ["d"], ["E"]]
    timed = {"ceilings", "bench", "training", "compile"}
    assert not timed & {stage.name for wave in acceptance.waves(acceptance.STAGES) if len(wave) > 1 for stage in wave}


def test_the_build_is_for_the_gpu_that_is_there(acceptance: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance.shutil, "which", lambda name, path: f"/usr/bin/{name}")
    told = subprocess.CompletedProcess([], 0, "9.0\n8.9\n")
    monkeypatch.setattr(acceptance.subprocess, "run", lambda *args, **kwargs: told)
    # What cannot be built leaves the rest; the stage "modules" fails then.
    expected = {"LIPGAN_NATIVE": "auto", "LIPGAN_CUDA": "auto", "LIPGAN_CUDA_ARCHITECTURES": "90-real"}
    assert acceptance.build_environment("cuda") == expected
    assert acceptance.modules("cuda", Path("out"))[-2:] == ["--wanted", "native,cuda"]
    monkeypatch.setattr(acceptance.shutil, "which", lambda name, path: None)
    assert acceptance.build_environment("cuda") == {"LIPGAN_NATIVE": "off", "LIPGAN_CUDA": "off"}
    assert acceptance.modules("cuda", Path("out"))[-1] == ""


def test_programs_are_found_beside_python(acceptance: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A Python that is called by its path has a CMake beside it that is not on PATH."""
    (tmp_path / "cmake").write_text("#!/bin/sh\n")
    (tmp_path / "cmake").chmod(0o755)
    monkeypatch.setattr(acceptance.sys, "executable", str(tmp_path / "python3"))
    monkeypatch.setenv("PATH", "/usr/bin")
    assert acceptance.program("cmake") == str(tmp_path / "cmake")
    result = acceptance.run(
        acceptance.Stage("path", 30, lambda device, out: ["/bin/sh", "-c", "command -v cmake"]), "cpu", tmp_path, 60
    )
    assert result.output == str(tmp_path / "cmake")


def test_a_module_that_could_be_built_and_is_not_there_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = script("gpu_checks")
    monkeypatch.setattr(checks, "explain", lambda op, backend, kind: "it was not built")
    (table,) = checks.modules(torch.device("cpu"), ["cuda"])
    assert [row["module"] for row in table.rows if row.get("failed")] == ["lipgan._cuda"]


def test_parity_finds_what_is_wrong() -> None:
    checks, calls = script("gpu_checks"), iter(range(100))
    x = torch.randn(5, 7)

    def outcome(run: Any, exact: bool = False) -> str:
        case = checks.Case("op", "case", run, [x], 8, exact)
        return str(checks._outcome(case, "native", torch.device("cpu"), [x.double().sin()], [x.sin()]))

    assert outcome(lambda x, backend: x.sin()) == "None"
    assert outcome(lambda x, backend: x.sin() * (1 + 1e-4)).startswith("case: AssertionError: error")
    assert "two calls give different bits" in outcome(lambda x, backend: x.sin() * float("nan"))
    assert "two calls give different bits" in outcome(lambda x, backend: x.sin() + 1e-6 * next(calls))
    assert "not the numbers of the definition" in outcome(lambda x, backend: x.sin(), exact=True)
    assert outcome(lambda x, backend: [].pop()) == "case: IndexError: pop from empty list"


def test_parity_goes_through_the_cases_in_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = script("gpu_checks")

    class Pool:  # of one process: this one
        def __init__(self, *how: Any) -> None:
            pass

        def submit(self, function: Any, *args: Any) -> Any:
            return type("Future", (), {"result": lambda self: function(*args)})()

        def shutdown(self, **how: Any) -> None:
            pass

    calls: list[tuple[int, bool]] = []

    def judge(index: int, small: bool, device: torch.device) -> list[tuple[str, str, str | None]]:
        calls.append((index, small))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return [("op", "native", "wrong" if index == 1 else None)]

    monkeypatch.setattr(checks, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(checks, "_judge", judge)
    (table,) = checks.parity(torch.device("cuda"))
    assert calls == [(k, False) for k in range(4)]
    assert table.rows == [{"op": "op", "backend": "native", "cases": 3, "failed": 1, "first failure": "wrong"}]


@pytest.mark.slow
def test_the_substitutes_of_a_cpu(tmp_path: Path) -> None:
    stages = "modules,doctor,graph of penalty,two devices,memcheck,ceilings"
    command = [sys.executable, str(ROOT / "scripts" / "gpu_acceptance.py"), "--device", "cpu", "--stages", stages]
    result = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    document = json.loads((tmp_path / "results.json").read_text())
    assert {stage["stage"]: stage["status"] for stage in document["stages"]} == {
        "modules": "passed",
        "doctor": "passed",
        "ceilings": "passed",
        "graph of penalty": "not here",
        "two devices": "not here",
        "memcheck": "not here",
    }
    assert "| copy, read and written |" in (tmp_path / "report.md").read_text()
