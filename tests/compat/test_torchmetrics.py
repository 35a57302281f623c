"""lipgan.compat.torchmetrics beside the classes of torchmetrics that it stands in for."""

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import peer
from processes import leave, run
from torch import Tensor, nn

from lipgan.bench.peers import present_or_stand_in

pytestmark = pytest.mark.filterwarnings("ignore:Metric .* will save all extracted features in buffer")


@pytest.fixture(autouse=True, scope="module")
def _torchvision() -> Iterator[None]:
    with present_or_stand_in():
        yield


class Pooled(nn.Module):
    """Features of images: two linear maps of their pixels."""

    num_features = 5

    def __init__(self) -> None:
        super().__init__()
        matrix = torch.randn(3 * 16, 5, generator=torch.Generator().manual_seed(1))
        self.register_buffer("matrix", matrix)

    def forward(self, imgs: Tensor) -> Tensor:
        return imgs.to(self.matrix.dtype).flatten(1) @ self.matrix / 100


def images(seed: int, n: int = 40, shift: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(shift, 200 + shift, (n, 3, 4, 4), generator=generator, dtype=torch.uint8)


FID, KID, IS = "FrechetInceptionDistance", "KernelInceptionDistance", "InceptionScore"
OPTIONS: dict[str, dict[str, Any]] = {
    FID: {},
    KID: {"subsets": 7, "subset_size": 20, "degree": 2, "gamma": 0.3, "coef": 0.5},
    IS: {"splits": 7},
}
EACH = pytest.mark.parametrize("name", [FID, KID, IS])
TWO_SIDED = pytest.mark.parametrize("name", [FID, KID])


def pair(name: str, **options: Any) -> tuple[Any, Any]:
    """(theirs, ours)"""
    settings = {"feature": Pooled(), **OPTIONS[name], **options}
    modules = (peer("torchmetrics.image"), peer("lipgan.compat.torchmetrics"))
    return tuple(getattr(module, name)(**settings) for module in modules)  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def _installed() -> None:
    peer("torchmetrics")


def fill(metric: Any, name: str, scale: float | None = None, *, seeds: tuple[int, ...] = (0, 1)) -> None:
    for seed in seeds:
        for real, batch in ((True, images(seed)), (False, images(seed + 10, shift=30))):
            imgs = batch if scale is None else batch * scale
            if name != IS:
                metric.update(imgs, real=real)
            elif not real:
                metric.update(imgs)


def value(metric: Any) -> Tensor:
    torch.manual_seed(3)  # for the subsets and the order
    found = metric.compute()
    return torch.stack([found] if isinstance(found, Tensor) else list(found))


def same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(value(ours), value(theirs), rtol=2e-4, atol=1e-5)


@EACH
def test_values_types_and_classes(name: str) -> None:
    theirs, ours = pair(name)
    assert isinstance(ours, type(theirs))
    assert isinstance(ours, peer("torchmetrics").Metric)
    for metric in (theirs, ours):
        fill(metric, name)
    same(ours, theirs)
    assert ours.compute_on_cpu == theirs.compute_on_cpu
    assert (ours.higher_is_better, ours.is_differentiable) == (theirs.higher_is_better, theirs.is_differentiable)


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_dtype_of_the_features_is_that_of_the_result(name: str, dtype: torch.dtype) -> None:
    theirs, ours = pair(name, feature=Pooled().to(dtype))
    for metric in (theirs, ours):
        fill(metric, name)
    assert value(ours).dtype == value(theirs).dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(value(ours), value(theirs), rtol=1e-7, atol=1e-10)


@EACH
@pytest.mark.parametrize("normalize", [True, False])
def test_normalize_with_a_module(name: str, normalize: bool) -> None:
    theirs, ours = pair(name, normalize=normalize)
    for metric in (theirs, ours):
        fill(metric, name, 1 / 255 if normalize else None)
    same(ours, theirs)


def test_the_length_of_features_is_found() -> None:
    class Unnamed(Pooled):
        num_features = property(lambda self: (_ for _ in ()).throw(AttributeError()))

    theirs, ours = pair(FID, feature=Unnamed(), input_img_size=(3, 4, 4))
    for metric in (theirs, ours):
        fill(metric, FID)
    same(ours, theirs)


@TWO_SIDED
@pytest.mark.parametrize("kept", [True, False])
def test_reset(name: str, kept: bool) -> None:
    theirs, ours = pair(name, reset_real_features=not kept)
    for metric in (theirs, ours):
        fill(metric, name)
        metric.reset()
        metric.update(images(20, shift=10), real=False)
        if not kept:
            metric.update(images(21), real=True)
    same(ours, theirs)


@EACH
def test_the_state_dict_goes_both_ways(name: str) -> None:
    theirs, ours = pair(name)
    for metric in (theirs, ours):
        metric.persistent(True)
    fill(theirs, name)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    same(ours, theirs)
    fill(ours, name, seeds=(50, 51))
    back = pair(name)[0]
    back.persistent(True)
    back.load_state_dict(ours.state_dict())
    back.orig_dtype = torch.float32  # torchmetrics knows it from an update only
    same(ours, back)


@EACH
def test_copies_and_devices(name: str) -> None:
    _, ours = pair(name)
    fill(ours, name)
    other = copy.deepcopy(ours).to("cpu").set_dtype(torch.float64)
    torch.testing.assert_close(value(other).double(), value(ours).double(), rtol=1e-5, atol=1e-6)
    moved = pair(name)[1].to("meta")
    assert moved.device == torch.device("meta")
    assert moved.inception.matrix.device == torch.device("meta")


def test_forward_gives_the_value_of_the_batch_and_counts_it_once() -> None:
    for name in (FID, KID):
        _, ours = pair(name, reset_real_features=False)
        expected = pair(name)[1]
        for metric in (ours, expected):
            metric.update(images(0), real=True)
        for seed in (1, 2):
            alone = pair(name)[1]
            alone.update(images(0), real=True)
            alone.update(images(seed, shift=20), real=False)
            torch.manual_seed(3)
            found = ours(images(seed, shift=20), real=False)
            found = torch.stack([found] if isinstance(found, Tensor) else list(found))
            torch.testing.assert_close(found, value(alone))
            expected.update(images(seed, shift=20), real=False)
            torch.testing.assert_close(value(ours), value(expected))


def test_forward_of_the_score() -> None:
    theirs, ours = pair(IS)
    for metric in (theirs, ours):
        torch.manual_seed(0)
        metric.values = [torch.stack(metric(images(seed))) for seed in (1, 2)]
    torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-5)
    same(ours, theirs)


