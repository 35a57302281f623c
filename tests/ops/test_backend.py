"""The table of backends: what it says is what the ops do."""

import importlib
import sys
from typing import Any

import pytest
import torch
from torch import nn

import lipgan
from lipgan.ops import UnavailableError, _backend, explain, gradient_penalty, matrix_sqrt, mlp_gradient_penalty, resolve
from lipgan.ops import nearest_neighbours as nearest
from lipgan.ops.spectral_norm import backends as spectral_norm

gradient_penalty_module: Any = sys.modules["lipgan.ops.gradient_penalty"]
nearest_module: Any = sys.modules["lipgan.ops.nearest_neighbours"]
polar_factor_module: Any = importlib.import_module("lipgan.ops.polar_factor")
symmetrize_module: Any = importlib.import_module("lipgan.ops.symmetrize")

# Op -> the functions of its forward by backend.
IMPLEMENTED = {
    "spectral_norm": spectral_norm._FORWARD,
    "gradient_penalty": gradient_penalty_module._FORWARD,
    "interpolate": gradient_penalty_module._INTERPOLATE,
    "mlp_gradient_penalty": mlp_gradient_penalty._FORWARD,
    "matrix_sqrt": matrix_sqrt._FORWARD,
    "polar_factor": polar_factor_module._FORWARD,
    "symmetrize": symmetrize_module._FORWARD,
    "nearest_neighbours": nearest_module._NEAREST,
    "ball_counts": nearest_module._COUNTS,
}


def test_the_table_has_the_forms_that_there_are() -> None:
    assert set(_backend.FORMS) == {*IMPLEMENTED, "polar_trace"}
    for op, functions in IMPLEMENTED.items():
        assert set(_backend.FORMS[op]["forward"]) == set(functions), op
    assert set(_backend.FORMS["spectral_norm"]["backward"]) == set(spectral_norm._BACKWARD)
    assert set(_backend.FORMS["polar_factor"]["backward"]) == set(polar_factor_module._BACKWARD)
    assert len(set(spectral_norm._BACKWARD.values())) == len(spectral_norm._BACKWARD)
    # The CUDA form has no second order of its own: the table says whose serves.
    assert set(_backend.FORMS["spectral_norm"]["second order"].values()) == set(spectral_norm._DOUBLE_BACKWARD)
    assert all("cuda" in _backend.FORMS[op]["forward"] for op in _backend.PREFERRED)


@pytest.mark.parametrize("op", _backend.FORMS)
def test_the_table_is_closed(op: str) -> None:
    forms = _backend.FORMS[op]
    assert set(forms) <= set(_backend.PASSES)
    for name, served in forms.items():
        assert set(served) == set(forms["forward"]), name
        assert set(served) | set(served.values()) <= set(_backend.BACKENDS)
    assert all(chosen == serving for chosen, serving in forms["forward"].items())


def test_a_named_backend_without_a_form_is_an_error() -> None:
    x, weight = torch.randn(3, 2), torch.randn(1, 2)
    penalty = ([weight], [None], [], [], "squared", 1.0, 0.0)
    with pytest.raises(UnavailableError, match="no cuda form of mlp_gradient_penalty"):
        mlp_gradient_penalty.penalize(x, *penalty, backend="cuda")
    with pytest.raises(UnavailableError, match="no cuda form of matrix_sqrt, only reference and native and triton"):
        matrix_sqrt.root(torch.eye(2), backend="cuda")
    with lipgan.use_backend("cuda"), pytest.raises(UnavailableError, match="no cuda form of matrix_sqrt"):
        lipgan.linalg.sqrtm(torch.eye(2))
    with pytest.raises(UnavailableError, match="backend 'cuda' cannot serve gradient_penalty on"):
        gradient_penalty(x.cpu(), backend="cuda")
    with pytest.raises(UnavailableError, match="no cuda form of nearest_neighbours"):
        nearest(x, backend="cuda")


@pytest.mark.backend("triton")
def test_a_perceptron_is_served_by_the_backend_that_was_named() -> None:
    critic, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)), torch.randn(5, 3)
    expected = lipgan.gradient_penalty(critic, x, kind="r1")
    with lipgan.use_backend("triton"):
        assert resolve("mlp_gradient_penalty", None, "cpu") == "triton"
        torch.testing.assert_close(lipgan.gradient_penalty(critic, x, kind="r1"), expected)


def test_where_triton_is_missing_cuda_serves_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"cuda", "reference"}
    monkeypatch.setattr(_backend, "_missing", lambda backend, device: None if backend in there else "missing")
    for cached in (_backend._resolve, _backend._standing_in):
        cached.cache_clear()
    try:
        chosen = {op: resolve(op, None, "cuda") for op in _backend.FORMS}
        has = {op for op, forms in _backend.FORMS.items() if "cuda" in forms["forward"]}
        assert has == {"spectral_norm", "gradient_penalty", "interpolate"}
        assert chosen == {op: "cuda" if op in has else "reference" for op in _backend.FORMS}
        assert _backend.serving("spectral_norm", "backward", "cuda", "cuda") == "cuda"
        assert _backend.serving("spectral_norm", "second order", "cuda", "cuda") == "reference"
        there.add("triton")
        for cached in (_backend._resolve, _backend._standing_in):
            cached.cache_clear()
        for op, forms in _backend.FORMS.items():
            assert resolve(op, None, "cuda") == ("triton" if "triton" in forms["forward"] else "reference"), op
        assert _backend.serving("spectral_norm", "second order", "cuda", "cuda") == "triton"
    finally:
        for cached in (_backend._resolve, _backend._standing_in):
            cached.cache_clear()


def test_gpus_that_the_cuda_module_is_not_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "cuda", lambda: object())
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for older, expected in (((8, 0), None), ((7, 5), "capability 8.0 and later, and one here has 7.5")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i, older=older: ((9, 0), older)[i])
        reason = explain("gradient_penalty", "cuda", "cuda")
        assert reason is None if expected is None else expected in reason
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert "built for ROCm" in explain("gradient_penalty", "cuda", "cuda")
    assert "serve CUDA tensors, not cpu" in explain("gradient_penalty", "cuda", "cpu")


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="unknown op 'spectral_nrm'; did you mean spectral_norm"):
        resolve("spectral_nrm", None, "cpu")
    with pytest.raises(ValueError, match="backend must be one of reference, native, triton, cuda, got 'fast'"):
        explain("spectral_norm", "fast", "cpu")
