"""Tar archives and parquet tables of images: what is read, and what is refused of hostile files."""

import io
import sys
import tarfile
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from peers import peer
from PIL import Image

from lipgan import data
from lipgan._files import expand_braces
from lipgan.data.image_shards import sharded_images
from lipgan.data.image_tables import TableImages
from lipgan.data.images import read_image


def image(seed: int, kind: str = "PNG", side: int = 8) -> bytes:
    levels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, kind)
    return buffer.getvalue()


def member(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def write(path: Path, *members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.PAX_FORMAT) -> str:
    with tarfile.open(path, "w", format=format) as file:
        for info, content in members:
            file.addfile(info, io.BytesIO(content))
    return str(path)


# ---- what is read ----


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_the_files(format: int, tmp_path: Path) -> None:
    folder = "f" * 40
    # Longer than a header has room for, but for ustar, which splits it at the folder.
    name = f"{folder}/{'n' * 90}.webp"
    kinds = {"0001.png": "PNG", "0002.JPG": "JPEG", name: "WEBP", "a/0003.ppm": "PPM", "0004.tiff": "TIFF"}
    path = write(
        tmp_path / "a.tar",
        member("a", type=tarfile.DIRTYPE),
        *(member(name, image(k, kind)) for k, (name, kind) in enumerate(kinds.items())),
        format=format,
    )
    found = sharded_images(path)
    assert [str(part) for part in found] == [f"{path}/{name}" for name in kinds]
    for k, (part, kind) in enumerate(zip(found, kinds.values(), strict=True)):
        expected = np.asarray(Image.open(io.BytesIO(image(k, kind))))
        assert np.array_equal(read_image(part).permute(1, 2, 0).numpy(force=True), expected)


def test_what_a_sample_has_beside_its_image_is_left_out(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.tar",
        member("0001.jpg", image(0, "JPEG")),
        member("0001.json", b"{}"),
        member("0001.mask.png", image(1)),
        member("0001.cls", b"7"),
        member("b/0001.left.png", image(2)),
        member("b/0001.right.png", image(3)),
        member("link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("hard.png", type=tarfile.LNKTYPE, linkname="0001.jpg"),
        member("null.png", type=tarfile.CHRTYPE),
        member(".hidden.png", image(4)),
        member("__MACOSX/x.png", image(4)),
    )
    left_out: Counter[str] = Counter()
    assert [part.name for part in sharded_images(path, left_out)] == ["0001.jpg", "b/0001.left.png", "b/0001.right.png"]
    assert left_out == {".json": 1, ".cls": 1, ".mask.png": 1, "linked": 3}


def test_shards_follow_one_another(tmp_path: Path) -> None:
    for k in range(11):
        write(tmp_path / f"s-{k:02d}.tar", member("0.png", image(k)), member("1.png", image(100 + k)))
    pattern = str(tmp_path / "s-{00..10}.tar")
    dataset = data.load(pattern)
    assert dataset.name == pattern
    assert dataset.labels is None
    expected = [torch.from_numpy(np.array(Image.open(io.BytesIO(image(k))))) for k in (0, 100, 1, 101)]
    assert torch.equal(dataset.samples[:4].cpu(), torch.stack(expected).permute(0, 3, 1, 2) / 127.5 - 1)
    assert len(dataset) == 22
    (tmp_path / "s-07.tar").unlink()
    with pytest.raises(FileNotFoundError) as error:
        data.load(pattern)
    assert error.value.filename == str(tmp_path / "s-07.tar")


def test_braces() -> None:
    assert expand_braces("a.tar") == ["a.tar"]
    assert expand_braces("a-{8..11}.tar") == ["a-8.tar", "a-9.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{x,y}-{007..008}") == ["x-007", "x-008", "y-007", "y-008"]
    for bad in ("{}", "{3..1}.tar"):
        with pytest.raises(ValueError, match="stands for no file"):
            expand_braces(bad)
    with pytest.raises(ValueError, match="more than 100000 files"):
        expand_braces("{0..9999}-{0..9999}.tar")


# ---- what is refused ----


def damaged(tmp_path: Path, change: Any, *members: tuple[tarfile.TarInfo, bytes]) -> str:
    path = write(tmp_path / "a.tar", *(members or (member("0.png", image(0)), member("1.png", image(1)))))
    content = bytearray(Path(path).read_bytes())
    Path(path).write_bytes(bytes(change(content)))
    return path


def with_size(size: bytes) -> Any:
    """Write another size into the first header, with the checksum that it then has."""

    def change(content: bytearray) -> bytearray:
        content[124:136] = size
        content[148:156] = b" " * 8
        content[148:156] = b"%06o\0 " % sum(content[:512])
        return content

    return change


def overwrite(begin: int, bytes_: bytes) -> Any:
    def change(content: bytearray) -> bytearray:
        content[begin : begin + len(bytes_)] = bytes_
        return content

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: b"", "a.tar is no archive of images: empty file"),
        (lambda content: b"x" * 2000, "a.tar is no archive of images: "),
        (lambda content: content[:300], "a.tar is no archive of images: "),
        (lambda content: content[:700], r"it was cut off: 0\.png has \d+ bytes by its header"),
        (lambda content: content[:1100], "a.tar is no archive of images: "),
        (lambda content: b"\x1f\x8b" + content, "compressed by gzip: unpack it"),
        (lambda content: b"\x28\xb5\x2f\xfd" + content, "compressed by zstd: unpack it"),
        # Eight terabytes, by octal digits; 2^80, and less than nothing, in base 256.
        (with_size(b"77777777777\0"), r"it was cut off: 0\.png has 8589934591 bytes by its header"),
        (with_size(b"\x80" + b"\0" + b"\x01" + b"\0" * 9), r"it was cut off: 0\.png has \d{22} bytes by its header"),
        (with_size(b"\xff" * 10 + b"\xfc\x00"), r"a\.tar is no archive of images: "),
        # The second header: tarfile takes it for the end.
        (overwrite(1024, b"garbage"), r"it is damaged behind 0\.png"),
    ],
)
def test_damaged_archives_are_one_sentence(change: Any, message: str, tmp_path: Path) -> None:
    path = damaged(tmp_path, change)
    with pytest.raises(ValueError, match=message) as error:
        sharded_images(path)
    assert str(error.value).startswith(path)
    assert "\n" not in str(error.value)


