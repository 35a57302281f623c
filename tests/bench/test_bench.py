"""The benchmarks: that they check before they time, and what they write. No test asserts a time."""

import argparse
import json
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lipgan import bench
from lipgan.__main__ import main
from lipgan.bench import compiled_penalty, critic_loss, fid, frechet, harness, kid, peers, prdc
from lipgan.bench import gradient_penalty as penalties
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
    assert calls == ["a", "b", *["a", "a", "b", "b"] * 3]  # one call of a turn is not counted
    assert set(times) == {"a", "b"}
    assert all(value >= 0 for value in times.values())


def test_long_calls_are_not_repeated_for_their_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], []

    def take(name: str, seconds: float) -> None:
        calls.append(name)
        now[0] += seconds

    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(harness, "_TURN_SECONDS", 0.0)
    a = partial(take, "a", 0.01)
    harness.interleave({"slow": partial(take, "slow", 0.2), "a": a}, seconds=0, warmup=2, rounds=2)
    assert calls == ["slow", "a"] * 2 + ["slow", "a", "a"] * 2
    # A warm-up of a longer one is one of its turns,
    calls.clear()
    harness.interleave({"slow": partial(take, "slow", 2.0), "a": a}, seconds=0, warmup=2)
    assert calls == ["slow", "a", "a", *["slow", "a", "a"] * 2, "a", "a"]
    # and of the longest, two turns are enough, unless there is time.
    calls.clear()
    longest = partial(take, "slow", 4.0)
    harness.interleave({"slow": longest, "a": a}, seconds=0, warmup=2)
    assert calls == ["slow", "a", "a", "slow", "a", "a", *["a", "a"] * 2]
    calls.clear()
    harness.interleave({"slow": longest}, seconds=15, warmup=1)
    assert calls == ["slow"] * 4


def test_results_are_checked_once_before_they_are_timed() -> None:
    checked: list[dict[str, int]] = []
    variants = {"a": lambda: 1, "b": lambda: 2}
    harness.take_quartiles()
    times = harness.interleave(variants, seconds=0, warmup=0, check=lambda results: checked.append(dict(results)))
    assert checked == [{"a": 1, "b": 2}]
    (taken,) = harness.take_quartiles()
    assert {name: one["median"] for name, one in taken["times"].items()} == times
    assert all(one["lower"] <= one["median"] <= one["upper"] and one["calls"] > 2 for one in taken["times"].values())

    def refuse(results: dict[str, int]) -> None:
        raise AssertionError("they differ")

    with pytest.raises(AssertionError, match="they differ"):
        harness.interleave(variants, seconds=0, check=refuse)
    assert harness.take_quartiles() == []


def test_between_calls_comes_what_empties_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    harness.interleave(
        {"a": lambda: calls.append("a")}, seconds=0, warmup=1, rounds=2, between=lambda: calls.append("-")
    )
    assert calls == ["a", "-", "a", "-", "a"]
    harness.Caches(10).empty()


def test_peers_that_are_absent_are_shown_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def double(module: Any, seed: int) -> tuple[peers.Run, peers.Run]:
        return (lambda: module.pi * 2), (lambda: 6.2831853)

    rows = [("one", "numpy", "math", double, 1e-6), ("two", "some-package", "no_such_package.module", double, 1e-6)]
    monkeypatch.setattr(peers, "PEERS", rows)
    monkeypatch.setattr(peers, "in_fresh_process", lambda function, *args: function(*args))
    (table,) = peers.run(seconds=0)
    assert table.rows[0]["ratio"] > 0
    assert table.rows[1] == {"what": "two", "package": "some-package", "version": "absent"}
    monkeypatch.setattr(
        peers, "PEERS", [("one", "numpy", "math", lambda module, seed: (lambda: 1.0, lambda: 2.0), 1e-6)]
    )
    with pytest.raises(AssertionError, match=r"numpy says 1\.0, lipgan says 2\.0"):
        peers.run(seconds=0)


