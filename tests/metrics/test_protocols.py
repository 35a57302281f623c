"""The protocols, against the formulas of the packages they are named for."""

import dataclasses

import numpy as np
import pytest
import torch

from lipgan import _choices
from lipgan.metrics import (
    PRDC,
    InceptionScore,
    KernelDistance,
    frechet_distance,
    frechet_distance_from_features,
    inception_score,
    kernel_distance,
    prdc,
    protocols,
)


def rows(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_names() -> None:
    assert (
        protocols.names()
        == ["clean", "lipgan", "pytorch-fid", "torch-fidelity", "torchmetrics"]
        == sorted(_choices.PROTOCOLS)
    )
    with pytest.raises(ValueError, match="unknown protocol 'torchmetric'; did you mean torchmetrics"):
        protocols.get("torchmetric")
    for name in protocols.names():
        assert str(protocols.get(name)).startswith(f"protocol {name}: ")
    with pytest.raises(dataclasses.FrozenInstanceError):
        protocols.get("pytorch-fid").ddof = 0  # type: ignore[misc]


@pytest.mark.parametrize("name", protocols.names())
def test_frechet_distance(name: str) -> None:
    x, y = rows(40, 3, 0).numpy(force=True), 2 * rows(30, 3, 1).numpy(force=True)
    expected = frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    distance = frechet_distance_from_features(x, y, ddof=protocols.get(name).ddof)
    assert float(distance) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("name", "ddof"), [("torch-fidelity", 0), ("torchmetrics", 1)])
def test_inception_score(name: str, ddof: int) -> None:
    probs = rows(100, 5, 0).softmax(1)
    shuffled = probs[torch.randperm(100, generator=torch.Generator().manual_seed(3))].numpy(force=True)
    scores = [np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()) for p in np.split(shuffled, 10)]
    values = inception_score(probs, generator=torch.Generator().manual_seed(3), protocol=name)
    assert values == pytest.approx((np.mean(scores), np.std(scores, ddof=ddof)), rel=1e-9)
    again = inception_score(probs, protocol=name)
    assert again == inception_score(probs, protocol=name) != values


