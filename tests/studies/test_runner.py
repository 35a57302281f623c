"""Units of work: kept when they are done, computed once, the same in any process."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import study_checks
import torch

from lipgan.studies import Study, get, runner
from lipgan.studies.study import Claim

CALLS: list[int] = []


def _square(settings, unit):
    CALLS.append(unit["k"])
    if unit["k"] == settings.get("fails_at"):
        raise KeyboardInterrupt
    return {"value": settings["factor"] * unit["k"] ** 2, "drawn": float(torch.rand(())), "limit": math.inf}


def _units(settings, seeds):
    return [{"k": k, "seed": seed} for seed in seeds for k in range(5)]


STUDY = Study(
    name="squares",
    title="Squares",
    claims=(Claim("x", "", "", ""),),
    method="",
    full={"factor": 2},
    quick={},
    seeds=(1, 1),
    units=_units,
    run=_square,
    analyse=None,
    draw=None,
    caption="",
)
UNITS = _units({}, [0])


@pytest.fixture(autouse=True)
def _forget():
    CALLS.clear()


def results(rows):
    return [(dict(row.unit), dict(row.result)) for row in rows]


def test_a_run_that_was_interrupted_loses_and_repeats_nothing(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    expected = results(runner.finish(STUDY, {"factor": 2}, UNITS, whole))
    CALLS.clear()
    stopped = dataclasses.replace(STUDY, run=lambda settings, unit: _square({**settings, "fails_at": 3}, unit))
    with pytest.raises(KeyboardInterrupt):
        runner.finish(stopped, {"factor": 2}, UNITS, parts)
    assert len((parts / runner.UNITS).read_text().splitlines()) == 1 + 3
    told = []
    rows = runner.finish(STUDY, {"factor": 2}, UNITS, parts, progress=lambda done, total: told.append((done, total)))
    assert CALLS == [0, 1, 2, 3, 3, 4]
    assert results(rows) == expected
    assert told == [(3, 5), (4, 5), (5, 5)]


def test_a_line_that_was_cut_short_is_computed_again(tmp_path):
    path = tmp_path / runner.UNITS
    expected = results(runner.finish(STUDY, {"factor": 2}, UNITS, tmp_path))
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in (b"", lines[4][:1], lines[4][:20], lines[4][:-1]):
        path.write_bytes(b"".join([*lines[:4], cut]))
        CALLS.clear()
        assert results(runner.finish(STUDY, {"factor": 2}, UNITS, tmp_path)) == expected
        assert CALLS == [3, 4]
        assert len(path.read_bytes().splitlines()) == 6


def test_more_seeds_add_to_what_is_there(tmp_path):
    runner.finish(STUDY, {"factor": 2}, UNITS, tmp_path)
    runner.finish(STUDY, {"factor": 2}, _units({}, [0, 1]), tmp_path)
    assert len(CALLS) == 10
    assert [row.unit["seed"] for row in runner.finish(STUDY, {"factor": 2}, _units({}, [1]), tmp_path)] == [1] * 5
    assert len(CALLS) == 10


def test_other_settings_are_refused(tmp_path):
    runner.finish(STUDY, {"factor": 2}, UNITS, tmp_path)
    before = (tmp_path / runner.UNITS).read_bytes()
    with pytest.raises(ValueError, match=r"other settings \(factor 2 there and 3 here\); take another --out"):
        runner.finish(STUDY, {"factor": 3}, UNITS, tmp_path)
    with pytest.raises(ValueError, match="is of the study squares, not of cubes"):
        runner.finish(dataclasses.replace(STUDY, name="cubes"), {"factor": 2}, UNITS, tmp_path)
    assert (tmp_path / runner.UNITS).read_bytes() == before


@pytest.mark.parametrize("line", [0, 2])
def test_damage_within_the_file_is_told(tmp_path, line):
    path = tmp_path / runner.UNITS
    runner.finish(STUDY, {"factor": 2}, UNITS, tmp_path)
    lines = path.read_text().splitlines()
    lines[line] = "{}"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=f"is damaged in line {line + 1}"):
        runner.finish(STUDY, {"factor": 2}, UNITS, tmp_path)


def test_numbers_that_json_lacks_come_back(tmp_path):
    rows = runner.finish(STUDY, {"factor": 2}, UNITS, tmp_path)
    assert rows[0].result["limit"] == math.inf
    text = (tmp_path / runner.UNITS).read_text().splitlines()[1]
    assert json.loads(text, parse_constant=pytest.fail)["result"]["limit"] == "inf"
    assert runner.read(tmp_path / runner.UNITS, "squares", {"factor": 2})[0].result["limit"] == math.inf


def test_units_have_their_own_random_numbers_and_leave_those_of_the_caller():
    torch.manual_seed(5)
    expected = float(torch.rand(()))
    torch.manual_seed(5)
    first, second, again = (runner.compute(_square, {"factor": 1}, unit).result for unit in (*UNITS[:2], UNITS[0]))
    assert float(torch.rand(())) == expected
    assert first["drawn"] == again["drawn"] != second["drawn"]


@pytest.mark.slow
def test_workers_give_the_numbers_of_one_process(tmp_path):
    study = study_checks.smaller("biased-gradients", steps=200, pairs=[[0.6, 1]])
    settings = study.settings(False)
    units = study.units(settings, [0, 1])
    found = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        found.append(results(runner.finish(study, settings, units, folder, workers=workers)))
    assert found[0] == found[1]
    assert len(found[0]) == 4


@pytest.mark.slow
def test_a_killed_command_goes_on_where_it_was(tmp_path):
    """SIGKILL in the middle, by the file of units: none is lost and none is computed twice."""
    study = get("biased-gradients")
    total = len(study.units(study.settings(True), range(3)))
    command = [sys.executable, "-m", "lipgan", "study", study.name, "--quick", "--seeds", "3", "--out", str(tmp_path)]
    path = tmp_path / study.name / runner.UNITS
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 120
        while not path.exists() or len(path.read_bytes().splitlines()) < 4:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = path.read_bytes().splitlines()
    assert 4 <= len(kept) <= total, "killed too late to be of use"
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert f"{total} units of work, " in done.stderr
    after = path.read_bytes().splitlines()
    assert after[: len(kept) - 1] == kept[:-1]
    units = [json.dumps(json.loads(line)["unit"]) for line in after[1:]]
    assert len(units) == len(set(units)) == total


@pytest.mark.slow
def test_a_stopped_command_leaves_no_process(tmp_path):
    command = [
        sys.executable,
        "-m",
        "lipgan",
        "study",
        "biased-gradients",
        "--quick",
        "--seeds",
        "200",
        "--workers",
        "2",
    ]
    path = tmp_path / "biased-gradients" / runner.UNITS
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        end = time.monotonic() + 120
        while not path.exists() or len(path.read_bytes().splitlines()) < 3:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM
        assert err.decode().splitlines()[-1] == "lipgan: stopped"
        # Every process of the session, multiprocessing's helper too, is gone within a moment.
        while time.monotonic() < end:
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.05)
        else:
            pytest.fail("a process is left")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
