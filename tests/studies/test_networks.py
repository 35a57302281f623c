"""Networks of chosen depth and norm take noise and digits, and have what was asked for."""

import pytest
import torch
from torch import nn

from lipgan.studies import networks


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_shapes_depths_and_norms(norm, residual):
    generator = networks.generator(4, 6, "softplus", norm, residual=residual)
    critic = networks.critic(4, 6, "tanh", norm, residual=residual)
    samples = generator(torch.randn(3, 64))
    assert samples.shape == (3, *networks.SHAPE)
    assert critic(samples).shape == (3,)
    kind = {"batch": nn.BatchNorm2d, "layer": nn.GroupNorm}.get(norm)
    for network, extra in ((generator, 1), (critic, 0)):
        layers = list(network.modules())
        assert sum(isinstance(layer, nn.Conv2d) for layer in layers) == 5
        if kind is not None:
            assert sum(isinstance(layer, kind) for layer in layers) == 4 + extra


def test_the_softplus_is_that_of_the_paper():
    layer = networks.NONLINEARITIES["softplus"]()
    x = torch.tensor([-1.0, 0.0, 3.0])
    assert layer(x) == pytest.approx((torch.log1p(torch.exp(2 * x + 2)) / 2 - 1).tolist(), rel=1e-5)


def test_layers_are_replaced_at_any_depth():
    network = nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU(), nn.Linear(1, 1)))
    networks.replaced(network, nn.ReLU, lambda layer: nn.Tanh())
    assert not any(isinstance(layer, nn.ReLU) for layer in network.modules())
    assert sum(isinstance(layer, nn.Tanh) for layer in network.modules()) == 2
