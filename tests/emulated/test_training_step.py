"""A training step never waits for the device: what goes there is copied from pinned memory, nothing comes back."""

import dataclasses

import pytest
import torch
from emulated_device import DEVICE, crossings
from torch import Tensor

from lipgan import _transfer, data, recipes
from lipgan.training import Trainer

pytestmark = pytest.mark.usefixtures("single_thread")

# Every system but "mad-gan", each penalty, each optimizer.
RECIPES = [
    "aae", "acgan", "adaptive-divergence", "ali", "began", "cramer", "cyclegan", "dragan", "ebgan", "gngan",
    "historical-averaging", "infogan", "instance-noise", "lapgan", "lipschitz",  "minibatch-discrimination",
    "mode-regularized", "progressive", "r3gan", "sngan", "ttur", "unrolled", "vae-gan", "veegan", "virtual-batch-norm",
    "wgan", "wgan-gp",
]  # fmt: skip


@pytest.mark.parametrize(("name", "accumulation"), [*((name, 1) for name in RECIPES), ("wgan-gp", 2), ("cyclegan", 2)])
def test_no_recipe_waits_in_a_step(name: str, accumulation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []
    monkeypatch.setattr(_transfer, "_PINNED_FOR", {"emulated"})
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    row = dataclasses.replace(recipes.get(name), batch_size=8, accumulation=accumulation)
    samples = data.load("digits", 8) if name in ("sngan", "acgan") else data.load("ring")
    trainer = Trainer.from_recipe(row, samples, device=DEVICE, log_every=1000).fit(2)
    pinned.clear()
    with crossings() as records:
        trainer.fit(1)
    assert records, "noise, at least, goes to the device"
    assert all(record.startswith("to device, later") for record in records), records
    assert len(pinned) == len(records)


def test_a_mixture_of_generators_waits_for_their_numbers_of_rows() -> None:
    """Which generator a row of noise belongs to stands in the noise."""
    row = dataclasses.replace(recipes.get("mad-gan"), batch_size=8)
    trainer = Trainer.from_recipe(row, data.load("ring"), device=DEVICE, log_every=1000).fit(1)
    with crossings() as records:
        trainer.fit(1)
    waits = [record for record in records if not record.startswith("to device, later")]
    assert waits
    assert all(record.startswith("size to host") for record in waits)


def test_a_logged_step_waits() -> None:
    """That the records would show it."""
    row = dataclasses.replace(recipes.get("gan"), batch_size=8)
    trainer = Trainer.from_recipe(row, "ring", device=DEVICE, log_every=2).fit(1)
    with crossings() as records:
        trainer.fit(1)
    assert any("to host" in record for record in records)


@pytest.mark.parametrize("name", ["gan", "wgan-gp", "cyclegan"])
def test_training_on_a_device_is_training_on_the_cpu(name: str) -> None:
    row = dataclasses.replace(recipes.get(name), batch_size=8)
    ends = []
    for device in ("cpu", DEVICE):
        trainer = Trainer.from_recipe(row, "ring", seed=3, device=device).fit(3)
        ends.append(torch.cat([p.detach().cpu().flatten() for p in trainer.generator.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)