@pytest.mark.slow
def test_fresh_process_keeps_the_number_of_threads() -> None:
    assert harness.in_fresh_process(torch.get_num_threads) == torch.get_num_threads()
    harness.take_quartiles()
    harness.in_fresh_process(harness.copy_bandwidth, 1000)
    (taken,) = harness.take_quartiles()
    assert taken["case"] == "copy_bandwidth(1000)"
    assert taken["times"]["copy"]["calls"] > 2
    with pytest.raises(ValueError, match="invalid literal"):  # the error of the process
        harness.in_fresh_process(int, "x")
    with pytest.raises(RuntimeError, match=r"the process of _exit\(3\) ended with status 3"):
        harness.in_fresh_process(os._exit, 3)


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
    if not os.access("/proc/self/clear_refs", os.W_OK):
        assert peak is None
        return
    assert peak is not None
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
        which="spectral-norm",
        json=tmp_path / "out.json",
        plot=tmp_path / "plots",
        threads=1,
        seed=3,
        seconds=0.0,
        device=None,
    )
    try:
        bench.main(args)
    finally:
        torch.set_num_threads(before)
    printed = capsys.readouterr().out
    assert "| small" in printed
    saved = json.loads((tmp_path / "out.json").read_text())
    assert saved["machine"]["threads"] == "1"
    speed, cold, memory, growth = saved["results"]["spectral-norm"]
    assert [row["model"] for row in cold["rows"]] == ["small", "large"]
    assert [row["model"] for row in speed["rows"]] == ["small", "large"]
    assert [row["variant"] for row in memory["rows"]] in (["torch", "per layer", "grouped"], [])
    assert [row["n"] for row in growth["rows"]] == [1, 2]
    assert (tmp_path / "plots" / "spectral-norm.png").read_bytes().startswith(b"\x89PNG")


def test_a_benchmark_that_fails_keeps_none_from_running(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(**how: Any) -> list[harness.Table]:
        raise AssertionError("they differ")

    monkeypatch.setattr(bench, "BENCHMARKS", ("kid", "prdc"))
    monkeypatch.setattr(kid, "run", wrong)
    monkeypatch.setattr(prdc, "run", lambda **how: [harness.Table("title", ["x"], [{"x": 1}])])
    how = {"json": tmp_path / "out.json", "plot": None, "threads": None, "seed": None, "seconds": 0.0, "device": None}
    assert bench.main(argparse.Namespace(which="all", **how)) == 1
    assert "AssertionError: they differ" in capsys.readouterr().err
    saved = json.loads((tmp_path / "out.json").read_text())
    assert [*saved["results"]] == ["prdc"]
    assert saved["results"]["prdc"][0]["rows"] == [{"x": 1}]
    with pytest.raises(AssertionError, match="they differ"):
        bench.main(argparse.Namespace(which="kid", **how))


@pytest.fixture
def small_frechet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frechet, "SIZES", [4, 8])
    monkeypatch.setattr(frechet, "SPECTRA_SIZE", 8)
    monkeypatch.setattr(frechet, "MEMORY_SIZE", 8)
    monkeypatch.setattr(frechet, "SAMPLES", 100)
    monkeypatch.setattr(frechet, "FEW", 5)
    monkeypatch.setattr(frechet, "MATRICES", (3, 4))
    monkeypatch.setattr(frechet, "in_fresh_process", lambda function, *args: function(*args))


@pytest.mark.usefixtures("small_frechet")
def test_frechet_tables_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    args = argparse.Namespace(
        which="frechet", json=path, plot=tmp_path, threads=None, seed=None, seconds=0.0, device=None
    )
    bench.main(args)
    assert "Frechet distance from statistics" in capsys.readouterr().out
    distances, spectra, _, updates, roots, memory = json.loads(path.read_text())["results"]["frechet"]
    assert [row["spectrum"] for row in spectra["rows"]] == frechet.SPECTRA
    assert all(row["off by"] <= max(row["bound"], 1e-12) < 1e-6 for row in spectra["rows"])
    assert [row["d"] for row in distances["rows"]] == [4, 8]
    assert [row["variant"] for row in updates["rows"]][-2:] == ["FeatureStats.update", "FeatureStats.update, float32"]
    assert [row["dtype"] for row in roots["rows"]] == ["float32", "float64"]
    assert len(memory["rows"]) == 4
    assert (tmp_path / "frechet.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("small_frechet")
@pytest.mark.parametrize("name", ["_by_sqrtm", "by_eigvals", "frechet_distance"])
def test_a_wrong_distance_is_not_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(frechet, name)
    monkeypatch.setattr(frechet, name, lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    with pytest.raises(AssertionError, match=r"the distance is off by (1\.0e-02|9\.9e-03), relative"):
        frechet._times(8, seed=0, seconds=0)
    if name == "by_eigvals":
        with pytest.raises(AssertionError, match=r"the distance is off by (1\.0e-02|9\.9e-03), relative"):
            frechet._spectral_times("1/k", 8, seed=0, seconds=0)


@pytest.mark.usefixtures("small_frechet")
def test_a_wrong_covariance_or_root_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frechet, "_eigh_sqrtm", lambda a: a)
    with pytest.raises(AssertionError, match="the root is off by"):
        frechet._batch_times(3, 4, seed=0, seconds=0)
    monkeypatch.setattr(frechet.FeatureStats, "cov", property(lambda self: self._scatter))
    with pytest.raises(AssertionError, match="the covariance is off by"):
        frechet._update_times(10, 4, seed=0, seconds=0)


SMALL_CASES = {
    "images": penalties.Case(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 1, 2)), (3, 1, 4, 4)),
    "both": penalties.Case(lambda: nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 1)), (5, 3), "r1+r2"),
    "points": penalties.Case(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 1)), (5, 3)),
}


