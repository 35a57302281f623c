"""Tests of benchmarks run their cases here, and begin no process for them."""

import pytest

from lipgan import bench


@pytest.fixture(autouse=True)
def _no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "prepare_processes", lambda modules: None)
