"""The state of metrics summed over two processes: every one computes what one process does of all samples."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import leave, run
from torch import Tensor

from lipgan.metrics import PRDC, FrechetDistance, InceptionScore, KernelDistance

Metrics = tuple[FrechetDistance, InceptionScore, KernelDistance, PRDC]


def features(n: int, seed: int) -> Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))


def fill(rank: int | None) -> Metrics:
    """The metrics with the samples of one process of two, or of both."""
    frechet, score = FrechetDistance(), InceptionScore(splits=3)
    kernel, neighbours = KernelDistance(subset_size=None), PRDC(nearest_k=1)
    # The second process has no probabilities, and other batches of the rest.
    if rank in (0, None):
        score.update(features(10, 0).softmax(1))
        frechet.update(features(20, 1), real=True)
        frechet.update(features(5, 2), real=False)
        kernel.update(features(8, 3), real=True)
        kernel.update(features(3, 6), real=False)
        neighbours.update(features(8, 3), real=True)
        neighbours.update(features(3, 6), real=False)
    if rank in (1, None):
        frechet.update(features(7, 4) + 100, real=True)
        frechet.update(features(9, 5).double(), real=False)
        kernel.update(features(4, 7).double(), real=False)
        neighbours.update(features(4, 7).double(), real=False)
    return frechet, score, kernel, neighbours


def values(metrics: Metrics) -> Tensor:
    frechet, score, kernel, neighbours = metrics
    shares = torch.tensor(list(neighbours.compute().values()), dtype=torch.float64)
    return torch.stack([frechet.compute(), *score.compute(), *kernel.compute(), *shares])


def process(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    metrics = fill(rank)
    for metric in metrics:
        metric.sync()
        metric.sync()  # counts nothing again
    torch.save(values(metrics), folder / f"{rank}.pt")
    frechet, score, *_ = metrics
    for update in (lambda: frechet.update(features(2, 0), real=True), lambda: score.update(torch.ones(1, 1))):
        with pytest.raises(RuntimeError, match="those of all processes since sync"):
            update()
    # The real side stays, and is not summed again; the generated side is new.
    frechet.reset_real_features = False
    frechet.reset()
    one = fill(rank)[0]
    frechet.update(features(5, 2) if rank == 0 else features(9, 5).double(), real=False)
    frechet.sync()
    one.sync()
    assert torch.equal(frechet.compute(), one.compute())
    wrong = KernelDistance()
    wrong.update(torch.ones(2, 2 + rank), real=True)
    with pytest.raises(ValueError, match=r"the real features must have one length in all processes, got \[2, 3\]"):
        wrong.sync()
    empty = InceptionScore()
    empty.sync()
    with pytest.raises(ValueError, match="needs at least 1 sample, got 0"):
        empty.compute()
    leave()


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    run(process, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, values(fill(None)), rtol=1e-12, atol=1e-12)


def test_sync_needs_processes() -> None:
    with pytest.raises(RuntimeError, match=r"sync joins processes, and torch.distributed is not initialized"):
        InceptionScore().sync()
