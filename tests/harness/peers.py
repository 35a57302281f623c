"""Packages that lipgan is compared with: imported where they are installed, else the test is skipped.

pytorch-fid and torch-fidelity bring torchvision along. Installed by ``pip install --no-deps``, they serve too: what is
compared takes features, and a stand-in for torchvision is imported where there is none. So it is with requests, by
which clean-fid downloads.

With ``LIPGAN_TEST_PEERS=required``, as `make peers` sets it, a package that is missing fails the test.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest


class _Class(type):
    """A class whose attributes are classes."""

    def __getattr__(cls, name: str) -> "_Class":
        if name.startswith("__"):
            raise AttributeError(name)
        return _Class(name, (), {})


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a package and its modules as modules in which every name is a class."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != self.package:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = _Class(self.package, (), {}).__getattr__  # type: ignore[method-assign]


@contextmanager
def torchvision_or_stand_in(package: str = "torchvision") -> Iterator[None]:
    """torchvision can be imported: the package, or where there is none, a stand-in that is gone afterwards."""
    try:
        importlib.import_module(package)
    except ImportError:
        stand_in = _StandIn(package)
        sys.meta_path.append(stand_in)
        try:
            yield
        finally:
            sys.meta_path.remove(stand_in)
            for name in [name for name in sys.modules if name.partition(".")[0] == package]:
                del sys.modules[name]
    else:
        yield


def peer(name: str) -> Any:
    """The module of another package, or a skip where that package is not installed."""
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        if os.environ.get("LIPGAN_TEST_PEERS") == "required":
            pytest.fail(f"{package} is not installed, and LIPGAN_TEST_PEERS=required wants it")
        pytest.skip(f"{package} is not installed")
    return importlib.import_module(name)