@pytest.mark.parametrize("name", ["torch-fidelity", "torchmetrics"])
def test_kernel_distance(name: str) -> None:
    x, y = rows(1000, 2, 0), rows(1000, 2, 1) + 0.5
    # Of 1000 samples every subset is all.
    products = [((a @ b.T) / 2 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    within = sum((k.sum() - k.trace()) / (1000 * 999) for k in products[:2])
    mean, std = kernel_distance(x, y, generator=torch.Generator().manual_seed(0), protocol=name)
    assert mean == pytest.approx(float(within - 2 * products[2].mean()), rel=1e-9)
    assert std == pytest.approx(0, abs=1e-9)


def test_precision_and_recall() -> None:
    # Whole numbers, so that many distances lie on a border.
    x, y = (2 * rows(40, 2, 0)).round(), (2 * rows(30, 2, 1) + 1).round()
    in_real = (torch.cdist(y, x) <= torch.cdist(x, x).kthvalue(4).values).any(1).double().mean().item()
    in_fake = (torch.cdist(x, y) <= torch.cdist(y, y).kthvalue(4).values).any(1).double().mean().item()
    values = prdc(x, y, protocol="torch-fidelity")
    assert list(values) == ["precision", "recall", "f1"]
    assert values["precision"] == pytest.approx(in_real, rel=1e-12)
    assert values["recall"] == pytest.approx(in_fake, rel=1e-12)
    assert values["f1"] == pytest.approx(2 * in_real * in_fake / (in_real + in_fake))


def test_what_a_package_lacks() -> None:
    x = torch.eye(4)
    with pytest.raises(ValueError, match="'pytorch-fid' has no Inception Score"):
        inception_score(x, protocol="pytorch-fid")
    with pytest.raises(ValueError, match="'pytorch-fid' has no kernel distance"):
        kernel_distance(x, x, protocol="pytorch-fid")
    with pytest.raises(ValueError, match="'torchmetrics' has no precision and recall"):
        prdc(x, x, protocol="torchmetrics")


def test_preprocessing() -> None:
    preprocessings = ["clean", "pytorch", "pytorch", "tensorflow", "torchmetrics"]
    assert [protocols.get(name).preprocessing for name in protocols.names()] == preprocessings


def test_lipgan_is_what_the_functions_do_by_themselves() -> None:
    probs, x, y = rows(60, 5, 0).softmax(1), rows(1100, 3, 1), rows(1000, 3, 2)
    assert inception_score(probs, protocol="lipgan") == inception_score(probs)
    values = [kernel_distance(x, y, generator=torch.Generator().manual_seed(1), protocol=p) for p in ("lipgan", None)]
    assert values[0] == values[1]
    assert prdc(x, y, protocol="lipgan") == prdc(x, y)


@pytest.mark.parametrize("name", ["clean", "lipgan"])
def test_subsets_are_no_larger_than_the_samples(name: str) -> None:
    x, y = rows(30, 3, 0), rows(20, 3, 1)
    protocol = protocols.get(name)
    expected = kernel_distance(x, y, 100, 20, generator=torch.Generator().manual_seed(2))
    assert kernel_distance(x, y, generator=torch.Generator().manual_seed(2), protocol=name) == expected
    assert "100 subsets of 20" in (protocol.definition("kid", 20) or "")
    assert "100 subsets of 1000" in (protocol.definition("kid") or "")
    with pytest.raises(ValueError, match="fake must have at least 2 samples, got 1"):
        kernel_distance(x, y[:1], protocol=name)


def test_the_functions_and_classes_take_a_protocol() -> None:
    probs, x, y = rows(60, 5, 0).softmax(1), rows(1100, 3, 1), rows(1000, 3, 2)
    score = InceptionScore(protocol="torchmetrics", generator=torch.Generator().manual_seed(0))
    score.update(probs)
    kernel = KernelDistance(protocol="torch-fidelity", generator=torch.Generator().manual_seed(0))
    neighbours = PRDC(protocol="torch-fidelity")
    for metric in (kernel, neighbours):
        metric.update(x, real=True)
        metric.update(y, real=False)
    expected = inception_score(probs, protocol="torchmetrics")
    assert tuple(map(float, score.compute())) == inception_score(probs, protocol="torchmetrics") == expected
    expected = kernel_distance(x, y, generator=torch.Generator().manual_seed(0), protocol="torch-fidelity")
    assert tuple(map(float, kernel.compute())) == expected
    assert neighbours.compute() == prdc(x, y, protocol="torch-fidelity")
    whole = prdc(x, y, 3, "le")
    assert neighbours.compute() == {key: whole[key] for key in ("precision", "recall", "f1")}


def test_what_a_protocol_decides_is_left_to_it() -> None:
    x = torch.eye(4)
    for call in (
        lambda: inception_score(x, 2, protocol="torchmetrics"),
        lambda: InceptionScore(splits=2, protocol="torchmetrics"),
    ):
        with pytest.raises(
            ValueError,
            match=r"^protocol 'torchmetrics' sets splits itself; leave out splits or protocol, got splits=2$",
        ):
            call()
    for make in (lambda **options: kernel_distance(x, x, **options), KernelDistance):
        with pytest.raises(
            ValueError,
            match=r"^protocol 'clean' sets degree itself; leave out degree or protocol, got degree=2$",
        ):
            make(degree=2, protocol="clean")
    for make in (lambda **options: prdc(x, x, **options), PRDC):
        with pytest.raises(
            ValueError,
            match=r"^protocol 'torch-fidelity' sets compare itself; leave out compare or protocol, got compare='le'$",
        ):
            make(compare="le", protocol="torch-fidelity")
        with pytest.raises(ValueError, match="'clean' has no precision and recall; choose another protocol"):
            make(protocol="clean")
    with pytest.raises(ValueError, match="'clean' has no Inception Score"):
        InceptionScore(protocol="clean")
    with pytest.raises(ValueError, match="'pytorch-fid' has no kernel distance"):
        KernelDistance(protocol="pytorch-fid")
    with pytest.raises(ValueError, match="unknown protocol 'clen'; did you mean clean"):
        KernelDistance(protocol="clen")
    with pytest.raises(ValueError, match="unknown protocol 'clen'; did you mean clean"):
        KernelDistance(protocol="clen", degree=2)
