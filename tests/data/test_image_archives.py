"""Zip archives of images as data sets."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lipgan import data
from lipgan.data import image_archives


def image(seed: int, height: int = 8, width: int = 8) -> bytes:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, members: dict[str, bytes]) -> str:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return str(path)


NAMES = ["00001/img00000002.png", "00000/img00000000.png", "00000/img00000001.png"]


def with_labels(path: Path, labels: Any, **others: bytes) -> str:
    members = {name: image(k) for k, name in enumerate(NAMES)}
    return write(path, {**members, "dataset.json": json.dumps({"labels": labels}).encode(), **others})


def test_images_and_labels_in_the_order_of_their_names(tmp_path: Path) -> None:
    path = with_labels(tmp_path / "a.zip", [[name, 4 - k] for k, name in enumerate(NAMES)])
    dataset = data.load(path)
    folder = tmp_path / "folder"
    with zipfile.ZipFile(path) as file:
        file.extractall(folder)
    expected = data.load(str(folder))
    assert torch.equal(dataset.samples, expected.samples)
    assert dataset.samples.shape == (3, 3, 8, 8)
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [3, 2, 4]  # folders would be classes 0, 0, 1


@pytest.mark.parametrize("labels", [None, [], [[name, [0.0, 1.0]] for name in NAMES], [[name, -1] for name in NAMES]])
def test_no_labels_that_can_be_used(labels: Any, tmp_path: Path) -> None:
    assert data.load(with_labels(tmp_path / "a.zip", labels)).labels is None


def test_without_a_file_of_labels_there_are_none(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zip", {"a/1.png": image(0), "b/1.png": image(1)})
    assert data.load(path).labels is None


def test_size_cuts_and_scales_as_in_a_folder(tmp_path: Path) -> None:
    members = {"1.png": image(0, 9, 14), "2.png": image(1, 20, 12)}
    path = write(tmp_path / "a.zip", members)
    for name, content in members.items():
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    assert torch.equal(data.load(path, 8).samples, data.load(str(tmp_path / "folder"), 8).samples)
    with pytest.raises(ValueError, match=r"a\.zip/1\.png has 14 x 9 pixels, which is no square"):
        data.load(path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (b"{", "dataset.json cannot be used: "),
        (b'{"labels": [["a.png"]]}', "dataset.json cannot be used: "),
        (b'{"labels": 7}', "dataset.json cannot be used: "),
        (b'{"labels": [["other.png", 1]]}', r"it has labels, but none for 00000/img00000000\.png"),
        (b'{"labels": ' + b"[" * 100_000, "dataset.json cannot be used: "),
        (b" " * 2**11, r"unpacks to 2048 bytes, more than 1024"),
    ],
)
def test_broken_labels_are_named(labels: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_archives, "_MAX_LABELS", 2**10 if labels.isspace() else 2**20)
    members = {name: image(k) for k, name in enumerate(NAMES)}
    path = write(tmp_path / "a.zip", {**members, "dataset.json": labels})
    with pytest.raises(ValueError, match=message):
        data.load(path)


def test_what_is_no_archive_of_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"a\.zip is no archive of images: it is not a zip archive"):
        data.load(str(tmp_path / "a.zip"))
    with pytest.raises(ValueError, match=r"leads out of it"):
        data.load(with_labels(tmp_path / "b.zip", None, **{"../a.png": image(0)}))
    with pytest.raises(FileNotFoundError, match="no such folder or file"):
        data.load("nowhere.zip")