def test_hostile_members_are_one_sentence(tmp_path: Path) -> None:
    for members, message in (
        ([member("../0.png", image(0))], r"\.\./0\.png leads out of it"),
        ([member("/etc/0.png", image(0))], "leads out of it"),
        ([member("0.png", image(0)), member("0.png", image(1))], r"it has 0\.png twice"),
        ([member("0.png", image(0)), member("0.jpg", image(1))], r"the sample 0 has two images, 0\.png and 0\.jpg"),
        ([member("0.txt", b"x")], r"a\.tar holds no image \(\.png"),
        ([], r"a\.tar holds no image"),
        # A header that is longer than any: it would be read into memory.
        ([member("x" * 2**21 + ".png", image(0))], r"a header in it has \d+ bytes"),
        ([member("0.png", image(0), pax_headers={"size": "-5"})], "damaged|no archive of images"),
    ):
        path = write(tmp_path / "a.tar", *members)
        with pytest.raises(ValueError, match=message):
            sharded_images(path)


def test_members_that_are_no_images_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.tar", member("0.png", b"hello"), member("1.png", image(0)[:60]), member("2.png"))
    found = sharded_images(path)
    for part in found:
        with pytest.raises(ValueError, match=rf"a\.tar/{part.name} cannot be used: "):
            read_image(part)
    monkeypatch.setattr("lipgan.data.image_shards.MAX_BYTES", 4)
    with pytest.raises(ValueError, match=r"0\.png cannot be used: it has 5 bytes, more than 4"):
        read_image(found[0])
    Path(path).write_bytes(Path(path).read_bytes()[:600])
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"1\.png cannot be used: the archive was cut off meanwhile"):
        read_image(found[1])


