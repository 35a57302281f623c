"""lipgan bench sweep: rows of sizes, and what it says of those where lipgan is slower."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lipgan import bench
from lipgan.bench import harness, sweep

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_TURN_SECONDS", 0.0)
    monkeypatch.setattr(sweep, "in_fresh_process", lambda function, *args: function(*args))
    for name, sizes in (("WIDTHS", [4, 5]), ("BATCHES", [1, 2]), ("ITEMS", [1, 3]), ("FEATURES", [4])):
        monkeypatch.setattr(sweep, name, sizes)
    monkeypatch.setattr(sweep, "_MOST_WORK", 40)


@pytest.mark.usefixtures("small")
def test_every_size_has_a_row(tmp_path: Path) -> None:
    norms, penalties, mixtures, distances = sweep.run(seconds=0.0)
    assert [row["size"] for row in norms.rows] == ["4 x 4", "5 x 5"]
    # Two times 5 x 5 is too much.
    assert [row["size"] for row in penalties.rows] == [f"2-{n}-{n}-1, batch {b}" for n, b in ((4, 1), (4, 2), (5, 1))]
    assert [row["size"] for row in mixtures.rows] == ["1 x 1", "2 x 1", "1 x 3", "2 x 3"]
    assert [row["size"] for row in distances.rows] == ["4 features"]
    bench._plot(sweep, [norms, penalties, mixtures, distances], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("small")
def test_where_it_is_slower_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 4.0, *[2.0] * 20])
    monkeypatch.setattr(sweep, "interleave", lambda *_, **__: {sweep.TORCH: 2.0, sweep.OURS: next(times)})
    norms, penalties, *_ = sweep.run(seconds=0.0)
    assert norms.notes == ["Slower than PyTorch: 5 x 5 (0.50)."]
    assert penalties.notes == ["Slower than PyTorch: nowhere."]


@pytest.mark.usefixtures("small")
def test_what_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(real: Tensor, fake: Tensor, **options: Any) -> Tensor:
        return real

    monkeypatch.setattr(sweep.lipgan, "interpolate", wrong)
    torch.manual_seed(0)
    with pytest.raises(AssertionError, match="results differ by"):
        sweep.run(seconds=0.0)
