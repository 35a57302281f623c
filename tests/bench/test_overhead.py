"""lipgan bench overhead: what it leaves out, and that nothing of that is left behind."""

from pathlib import Path

import pytest
import torch

from lipgan import bench
from lipgan.bench import harness, overhead
from lipgan.ops import _backend, spectral_norm

pytestmark = [pytest.mark.usefixtures("single_thread"), pytest.mark.backend("triton")]


def test_overhead_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(harness, "_TURN_SECONDS", 0.0)
    monkeypatch.setattr(overhead, "in_fresh_process", lambda function, *args: function(*args))
    monkeypatch.setitem(overhead.BUDGETS, "gradient_penalty", 0.0)
    monkeypatch.setitem(overhead.BUDGETS, "spectral_norm, forward", 1e9)
    ops, layers = overhead.run(seconds=0.0)
    rows = {row["op"]: row for row in ops.rows}
    assert list(rows) == list(overhead.BUDGETS)
    # An iteration is two launches, and a scaling; partial dot products and the rest; all of a penalty; what lies
    # between the products of a perceptron.
    assert [row["launches"] for row in ops.rows] == [3, 2, 1, 10]
    assert (rows["gradient_penalty"]["within"], rows["spectral_norm, forward"]["within"]) == ("no", "yes")
    assert len(layers.rows) == 3
    assert all(row["ratio"] == pytest.approx(row["torch us"] / row["lipgan us"]) for row in layers.rows)
    bench._plot(overhead, [ops, layers], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_launches_run_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    from lipgan.kernels.spectral_norm import tables

    arguments = torch.randn(3, 4), torch.randn(3), torch.randn(4)
    expected = [x.clone() for x in spectral_norm(*arguments, backend="triton")]
    with overhead.without_launches() as launched:
        spectral_norm(*arguments, backend="triton")
        assert launched[-1] == "spectral_norm_scale_kernel"
        assert tables._tables
    assert not tables._tables, "tables that were never written"
    # In the interpreter, and nowhere else without a GPU.
    assert all(map(torch.equal, spectral_norm(*arguments, backend="triton"), expected))
    monkeypatch.setattr(_backend, "interpreted", lambda: False)
    _backend._resolve.cache_clear()
    try:
        with pytest.raises(_backend.UnavailableError, match="only in its interpreter"):
            spectral_norm(*arguments, backend="triton")
    finally:
        _backend._resolve.cache_clear()


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_TURN_SECONDS", 0.0)
    monkeypatch.setattr(overhead, "in_fresh_process", lambda function, *args: function(*args))
    monkeypatch.setattr(overhead.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(overhead, "_layers", lambda seed: {"torch: x": int, "lipgan: x": int})
    ops, _ = overhead.run(seconds=0.0)
    assert not ops.rows
    assert ops.notes[-1] == "Not measured: the package triton is not installed."
