"""lipgan bench step: that it checks before it times."""

from pathlib import Path
from typing import Any

import pytest
import torch
from system_checks import recipe

from lipgan import bench, data
from lipgan.bench import harness, step

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {name: recipe(name, batch_size=4, n_critic=1) for name in ("sngan", "wgan-gp", "gan")}
    monkeypatch.setattr(step.recipes, "get", rows.__getitem__)
    load = data.load
    monkeypatch.setattr(step.data, "load", lambda name: load(name, 8 if name == "digits" else None))
    monkeypatch.setattr(step, "_LOG_EVERY", 2)
    monkeypatch.setattr(harness, "_TURN_SECONDS", 0.0)
    monkeypatch.setattr(step, "in_fresh_process", lambda function, *args: function(*args))


@pytest.mark.usefixtures("small")
def test_step_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    speed, overhead, shares = step.run(seconds=0.0)
    assert [row["recipe"] for row in speed.rows] == list(step.CASES)
    assert [row["recipe"] for row in overhead.rows] == list(step.OVERHEADS)
    for row in shares.rows:
        assert row["torch convolutions ms"] > 0
        assert row["bound"] == pytest.approx(row["torch ms"] / row["lipgan convolutions ms"])
    bench._plot(step, [speed, overhead, shares], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("loop", "name"), [("Plain", "sngan"), ("Bare", "sngan"), ("Plain", "wgan-gp")])
def test_a_wrong_loop_is_not_timed(loop: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    update = getattr(step, loop).update_generator

    def wrong(self: Any) -> dict[str, torch.Tensor]:
        return {"generator_loss": 1.001 * update(self)["generator_loss"] + 1e-3}

    monkeypatch.setattr(getattr(step, loop), "update_generator", wrong)
    with pytest.raises(AssertionError, match=f"generator_loss of step 1: {loop} and Trainer differ by"):
        step._times((name, "digits"), 0, 0.0, overhead=False)


def test_convolutions_are_told_from_the_rest() -> None:
    x, w = torch.randn(2, 1, 8, 8), torch.randn(3, 1, 3, 3, requires_grad=True)
    with step._Convolutions() as nothing:
        torch.mm(x[0, 0], x[1, 0])
    with step._Convolutions() as forward:
        y = torch.conv2d(x, w)
    with step._Convolutions() as backward:
        y.sum().backward()
    assert nothing.seconds == 0.0
    assert forward.seconds > 0.0
    assert backward.seconds > 0.0
