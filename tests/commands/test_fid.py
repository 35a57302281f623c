"""``lipgan fid``, from files to the printed number."""

import contextlib
import io
import json
import os
import shutil
import tarfile
import threading
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from processes import leave, run

from lipgan import data
from lipgan.__main__ import main
from lipgan.commands.names import Source
from lipgan.commands.sources import Reader
from lipgan.metrics import FeatureStats, features, frechet_distance


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders of 24 images of 9 x 8 pixels. Read only."""
    random = np.random.default_rng(0)
    made = []
    for name, brightness in (("real", 256), ("fake", 128)):
        folder = tmp_path_factory.mktemp(name)
        for i in range(24):
            below = folder / f"class {i % 2}"
            below.mkdir(exist_ok=True)
            Image.fromarray(random.integers(0, brightness, (8, 9, 3), dtype=np.uint8)).save(below / f"{i}.png")
        made.append(folder)
    return made[0], made[1]


def fid(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[float, str]:
    """What a run that succeeds prints: the number, and stderr."""
    capsys.readouterr()
    status = main(["fid", *map(str, arguments)])
    output = capsys.readouterr()
    assert status == 0, output.err
    assert output.out.startswith("FID:  ")
    assert output.out.count("\n") == 1
    return float(output.out.removeprefix("FID:  ")), output.err


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The single line of a run that does not."""
    capsys.readouterr()
    assert main(["fid", *map(str, arguments)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("lipgan: error: ")
    assert output.err.count("\n") == 1, output.err
    return output.err


def by_hand(*folders: Path, name: str = "random") -> float:
    """The distance of the images as pytorch-fid's formula has it."""
    stats = []
    for folder in folders:
        images = [np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))]
        x = features.get(name)(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)).double().numpy()
        stats += [x.mean(0), np.cov(x, rowvar=False)]
    return float(frechet_distance(*stats))


