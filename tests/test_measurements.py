"""scripts/measurements.py: tables of pages from files of measurements."""

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


def _run(ours: float, **facts: str) -> dict[str, Any]:
    machine = {"cpu": "C", "cores": "2", "threads": "2", "isa": "avx2", "system": "S", "python": "3", "torch": "2"}
    machine |= {"date": "2026-01-02", "commit": "abc", **facts}
    row = {"d": 8, "torch ms": 6.0, "lipgan ms": ours, "ratio": 6.0 / ours, "route": "x"}
    columns = ["d", "torch ms", "lipgan ms", "ratio", "route"]
    return {"machine": machine, "results": {"some": [{"title": "t", "columns": columns, "rows": [row], "notes": []}]}}


PAGE = """Before.

<!-- table: machine -->
old
<!-- end -->

<!-- table: some 0: d, lipgan ms, ratio, route -->
old
<!-- end -->

After.
"""


def test_a_page_gets_medians_and_the_spread_of_ratios(script: Any) -> None:
    page = script.fill(PAGE, [_run(2.0), _run(3.0), _run(1.5, date="2026-01-03")])
    assert page.startswith("Before.\n\n<!-- table: machine -->\n\nC, 2 cores")
    assert "2026-01-02, 2026-01-03, commit abc; medians of up to 3 runs" in page
    assert "| 8 | 2.00      | 3.00 (2.00 to 4.00) | x     |" in page
    assert "old" not in page
    assert page.endswith("After.\n")
    assert script.fill(page, [_run(2.0), _run(3.0), _run(1.5, date="2026-01-03")]) == page


def test_what_was_not_measured_stays_an_error(script: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold the benchmark other"):
        script.fill("<!-- table: other 0 -->\n<!-- end -->", [_run(2.0)])
    with pytest.raises(ValueError, match="no column 'speed'"):
        script.fill("<!-- table: some 0: speed -->\n<!-- end -->", [_run(2.0)])
    with pytest.raises(ValueError, match=r"of one machine, got \['2', '4'\] for cores"):
        script.fill(PAGE, [_run(2.0), _run(2.0, cores="4")])
    with pytest.raises(ValueError, match="must hold the row"):
        script.fill("<!-- table: summary -->\n<!-- end -->", [_run(2.0)])
    path = tmp_path / "x.json"
    path.write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="no machine and results in it"):
        script.read([path])


def test_the_pages_are_those_that_the_files_make(script: Any) -> None:
    files = sorted((ROOT / "docs" / "measurements").glob("*.json"))
    assert files
    runs = script.read(files)
    for path in script.PAGES:
        assert script.fill(path.read_text(), runs) == path.read_text(), f"{path}: run scripts/measurements.py"
