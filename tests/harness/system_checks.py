"""What every system of `lipgan.systems` is asked, whatever it minimizes."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lipgan import recipes
from lipgan.data import Dataset
from lipgan.recipes import Recipe
from lipgan.systems import Batch, System, latents
from lipgan.training import Trainer


def recipe(name: str, **changes: Any) -> Recipe:
    """A row of the table with other values; ``options`` are added to those of the row."""
    row = recipes.get(name)
    options = {**row.options, **changes.pop("options", {})}
    return dataclasses.replace(row, options=options, **changes)


def points(n: int = 64) -> Dataset:
    return Dataset("points", torch.randn(n, 2, generator=torch.Generator().manual_seed(4)) * 0.3 + 1)


def pictures(channels: int = 1, n: int = 24) -> Dataset:
    random = torch.Generator().manual_seed(5)
    return Dataset(f"pictures-{channels}", torch.rand(n, channels, 16, 16, generator=random) * 2 - 1)


def system_of(row: Recipe, data: Dataset, seed: int = 0) -> System:
    """The system of a recipe with fresh networks, outside of a trainer."""
    return Trainer.from_recipe(row, data, seed=seed).system


def batch(system: System, n: int = 8, seed: int = 1) -> Batch:
    """A batch as the trainer would make it, of the first samples."""
    random = torch.Generator().manual_seed(seed)
    like = next(system.generator.parameters())
    return Batch(
        real=system.data.samples[:n].to(like),
        labels=None if system.data.labels is None else system.data.labels[:n],
        z=latents(system.generator, n, random).to(like),
        random=random,
    )


def assert_serves(row: Recipe) -> None:
    """Two steps on vectors, on grey and on colour images: finite rows, samples of the shape of the data."""
    for data in (points(), pictures(1), pictures(3)):
        trainer = Trainer.from_recipe(dataclasses.replace(row, batch_size=8), data, log_every=1).fit(2)
        assert trainer.sample(3).shape == (3, *data.shape)
        assert all(abs(value) < 1e6 for value in trainer.history[-1].values() if value is not None)


def assert_resumes(row: Recipe, data: Dataset, path: Path) -> None:
    """Training, saving, loading and continuing ends in the bits of a run that was not interrupted."""
    whole = Trainer.from_recipe(row, data, seed=3).fit(5)
    Trainer.from_recipe(row, data, seed=3).fit(2).save(path / "checkpoint.pt")
    resumed = Trainer.load(path / "checkpoint.pt", data=data).fit(3)
    assert_same(whole.state_dict(), resumed.state_dict())


def assert_parts_add_up(row: Recipe, data: Dataset | None = None) -> None:
    """A batch in two parts, as of accumulation or of two processes, gives the step of the whole batch.

    ``data`` are points unless given.
    """
    data = points() if data is None else data
    ends = []
    for parts in (1, 2):
        trainer = Trainer.from_recipe(dataclasses.replace(row, accumulation=parts), data, seed=3).fit(2)
        ends.append(torch.cat([p.detach().flatten() for p in trainer.generator.parameters()]))
    moved = ends[0] - torch.cat([p.detach().flatten() for p in system_of(row, data, seed=3).generator.parameters()])
    # Adam's first steps are signs of gradients, so that the few that are 0 but for rounding may differ.
    assert float((ends[0] - ends[1]).norm()) < 0.02 * float(moved.norm())


def assert_same(a: Any, b: Any, where: str = "state") -> None:
    """Equal to the last bit, through nested containers."""
    assert type(a) is type(b), where
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where