def test_collections_and_shared_features() -> None:
    torchmetrics = peer("torchmetrics")
    wrappers = peer("torchmetrics.wrappers")
    calls = []

    class Counted(Pooled):
        def forward(self, imgs: Tensor) -> Tensor:
            calls.append(len(imgs))
            return super().forward(imgs)

    for make, count in ((torchmetrics.MetricCollection, 4), (wrappers.FeatureShare, 2)):
        calls.clear()
        network = Counted()
        collection = make([pair(name, feature=network)[1] for name in (FID, KID)])
        collection.update(images(0), real=True)
        collection.update(images(1, shift=20), real=False)
        torch.manual_seed(3)
        found = collection.compute()
        if make is torchmetrics.MetricCollection:
            assert {"FrechetInceptionDistance"} < set(found)
        assert len(calls) == count
        alone = pair(FID)[1]
        alone.update(images(0), real=True)
        alone.update(images(1, shift=20), real=False)
        torch.testing.assert_close(found[FID], alone.compute())
        collection.reset()


def test_singular_covariances() -> None:
    """Fewer samples than features, where torchmetrics takes roots of negative rounding."""
    _, ours = pair(FID, feature=nn.Flatten(), input_img_size=(3, 4, 4))
    ours.update(images(0, 10), real=True)
    ours.update(images(0, 10), real=False)
    scale = images(0, 10).double().flatten(1).var(0).sum()
    assert 0 <= float(ours.compute()) < 1e-9 * scale


