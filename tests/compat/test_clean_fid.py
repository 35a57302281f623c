"""lipgan.compat.clean_fid, by its definition and, where it is installed, beside clean-fid."""

import inspect
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peers import peer
from PIL import Image
from torch import Tensor

from lipgan.bench.peers import present_or_stand_in
from lipgan.compat.clean_fid import compute_fid
from lipgan.metrics import FeatureStats, frechet_distance


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two folders of 14 images of two sizes. Read only."""
    random = np.random.default_rng(0)
    made = []
    for name, brightness in (("real", 256), ("fake", 150)):
        folder = tmp_path_factory.mktemp(name)
        for i in range(14):
            levels = random.integers(0, brightness, (20 + i // 7, 31, 3), dtype=np.uint8)
            Image.fromarray(levels).save(folder / f"{i:02}.png")
        made.append(str(folder))
    return made[0], made[1]


def pooled(x: Tensor) -> Tensor:
    """A stand-in for a network: means over the quarters of an image."""
    assert x.dtype == torch.float32
    return F.adaptive_avg_pool2d(x, 2).flatten(1) / 50


def generate(z: Tensor) -> Tensor:
    return (z[:, :192].sigmoid() * 200).reshape(-1, 3, 8, 8)


OPTIONS: dict[str, Any] = {"custom_feat_extractor": pooled, "num_workers": 0, "device": "cpu", "verbose": False}


def bilinear(array: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(array).resize((64, 64), Image.Resampling.BILINEAR))


def brighter(array: np.ndarray) -> np.ndarray:
    return (array // 2 + 40).astype(array.dtype)


# ---- beside clean-fid ----


class ToTensor:
    """What clean-fid uses of torchvision."""

    def __call__(self, array: np.ndarray) -> Tensor:
        x = torch.from_numpy(np.array(array)).permute(2, 0, 1)
        return x.float() / 255 if x.dtype == torch.uint8 else x


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with present_or_stand_in(), present_or_stand_in("requests"):
        module = peer("cleanfid.fid")
        transforms = SimpleNamespace(ToTensor=ToTensor)
        monkeypatch.setattr(peer("cleanfid.utils"), "torchvision", SimpleNamespace(transforms=transforms))
        yield module.compute_fid


def test_the_signature_is_that_of_clean_fid(theirs: Any) -> None:
    expected, found = (inspect.signature(function).parameters for function in (theirs, compute_fid))
    assert list(found) == list(expected)
    different = [name for name in found if found[name].default != expected[name].default]
    assert different == ["device"]  # theirs is a GPU, there or not


@pytest.mark.parametrize("mode", ["clean", "legacy_pytorch"])
@pytest.mark.parametrize(
    "others",
    [{}, {"custom_image_tranform": brighter}, {"custom_fn_resize": bilinear}, {"batch_size": 5}],
    ids=["plain", "transform", "resize", "batches"],
)
def test_folders_as_clean_fid(theirs: Any, folders: tuple[str, str], mode: str, others: dict[str, Any]) -> None:
    options = {**OPTIONS, "mode": mode, **others}
    assert compute_fid(*folders, **options) == pytest.approx(theirs(*folders, **options), rel=1e-4)


@pytest.mark.parametrize("mode", ["clean", "legacy_pytorch"])
def test_a_generator_as_clean_fid(theirs: Any, folders: tuple[str, str], mode: str) -> None:
    options = {**OPTIONS, "fdir2": folders[1], "mode": mode, "num_gen": 21, "batch_size": 8, "z_dim": 200}
    found = []
    for function in (compute_fid, theirs):
        own = torch.Generator().manual_seed(0)  # reading the folder draws global random numbers there
        shapes = []

        def gen(z: Tensor, own: torch.Generator = own, shapes: list[Any] = shapes) -> Tensor:
            shapes.append(tuple(z.shape))
            return generate(torch.randn(z.shape, generator=own))

        found.append(function(**options, gen=gen))
        assert shapes == [(8, 200)] * 3
    assert found[0] == pytest.approx(found[1], rel=1e-4)


# ---- by definition ----


def by_definition(folder: str) -> list[np.ndarray]:
    rows = []
    for path in sorted(Path(folder).glob("*.png")):
        array = np.asarray(Image.open(path)).astype(np.float32)
        channels = [
            np.asarray(Image.fromarray(array[:, :, k]).resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255)
            for k in range(3)
        ]
        rows.append(pooled(torch.from_numpy(np.stack(channels))[None])[0].double().numpy())
    return [np.mean(rows, axis=0), np.cov(rows, rowvar=False)]


def test_folders(folders: tuple[str, str], tmp_path: Path) -> None:
    expected = frechet_distance(*by_definition(folders[0]), *by_definition(folders[1]))
    found = compute_fid(*folders, **OPTIONS)
    assert isinstance(found, float)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found > 1
    archive = tmp_path / "real.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in Path(folders[0]).iterdir():
            file.write(path, path.name)
    assert compute_fid(str(archive), folders[1], **OPTIONS) == pytest.approx(found, rel=1e-9)
    stats = FeatureStats(12)
    for path in sorted(Path(folders[0]).iterdir()):
        x = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None]
        x = F.interpolate(x.double(), size=(299, 299), mode="bicubic", antialias=True).clamp(0, 255).float()
        stats.update(pooled(x))
    stats.save(tmp_path / "real.npz")
    assert compute_fid(str(tmp_path / "real.npz"), folders[1], **OPTIONS) == pytest.approx(found, rel=1e-4)


def test_legacy_tensorflow_leaves_the_size_to_the_network(folders: tuple[str, str]) -> None:
    sizes = set()

    def network(x: Tensor) -> Tensor:
        sizes.add(tuple(x.shape[2:]))
        return pooled(x)

    compute_fid(*folders, **{**OPTIONS, "custom_feat_extractor": network, "mode": "legacy_tensorflow"})
    assert sizes == {(20, 31), (21, 31)}


def test_files_that_are_left_out_are_told(folders: tuple[str, str], tmp_path: Path) -> None:
    for path in Path(folders[0]).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "a.txt").touch()
    with pytest.warns(UserWarning, match=r"1 file of other kinds left out \(1 \.txt\)"):
        compute_fid(str(tmp_path), folders[1], **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fdir1": None}, "fdir1 or gen must be given, got None for both"),
        ({"fdir2": None}, "fdir2 must name a folder, .* such as FFHQ's, are not part of lipgan"),
        ({"mode": "cleaner"}, "mode must be one of clean, legacy_pytorch, legacy_tensorflow, got 'cleaner'"),
        (
            {"custom_feat_extractor": None, "model_name": "clip_vit_b_32"},
            "model_name must be inception_v3, .*clip_vit_b_32",
        ),
        ({"fdir1": "nowhere"}, "nowhere does not exist"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"custom_feat_extractor": lambda x: x}, r"must return features \(n, d\), got \(7, 3, 299, 299\)"),
        ({"fdir1": None, "gen": generate, "num_gen": 0}, "num_gen must be"),
    ],
)
def test_what_is_refused(folders: tuple[str, str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute_fid(**{"fdir1": folders[0], "fdir2": folders[1], **OPTIONS, **options})


def test_inception_is_the_default_and_not_downloaded(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="the features 'inception' need"):
        compute_fid(*folders)