@pytest.mark.slow
def test_gradient_penalty_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(penalties, "CASES", SMALL_CASES)
    monkeypatch.setattr(penalties, "MORE_CASES", {"more": SMALL_CASES["points"]})
    monkeypatch.setattr(penalties, "STEP_CRITICS", SMALL_CASES)
    monkeypatch.setattr(harness, "_TURN_SECONDS", 0.0)
    monkeypatch.setattr(penalties, "in_fresh_process", lambda function, *args: function(*args))
    speed, more, steps, engines, memory = penalties.run(seconds=0.0)
    assert [row["critic"] for row in more.rows] == ["more"]
    assert [(row["critic"], row["kind"]) for row in steps.rows] == [
        (name, kind) for name in SMALL_CASES for kind in penalties.STEP_KINDS
    ]
    assert [row["critic"] for row in speed.rows] == list(SMALL_CASES)
    assert [row["critic"] for row in memory.rows] in (["images"], [])
    bench._plot(penalties, [speed, more, steps, engines, memory], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_compiled_penalties(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend="aot_eager"))
    monkeypatch.setattr(compiled_penalty, "CASES", SMALL_CASES)
    monkeypatch.setattr(compiled_penalty, "COMPILED", ["images"])
    monkeypatch.setattr(harness, "_TURN_SECONDS", 0.0)
    monkeypatch.setattr(compiled_penalty, "in_fresh_process", lambda function, *args: function(*args))
    (table,) = compiled_penalty.run(seconds=0.0)
    assert [row["critic"] for row in table.rows] == ["images"]
    assert set(table.rows[0]) == set(table.columns)
    bench._plot(compiled_penalty, [table], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    right = compiled_penalty._lipgan
    monkeypatch.setattr(
        compiled_penalty,
        "_lipgan",
        lambda *args, **how: lambda: (2 * right(*args, **how)()[0], *right(*args, **how)()[1:]),
    )
    with pytest.raises(AssertionError, match="lipgan: the value or its gradients are off by"):
        compiled_penalty._times("images", seed=0, seconds=0.0)


def test_a_wrong_penalty_is_not_timed() -> None:
    case = SMALL_CASES["points"]
    variants = {name: penalties._Variant(case, way, 0) for name, way in penalties.ENGINES.items()}
    penalties._check(variants)
    right = penalties.with_lipgan
    variants["lipgan"].way = lambda *args: 1.01 * right(*args)
    with pytest.raises(AssertionError, match=r"lipgan: the value or its gradients are off by 1\.0e-02"):
        penalties._check(variants)


def test_a_wrong_critic_step_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(penalties, "CASES", SMALL_CASES)
    right = critic_loss.by_critic_loss
    monkeypatch.setitem(critic_loss.STEPS, "critic_loss", lambda *args: 1.01 * right(*args))
    with pytest.raises(AssertionError, match=r"critic_loss: the value or its gradients are off by 1\.0e-02"):
        penalties._step_times("images", "r1", seed=0, seconds=0.0)


def test_prdc_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prdc, "SIZES", [(30, 4), (40, 4)])
    monkeypatch.setattr(harness, "_TURN_SECONDS", 0.0)
    monkeypatch.setattr(prdc, "in_fresh_process", lambda function, *args: function(*args))
    (table,) = prdc.run(seconds=0.0)
    assert [(row["n"], row["dtype"]) for row in table.rows] == [
        (n, dtype) for n in (30, 40) for dtype in ("float32", "float64")
    ]
    bench._plot(prdc, [table], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_coverage_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = prdc.prdc
    monkeypatch.setattr(prdc, "prdc", lambda *args: {**right(*args), "coverage": 2.0})
    with pytest.raises(AssertionError, match=r"coverage: lipgan says 2\.0, the matrices say"):
        prdc._times(30, 4, "float32", 0, 0.0)


def test_fid_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fid, "DIM", 6)
    monkeypatch.setattr(fid, "SAMPLES", 50)
    monkeypatch.setattr(fid, "BATCHES", [7, 50])
    monkeypatch.setattr(harness, "_TURN_SECONDS", 0.0)
    monkeypatch.setattr(fid, "in_fresh_process", lambda function, *args: function(*args))
    monkeypatch.setattr(fid, "_command_times", lambda files, side, seed: (2.0, 1.9))
    table, command = fid.run(seconds=0.0)
    assert [(row["files"], row["pixels"]) for row in command.rows] == [(100, 256), (30, 1024)]
    assert all((row["total ms"], row["network ms"]) == (2000.0, 1900.0) for row in command.rows)
    assert all(row["around it, %"] == pytest.approx(5) for row in command.rows)
    assert [row["rows at once"] for row in table.rows] == [7, 50]
    assert all(row["ratio"] == pytest.approx(row["eigvals ms"] / row["lipgan ms"]) for row in table.rows)
    bench._plot(fid, [table], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    right = fid._by_lipgan
    monkeypatch.setattr(fid, "_by_lipgan", lambda *sides: 1.01 * right(*sides))
    with pytest.raises(AssertionError, match=r"lipgan and torch eigvals differ by 1\.0e-02, relative"):
        fid.run(seconds=0.0)


def test_the_command_on_folders_is_timed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = fid.InceptionNetwork.forward
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        total, network = fid._command_times(2, 16, 0)
    finally:
        torch.set_num_threads(threads)
    assert 0 < network < total
    assert fid.InceptionNetwork.forward is forward
    monkeypatch.setattr(fid, "_write_weights", lambda folder, seed: folder / "absent.pth")
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        fid._command_times(2, 16, 0)


def test_kid_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kid, "CASES", [(40, "float32"), (50, "float64")])
    monkeypatch.setattr(kid, "DIM", 6)
    monkeypatch.setattr(kid, "SUBSETS", 4)
    monkeypatch.setattr(kid, "SUBSET_SIZE", 20)
    monkeypatch.setattr(harness, "_TURN_SECONDS", 0.0)
    monkeypatch.setattr(kid, "in_fresh_process", lambda function, *args: function(*args))
    (table,) = kid.run(seconds=0.0)
    assert [(row["n"], row["dtype"]) for row in table.rows] == kid.CASES
    assert all(row["ratio"] == pytest.approx(row["matrices ms"] / row["lipgan ms"]) for row in table.rows)
    bench._plot(kid, [table], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    right = kid.kernel_distance
    monkeypatch.setattr(kid, "kernel_distance", lambda *args, **options: (right(*args, **options)[0], 2.0))
    with pytest.raises(AssertionError, match=r"deviation: lipgan says 2\.0, the matrices say"):
        kid.run(seconds=0.0)


def test_the_command_line_knows_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "nothing"])
    message = capsys.readouterr().err
    assert all(name in message for name in bench.BENCHMARKS)


def test_threads_must_be_positive() -> None:
    args = argparse.Namespace(which="spectral-norm", json=None, plot=None, threads=0, seed=0, seconds=0.0, device=None)
    with pytest.raises(ValueError, match="--threads must be at least 1, got 0"):
        bench.main(args)


@pytest.mark.parametrize("name", [*penalties.CASES, *penalties.MORE_CASES])
def test_every_critic_takes_its_samples(name: str) -> None:
    case = penalties._case(name)
    variant = penalties._Variant(penalties.Case(case.critic, (4, *case.shape[1:]), case.kind), penalties.with_lipgan, 0)
    assert variant.step().isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in variant.critic.parameters())


def test_steps_are_of_critics_that_there_are() -> None:
    assert all(penalties._case(name).shape for name in penalties.STEP_CRITICS)
