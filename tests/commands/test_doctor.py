"""lipgan doctor says which backend serves, and why another does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lipgan.commands import doctor
from lipgan.ops import BACKENDS, _backend


@pytest.mark.backend("native")
def test_report_names_every_backend_and_the_one_that_serves() -> None:
    report = doctor.report()
    assert "spectral_norm on cpu: native" in report
    for backend in BACKENDS:
        assert f"\n  {backend} " in report
    assert "instruction set" in report
    # Where a backend has no form of an op, or another serves a derivative, the report says so.
    assert "\nmlp_gradient_penalty on cpu: native (backward native)\n" in report
    assert "\n  cuda: no form of this op" in report


@pytest.mark.backend("native")
@pytest.mark.backend("triton")
def test_advice_is_what_a_person_can_act_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert doctor.advice() == [
        "GPU not visible: this torch is built for CPUs only; install its CUDA or ROCm build to use one"
    ]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert doctor.advice()[0].startswith("GPU not visible: torch finds none; look at nvidia-smi")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert doctor.advice() == ["nothing to mend: the fastest backend serves every op on every device here"]


@pytest.mark.parametrize("with_triton", [True, False])
def test_report_on_a_gpu_with_the_cuda_module(monkeypatch: pytest.MonkeyPatch, with_triton: bool) -> None:
    there = {"native", "cuda", "reference"} | ({"triton"} if with_triton else set())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_backend, "_missing", lambda backend, device: None if backend in there else "missing")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object() if with_triton else None)
    for cached in (_backend._resolve, _backend._standing_in):
        cached.cache_clear()
    try:
        report = doctor.report()
    finally:
        for cached in (_backend._resolve, _backend._standing_in):
            cached.cache_clear()
    serving = "triton" if with_triton else "cuda"
    assert f"\ngradient_penalty on cuda: {serving} (backward {serving}, second order reference)\n" in report
    second = "triton" if with_triton else "reference"
    assert f"\nspectral_norm on cuda: {serving} (backward {serving}, second order {second})\n" in report
    assert report.count("\n  without a choice cuda serves ") == 2
    if not with_triton:
        assert "served by CUDA C++ in spectral_norm, gradient_penalty, interpolate, else by the reference" in report


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
    assert "compiler missing" in report.splitlines()[-2]


@pytest.mark.slow
def test_training_by_a_backend_that_cannot_serve_is_one_line(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "lipgan", "train", "--steps", "1", "--device", "cpu", "--out", str(tmp_path / "run")],
        env={**os.environ, "LIPGAN_BACKEND": "cuda"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("lipgan: error: backend 'cuda' cannot serve spectral_norm on cpu: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "status", "text"),
    [
        ("reference", 0, "spectral_norm on cpu: reference"),
        ("cuda", 0, "spectral_norm on cpu: none. backend 'cuda' cannot serve spectral_norm on cpu"),
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
