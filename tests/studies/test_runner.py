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


def test_a_team_shares_the_units_and_whoever_comes_later_finds_them(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "team"
    for each in (whole, folder):
        each.mkdir()
    expected = results(runner.finish(STUDY, {"factor": 2}, UNITS, whole))
    stopped = dataclasses.replace(STUDY, run=lambda settings, unit: _square({**settings, "fails_at": 4}, unit))
    CALLS.clear()
    with pytest.raises(KeyboardInterrupt):
        runner.contribute(stopped, {"factor": 2}, UNITS, folder, member=1, team=3)
    assert CALLS == [1, 4]
    # Another number of members takes up what there is, whoever has made it.
    runner.contribute(STUDY, {"factor": 2}, UNITS, folder, member=1, team=2)
    assert CALLS == [1, 4, 3]
    told = []
    rows = runner.finish(STUDY, {"factor": 2}, UNITS, folder, team=2, progress=lambda done, _: told.append(done))
    assert CALLS == [1, 4, 3, 0, 2, 4]
    assert told == [2, 3, 4, 5]
    assert results(rows) == expected
    assert [path.name for path in folder.iterdir()] == [runner.UNITS]
    runner.contribute(STUDY, {"factor": 2}, UNITS, folder, member=1, team=2)
    assert results(runner.finish(STUDY, {"factor": 2}, UNITS, folder)) == expected
    assert CALLS[6:] == []


def test_the_first_of_a_team_waits_for_the_others(tmp_path, monkeypatch):
    def arrives(seconds):
        runner.contribute(STUDY, {"factor": 2}, UNITS, tmp_path, member=1, team=2)

    monkeypatch.setattr(runner.time, "sleep", arrives)
    rows = runner.finish(STUDY, {"factor": 2}, UNITS, tmp_path, team=2)
    assert CALLS == [0, 2, 4, 1, 3]
    assert [row.unit["k"] for row in rows] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"other settings \(factor 2 there and 3 here\)"):
        runner.contribute(STUDY, {"factor": 3}, UNITS, tmp_path, member=1, team=2)


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
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_a_command_that_is_ended_leaves_no_process_and_is_resumed(tmp_path, ending):
    """Two workers begin, this process goes on: nothing is lost or computed twice, and all numbers are the same."""
    study = get("biased-gradients")
    settings = study.settings(True)
    seeds = 200  # More than are done before the signal comes.
    folder = tmp_path / study.name
    path = folder / runner.UNITS
    command = [sys.executable, "-m", "lipgan", "study", study.name, "--quick", "--seeds", str(seeds), "--workers", "2"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        end = time.monotonic() + 200
        while not path.exists() or len(path.read_bytes().splitlines()) < 4:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(ending)
        _, err = process.communicate(timeout=60)
        if ending == signal.SIGTERM:
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
    kept = path.read_bytes().split(b"\n")[:-1]
    done = {json.dumps(json.loads(line)["unit"]) for line in kept[1:]}
    # The units that the workers have finished, and a few that they have not.
    units = study.units(settings, range(seeds))
    missing = [unit for unit in units if json.dumps(unit) not in done][:2]
    wanted = [unit for unit in units if json.dumps(unit) in done] + missing
    calls = []
    counted = dataclasses.replace(study, run=lambda settings, unit: calls.append(unit) or study.run(settings, unit))
    rows = runner.finish(counted, settings, wanted, folder)
    assert calls == missing
    after = path.read_bytes().splitlines()
    assert after[: len(kept)] == kept
    assert len(after) == len(kept) + len(missing)
    assert results(rows[:3]) == results(runner.compute(study.run, settings, unit) for unit in wanted[:3])
