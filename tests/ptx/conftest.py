"""Ends the process that compiles for a module of tests with the module."""

from collections.abc import Iterator

import pytest
from ptx.compile import compiler


@pytest.fixture(autouse=True, scope="module")
def _compiler_of_a_module() -> Iterator[None]:
    yield
    compiler.close()