# ---- tables ----


def stored(path: Path, columns: dict[str, Any], **options: Any) -> str:
    arrow, parquet = peer("pyarrow"), peer("pyarrow.parquet")
    parquet.write_table(arrow.table(columns), path, **options)
    return str(path)


def test_tables_of_structs_and_of_bytes(tmp_path: Path) -> None:
    images = [image(k) for k in range(37)]
    structs = [{"bytes": content, "path": "../x.png"} for content in images]
    paths = [
        stored(tmp_path / "a.parquet", {"label": list(range(37)), "image": structs}, row_group_size=10),
        stored(tmp_path / "b.parquet", {"picture": images, "text": ["x"] * 37}),
        stored(tmp_path / "c.parquet", {"mask": images[::-1], "img": images}),
    ]
    for path in paths:
        table = TableImages(path)
        assert len(table) == 37
        for _ in range(2):
            assert [read_image(cell)[0, 0, 0].item() for cell in table] == [
                np.asarray(Image.open(io.BytesIO(content)))[0, 0, 0] for content in images
            ]
        assert str(list(table)[20]) == f"{path}, row 20"
    together = data.load(str(tmp_path / "{a,b}.parquet"))
    assert len(together) == 74
    assert torch.equal(together.samples[:37], data.load(paths[1]).samples)


def all_of(path: str) -> list[torch.Tensor]:
    return [read_image(cell) for cell in TableImages(path)]


def test_tables_that_are_refused(tmp_path: Path) -> None:
    for columns, message in (
        ({"text": ["x"]}, r"no column of bytes that may be images: text \(string\)"),
        ({"a": [b"x"], "b": [b"y"]}, r"several columns of bytes that may be images: a \(binary\), b \(binary\)"),
        ({"image": [{"path": "x.png"}]}, "no column of bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            TableImages(stored(tmp_path / "a.parquet", columns))
    path = stored(
        tmp_path / "a.parquet", {"image": [{"bytes": None, "path": "/etc/passwd"}, {"bytes": b"x", "path": ""}]}
    )
    for cell, problem in zip(TableImages(path), ("it holds no bytes", "not a PNG"), strict=True):
        with pytest.raises(ValueError, match=rf"a\.parquet, row \d cannot be used: {problem}"):
            read_image(cell)
    whole = Path(stored(tmp_path / "a.parquet", {"image": [image(0)] * 9})).read_bytes()
    for content in (b"", b"hello", whole[:-9], whole[: len(whole) // 2], whole[:90] + b"\xff" * 40 + whole[130:]):
        (tmp_path / "a.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.parquet(, row \d)? (is no table|cannot be used)") as error:
            all_of(path)
        assert "\n" not in str(error.value)


def test_without_pyarrow_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"^a\.parquet needs the package pyarrow: pip install pyarrow \("):
        TableImages("a.parquet")


def test_a_data_set_that_the_package_has_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a package that has what is used of datasets: load_from_disk, and rows with features."""

    class Rows(list[Any]):
        features = {"img": type("Image", (), {})(), "label": type("ClassLabel", (), {})()}  # noqa: RUF012

    rows = Rows({"img": Image.open(io.BytesIO(image(k))), "label": k} for k in range(3))
    module: Any = ModuleType("datasets")
    module.config = type("config", (), {"HF_HUB_OFFLINE": False})
    module.load_dataset = lambda which, **options: pytest.fail("asked the hub")
    module.load_from_disk = lambda which: {"train": rows, "test": rows[:1]} if "dict" in which else rows
    monkeypatch.setitem(sys.modules, "datasets", module)
    for name, file in (("one", "state.json"), ("dict", "dataset_dict.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
        dataset = data.load(f"huggingface:{tmp_path / name}")
        assert dataset.samples.shape == (3, 3, 8, 8)
        assert dataset.labels is not None
        assert dataset.labels.tolist() == [0, 1, 2]
