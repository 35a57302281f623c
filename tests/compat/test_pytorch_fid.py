"""pytorch-fid's functions of paths, and its command."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peers import peer
from PIL import Image

from lipgan.bench.peers import present_or_stand_in
from lipgan.compat import pytorch_fid
from lipgan.compat.pytorch_fid import calculate_fid_given_paths, main, save_fid_stats
from lipgan.metrics import features, frechet_distance


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two folders of 12 images. Read only."""
    random = np.random.default_rng(0)
    made = []
    for name, brightness in (("real", 256), ("fake", 150)):
        folder = tmp_path_factory.mktemp(name)
        for i in range(12):
            levels = random.integers(0, brightness, (2, 2, 3), dtype=np.uint8)
            Image.fromarray(levels).save(folder / f"{i:02}.png")
        made.append(str(folder))
    return made


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Pixels in the place of Inception; the list gets the options that it is made with."""
    calls: list[dict[str, Any]] = []

    def stand_in(**options: Any) -> features.Pixels:
        calls.append(options)
        return features.Pixels()

    monkeypatch.setattr(features, "EXTRACTORS", {**features.EXTRACTORS, "inception": stand_in})
    return calls


def by_hand(folders: list[str]) -> float:
    statistics = []
    for folder in folders:
        images = np.stack([np.asarray(Image.open(path)) for path in sorted(Path(folder).iterdir())])
        x = features.Pixels()(torch.from_numpy(images).permute(0, 3, 1, 2)).double().numpy()
        statistics += [x.mean(0), np.cov(x, rowvar=False)]
    return float(frechet_distance(*statistics))


@pytest.fixture
def theirs() -> Iterator[Any]:
    with present_or_stand_in():
        yield peer("pytorch_fid.fid_score")


@pytest.mark.parametrize("name", ["calculate_fid_given_paths", "save_fid_stats", "calculate_frechet_distance"])
def test_signatures_are_those_of_pytorch_fid(theirs: Any, name: str) -> None:
    expected, found = (inspect.signature(getattr(module, name)).parameters for module in (theirs, pytorch_fid))
    assert [(key, value.default) for key, value in found.items()] == [
        (key, value.default) for key, value in expected.items()
    ]


def test_paths(folders: list[str], network: list[dict[str, Any]], tmp_path: Path) -> None:
    value = calculate_fid_given_paths(folders, 5, "cpu", 2048)
    assert type(value) is np.float64
    assert value == pytest.approx(by_hand(folders), rel=1e-5)
    assert value > 0.1
    saved = str(tmp_path / "real.npz")
    save_fid_stats([folders[0], saved], 5, torch.device("cpu"), 768, num_workers=2)
    assert calculate_fid_given_paths([saved, folders[1]], 5, "cpu", 192) == pytest.approx(value, rel=1e-9)
    assert network == [{"dim": 2048}, {"dim": 768}, {"dim": 192}]
    assert calculate_fid_given_paths([saved, saved], 5, "cpu", 64) == pytest.approx(0, abs=1e-9)
    assert len(network) == 3, "statistics need no network"
    with pytest.raises(RuntimeError, match="Existing output file"):
        save_fid_stats([folders[0], saved], 5, "cpu", 2048)


def test_the_command(
    folders: list[str], network: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = calculate_fid_given_paths(folders, 50, "cpu", 2048)
    assert main([*folders, "--batch-size", "50", "--num-workers", "1", "--device", "cpu"]) == 0
    assert float(capsys.readouterr().out.removeprefix("FID:  ")) == pytest.approx(float(expected), rel=1e-9)
    saved = str(tmp_path / "real.npz")
    assert main(["--save-stats", folders[0], saved, "--dims", "64"]) == 0
    assert network[-1] == {"dim": 64}
    with np.load(saved) as file:
        assert {"mu", "sigma"} <= set(file)
    capsys.readouterr()
    for arguments, message in (
        ([folders[0], "nowhere"], "Invalid path: nowhere"),
        ([folders[0], __file__], "is not a folder of images"),
        (["--save-stats", folders[0], saved], "Existing output file"),
        ([*folders, "--device", "abacus"], "device 'abacus' cannot be used here"),
    ):
        assert main(arguments) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith("python -m lipgan.compat.pytorch_fid: error: ")
        assert output.err.count("\n") == 1
        assert message in output.err


def test_what_is_refused(folders: list[str], network: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dims must be one of 64, 192, 768, 2048, got 100"):
        calculate_fid_given_paths(folders, 5, "cpu", 100)
    with pytest.raises(ValueError, match="paths must be two, got 1"):
        calculate_fid_given_paths(folders[:1], 5, "cpu", 64)
    np.savez(tmp_path / "a.npz", mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(ValueError, match=r"a\.npz must have 12 features a sample like .*, got 2"):
        calculate_fid_given_paths([folders[0], str(tmp_path / "a.npz")], 5, "cpu", 64)


def test_weights_are_not_downloaded(folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="the features 'inception' need"):
        calculate_fid_given_paths(folders, 5, "cpu", 2048)
