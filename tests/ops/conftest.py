"""The instruction sets of the C++ kernels."""

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
