"""The tape against double backward: critics at random."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tape_critics import ImageAttention, compare, stack
from torch import Tensor, nn

import lipgan


@st.composite
def image_critics(draw: st.DrawFn) -> list[Any]:
    """Layers of an image critic, as functions that make them; every one keeps 4 channels of 6 x 6."""
    convolution = st.builds(
        lambda kernel, groups, bias, mode: (
            lambda: nn.Conv2d(4, 4, kernel, padding=kernel // 2, groups=groups, bias=bias, padding_mode=mode)
        ),
        st.sampled_from([1, 3]),
        st.sampled_from([1, 2, 4]),
        st.booleans(),
        st.sampled_from(["zeros", "reflect", "circular"]),
    )
    pointwise = [
        nn.ReLU,
        lambda: nn.ReLU(inplace=True),
        lambda: nn.LeakyReLU(0.2),
        lambda: nn.PReLU(4),
        nn.GELU,
        nn.SiLU,
        nn.Tanh,
        nn.Softplus,
        nn.ELU,
        lambda: nn.Dropout(0.3),
        lambda: nn.Dropout2d(0.3),
        lambda: nn.BatchNorm2d(4),
        lambda: nn.GroupNorm(2, 4),
        lambda: nn.InstanceNorm2d(4, affine=True),
        lambda: nn.LayerNorm((4, 6, 6)),
        lambda: nn.AvgPool2d(3, 1, 1),
        lambda: nn.MaxPool2d(3, 1, 1),
        ImageAttention,
        lambda: lipgan.spectral_norm(nn.Conv2d(4, 4, 3, padding=1)),
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 2, 2), nn.AvgPool2d(2)),
        lambda: nn.Sequential(nn.Conv2d(4, 16, 1), nn.PixelShuffle(2), nn.MaxPool2d(2)),
    ]
    layer = st.one_of(convolution, st.sampled_from(pointwise))
    return draw(st.lists(st.tuples(layer, st.sampled_from(["", "", "sum", "product", "cat"])), min_size=1, max_size=5))


class Branches(nn.Module):
    """A layer and a way around it."""

    def __init__(self, layer: nn.Module, join: str) -> None:
        super().__init__()
        self.layer, self.join = layer, join
        self.merge = nn.Conv2d(8, 4, 1) if join == "cat" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x + 0 if self.join else x)
        if self.join == "sum":
            h = h + x
        elif self.join == "product":
            h = h * torch.sigmoid(x)
        elif self.join == "cat":
            h = torch.cat([x, h], 1)
        return self.merge(h)


@pytest.mark.slow
@given(
    layers=image_critics(),
    batch=st.integers(1, 3),
    training=st.booleans(),
    kind=st.sampled_from(["wgan-gp", "lp", "r1", "r1+r2", "max"]),
)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_critics_at_random(layers: list[Any], batch: int, training: bool, kind: str) -> None:
    def build() -> nn.Module:
        branches = [Branches(make(), join) for make, join in layers]
        return stack(nn.Conv2d(2, 4, 3, padding=1), *branches, nn.Flatten(), nn.Linear(144, 2)).train(training)

    compare(build, (batch, 2, 6, 6), kind=kind, target=0.5)
