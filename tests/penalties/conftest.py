"""What holds for every test of the penalties."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from penalty_critics import active_modes

from lipgan.penalties import engines
from lipgan.penalties.tape import Tape


@pytest.fixture(autouse=True)
def _leaves_nothing_behind() -> Iterator[None]:
    """No dispatch mode, setting of attention or of torch.compile outlives a call, whether it fails or not."""
    attention = torch.backends.cuda.flash_sdp_enabled()
    yield
    assert active_modes() == 0
    assert torch.backends.cuda.flash_sdp_enabled() == attention
    if "torch._dynamo" in sys.modules:
        assert torch._dynamo.eval_frame._stance.stance == "default"


@pytest.fixture
def checked_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is recorded at once, and what was recorded is compared with the tape."""
    monkeypatch.setenv("LIPGAN_CHECK_PLANS", "1")


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Those that were run, with plans left unchecked, which would run more."""
    run: list[Tape] = []

    def noted(*args: Any, **options: Any) -> Tape:
        run.append(Tape(*args, **options))
        return run[-1]

    monkeypatch.setattr(engines, "Tape", noted)
    monkeypatch.setenv("LIPGAN_CHECK_PLANS", "0")
    return run