@pytest.mark.parametrize("name", ["random", "pixels"])
def test_folders(name: str, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    value, error = fid(capsys, *folders, "--features", name, "--batch-size", "7")
    assert value == pytest.approx(by_hand(*folders, name=name), rel=1e-5)
    assert value > 0.1
    lines = error.splitlines()
    assert len(lines) == 2
    for side, line, folder in zip("AB", lines, folders, strict=True):
        assert line == (
            f"lipgan: {side}: 24 samples, images {folder}, 9 x 8 pixels in RGB, features {name}, protocol pytorch-fid, "
            "covariance over n - 1"
        )


def test_a_folder_has_no_distance_to_itself(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    value, _ = fid(capsys, folders[0], folders[0], "--features", "random")
    assert value == pytest.approx(0, abs=1e-9)


def test_statistics_are_saved_and_used_in_place_of_the_images(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "real.npz"
    value, _ = fid(capsys, *folders, "--features", "random", "--save-stats", saved)
    again, error = fid(capsys, saved, folders[1], "--features", "random")
    assert again == pytest.approx(value, rel=1e-12)
    assert f"A: 24 samples, statistics {saved}, covariance over n - 1\n" in error
    assert fid(capsys, saved, saved)[0] == pytest.approx(0, abs=1e-9)


def test_statistics_of_other_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", mu=np.zeros(2), sigma=np.eye(2))
    np.savez(tmp_path / "b.npz", mu=np.ones(2), sigma=4 * np.eye(2))
    value, error = fid(capsys, tmp_path / "a.npz", tmp_path / "b.npz")
    assert value == pytest.approx(4)
    assert error.splitlines()[0].endswith(f"A: an unknown number of samples, statistics {tmp_path / 'a.npz'}")


def test_features_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(9000, 3)), random.normal(1, 2, size=(50, 3)).astype(np.float32)
    np.save(tmp_path / "x.npy", np.asfortranarray(x))
    np.save(tmp_path / "y.npy", y)
    expected = frechet_distance(x.mean(0), np.cov(x.T), y.mean(0, dtype=np.float64), np.cov(y.T.astype(np.float64)))
    value, _ = fid(capsys, tmp_path / "x.npy", tmp_path / "y.npy")
    assert value == pytest.approx(expected, rel=1e-9)


def test_a_data_set_is_read_as_its_images_would_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, sample in enumerate(data.load("digits", 8).samples):
        Image.fromarray(((sample[0] + 1) * 127.5).round().to(torch.uint8).numpy()).save(tmp_path / f"{i}.png")
    for name in ("pixels", "digits"):
        value, error = fid(capsys, "digits", tmp_path, "--features", name, "--size", "8")
        assert value == pytest.approx(0, abs=1e-5)
        assert "A: 1797 samples, data set digits, 8 x 8 pixels" in error


def test_size(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        Image.new("RGB", (20 + i, 30), (i, 40 * i, 9)).save(tmp_path / f"{i}.png")
    assert "scale them all" in refusal(capsys, folders[0], tmp_path, "--features", "random")
    _, error = fid(capsys, folders[0], tmp_path, "--features", "pixels", "--size", "4")
    assert error.count("4 x 4 pixels") == 2


def test_sides_of_two_sizes_are_pointed_out(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(3):
        Image.new("RGB", (20, 30), (i, 40 * i, 9)).save(tmp_path / f"{i}.png")
    _, error = fid(capsys, folders[0], tmp_path, "--features", "random")
    assert "the images of A and B differ in size; --size N" in error
    error = refusal(capsys, folders[0], tmp_path, "--features", "pixels")
    assert f"{tmp_path} has 1800 features a sample, {folders[0]} 216" in error


def test_inception_takes_images_of_several_sizes(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Means(features.InceptionFeatures):
        """The means of the channels, in the place of a network."""

        name, dim = "means", 3

        def __init__(self, **options: object) -> None:
            torch.nn.Module.__init__(self)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.double().mean((2, 3))

    monkeypatch.setattr(features, "EXTRACTORS", {**features.EXTRACTORS, "inception": Means})
    for i in range(5):
        Image.new("RGB", (9 + i // 2, 8), (i, 40 * i, 9 * i * i)).save(tmp_path / f"{i}.png")
    value, error = fid(capsys, folders[0], tmp_path, "--json", tmp_path / "out.json")
    rows = np.array([[i, 40 * i, 9 * i * i] for i in range(5)], float)
    images = [np.asarray(Image.open(path)).mean((0, 1)) for path in sorted(folders[0].rglob("*.png"))]
    expected = [f(np.array(x)) for x in (images, rows) for f in (lambda x: x.mean(0), lambda x: np.cov(x.T))]
    assert value == pytest.approx(frechet_distance(*expected), rel=1e-9)
    assert "B: 5 samples" in error
    assert "of several sizes in RGB, features means" in error
    assert json.loads((tmp_path / "out.json").read_text())["b"]["pixels"] is None


def test_json(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (9, 8)).save(tmp_path / "good.png")
    Image.new("RGB", (9, 8), (1, 2, 3)).save(tmp_path / "white.png")
    (tmp_path / "bad\n.png").write_bytes(b"no image")
    output = tmp_path / "result.json"
    value, error = fid(
        capsys, folders[0], tmp_path, "--features", "pixels", "--json", output, "--skip-broken", "--size", "8"
    )
    assert "lipgan: skipped: " in error
    assert len(error.splitlines()) == 3
    result = json.loads(output.read_text())
    assert result["fid"] == value
    assert 0 <= result["error_bound"] < 1e-6
    assert (result["dim"], result["size"], result["protocol"]) == (192, 8, "pytorch-fid")
    assert result["a"] == {
        "source": str(folders[0]),
        "kind": "images",
        "samples": 24,
        "pixels": [8, 8],
        "features": "pixels",
        "ddof": 1,
        "skipped": [],
    }
    assert result["b"]["samples"] == 2
    assert len(result["b"]["skipped"]) == 1


def test_a_broken_image_is_fatal_unless_skipped(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(3):
        Image.new("RGB", (9, 8), (i, 40 * i, 9)).save(tmp_path / f"{i}.png")
    alone, _ = fid(capsys, folders[0], tmp_path, "--features", "pixels")
    good = (tmp_path / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "pipe.png").mkdir()  # a folder by that name is a folder
    assert "cut.png cannot be used" in refusal(capsys, folders[0], tmp_path, "--features", "pixels")
    value, error = fid(capsys, folders[0], tmp_path, "--features", "pixels", "--skip-broken")
    assert value == alone
    assert f"lipgan: skipped: {tmp_path / 'cut.png'} cannot be used: " in error


def test_workers_change_nothing(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    outputs = [
        fid(capsys, *folders, "--features", "random", "--batch-size", 5, *workers)
        for workers in ((), ("--workers", 0), ("--workers", 3))
    ]
    assert outputs[0] == outputs[1] == outputs[2]


def test_nothing_usable(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no image" in refusal(capsys, folders[0], tmp_path, "--features", "pixels")
    (tmp_path / "bad.png").write_bytes(b"no image")
    capsys.readouterr()
    assert main(["fid", str(folders[0]), str(tmp_path), "--features", "pixels", "--skip-broken"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert f"{tmp_path} must have at least 2 samples that can be used, got 0" in lines[-1]


def bytes_of(array: object, pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(array), allow_pickle=pickle)
    return buffer.getvalue()


def archive(**arrays: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in arrays.items():
            file.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def npy_header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


OBJECTS = bytes_of(np.array([{}], dtype=object), pickle=True)
HOSTILE = {
    "empty.npy": (b"", "is no file of features"),
    "text.npy": (b"hello", "is no file of features"),
    "objects.npy": (OBJECTS, "is no file of features"),
    "archive.npy": (archive(mu=bytes_of([1.0])), "it is an archive under another name"),
    "cut.npy": (bytes_of(np.zeros((9, 9)))[:-1], "is no file of features"),
    "flat.npy": (bytes_of(np.zeros(9)), "must hold features of shape (n, d), got shape (9,)"),
    "whole numbers.npy": (bytes_of(np.zeros((9, 2), int)), "real floating-point dtype, got int64"),
    "nan.npy": (bytes_of(np.full((9, 2), np.nan)), "nan.npy is no file of features: features"),
    "one.npy": (bytes_of(np.zeros((1, 2))), "at least 2 samples that can be used, got 1"),
    "none.npy": (bytes_of(np.zeros((0, 2))), "got"),
    "long.npy": (bytes_of(np.zeros((2, 2**14 + 1))), "have length 16385, more than 16384"),
    "claims.npy": (npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': (9, 99999999999)}"), "is no file"),
    "negative.npy": (npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': (-3, 2)}"), "is no file"),
    "deep.npy": (npy_header("(" * 9000), "is no file of features"),
    "text.npz": (b"hello", "is no file of statistics, images or features"),
    "keys.npz": (archive(mean=bytes_of([1.0])), "it has no array 'mu'"),
    "objects.npz": (archive(mu=OBJECTS, sigma=OBJECTS), "is no file of feature statistics"),
    "shape.npz": (archive(mu=bytes_of(np.zeros(2)), sigma=bytes_of(np.eye(3))), "sigma must have shape (2, 2)"),
    "notes.txt": (b"hello", "notes.txt is not a folder of images"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = HOSTILE[name]
    (tmp_path / name).write_bytes(content)
    error = refusal(capsys, tmp_path / name, tmp_path / name)
    assert message in error
    assert name in error
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("features", ["random", "pixels", "digits"])
def test_vectors_have_no_features_of_images(features: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = refusal(capsys, "ring", "ring", "--features", features)
    assert f"ring holds vectors [2], of which the features {features} are not computed" in error


def test_files_of_other_kinds_are_told(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(folders[0], mixed)
    (mixed / "moving.gif").touch()
    assert main(["fid", str(mixed), str(folders[0]), "--features", "pixels"]) == 0
    assert f"skipped: {mixed}: 1 file of other kinds left out (1 .gif)" in capsys.readouterr().err


def test_no_name_is_no_data_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert "must not be empty, got ''" in refusal(capsys, "", "digits", "--features", "random")


def test_an_indefinite_covariance_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", mu=np.zeros(2), sigma=np.eye(2))
    np.savez(tmp_path / "b.npz", mu=np.zeros(2), sigma=np.diag([1.0, -1.0]))
    error = refusal(capsys, tmp_path / "a.npz", tmp_path / "b.npz")
    assert f"the covariance of {tmp_path / 'b.npz'} must be positive semi-definite" in error


def test_a_distance_beyond_float64_is_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", mu=np.zeros(2), sigma=np.eye(2))
    np.savez(tmp_path / "b.npz", mu=np.full(2, 1e300), sigma=np.eye(2))
    error = refusal(capsys, tmp_path / "a.npz", tmp_path / "b.npz", "--json", tmp_path / "c.json")
    assert f"features of {tmp_path / 'a.npz'} and {tmp_path / 'b.npz'} must be small enough for float64" in error
    assert not (tmp_path / "c.json").exists()


def test_nothing_is_written_over_what_is_read_or_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    statistics = tmp_path / "a.npz"
    np.savez(statistics, mu=np.zeros(2), sigma=np.eye(2))
    before = statistics.read_bytes()
    (tmp_path / "link.npz").symlink_to(statistics)
    for flag, output in (("--json", statistics), ("--save-stats", tmp_path / "link.npz")):
        error = refusal(capsys, statistics, statistics, flag, output)
        assert f"{flag} {output} would be written over a file that is read" in error
    same = tmp_path / "same"
    error = refusal(capsys, statistics, statistics, "--save-stats", same, "--json", same)
    assert f"--json {same} would be written over what --save-stats writes" in error
    assert statistics.read_bytes() == before
    assert not same.exists()


def test_what_can_be_refused_is_refused_before_reading(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(self: Reader, source: Source) -> None:
        raise AssertionError("something was read")

    monkeypatch.setattr(Reader, "read", read)
    a, b = folders
    for arguments, message in (
        ((a, "nowhere", "--features", "random"), "nowhere does not exist; it must be a folder of images"),
        ((a, "digit", "--features", "random"), "or a data set (chords, digits,"),
        ((a, b, "--features", "randon"), "unknown feature extractor 'randon'; did you mean random?"),
        ((a, b, "--features", "random", "--protocol", "torch-fid"), "unknown protocol 'torch-fid'; did you mean"),
        (
            (a, b, "--features", "random", "--download"),
            "--download is for features whose weights are not part of lipgan, got --features random",
        ),
        ((a, b, "--features", "random", "--json", tmp_path / "no" / "a.json"), "no is not a folder"),
        ((a, b, "--features", "random", "--save-stats", tmp_path / "no" / "a.npz"), "no is not a folder"),
        ((a, b, "--features", "random", "--device", "abacus"), "device 'abacus' cannot be used here"),
    ):
        assert message in refusal(capsys, *arguments)


def test_inception_is_the_default_and_says_what_it_lacks(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no cache"))
    error = refusal(capsys, *folders)
    assert error == refusal(capsys, *folders, "--features", "inception")
    for words in ("pt_inception-2015-12-05-6726825d.pth", "https://", "no cache", "--download", "random"):
        assert words in error
    (tmp_path / "weights.pth").write_bytes(b"something else")
    error = refusal(capsys, *folders, "--features", tmp_path / "weights.pth")
    assert "weights.pth is damaged or another file: it must have 95628359 bytes, got 14" in error
    assert not (tmp_path / "no cache").exists()


def test_inception_is_made_of_what_was_named(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def stand_in(**options: object) -> features.Pixels:
        calls.append(options)
        return features.Pixels()

    monkeypatch.setattr(features, "EXTRACTORS", {**features.EXTRACTORS, "inception": stand_in})
    weights = tmp_path / "weights.pth"
    weights.touch()
    for arguments, options in (
        ((), {"download": False, "preprocessing": "pytorch"}),
        (("--features", "inception", "--download"), {"download": True, "preprocessing": "pytorch"}),
        (("--features", weights), {"weights": str(weights), "preprocessing": "pytorch"}),
        (("--protocol", "torchmetrics"), {"download": False, "preprocessing": "torchmetrics"}),
        (("--protocol", "clean"), {"download": False, "preprocessing": "clean"}),
    ):
        fid(capsys, *folders, *arguments)
        assert calls.pop() == options
        assert not calls
    np.savez(tmp_path / "a.npz", mu=np.zeros(216), sigma=np.eye(216))
    fid(capsys, tmp_path / "a.npz", tmp_path / "a.npz")
    assert not calls, "statistics need no extractor"


def test_ctrl_c_leaves_nothing_half_written(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FeatureStats, "update", interrupted)
    outputs = ("--json", str(tmp_path / "a.json"), "--save-stats", str(tmp_path / "a.npz"))
    assert main(["fid", *map(str, folders), "--features", "random", *outputs]) == 130
    assert capsys.readouterr().err == "lipgan: stopped\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--json", "--save-stats"])
def test_a_destination_that_cannot_be_written_is_refused_before_reading(
    flag: str,
    folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def read(self: Reader, source: Source) -> None:
        raise AssertionError("something was read")

    monkeypatch.setattr(Reader, "read", read)
    error = refusal(capsys, *folders, "--features", "random", flag, tmp_path)
    assert f"{tmp_path} cannot be written: it is a folder" in error


def test_results_go_through_pipes_and_links(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link.npz"
    os.mkfifo(pipe)
    link.symlink_to("stats.npz")
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()), daemon=True)
    reader.start()
    value, _ = fid(capsys, *folders, "--features", "pixels", "--json", pipe, "--save-stats", link)
    reader.join(20)
    assert json.loads(received[0])["fid"] == value
    assert link.is_symlink()
    assert FeatureStats.load(tmp_path / "stats.npz").count == 24


# ---- files of other programs ----


def levels_of(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))])


def write_zip(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def zip_of(folder: Path, path: Path, compression: int = zipfile.ZIP_STORED, **others: bytes) -> Path:
    """The images of a folder as a data set of StyleGAN."""
    images = {f"00000/img{i:08}.png": file.read_bytes() for i, file in enumerate(sorted(folder.rglob("*.png")))}
    return write_zip(path, {**images, **others}, compression)


@pytest.mark.parametrize("keys", [("mean", "cov"), ("mu_clean", "sigma_clean")])
def test_statistics_by_other_names(keys: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(
        tmp_path / "a.npz", **{keys[0]: np.zeros(2), keys[1]: np.eye(2), "arr_0": np.zeros((1, 4, 4, 3), np.uint8)}
    )
    np.savez(tmp_path / "b.npz", **{"mu": np.ones(2), "sigma": 4 * np.eye(2), keys[0]: np.zeros(9), keys[1]: np.eye(9)})
    value, error = fid(capsys, tmp_path / "a.npz", tmp_path / "b.npz")
    assert value == pytest.approx(4)
    assert f"statistics {tmp_path / 'a.npz'}" in error
    np.savez(tmp_path / "c.npz", **{keys[0]: np.zeros(2), keys[1]: np.eye(3)})
    assert f"{keys[1]} must have shape (2, 2)" in refusal(capsys, tmp_path / "c.npz", tmp_path / "b.npz")


@pytest.mark.parametrize("layout", ["npz", "compressed", "by columns", "channels first", "npy", "npy channels first"])
@pytest.mark.parametrize("size", [None, 5])
def test_arrays_of_images(
    layout: str, size: int | None, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = levels_of(folders[0])
    if "first" in layout:
        images = images.transpose(0, 3, 1, 2)
    if layout.startswith("npy"):
        path = tmp_path / "images.npy"
        np.save(path, images)
    else:
        path = tmp_path / "images.npz"
        arrays = {"arr_0": np.asfortranarray(images) if layout == "by columns" else images, "arr_1": np.arange(24)}
        (np.savez_compressed if layout == "compressed" else np.savez)(path, **arrays)
    options = ("--features", "random", "--batch-size", "7", *(() if size is None else ("--size", size)))
    expected, _ = fid(capsys, *folders, *options)
    value, error = fid(capsys, path, folders[1], *options)
    assert value == pytest.approx(expected, rel=1e-9)
    pixels = "9 x 8" if size is None else "5 x 5"
    assert f"A: 24 samples, image array {path}, {pixels} pixels in RGB, features random" in error


def test_arrays_of_images_are_read_in_parts(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = levels_of(folders[0])
    np.savez(tmp_path / "a.npz", images=images)
    np.savez(tmp_path / "b.npz", images=np.asfortranarray(images))
    np.save(tmp_path / "c.npy", images)
    monkeypatch.setattr("lipgan.data.image_arrays._NUMBERS", 5 * 9 * 8 * 3)
    read = []
    taken = Reader._add

    def add(self: Reader, source: Source, stats: FeatureStats | None, rows: torch.Tensor) -> FeatureStats:
        read.append(len(rows))
        return taken(self, source, stats, rows)

    monkeypatch.setattr(Reader, "_add", add)
    for name in ("a.npz", "b.npz", "c.npy"):
        read.clear()
        assert fid(capsys, tmp_path / name, tmp_path / name, "--features", "pixels")[0] == pytest.approx(0, abs=1e-9)
        assert read == 2 * [5, 5, 5, 5, 4]


def test_features_in_an_npz_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    for key in ("pool_3", "arr_0", "features"):
        np.savez(tmp_path / f"{key}.npz", **{key: x})
        assert fid(capsys, tmp_path / f"{key}.npz", tmp_path / "x.npy")[0] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("workers", [0, 3])
def test_an_archive_of_images(
    compression: int, workers: int, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = {
        "dataset.json": b'{"labels": null}',
        "00000/.hidden.png": b"",
        "__MACOSX/00000/._img.png": b"",
        "b.gif": b"",
    }
    path = zip_of(folders[0], tmp_path / "real.zip", compression, **others)
    options = ("--features", "random", "--workers", workers)
    expected, _ = fid(capsys, *folders, *options)
    value, error = fid(capsys, path, folders[1], *options)
    assert value == pytest.approx(expected, rel=1e-9)
    assert f"A: 24 samples, image archive {path}, 9 x 8 pixels" in error
    assert f"skipped: {path}: 2 files of other kinds left out (1 .gif, 1 .json)\n" in error
    assert [entry.name for entry in tmp_path.iterdir()] == ["real.zip"], "something was unpacked"


@pytest.mark.parametrize("name", ["../a.png", "a/../../b.png", "/etc/a.png", "..\\a.png", "C:/a.png", "C:\\a.png"])
def test_an_archive_that_leads_out_of_itself(
    name: str, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = zip_of(folders[0], tmp_path / "real.zip", **{name: b"x"})
    error = refusal(capsys, path, folders[1], "--features", "pixels")
    assert f"{path} is no archive of images: " in error
    assert "leads out of it" in error


def bomb() -> bytes:
    """A PNG of few bytes that claims 10,000 x 10,000 pixels."""
    header = b"IHDR" + (10000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    chunks = [header, b"IDAT" + zlib.compress(b""), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") for chunk in chunks
    )


def test_broken_and_huge_images_in_an_archive(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lipgan.data.image_archives.MAX_BYTES", 2**20)
    bad = {
        "a.png": (b"no image", "not a PNG"),
        "b.png": (bomb(), "10000 x 10000 pixels are more than"),
        "c.png": (bytes(2**21), "unpacks to 2097152 bytes, more than 1048576"),
    }
    for name, (content, message) in bad.items():
        path = zip_of(folders[0], tmp_path / "real.zip", zipfile.ZIP_DEFLATED, **{name: content})
        error = refusal(capsys, path, folders[1], "--features", "pixels")
        assert f"{path}/{name} cannot be used: " in error
        assert message in error
    path = zip_of(folders[0], tmp_path / "real.zip", zipfile.ZIP_DEFLATED, **{k: v for k, (v, _) in bad.items()})
    value, error = fid(capsys, path, folders[1], "--features", "pixels", "--skip-broken")
    assert value == pytest.approx(fid(capsys, *folders, "--features", "pixels")[0], rel=1e-9)
    assert error.count("skipped: ") == 3
    other = zip_of(folders[0], tmp_path / "other.zip", zipfile.ZIP_BZIP2)
    assert "compressed by another method than deflate" in refusal(capsys, other, folders[1], "--features", "pixels")


def damaged(folder: Path, path: Path) -> bytes:
    content = bytearray(zip_of(folder, path).read_bytes())
    content[300] ^= 255
    return bytes(content)


def test_archives_that_are_none(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = zip_of(folders[0], tmp_path / "whole.zip").read_bytes()
    encrypted = bytearray(whole)
    at = whole.index(b"PK\x01\x02")
    encrypted[at + 8] |= 1
    encrypted[6] |= 1
    cases = {
        "text": (b"hello", "is no archive of images: it is not a zip archive, or was cut off"),
        "cut": (whole[:-30], "is no archive of images: it is not a zip archive"),
        "empty": (write_zip(tmp_path / "a.zip", {}).read_bytes(), "holds no image (.png"),
        "other": (write_zip(tmp_path / "a.zip", {"a.txt": b""}).read_bytes(), "holds no image (.png"),
        "damaged": (damaged(folders[0], tmp_path / "a.zip"), "cannot be used: "),
        "encrypted": (bytes(encrypted), "cannot be used: it is encrypted"),
    }
    path = tmp_path / "bad.zip"
    for content, message in cases.values():
        path.write_bytes(content)
        error = refusal(capsys, path, folders[1], "--features", "pixels")
        assert str(path) in error
        assert message in error


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.zeros((4, 8, 8, 3), np.float32),
            "images must be uint8, levels from 0 to 255, got float32 of shape [4, 8, 8, 3]",
        ),
        (np.zeros((4, 8, 8, 4), np.uint8), "no axis has 1 or 3 channels"),
        (np.zeros((4, 3, 8, 3), np.uint8), "it cannot be told which axis is of channels"),
        (np.zeros((4, 8), np.uint8), "images must be [n, h, w], [n, h, w, c] or [n, c, h, w], got shape [4, 8]"),
        (np.zeros((4, 0, 8), np.uint8), "got shape [4, 0, 8]"),
        (np.zeros((1, 8, 8), np.uint8), "must have at least 2 samples that can be used, got 1"),
        (np.zeros((0, 8, 8), np.uint8), "must have at least 2 samples that can be used, got 0"),
    ],
)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_arrays_that_are_no_images(
    array: np.ndarray, message: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"a.{suffix}"
    np.save(path, array) if suffix == "npy" else np.savez(path, array)
    error = refusal(capsys, path, path, "--features", "pixels")
    assert message in error
    assert str(path) in error


def test_a_row_of_an_archive_that_is_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytes_of(np.zeros((4, 8, 8), np.uint8))
    for array, message in ((content[:-1], "is cut off"), (content[:100], "damaged"), (OBJECTS, "not unpickled")):
        (tmp_path / "a.npz").write_bytes(archive(arr_0=array))
        error = refusal(capsys, tmp_path / "a.npz", "digits", "--features", "pixels")
        assert "a.npz" in error
        assert message in error
    np.savez_compressed(tmp_path / "a.npz", arr_0=np.random.default_rng(0).integers(0, 256, (4000, 8, 8), np.uint8))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[100_000] ^= 255
    (tmp_path / "a.npz").write_bytes(content)
    assert "a.npz holds no images that can be used: " in refusal(
        capsys, tmp_path / "a.npz", "digits", "--features", "pixels"
    )


# --- several processes


def _process(rank: int, folder: Path, sources: dict[str, list[str]]) -> None:
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    said = {}
    for name, arguments in sources.items():
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            status = main(arguments)
        said[name] = [status, out.getvalue(), err.getvalue()]
    (folder / f"{rank}.json").write_text(json.dumps(said))
    leave()


@pytest.mark.slow
def test_two_processes_print_once_what_one_prints(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    array, rows, broken, wide = (tmp_path / name for name in ("images.npy", "rows.npy", "broken", "wide"))
    random = np.random.default_rng(1)
    np.save(array, random.integers(0, 256, (7, 8, 9, 3), dtype=np.uint8))
    np.save(rows, random.normal(size=(9, 192)))
    for folder in (broken, wide):
        shutil.copytree(folders[0], folder)
    second = sorted(broken.rglob("*.png"))[1]  # of the second process
    second.write_bytes(b"no image")
    Image.new("RGB", (4, 4)).save(sorted(wide.rglob("*.png"))[1])
    (broken / "notes.txt").write_text("")
    pixels = ["--features", "pixels"]
    real, fake = map(str, folders)
    stats, result = tmp_path / "stats.npz", tmp_path / "result.json"
    good = {
        "folders": ["fid", real, fake, "--features", "random", "--save-stats", str(stats), "--json", str(result)],
        "array and data set": ["fid", str(array), "digits", *pixels, "--size", "8"],
        "rows and statistics": ["fid", str(rows), str(tmp_path / "before.npz")],
        "broken": ["fid", str(broken), fake, *pixels, "--skip-broken"],
    }
    bad = {
        "a broken file": (["fid", str(broken), fake, *pixels], f"{second} cannot be used"),
        "sizes": (["fid", str(wide), fake, *pixels], "images before it"),
        "a name": (["fid", real, "nothing", *pixels], "nothing"),
        "download": (["fid", real, fake, "--download"], "--download is for one process"),
        "eval": (["eval", real], "lipgan eval is for one process"),
    }
    FeatureStats(192).update(random.normal(size=(300, 192))).save(tmp_path / "before.npz")
    alone = {name: fid(capsys, *arguments[1:]) for name, arguments in good.items()}
    kept = FeatureStats.load(stats)
    stats.unlink()
    result.unlink()
    run(_process, tmp_path, good | {name: arguments for name, (arguments, _) in bad.items()})
    first, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for name, (number, words) in alone.items():
        status, out, err = first[name]
        assert (status, out.count("FID:  ")) == (0, 1), (name, err)
        assert float(out.removeprefix("FID:  ")) == pytest.approx(number, rel=1e-8), name
        assert sorted(err.splitlines()) == sorted(words.splitlines()), name
        assert other[name] == [0, "", ""], name
    assert json.loads(result.read_text())["a"]["samples"] == 24
    merged = FeatureStats.load(stats)
    assert merged.count == kept.count
    torch.testing.assert_close(merged.cov, kept.cov, rtol=1e-12, atol=1e-12 * float(kept.cov.abs().max()))
    for name, (_, sentence) in bad.items():
        assert (first[name][0], other[name][0]) == (2, 2), name
        told = [words for _, out, words in (first[name], other[name]) if words]
        assert len(told) == 1, (name, told)
        assert told[0].startswith("lipgan: error: "), name
        assert sentence in told[0], name


def test_shards_are_read_as_the_folder_is(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = sorted(folders[0].rglob("*.png"))
    for k in range(2):
        with tarfile.open(tmp_path / f"s{k}.tar", "w") as file:
            for path in paths[k::2]:
                file.add(path, path.name)
            file.add(__file__, "notes.txt")
    expected = by_hand(*folders)
    value, error = fid(capsys, tmp_path / "s{0..1}.tar", folders[1], "--features", "random")
    assert value == pytest.approx(expected, rel=1e-5)
    assert f"skipped: {tmp_path / 's{0..1}.tar'}: 2 files of other kinds left out (2 .txt)" in error
    assert f"A: 24 samples, image shards {tmp_path / 's{0..1}.tar'}, 9 x 8 pixels" in error
    broken = tmp_path / "s1.tar"
    broken.write_bytes(broken.read_bytes()[:3000])
    error = refusal(capsys, tmp_path / "s{0..1}.tar", folders[1], "--features", "random")
    assert f"{broken} is no archive of images: " in error
    assert "s2.tar does not exist; it must be a folder of images" in refusal(
        capsys, tmp_path / "s{0..2}.tar", folders[1]
    )


def test_a_folder_of_other_files_says_of_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    for name in ("0.tar", "1.tar", "README"):
        (tmp_path / "a" / name).write_bytes(b"")
    assert "but 1 without a suffix, 2 .tar" in refusal(capsys, tmp_path / "a", "digits", "--features", "random")
