"""Packages that lipgan is compared with: imported where they are installed, else the test is skipped.

pytorch-fid and torch-fidelity bring torchvision along. Installed by ``pip install --no-deps``, they serve too: what is
compared takes features, and `lipgan.bench.peers` has a stand-in for torchvision where there is none. So it is with
requests, by which clean-fid downloads.

With ``LIPGAN_TEST_PEERS=required``, as `make peers` sets it, a package that is missing fails the test.
"""

import importlib
import importlib.util
import os
from typing import Any

import pytest


def peer(name: str) -> Any:
    """The module of another package, or a skip where that package is not installed."""
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        if os.environ.get("LIPGAN_TEST_PEERS") == "required":
            pytest.fail(f"{package} is not installed, and LIPGAN_TEST_PEERS=required wants it")
        pytest.skip(f"{package} is not installed")
    return importlib.import_module(name)
