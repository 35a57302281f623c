"""The metrics against the packages that people use, where those are installed: ``pip install -e ".[peers]"``."""

import contextlib
import io
from collections.abc import Iterator

import pytest
import torch
from peers import peer
from torch import Tensor

from lipgan.bench.peers import present_or_stand_in
from lipgan.compat.prdc import compute_prdc
from lipgan.compat.pytorch_fid import calculate_frechet_distance
from lipgan.metrics import (
    frechet_distance_from_features,
    inception_score,
    kernel_distance,
    prdc,
    protocols,
    wasserstein_distance,
)


@pytest.fixture(autouse=True, scope="module")
def _torchvision() -> Iterator[None]:
    with present_or_stand_in():
        yield


def features(m: int = 120, n: int = 100, d: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(m, d, generator=generator, dtype=torch.float64)
    return real, 1.3 * torch.randn(n, d, generator=generator, dtype=torch.float64) + 0.4


def logits() -> Tensor:
    return 2 * torch.randn(200, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Identity(torch.nn.Module):
    """In the place of a network: the features are what comes in."""

    num_features = 8

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_fid_of_pytorch_fid() -> None:
    theirs = peer("pytorch_fid.fid_score").calculate_frechet_distance
    statistics = [value.numpy() for x in features() for value in (x.mean(0), x.T.cov())]
    assert calculate_frechet_distance(*statistics) == pytest.approx(theirs(*statistics), rel=1e-6)


def test_fid_of_torchmetrics() -> None:
    metric = peer("torchmetrics.image.fid").FrechetInceptionDistance(feature=Identity())
    x, y = features()
    metric.update(x, real=True)
    metric.update(y, real=False)
    assert float(frechet_distance_from_features(x, y)) == pytest.approx(float(metric.compute()), rel=1e-6)


def test_fid_of_torch_fidelity() -> None:
    module = peer("torch_fidelity.metric_fid")
    x, y = features()
    statistics = [module.fid_features_to_statistics(rows) for rows in (x, y)]
    (theirs,) = module.fid_statistics_to_metric(*statistics, False).values()
    assert float(frechet_distance_from_features(x, y)) == pytest.approx(theirs, rel=1e-6)


def test_kid_of_torchmetrics() -> None:
    x, y = features(100, 100)
    # Subsets of all samples, since each package draws its own.
    metric = peer("torchmetrics.image.kid").KernelInceptionDistance(feature=Identity(), subsets=2, subset_size=100)
    metric.update(x, real=True)
    metric.update(y, real=False)
    assert kernel_distance(x, y, 2, 100)[0] == pytest.approx(float(metric.compute()[0]), rel=1e-6)


def test_kid_of_torch_fidelity() -> None:
    x, y = features(100, 100)
    theirs = peer("torch_fidelity.metric_kid").kid_features_to_metric(
        x, y, kid_subsets=2, kid_subset_size=100, verbose=False
    )
    mean, std = kernel_distance(x, y, 2, 100)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    assert std == pytest.approx(theirs["kernel_inception_distance_std"], abs=1e-9)


def test_inception_score_of_torchmetrics() -> None:
    metric = peer("torchmetrics.image.inception").InceptionScore(feature=Identity())
    metric.update(logits())
    # It shuffles by the global generator.
    torch.manual_seed(5)
    theirs = tuple(map(float, metric.compute()))
    generator = torch.Generator().manual_seed(5)
    ours = inception_score(logits().softmax(1), generator=generator, protocol="torchmetrics")
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_inception_score_of_torch_fidelity() -> None:
    module = peer("torch_fidelity.metric_isc")
    theirs = module.isc_features_to_metric(logits(), splits=10, shuffle=False)
    assert inception_score(logits().softmax(1)) == pytest.approx(tuple(theirs.values()), rel=1e-3)


@pytest.mark.parametrize("nearest_k", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_precision_recall_density_coverage_of_prdc(nearest_k: int, dtype: torch.dtype) -> None:
    x, y = (rows.to(dtype).numpy() for rows in features(300, 200))
    with contextlib.redirect_stdout(io.StringIO()):  # it prints how many samples there are
        theirs = peer("prdc").compute_prdc(x, y, nearest_k)
    ours = compute_prdc(x, y, nearest_k)
    assert ours == {name: pytest.approx(float(theirs[name]), rel=1e-15) for name in ours}
    assert ours["recall"] != ours["precision"] != ours["coverage"]


def test_precision_and_recall_of_torch_fidelity() -> None:
    real, fake = features(300, 200)
    module = peer("torch_fidelity.metric_prc")
    # The generated side comes first.
    theirs = module.prc_features_to_metric(
        fake, real, prc_neighborhood=3, prc_batch_size=64, save_cpu_ram=False, verbose=False
    )
    ours = prdc(real, fake, protocol="torch-fidelity")
    assert list(ours.values()) == pytest.approx([float(value) for value in theirs.values()], rel=1e-7)
    assert protocols.get("torch-fidelity").nearest_k == 3


@pytest.mark.parametrize("sizes", [(40, 40), (40, 25)])
@pytest.mark.parametrize("p", [1, 2])
def test_wasserstein_distance_of_pot(sizes: tuple[int, int], p: int) -> None:
    ot = peer("ot")
    x, y = (rows.numpy() for rows in features(*sizes))
    theirs = ot.emd2([], [], ot.dist(x, y, metric="euclidean") ** p) ** (1 / p)
    assert wasserstein_distance(x, y, p) == pytest.approx(float(theirs), rel=1e-9)
