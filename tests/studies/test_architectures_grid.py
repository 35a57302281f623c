"""The networks of the grid, the rules on made-up numbers, a small run."""

import pytest
import study_checks
import torch
from study_checks import changed, made, verdicts
from torch import nn

from lipgan.studies import architectures_grid as module
from lipgan.studies.runner import compute
from lipgan.studies.study import FAILS, HOLDS, UNKNOWN, Finished


@pytest.fixture(scope="module")
def study():
    return study_checks.smaller("architectures-grid", steps=1, samples=10, batch=4, width=4, depth=4, mlp_width=8)


def ideal(unit):
    fid = {"WGAN-GP": 100.0, "WGAN": 200.0}.get(unit["method"], 300.0)
    if unit["architecture"] == "MLP generator" and unit["method"] == "WGAN":
        fid = 250.0
    return {"fid": fid, "images": None}


def test_the_rules_see_what_is_wrong(study):
    rows = made(study, ideal)
    assert set(verdicts(study, rows).values()) == {HOLDS}
    for method, architecture, fid, claim in (
        ("WGAN-GP", "deep ResNet", 260.0, "every"),
        ("WGAN", module._CONSTANT, 301.0, "constant"),
        ("DCGAN", module._MLP, 240.0, "mlp"),
        ("WGAN", "baseline", 255.0, "mlp"),
    ):

        def broken(unit, r, cell=(method, architecture), fid=fid):
            return {**r, "fid": fid} if (unit["method"], unit["architecture"]) == cell else r

        assert verdicts(study, changed(rows, broken))[claim] == FAILS


def test_noise_is_not_compared(study):
    rows = changed(made(study, ideal), lambda unit, r: {**r, "fid": 5 * r["fid"]})
    assert set(verdicts(study, rows).values()) == {UNKNOWN}


@pytest.mark.parametrize("architecture", module._ARCHITECTURES)
def test_the_networks_are_what_they_are_called(study, architecture):
    generator, critic = module._networks(study.settings(False), architecture, "layer")
    assert critic(generator(torch.randn(2, 64))).shape == (2,)
    kinds = {type(layer) for network in (generator, critic) for layer in network.modules()}
    assert (nn.GroupNorm in kinds) == (architecture != "no norm")
    assert (nn.BatchNorm2d in kinds) == (architecture in ("baseline", "tanh everywhere", "deep ResNet"))
    if architecture == "tanh everywhere":
        assert not kinds & {nn.ReLU, nn.LeakyReLU}


def test_a_small_run(study):
    settings = study.settings(False)
    units = study.units(settings, [0])
    chosen = [unit for unit in units if unit["architecture"] in ("no norm", "deep ResNet")][:6]
    found = {str(unit): compute(study.run, settings, unit) for unit in chosen}
    assert all(row.result["fid"] > 0 and len(row.result["images"]) == 8 for row in found.values())
    rows = [found.get(str(unit), Finished(unit, {"fid": 1.0, "images": None}, 0.0)) for unit in units]
    assert len(study_checks.drawn(study, rows)) > 5_000
