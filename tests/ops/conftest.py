"""The instruction sets of the C++ kernels, and their threads."""

from collections.abc import Iterator

import pytest

from lipgan.ops import _backend

NATIVE = _backend.native()


@pytest.fixture(params=NATIVE.supported_isas() if NATIVE is not None else ["native"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this processor has; without the C++ module one parameter, which is skipped."""
    assert NATIVE is not None
    before = NATIVE.isa()
    NATIVE.set_isa(request.param)
    yield request.param
    NATIVE.set_isa(before)


@pytest.fixture(autouse=True)
def _threads_whether_they_pay_or_not() -> Iterator[None]:
    """On a busy machine the kernels would go on with one thread, and a test of several would be none."""
    if NATIVE is not None:
        NATIVE.insist_on_threads(True)
    yield
    if NATIVE is not None:
        NATIVE.insist_on_threads(False)