def process(rank: int, folder: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    with warnings.catch_warnings(), present_or_stand_in():
        warnings.simplefilter("ignore")
        values = {}
        for name in (FID, KID, IS):
            _, ours = pair(name)
            fill(ours, name, seeds=(100 * rank, 100 * rank + 1))
            values[name] = value(ours)  # compute gathers, and gives the state of this process back
            assert name != FID or int(ours.real_features_num_samples) == 80
    torch.save(values, folder / f"{rank}.pt")
    leave()


@pytest.mark.slow
def test_two_processes_compute_what_one_computes_of_all(tmp_path: Path) -> None:
    run(process, tmp_path)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name in (FID, KID, IS):
        _, one = pair(name)
        fill(one, name, seeds=(0, 100, 1, 101))  # The first batches of both are gathered first.
        for values in found:
            torch.testing.assert_close(values[name], value(one), rtol=1e-5, atol=1e-6)


# ---- Inception ----


@pytest.mark.parametrize("feature", [64, "logits_unbiased"])
@pytest.mark.parametrize("antialias", [True, False])
def test_features_are_those_of_torchmetrics(weights: str, feature: int | str, antialias: bool) -> None:
    peer("torch_fidelity")
    theirs = peer("torchmetrics.image.fid").NoTrainInceptionV3(
        "inception-v3-compat", [str(feature)], weights, antialias=antialias
    )
    ours = peer("lipgan.compat.torchmetrics").KernelInceptionDistance(
        feature, feature_extractor_weights_path=weights, antialias=antialias
    )
    imgs = torch.randint(0, 256, (2, 3, 40, 31), dtype=torch.uint8)
    expected = theirs(imgs)
    found = ours.train().inception(imgs)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_inception_by_number(weights: str) -> None:
    module = peer("lipgan.compat.torchmetrics")
    metric = module.FrechetInceptionDistance(64, normalize=True, feature_extractor_weights_path=weights)
    bright = images(0, 3)
    metric.update((bright.float() + 0.5) / 255, real=True)
    metric.update(images(1, 3).float() / 255, real=False)
    torch.testing.assert_close(metric.real_features_sum.float(), metric.inception(bright).sum(0), rtol=1e-4, atol=1e-4)
    assert metric.compute() > 0
    with pytest.raises(ValueError, match=r"imgs must be uint8, or in \[0, 1\] with normalize=True, got torch.float32"):
        metric.inception(torch.rand(2, 3, 8, 8))
    assert metric.set_dtype(torch.float64).inception(bright).dtype == torch.float64


# ---- what is refused ----


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (
            FID,
            {"feature": 63},
            ValueError,
            r"feature must be one of \(64, 192, 768, 2048\) or a torch.nn.Module, got 63",
        ),
        (FID, {"feature": "logits_unbiased"}, ValueError, "got 'logits_unbiased'"),
        (KID, {"feature": 1.5}, TypeError, "feature must be one of .*, got float"),
        (IS, {"feature": True}, TypeError, "feature must be one of .*, got bool"),
        (
            FID,
            {"feature_extractor_weights_path": "w.pth"},
            ValueError,
            "must be None for a module as feature, got 'w.pth'",
        ),
        (FID, {"feature": 64, "feature_extractor_weights_path": "/nowhere/w.pth"}, FileNotFoundError, "/nowhere/w.pth"),
        (FID, {"normalize": 1}, ValueError, "`normalize` expected to be a bool"),
        (KID, {"subset_size": 0}, ValueError, "`subset_size` expected to be integer"),
        (KID, {"nothing": 0}, ValueError, "nothing"),
    ],
)
def test_bad_arguments(name: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    make = getattr(peer("lipgan.compat.torchmetrics"), name)
    with pytest.raises(error, match=message):
        make(**{"feature": Pooled(), **options})


def test_too_few_samples() -> None:
    _, fid = pair(FID)
    fid.update(images(0), real=True)
    fid.update(images(0, 1), real=False)
    with pytest.raises(RuntimeError, match=r"More than one sample is required .* got 1 fake"):
        fid.compute()
    _, kid = pair(KID)
    kid.update(images(0), real=True)
    kid.update(images(0, 3), real=False)
    with pytest.raises(ValueError, match=r"`subset_size` should be smaller .* got 20 and 3 fake"):
        kid.compute()


def test_features_that_are_not_finite() -> None:
    _, fid = pair(FID, feature=nn.Flatten(), input_img_size=(3, 4, 4))
    for real in (True, False):
        fid.update(torch.full((3, 3, 4, 4), torch.nan), real=real)
    with pytest.raises(ValueError, match="NaN"):
        fid.compute()
