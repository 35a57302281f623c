"""scripts/measurements.py: tables of pages from files of measurements."""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("measurements", ROOT / "scripts" / "measurements.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TITLE = "Some times, CPU"


def _run(ours: float, *, name: str = "kid", title: str = TITLE, n: int = 8, **facts: str) -> dict[str, Any]:
    machine = {"cpu": "C", "cores": "2", "threads": "2", "isa": "avx2", "system": "S", "python": "3", "torch": "2"}
    machine |= {"date": "2026-01-02", "commit": "abc", **facts}
    row = {"d": n, "torch ms": 6.0, "lipgan ms": ours, "ratio": 6.0 / ours, "route": "x"}
    columns = ["d", "torch ms", "lipgan ms", "ratio", "route"]
    return {"machine": machine, "results": {name: [{"title": title, "columns": columns, "rows": [row], "notes": []}]}}


PAGE = """Before.

<!-- table: machine -->
old
<!-- end -->

<!-- table: kid 0: d, lipgan ms, ratio, route -->
old
<!-- end -->

<!-- table: slower kid 0 -->
old
<!-- end -->

After.
"""


def test_a_page_gets_medians_and_the_spread_of_ratios(script: Any) -> None:
    runs = [_run(2.0), _run(3.0), _run(1.5, date="2026-01-03")]
    page = script.fill(PAGE, runs)
    assert page.startswith("Before.\n\n<!-- table: machine -->\n\nC, 2 cores")
    assert "2026-01-02, 2026-01-03, commit abc; medians of up to 3 runs" in page
    assert "*Some times, CPU (3 runs)*" in page
    assert "| 8 | 2.00      | 3.00 (2.00..4.00) | x     |" in page
    assert "lipgan is slower in none of the 1 rows." in page
    assert "old" not in page
    assert page.endswith("After.\n")
    assert script.fill(page, runs) == page


def test_what_is_slower_is_said(script: Any) -> None:
    page = script.fill(PAGE, [_run(8.0), _run(12.0), _run(4.0)])
    assert "lipgan is slower in 1 of the 1 rows: 8 (0.75 (0.50..1.50))." in page


def test_rows_are_matched_by_what_they_are_about(script: Any) -> None:
    both = _run(2.0)
    both["results"]["kid"][0]["rows"].append({**both["results"]["kid"][0]["rows"][0], "d": 16, "lipgan ms": 5.0})
    page = script.fill("<!-- table: kid 0: d, lipgan ms -->\n<!-- end -->", [_run(9.0, n=4), _run(4.0, n=16), both])
    assert "| 8  | 2.00" in page
    assert "| 16 | 4.50" in page
    assert "| 4 " not in page


def test_another_title_is_another_measurement(script: Any) -> None:
    page = script.fill(PAGE, [_run(1.0, title="Some times of other sizes"), _run(3.0)])
    assert "*Some times, CPU (one run)*" in page
    assert "| 8 | 3.00      | 2.00  | x     |" in page


def test_what_is_not_measured_is_said_to_be_so(script: Any) -> None:
    for mark in ("prdc 0", "kid 1"):
        page = script.fill(f"<!-- table: {mark} -->\nold\n<!-- end -->", [_run(2.0)])
        assert page == f"<!-- table: {mark} -->\n\nNot measured yet (`lipgan bench {mark[:-2]}`).\n\n<!-- end -->"
    page = script.fill("<!-- table: slower kid 1 -->\nold\n<!-- end -->", [_run(2.0)])
    assert page == "<!-- table: slower kid 1 -->\n<!-- end -->"
    assert "| kernel distance | n |  | 0 to 2 | not measured yet |" in script.exponents([_run(2.0, name="prdc")][:0])


def test_exponents_are_those_of_the_times(script: Any) -> None:
    rows = [{"n": n, "torch": 5.0, "per layer": 3.0 * n, "grouped": 100 / n**0.5} for n in (1, 2, 4)]
    table = {"title": TITLE, "columns": ["n", "torch", "per layer", "grouped"], "rows": rows, "notes": []}
    text = script.exponents([{"results": {"spectral-norm": [None, None, None, table]}}])
    assert "| 1 to 4 | 1 | torch 1.00, per layer 2.00, grouped 0.50 |" in text


def test_what_cannot_be_shown_is_an_error(script: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be of a benchmark \(.*\), got 'other'"):
        script.fill("<!-- table: other 0 -->\n<!-- end -->", [_run(2.0)])
    with pytest.raises(ValueError, match="no column 'speed'"):
        script.fill("<!-- table: kid 0: speed -->\n<!-- end -->", [_run(2.0)])
    with pytest.raises(ValueError, match=r"of one machine, got \['2', '4'\] for cores"):
        script.fill(PAGE, [_run(2.0), _run(2.0, cores="4")])
    with pytest.raises(ValueError, match="must hold the row"):
        script.fill("<!-- table: summary -->\n<!-- end -->", [_run(2.0)])
    path = tmp_path / "x.json"
    path.write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="no machine and results in it"):
        script.read([path])


def test_a_run_goes_on_where_it_was_left(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[str] = []

    def measure(args: argparse.Namespace) -> int:
        measured.append(args.which)
        if args.which == "fid":
            raise AssertionError("they differ")
        args.json.write_text(json.dumps(_run(2.0, name=args.which)))
        return 0

    here = {"commit": "abc"}
    monkeypatch.setattr(script.bench, "load", lambda names: {})
    monkeypatch.setattr(script.bench, "main", measure)
    monkeypatch.setattr(script, "machine_here", lambda: here)
    assert script.measure(2, ["prdc", "fid", "kid"], 0.0, tmp_path) == ["fid"]
    assert measured == ["prdc", "fid", "kid"]
    assert "AssertionError: they differ" in capsys.readouterr().err
    assert [path.name for path in script.files(tmp_path)] == ["2.kid.json", "2.prdc.json"]
    measured.clear()
    script.measure(2, ["prdc", "fid"], 0.0, tmp_path)
    assert measured == ["fid"]
    for commit in ("abd", "abc+"):  # other code
        here["commit"] = commit
        measured.clear()
        script.measure(2, ["prdc"], 0.0, tmp_path)
        assert measured == ["prdc"]


def test_runs_are_in_the_order_of_their_numbers(script: Any, tmp_path: Path) -> None:
    for name in ("10.kid", "2.kid", "2.fid"):
        (tmp_path / f"{name}.json").touch()
    assert [path.name for path in script.files(tmp_path)] == ["2.fid.json", "2.kid.json", "10.kid.json"]


def test_the_readme_begins_with_the_least_and_the_largest_ratio() -> None:
    readme = (ROOT / "README.md").read_text()
    table = readme.split("<!-- table: summary -->")[1].split("<!-- end -->")[0]
    # Of the kernels; the last row is a training step.
    rows = [row for row in table.strip().splitlines()[2:] if "training" not in row]
    ratios = [float(row.split("|")[5].split()[0]) for row in rows]
    assert f"about\n{min(ratios):.1f} to {max(ratios):.0f} times as fast on a CPU" in readme


def test_the_pages_are_those_that_the_files_make(script: Any) -> None:
    files = script.files()
    assert files
    runs = script.read(files)
    for path in script.PAGES:
        assert script.fill(path.read_text(), runs) == path.read_text(), f"{path}: run scripts/measurements.py"
