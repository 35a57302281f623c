"""A module of lipgan.compat whose package is missing says so in one sentence."""

import importlib
import sys

import pytest


def test_torchmetrics_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lipgan.compat.torchmetrics", raising=False)
    for name in ("torchmetrics", "torchmetrics.image", "torchmetrics.image.fid"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ImportError,
        match=r"^lipgan\.compat\.torchmetrics needs the package torchmetrics \(pip install torchmetrics\): ",
    ):
        importlib.import_module("lipgan.compat.torchmetrics")
