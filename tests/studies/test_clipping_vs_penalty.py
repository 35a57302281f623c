"""The measures on functions that are known, the rules on made-up numbers, a small run."""

import pytest
import study_checks
import torch
from study_checks import changed, made, verdicts

from lipgan.studies import clipping_vs_penalty as module
from lipgan.studies.study import FAILS, HOLDS

SMALL = {"steps": 6, "deep_steps": 4, "batch": 16, "width": 8, "deep_width": 6, "test_samples": 50, "pixels": 5}


@pytest.fixture(scope="module")
def study():
    return study_checks.smaller("clipping-vs-penalty", **SMALL, depth=3)


def ideal(unit):
    penalty = "penalty" in unit.values()
    if "deep" in unit:
        return {"norms": [1.0, 1.0, 2.0] if penalty else [1e-6, 1e-3, 1.0]}
    return {
        "surface": [float(i) for i in range(25)],
        "unexplained": 0.3 if penalty else 0.1,
        "corners": 0.01 if penalty else 0.9,
        "slope": 1.1 if penalty else 0.2,
        "weights": [1 / 41] * 41,
    }


def test_the_rules_see_what_is_wrong(study):
    rows = made(study, ideal)
    assert set(verdicts(study, rows).values()) == {HOLDS}
    for key, value, claim in (
        ("unexplained", 0.2, "moments"),
        ("norms", [1.0, 1.0, 9.0], "depth"),
        ("norms", [1.0, 1.0, 11.0], "depth"),
        ("corners", 0.5, "corners"),
        ("slope", 1.0, "norm"),
        ("slope", 1.3, "norm"),
    ):
        found = verdicts(
            study, changed(rows, lambda unit, r, key=key, value=value: {**r, key: value} if key in r else r)
        )
        assert [name for name, verdict in found.items() if verdict == FAILS] == [claim]


def test_what_degree_two_leaves():
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    assert module._unexplained(x, 3 + x[:, 0] - 2 * x[:, 0] * x[:, 1] + x[:, 1] ** 2) < 1e-9
    assert module._unexplained(x, (5 * x[:, 0]).sin()) > 0.5
    assert module._unexplained(x, torch.ones(200)) == 0


def test_gradient_norms_are_those_of_the_later_layers():
    critic = module._deep({"depth": 2, "deep_width": 2})
    with torch.no_grad():
        for layer, factor in zip((critic[2], critic[4]), (3.0, 5.0), strict=True):
            layer.weight.copy_(factor * torch.eye(2)[: layer.out_features])
            layer.bias.zero_()
    x = torch.rand(4, 2).requires_grad_()
    norms = module._norms_by_layer(torch.nn.Sequential(torch.nn.Identity(), torch.nn.ReLU(), *critic[2:]), x)
    assert norms == pytest.approx([15.0, 5.0])


def test_a_small_run(study):
    rows = study_checks.finished(study)
    assert len(rows) == 10
    for row in rows:
        if "data" in row.unit:
            assert sum(row.result["weights"]) == pytest.approx(1, abs=1e-5)
            assert 0 <= row.result["unexplained"] <= 1
            assert row.result["slope"] > 0
    verdicts(study, rows)
    assert len(study_checks.drawn(study, rows)) > 10_000
