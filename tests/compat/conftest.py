"""What the tests of several packages share."""

import hashlib

import pytest
import torch
from torch import nn

from lipgan.metrics.features.inception import InceptionNetwork


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random weights in a file of the published layout, with the checksum in its name."""
    torch.manual_seed(0)
    network = InceptionNetwork()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    folder = tmp_path_factory.mktemp("weights")
    torch.save(network.state_dict(), folder / "new.pth")
    digest = hashlib.sha256((folder / "new.pth").read_bytes()).hexdigest()
    return str((folder / "new.pth").rename(folder / f"random-{digest[:8]}.pth"))
