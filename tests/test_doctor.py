"""lipgan doctor says which backend serves, and why another does not."""

import os
import subprocess
import sys

import pytest

from lipgan import doctor
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
