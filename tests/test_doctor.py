"""lipgan doctor says which backend serves, and why another does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lipgan.commands import doctor
from lipgan.ops import BACKENDS, _backend


def test_report_names_every_backend_and_the_one_that_serves() -> None:
    report = doctor.report()
    assert "spectral_norm on cpu: native" in report
    for backend in BACKENDS:
        assert f"\n  {backend} " in report
    assert "instruction set" in report


def test_report_without_the_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "native", lambda: None)
    monkeypatch.setattr(doctor, "native", lambda: None)
    _backend._resolve.cache_clear()
    try:
        report = doctor.report()
    finally:
        _backend._resolve.cache_clear()
    assert "spectral_norm on cpu: reference" in report
    assert "lipgan._C was not built" in report


def test_training_by_a_backend_that_cannot_serve_is_one_line(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "lipgan", "train", "--steps", "1", "--device", "cpu", "--out", str(tmp_path / "run")],
        env={**os.environ, "LIPGAN_BACKEND": "cuda"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("lipgan: error: backend 'cuda' cannot serve here: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("backend", "status", "text"),
    [
        ("reference", 0, "spectral_norm on cpu: reference"),
        ("cuda", 0, "spectral_norm on cpu: none. backend 'cuda' cannot serve here"),
        ("fast", 2, "lipgan: error: LIPGAN_BACKEND must be one of reference, native, triton, cuda, got 'fast'"),
    ],
)
def test_choice_by_environment(backend: str, status: int, text: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "lipgan", "doctor"],
        env={**os.environ, "LIPGAN_BACKEND": backend},
        capture_output=True,
        text=True,
    )
    assert result.returncode == status
    assert text in result.stdout + result.stderr
