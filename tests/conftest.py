"""Set-up shared by all tests."""

import os

# The interpreter has to be chosen before the first `import triton`; ahead-of-time compilation runs in a subprocess.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from collections.abc import Iterator

import pytest
import torch

from lipgan.ops import _backend

# LIPGAN_TEST_POISON=1 runs every test with poisoned outputs.
POISON_ALL = os.environ.get("LIPGAN_TEST_POISON", "0") == "1"


@pytest.fixture(autouse=POISON_ALL)
def poisoned_outputs() -> Iterator[None]:
    """Fill every ``torch.empty``, and every output of the C++ kernels, with NaN: an element not written shows."""
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all(), "torch no longer poisons uninitialized memory"
    if _backend.native() is not None:
        _backend.serving_native()  # also for a test that calls lipgan._C itself
    yield
    torch.use_deterministic_algorithms(before, warn_only=warned)
    if _backend.native() is not None:
        _backend.serving_native()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def single_thread() -> Iterator[None]:
    """Networks this small lose more by handing work to a second thread, on shared cores, than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
