"""The benchmarks: that they check before they time, and what they write. No test asserts a time."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from lipgan import bench
from lipgan.bench import harness
from lipgan.bench import spectral_norm as benchmark


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(4, 3), (8, 4, 3, 3)]
    monkeypatch.setattr(benchmark, "MODELS", {"small": lambda: shapes, "large": lambda: shapes * 2})
    monkeypatch.setattr(benchmark, "copy_bandwidth", lambda: harness.copy_bandwidth(1000))
    monkeypatch.setattr(benchmark, "COUNTS", [1, 2])
    monkeypatch.setattr(benchmark, "in_fresh_process", lambda function, *args: function(*args))


def test_variants_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_TURN_SECONDS", 0.0)
    calls: list[str] = []
    times = harness.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0, warmup=1)
    assert calls == ["a", "b", *["a", "a", "b", "b"] * 5]  # one call of a turn is not counted
    assert set(times) == {"a", "b"}
    assert all(value >= 0 for value in times.values())


def test_fresh_process_keeps_the_number_of_threads() -> None:
    assert harness.in_fresh_process(torch.get_num_threads) == torch.get_num_threads()


def test_table_renders_as_markdown() -> None:
    table = harness.Table("title", ["name", "x"], [{"name": "one", "x": 1.234}, {"name": "two", "x": 1234.5}], ["note"])
    assert table.render().splitlines() == [
        "title",
        "",
        "| name | x    |",
        "|------|------|",
        "| one  | 1.23 |",
        "| two  | 1234 |",
        "",
        "note",
    ]


def test_peak_memory_sees_an_allocation() -> None:
    peak = harness.peak_memory(lambda: torch.ones(16 << 20))
    if peak is None:
        pytest.skip("the system does not tell")
    assert 0.9 * (64 << 20) < peak < 1.5 * (64 << 20)


@pytest.mark.usefixtures("small")
def test_a_wrong_variant_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    variants = benchmark._variants([(4, 3)], seed=0)
    right = variants["grouped"].forward
    monkeypatch.setattr(variants["grouped"], "forward", lambda: [1.01 * weight for weight in right()])
    with pytest.raises(AssertionError, match=r"grouped: the weight of layer 0 is off by 1\.0e-02"):
        benchmark._check(variants)


@pytest.mark.usefixtures("small")
def test_run_writes_tables_json_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    args = argparse.Namespace(
        which="spectral-norm", json=tmp_path / "out.json", plot=tmp_path / "plots", threads=1, seed=3, seconds=0.0
    )
    try:
        bench.main(args)
    finally:
        torch.set_num_threads(before)
    printed = capsys.readouterr().out
    assert "| small" in printed
    saved = json.loads((tmp_path / "out.json").read_text())
    assert saved["machine"]["threads"] == "1"
    speed, memory, growth = saved["results"]["spectral-norm"]
    assert [row["model"] for row in speed["rows"]] == ["small", "large"]
    assert all(row["ratio"] > 0 and row["ratio grouped"] > 0 for row in speed["rows"])
    assert [row["variant"] for row in memory["rows"]] in (["torch", "per layer", "grouped"], [])
    assert [row["n"] for row in growth["rows"]] == [1, 2]
    assert (tmp_path / "plots" / "spectral-norm.png").read_bytes().startswith(b"\x89PNG")


def test_threads_must_be_positive() -> None:
    args = argparse.Namespace(which="spectral-norm", json=None, plot=None, threads=0, seed=0, seconds=0.0)
    with pytest.raises(ValueError, match="--threads must be at least 1, got 0"):
        bench.main(args)
