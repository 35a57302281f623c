"""Folders of image files: formats, colour modes, sizes, and hostile files."""

import io
import os
import struct
import threading
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lipgan.data.images import (
    MAX_PIXELS,
    ImageError,
    default_workers,
    find_images,
    image_batches,
    left_out_in_words,
    read_image,
)


def levels(height: int = 6, width: int = 5, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def png(width: int, height: int, pixels: bytes = b"") -> bytes:
    """A grey PNG that claims a size, whatever follows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".webp", ".PNG"])
def test_lossless_formats_keep_every_pixel(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"image{suffix}"
    Image.fromarray(levels()).save(path, lossless=True)
    image = read_image(path)
    assert image.dtype == torch.uint8
    assert np.array_equal(image.permute(1, 2, 0).numpy(), levels())


def test_jpeg(tmp_path: Path) -> None:
    Image.new("RGB", (8, 4), (200, 30, 90)).save(tmp_path / "a.jpg", quality=95)
    image = read_image(tmp_path / "a.jpg")
    assert image.shape == (3, 4, 8)
    assert (image.float().mean((1, 2)) - torch.tensor([200.0, 30.0, 90.0])).abs().max() < 4


def test_grey_and_one_bit_become_three_equal_channels(tmp_path: Path) -> None:
    grey = levels()[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey).convert("1").save(tmp_path / "bit.png")
    assert np.array_equal(read_image(tmp_path / "grey.png").numpy(), np.stack([grey] * 3))
    bits = read_image(tmp_path / "bit.png")
    assert torch.equal(bits[0], bits[2])
    assert set(bits.unique().tolist()) == {0, 255}


def test_transparency_is_dropped_and_palettes_are_looked_up(tmp_path: Path) -> None:
    Image.fromarray(levels(channels=4)).save(tmp_path / "rgba.png")
    assert np.array_equal(read_image(tmp_path / "rgba.png").permute(1, 2, 0).numpy(), levels(channels=4)[..., :3])
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([1, 0])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert read_image(tmp_path / "palette.png").permute(1, 2, 0).tolist() == [[[40, 50, 60], [10, 20, 30]]]


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    deep = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    expected = np.round(deep / 257).astype(np.uint8)
    assert np.array_equal(read_image(tmp_path / "deep.png")[0].numpy(), expected)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.array([[0.0, 0.5]], np.float32), "floating point, whose range is not known"),
        (np.array([[0, 65536]], np.int32), "must be from 0 to 65535, got 0 to 65536"),
        (np.array([[-1, 255]], np.int32), "must be from 0 to 65535, got -1 to 255"),
    ],
)
def test_levels_that_would_be_clipped_are_refused(rows: np.ndarray, message: str, tmp_path: Path) -> None:
    Image.fromarray(rows).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=rf"a\.tif cannot be used: its levels .*{message}"):
        read_image(tmp_path / "a.tif")


def test_size_scales_by_pillows_bicubic_filter(tmp_path: Path) -> None:
    Image.fromarray(levels(9, 7)).save(tmp_path / "a.png")
    expected = np.asarray(Image.fromarray(levels(9, 7)).resize((4, 4), Image.Resampling.BICUBIC))
    assert np.array_equal(read_image(tmp_path / "a.png", 4).permute(1, 2, 0).numpy(), expected)


def test_folders_are_searched_below_in_order(tmp_path: Path) -> None:
    for name in ("b/2.png", "a.JPG", "b/c/1.webp", ".hidden/x.png", "b/._2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "b" / "circle").symlink_to(tmp_path)
    found = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
    assert found == ["a.JPG", "b/2.png", "b/c/1.webp"]
    with pytest.raises(FileNotFoundError):
        find_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no image \(\.png"):
        find_images(tmp_path / "empty")


def test_batches_hold_every_image_once(tmp_path: Path) -> None:
    for i in range(5):
        Image.new("RGB", (3, 2), (i, i, i)).save(tmp_path / f"{i}.png")
    batches = list(image_batches(find_images(tmp_path), 2))
    assert [tuple(batch.shape) for batch in batches] == [(2, 3, 2, 3), (2, 3, 2, 3), (1, 3, 2, 3)]
    assert torch.cat(batches)[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("workers", [1, 3, 1000])
def test_workers_change_nothing(workers: int, tmp_path: Path) -> None:
    for i in range(17):
        # Large ones first, so that those behind them are read earlier.
        Image.new("RGB", (3, 2) if i else (900, 600), (i, 2 * i, 255 - i)).save(tmp_path / f"{i:02}.png")
    for i in (4, 11):
        (tmp_path / f"{i:02}.png").write_bytes(b"no image")
    paths = find_images(tmp_path)

    def read(workers: int) -> tuple[list[torch.Tensor], list[str]]:
        skipped: list[ImageError] = []
        batches = list(image_batches(paths, 4, 5, skip=skipped.append, workers=workers))
        return batches, list(map(str, skipped))

    for ours, theirs in zip(read(workers), read(0), strict=True):
        assert len(ours) == len(theirs)
        for x, y in zip(ours, theirs, strict=True):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    with pytest.raises(ImageError, match=r"04\.png"):
        list(image_batches(paths, 4, 5, workers=workers))
    batches = image_batches(paths[:4], 2, workers=workers)
    with pytest.raises(ValueError, match=r"01\.png has 3 x 2 pixels, images before it 900 x 600"):
        next(batches)


def test_workers_end_with_the_batches(tmp_path: Path) -> None:
    def readers() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("lipgan-images")]

    for i in range(9):
        Image.new("RGB", (3, 2)).save(tmp_path / f"{i}.png")
    batches = image_batches(find_images(tmp_path), 2, workers=2)
    next(batches)
    assert readers()
    batches.close()  # type: ignore[attr-defined]
    assert not readers()


def test_warnings_of_pillow_are_off_in_all_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(40):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{i}.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(list(image_batches(find_images(tmp_path), 4, workers=4))) == 10
        warnings.warn("of somebody else", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["of somebody else"]
    assert warnings.filters == before


def test_the_default_number_of_workers() -> None:
    assert 1 <= default_workers() <= 4


def test_images_of_two_sizes_need_a_size(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2)).save(tmp_path / "a.png")
    Image.new("RGB", (4, 2)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png has 4 x 2 pixels, images before it 3 x 2"):
        list(image_batches(find_images(tmp_path), 1))
    assert next(iter(image_batches(find_images(tmp_path), 2, 8))).shape == (2, 3, 8, 8)
    Image.new("RGB", (4, 2)).save(tmp_path / "c.png")
    batches = list(image_batches(find_images(tmp_path), 2, mixed=True))
    assert [tuple(batch.shape) for batch in batches] == [(1, 3, 2, 3), (2, 3, 2, 4)]


def whole_png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(levels(40, 40)).save(buffer, "PNG")
    return buffer.getvalue()


HOSTILE = {
    "empty": b"",
    "text": b"this is no image",
    "cut off": whole_png()[:1000],
    "damaged": whole_png()[:600] + b"\0" * 500 + whole_png()[1100:],
    "only a header": png(8, 8),
    "zero wide": png(0, 8),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
    "bmp header": b"BM" + b"\xff" * 60,
    "webp header": b"RIFF\xff\xff\xff\xffWEBPVP8 " + b"\0" * 40,
    "jpeg header": b"\xff\xd8\xff\xe0\0\x10JFIF\0" + b"\0" * 40,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_broken_files_are_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(HOSTILE[kind])
    with pytest.raises(ImageError, match=r"bad\.png cannot be used: ."):
        read_image(path)


@pytest.mark.parametrize("side", [8193, 20_000, 2**31 - 1])
def test_decompression_bombs_are_refused_by_their_header(side: int, tmp_path: Path) -> None:
    """The sides lie below Pillow's warning, between its warning and its error, and above both."""
    path = tmp_path / "bomb.png"
    path.write_bytes(png(side, max(8193, side)))
    with pytest.raises(ImageError, match=r"bomb\.png cannot be used: .*(pixels|bomb)"):
        read_image(path)


def test_the_limit_of_pixels_is_exact(tmp_path: Path) -> None:
    Image.new("L", (5, 4)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", max_pixels=20).shape == (3, 4, 5)
    with pytest.raises(ImageError, match="5 x 4 pixels are more than 19"):
        read_image(tmp_path / "a.png", max_pixels=19)
    assert MAX_PIXELS > 8192 * 8000


def test_text_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    data = b"zTXt-key\0\0" + zlib.compress(b"\0" * 2**26)
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    plain = png(2, 2, b"\0\1\2" * 2)
    (tmp_path / "a.png").write_bytes(plain[:33] + chunk + plain[33:])
    with pytest.raises(ImageError, match=r"a\.png"):
        read_image(tmp_path / "a.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "missing")
    for name, message in (("pipe", "regular"), ("folder", "regular"), ("link", "No such file")):
        with pytest.raises(ImageError, match=rf"{name}\.png cannot be used: .*{message}"):
            read_image(tmp_path / f"{name}.png")


def test_broken_files_are_skipped_on_request(tmp_path: Path) -> None:
    for name in ("a", "c", "e"):
        Image.new("RGB", (3, 2)).save(tmp_path / f"{name}.png")
    for name in ("b", "d"):
        (tmp_path / f"{name}.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"b\.png"):
        list(image_batches(find_images(tmp_path), 2))
    skipped: list[ImageError] = []
    batches = list(image_batches(find_images(tmp_path), 2, skip=skipped.append))
    assert [len(batch) for batch in batches] == [2, 1]
    assert [("b.png" in str(error), "d.png" in str(error)) for error in skipped] == [(True, False), (False, True)]


@pytest.mark.parametrize("suffix", [".tif", ".tiff", ".ppm", ".pgm"])
def test_what_pytorch_fid_and_clean_fid_read_is_found_and_read(suffix: str, tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (5, 6) if suffix == ".pgm" else (5, 6, 3), np.uint8)
    Image.fromarray(levels).save(tmp_path / f"a{suffix}")
    (path,) = find_images(tmp_path)
    read = read_image(path)
    assert read.shape == (3, 5, 6)
    assert read.permute(1, 2, 0).numpy().tolist() == np.broadcast_to(levels.reshape(5, 6, -1), (5, 6, 3)).tolist()


def test_files_of_other_kinds_are_counted(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for name in ("a.png", "b.gif", "below/c.GIF", "notes", "d.npy", ".hidden.gif"):
        (tmp_path / name).touch()
    left_out: Counter[str] = Counter()
    assert [path.name for path in find_images(tmp_path, left_out)] == ["a.png"]
    assert left_out == {".gif": 2, "": 1, ".npy": 1}
    assert left_out_in_words("x", left_out) == (
        "x: 4 files of other kinds left out (1 without a suffix, 2 .gif, 1 .npy)"
    )
