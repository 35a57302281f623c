"""What the command line answers without importing what takes seconds."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lipgan import _choices, data, recipes
from lipgan.__main__ import main
from lipgan.commands import names
from lipgan.metrics import features
from lipgan.training.run import CHECKPOINT

HEAVY = ("torch", "numpy", "scipy", "PIL", "matplotlib", "sklearn", "triton")

# Runs each command line in one process that has imported nothing, and prints status and what of HEAVY is there then.
SCRIPT = """
import contextlib, io, json, sys
from lipgan.__main__ import main

results = []
for arguments in json.loads(sys.argv[1]):
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            status = main(arguments)
        except SystemExit as leave:
            status = leave.code
    results.append([status, err.getvalue(), [name for name in json.loads(sys.argv[2]) if name in sys.modules]])
print(json.dumps(results))
"""

ANSWERS = {
    ("--help",): (0, ""),
    ("--version",): (0, ""),
    ("train", "--help"): (0, ""),
    ("fid", "--help"): (0, ""),
    ("nothing",): (2, "invalid choice: 'nothing'"),
    ("train",): (2, "required: --out"),
    ("train", "--out", "run", "--steps", "0"): (2, "--steps: must be a whole number of at least 1, got '0'"),
    ("train", "--out", "run", "--recipe", "sngam"): (2, "unknown recipe 'sngam'; did you mean"),
    ("train", "--out", "run", "--data", "digit"): (2, "unknown data set 'digit'; did you mean digits"),
    ("train", "--out", "run", "--config", "absent.toml"): (2, "absent.toml: No such file or directory"),
    ("sample", "absent.pt"): (2, "absent.pt: No such file or directory"),
    ("sample", "."): (2, "checkpoint.pt: No such file or directory"),
    ("eval", "absent.pt"): (2, "absent.pt: No such file or directory"),
    ("fid", "absent", "digits"): (2, "absent does not exist; it must be a folder of images"),
    ("fid", "digits", ""): (2, "must not be empty"),
    ("fid", "digits", "digits", "--protocol", "pytorch"): (2, "unknown protocol 'pytorch'; did you mean pytorch-fid"),
    ("fid", "digits", "digits", "--features", "pixel"): (2, "unknown feature extractor 'pixel'; did you mean pixels?"),
    ("fid", "digits", "digits", "--json", "absent/x.json"): (
        2,
        "absent/x.json cannot be written: absent is",
    ),
    ("fid", "digits", "digits", "--save-stats", "."): (2, ". cannot be written: it is a folder"),
    ("eval", ".", "--protocol", "clear"): (2, "unknown protocol 'clear'; did you mean clean?"),
    ("eval", ".", "--features", "inceptoin"): (2, "unknown feature extractor 'inceptoin'; did you mean inception?"),
    ("eval", ".", "--plot", "absent/x.png"): (2, "absent/x.png cannot be written: absent is not a folder"),
    ("sample", ".", "--output", "absent/x.png"): (2, "absent/x.png cannot be written: absent is not a folder"),
    ("bench", "everything"): (2, "invalid choice: 'everything'"),
    ("study", "dualities"): (2, "unknown study 'dualities'; did you mean duality?"),
    ("study",): (2, "study needs a name, or all"),
    ("study", "duality", "--list"): (2, "--list takes no name, got 'duality'"),
}


def test_help_and_wrong_arguments_import_nothing_heavy(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, json.dumps(list(ANSWERS)), json.dumps(HEAVY)]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, check=True, timeout=60)
    for arguments, (status, error, imported) in zip(ANSWERS, json.loads(done.stdout), strict=True):
        expected, message = ANSWERS[arguments]
        assert status == expected, arguments
        assert message in error, arguments
        assert error.count("\n") == (expected != 0), arguments
        assert not imported, arguments
    assert list(tmp_path.iterdir()) == []


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"lipgan {importlib.metadata.version('lipgan')}\n"


def test_a_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-m", "lipgan", "study", "--list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 141


def test_import_of_the_package_imports_nothing_heavy_either() -> None:
    script = f"import sys, lipgan; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_names_are_those_of_the_tables() -> None:
    assert list(_choices.RECIPES) == recipes.names()
    assert list(_choices.DATA_SETS) == data.names()
    assert list(_choices.FEATURES) == features.names()
    assert tuple(features.PREFIXES) == _choices.FEATURE_PREFIXES
    assert names.CHECKPOINT == CHECKPOINT


def test_several_processes_leave_the_answer_to_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--out", str(tmp_path / "run"), "--recipe", "sngam"]
    checked: list[str] = []
    monkeypatch.setattr(names, "_CHECKS", {"train": lambda args: checked.append(args.recipe)})
    assert main(arguments) == 2
    assert checked == ["sngam"]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("lipgan.commands.train.main", lambda args: 0)
    assert main(arguments) == 0
    assert checked == ["sngam"]
    assert "unknown recipe" in capsys.readouterr().err
