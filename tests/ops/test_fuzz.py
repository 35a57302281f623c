"""The native backend and the reference agree on the corpus of the fuzz (tests/harness/fuzz.py), and on a few draws."""

import pytest
import torch
from fuzz import Case, cases, check, close, corpus
from hypothesis import given, settings


@pytest.mark.backend("native")
@pytest.mark.parametrize("case", corpus(), ids=lambda case: f"{case['op']}-{case['dtype']}-{case['scale']:g}")
def test_corpus(case: Case) -> None:
    check(case)


@pytest.mark.backend("native")
@given(case=cases())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_draws(case: Case) -> None:
    check(case)


def test_the_fuzz_sees_a_difference() -> None:
    x = torch.ones(3)
    close("x", x, x * (1 + 1e-7), 1e-6)
    for other in (x * 1.1, x * torch.nan, x * torch.inf, x.double(), x[:2]):
        with pytest.raises(AssertionError, match=r"^x: "):
            close("x", x, other, 1e-6)
