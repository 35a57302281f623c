"""lipgan.data: the built-in data sets, one's own files, those of other packages, and the order of the batches."""

import io
import math
import os
import pickle
import re
import struct
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torch.nn import functional as F

from lipgan import data
from lipgan.data import BatchOrder, Dataset, files
from lipgan.data.chords import CHORDS, _grammar, entropy, legal, log_likelihood, midi
from lipgan.data.sentences import counted, cut, ink
from lipgan.metrics import mode_coverage, wasserstein_distance

TOY = ["grid", "ring", "segments", "swiss-roll", "two-gaussians"]


pytestmark = pytest.mark.usefixtures("single_thread")


# --- sentences


def test_sentences_say_what_the_images_show() -> None:
    dataset = data.load("sentences")
    assert dataset.samples.shape == (3600, 1, 24, 24)
    assert dataset.captions is not None
    assert dataset.captions[7] == "one thin seven"
    assert dataset.captions[20 + 10 + 6] == "two thick sixes"
    assert len(set(dataset.captions)) == 60
    ink = ((dataset.samples + 1) / 2).squeeze(1)
    # Of all images of a sentence: [count, stroke, digit, h, w].
    mean = torch.stack([ink[dataset.labels == label].mean(0) for label in range(60)]).view(3, 2, 10, 24, 24)
    total = mean.sum((3, 4))
    assert (total[:, 1] > 1.5 * total[:, 0]).all(), "thick ones have more ink than thin ones"
    for count in (1, 2):
        torch.testing.assert_close(total[count], (count + 1) * total[0], rtol=0.15, atol=0)
    # One digit fills the middle third, two the middle two thirds, three all of the width; half of the height.
    assert mean[0, ..., :8].max() == mean[0, ..., 16:].max() == 0
    assert mean[1, ..., :4].max() == mean[1, ..., 20:].max() == 0
    assert mean[..., :6, :].max() == mean[..., 18:, :].max() == 0
    # The digit in the middle looks like its class: nearer to the mean of that than to others.
    digits = data.load("digits", 24)
    alike = torch.stack([digits.samples[digits.labels == k].mean(0) for k in range(10)])
    shape = F.interpolate(alike, (12, 8), mode="area").flatten(1)
    middle = mean[0, :, :, 6:18, 8:16].flatten(2)
    correlation = torch.corrcoef(torch.cat([shape, middle[0], middle[1]]))
    assert torch.equal(correlation[10:20, :10].argmax(1), torch.arange(10))
    assert torch.equal(correlation[20:, :10].argmax(1), torch.arange(10))


@pytest.mark.parametrize("size", [24, 32])
def test_digits_of_sentences_are_counted_and_cut_out(size: int) -> None:
    dataset = data.load("sentences", size)
    assert dataset.labels is not None
    images, labels = dataset.samples[::7], dataset.labels[::7]
    assert float((counted(images) == labels // 20 + 1).float().mean()) > 0.995
    assert counted(torch.full((1, 1, size, size), -1.0)).tolist() == [1]
    digits, owners = cut(images, labels)
    assert digits.shape[1:] == (1, size // 2, size // 3)
    assert torch.equal(owners.bincount(), labels // 20 + 1)
    # All that is drawn has been cut out, and nothing twice.
    torch.testing.assert_close(torch.zeros(len(images)).index_add(0, owners, ink(digits)), ink(images))


def test_captions_are_one_for_each_class() -> None:
    samples, labels = torch.zeros(4, 2), torch.tensor([0, 1, 2, 0])
    named = Dataset("x", samples, labels, captions=("a", "b", "c"))
    assert named.digest != Dataset("x", samples, labels, captions=("a", "b", "d")).digest
    with pytest.raises(ValueError, match="captions must be one for each of the 3 classes of 'x', got 2"):
        Dataset("x", samples, labels, captions=("a", "b"))
    with pytest.raises(ValueError, match="size of sentences must be a multiple of 4 from 16 to 128, got 12"):
        data.load("sentences", 12)


# --- chords


def test_chords_follow_the_grammar_and_its_entropy() -> None:
    phrases = data.load("chords").samples
    assert phrases.shape == (10000, 16, 11)
    assert legal(phrases).all()
    names = list(CHORDS)
    assert (phrases[:, -1].argmax(1) == names.index("I")).all()
    nll = -log_likelihood(phrases, slip=0)
    # Within four standard errors.
    assert float(nll.mean()) == pytest.approx(entropy(), abs=4 * float(nll.std()) / 100)
    # After a six-four chord only a dominant, each as often as the other where the end is far.
    chords = phrases.argmax(2)
    before, after = chords[:, :8].flatten(), chords[:, 1:9].flatten()
    shares = after[before == names.index("I64")].bincount(minlength=11) / (before == names.index("I64")).sum()
    assert shares[[names.index("V"), names.index("V7")]].tolist() == pytest.approx([0.5, 0.5], abs=0.05)


def test_the_probabilities_of_all_phrases_add_up() -> None:
    """By phrases of the grammar, of which the mean of 1 / p is the number of those that are allowed."""
    phrases = data.load("chords").samples
    allowed = (torch.stack([step > 0 for step in _grammar()[1]])).double()
    count = (_grammar()[0] > 0).double()
    for step in allowed:
        count = count @ step
    found = (-log_likelihood(phrases, slip=0)).exp()
    assert float(found.mean()) == pytest.approx(float(count.sum()), rel=5 * float(found.std() / found.mean()) / 100)


def test_what_breaks_the_grammar_is_found_and_costs() -> None:
    phrases = data.load("chords").samples[:50].clone()
    at = list(CHORDS).index("I64")
    # I cannot follow a six-four chord, with which no phrase ends.
    phrases[:, -1] = F.one_hot(torch.tensor(at), 11).float()
    assert not legal(phrases)[:, -1].any()
    assert legal(phrases)[:, :-1].all()
    drop = log_likelihood(data.load("chords").samples[:50]) - log_likelihood(phrases)
    assert (drop > 5).all()
    with pytest.raises(ValueError, match=r"phrases must be \[n, 16, 11\], got shape \(2, 2\)"):
        legal(torch.zeros(2, 2))


def test_music_has_the_notes_of_the_chords() -> None:
    mido = pytest.importorskip("mido")
    phrases = data.load("chords").samples[:2]
    file = mido.MidiFile(file=io.BytesIO(midi(phrases)))
    assert file.length == pytest.approx((2 * 16 + 4) * 0.6)
    played, time, sounding = [], 0, set()
    for message in file.tracks[0]:
        time += message.time
        if message.type == "note_on":
            sounding.add((time, message.note))
        elif message.type == "note_off" and sounding:
            played.append(tuple(sorted(note for _, note in sounding)))
            sounding = set()
    assert played == [tuple(sorted(list(CHORDS.values())[k])) for k in phrases.argmax(2).flatten().tolist()]


def test_music_without_mido_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mido", None)
    with pytest.raises(ValueError, match="a MIDI file needs the package mido: pip install mido"):
        midi(data.load("chords").samples[:1])


# --- digits


@pytest.mark.parametrize("size", [8, 12, 16, 32])
def test_digits_have_the_documented_layout(size: int) -> None:
    digits = data.load("digits", size)
    assert digits.samples.shape == (1797, 1, size, size)
    assert digits.samples.dtype == torch.float32
    assert digits.samples.min() == -1
    assert digits.samples.max() == 1
    assert digits.shape == (1, size, size)
    assert len(digits) == 1797
    assert digits.labels is not None
    assert digits.labels.tolist() == load_digits().target.tolist()


def test_digits_at_their_own_size_are_the_original_levels() -> None:
    levels = (data.load("digits", 8).samples.squeeze(1) + 1) * 8
    assert torch.equal(levels.double(), torch.from_numpy(load_digits().images))


def test_scaling_up_keeps_the_picture() -> None:
    small, large = data.load("digits", 8).samples, data.load("digits", 32).samples
    back = F.avg_pool2d(large, 4)

    def error(other: torch.Tensor) -> float:
        return float((back - other).abs().mean())

    # The interpolation smooths a little; a grid that is shifted, mirrored or transposed is off by far more.
    others = [small.roll(1, 2), small.roll(-1, 2), small.roll(1, 3), small.roll(-1, 3)]
    others += [small.flip(2), small.flip(3), small.transpose(2, 3)]
    assert 3 * error(small) < min(map(error, others))


@pytest.mark.parametrize("size", [0, 7, -8])
def test_digits_refuse_a_size_below_their_own(size: int) -> None:
    with pytest.raises(ValueError, match=f"at least 8.*got {size}"):
        data.load("digits", size)


# --- toy data


@pytest.mark.parametrize("name", TOY)
def test_toy_data_are_points_of_the_plane(name: str) -> None:
    toy = data.load(name)
    assert toy.name == name
    assert toy.samples.shape == (10_000, 2)
    assert toy.samples.dtype == torch.float32
    assert not toy.is_image
    assert len(toy.samples.unique(dim=0)) > 9_990


@pytest.mark.parametrize("name", data.names())
def test_a_data_set_is_the_same_whoever_drew_before_and_leaves_torchs_numbers_alone(name: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = data.load(name)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second = data.load(name)
    assert torch.equal(first.samples, second.samples)
    assert (first.labels is None) == (second.labels is None)


@pytest.mark.parametrize(("name", "k", "std"), [("ring", 8, 0.02), ("grid", 25, 0.05), ("two-gaussians", 2, 0.5)])
def test_mixtures_have_the_documented_moments(name: str, k: int, std: float) -> None:
    mixture = data.load(name)
    assert mixture.labels is not None
    assert mixture.modes is not None
    assert mixture.mode_std == std
    assert mixture.classes == k == len(mixture.modes)
    n = len(mixture) // k
    residuals = mixture.samples.double() - mixture.modes[mixture.labels].double()
    for mode in range(k):
        own = residuals[mixture.labels == mode]
        assert len(own) == n
        # Five deviations of the mean and of the variance of n draws.
        assert float(own.mean(0).abs().max()) < 5 * std / math.sqrt(n)
        assert float((own.var(0) / std**2 - 1).abs().max()) < 5 * math.sqrt(2 / (n - 1))
    coverage = mode_coverage(mixture.samples, mixture.modes, mixture.mode_std)
    assert coverage.covered == k
    # The chi distribution with two degrees of freedom.
    share = 1 - math.exp(-4.5)
    assert abs(coverage.high_quality - share) < 5 * math.sqrt(share * (1 - share) / len(mixture))


def test_the_modes_lie_where_the_papers_put_them() -> None:
    ring, grid = data.load("ring").modes, data.load("grid").modes
    assert ring is not None
    assert grid is not None
    assert torch.allclose(ring.norm(dim=1), torch.full((8,), 2.0))
    assert torch.allclose((ring - ring.roll(1, 0)).norm(dim=1), torch.full((8,), 4 * math.sin(math.pi / 8)))
    ticks = [-4.0, -2.0, 0.0, 2.0, 4.0]
    assert sorted(map(tuple, grid.tolist())) == [(x, y) for x in ticks for y in ticks]


def test_the_swiss_roll_is_a_spiral_with_noise() -> None:
    samples = data.load("swiss-roll").samples.double() * 7.5
    t = torch.linspace(1.5 * math.pi - 0.5, 4.5 * math.pi + 0.5, 2000, dtype=torch.float64)
    spiral = t[:, None] * torch.stack([t.cos(), t.sin()], 1)
    distances = torch.cdist(samples[::5], spiral).amin(1)
    # Across a smooth curve the noise has one coordinate; the turns are 2 pi apart, 25 deviations.
    assert abs(float(distances.square().mean().sqrt()) / 0.25 - 1) < 5 / math.sqrt(2 * 2000)
    assert float(distances.max()) < 0.25 * 5


@pytest.mark.parametrize("theta", [0.5, -2.0])
def test_the_distance_of_parallel_segments_is_that_of_their_thetas(theta: float) -> None:
    real, fake = data.segments(0.0, 100), data.load(f"segments:{theta}")
    assert fake.name == f"segments:{theta}"
    assert fake.samples[:, 0].unique().tolist() == [theta]
    assert torch.equal(real.samples[:, 1], data.segments(theta, 100).samples[:, 1])
    assert wasserstein_distance(real.samples, data.segments(theta, 100).samples) == pytest.approx(abs(theta))
    u = fake.samples[:, 1].double()
    assert 0 <= float(u.min()) < 1e-3
    assert 1 - 1e-3 < float(u.max()) <= 1
    assert abs(float(u.mean()) - 0.5) < 5 / math.sqrt(12 * len(u))
    assert not torch.equal(real.samples, data.segments(0.0, 100, seed=9).samples)


@pytest.mark.parametrize("theta", ["", "x", "nan", "inf", "1e+60"])
def test_a_theta_that_is_no_number_is_refused(theta: str) -> None:
    with pytest.raises(ValueError, match=rf"(?i)theta .*{re.escape(theta)}"):
        data.load(f"segments:{theta}")


def test_segments_need_a_sample() -> None:
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        data.segments(0.0, 0)


@pytest.mark.parametrize("name", [*TOY, "segments:0.5"])
def test_vectors_have_no_size(name: str) -> None:
    with pytest.raises(ValueError, match=r"size is for images.* vectors \[2\]; got 16"):
        data.load(name, 16)


# --- patches


@pytest.mark.parametrize(("size", "n"), [(8, 4096), (32, 4096), (44, 4096), (48, 3640), (64, 2048), (128, 512)])
def test_patches_have_the_documented_layout(size: int, n: int) -> None:
    patches = data.load("patches", size)
    assert patches.samples.shape == (n, 3, size, size)
    assert patches.samples.dtype == torch.float32
    assert -1 <= float(patches.samples.min()) < -0.9
    assert 0.9 < float(patches.samples.max()) <= 1
    assert patches.labels is not None
    assert patches.labels.bincount().tolist() == [n // 2, n // 2]
    assert patches.samples.numel() * 4 < 200e6
    assert patches.is_image
    assert patches.classes == 2


def test_a_patch_is_a_window_of_the_photograph_that_its_label_names() -> None:
    patches = data.load("patches", 32)
    photographs = [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]
    windows = [photograph.unfold(1, 32, 1).unfold(2, 32, 1) for photograph in photographs]
    assert patches.labels is not None
    for sample, label in zip(patches.samples[-6:], patches.labels[-6:].tolist(), strict=True):
        levels = ((sample + 1) * 127.5).round().to(torch.uint8)
        corners = windows[label][..., 0, 0] == levels[:, 0, 0, None, None]
        candidates = corners.all(0).nonzero().tolist()
        assert any(torch.equal(windows[label][:, top, left], levels) for top, left in candidates)
        assert not any(torch.equal(windows[1 - label][:, top, left], levels) for top, left in candidates)
    # Every eighth of the width and of the height begins a patch.
    assert len(patches.samples.flatten(1).unique(dim=0)) > 3500


@pytest.mark.parametrize("size", [-8, 0, 4, 10, 127, 132])
def test_patches_refuse_other_sizes(size: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of 4 from 8 to 128, got {size}"):
        data.load("patches", size)


# --- names


def test_unknown_name_tells_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown data set 'digit'; did you mean digits\?"):
        data.load("digit")
    with pytest.raises(ValueError, match=r"unknown data set 'swissroll'; did you mean swiss-roll\?"):
        data.load("swissroll")


def test_images_are_of_16_pixels_unless_told() -> None:
    assert data.DEFAULT_SIZE == 16
    assert data.load("digits").shape == (1, 16, 16)
    assert data.load("patches").shape == (3, 16, 16)


@pytest.mark.parametrize("name", ["absent/images", "absent.npz", "./absent"])
def test_a_path_to_nothing_is_a_missing_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder or file") as raised:
        data.load(name)
    assert raised.value.filename == name


def test_a_built_in_name_is_not_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder_of(Path("digits"), {"a.png": (4, 4)})
    assert data.load("digits", 8).shape == (1, 8, 8)
    assert data.load("./digits").shape == (3, 4, 4)
    assert data.load(Path("digits").resolve()).shape == (3, 4, 4)


# --- folders of images


def folder_of(folder: Path, sizes: dict[str, tuple[int, int]], mode: str = "RGB") -> Path:
    """Noise, by the name of the file and its width and height."""
    random = np.random.default_rng(0)
    for name, (width, height) in sizes.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        levels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(levels).convert(mode).save(path)
    return folder


def test_a_folder_is_its_pixels_in_the_order_of_names(tmp_path: Path) -> None:
    folder_of(tmp_path, {"b.png": (6, 6), "a.png": (6, 6), "c/d.bmp": (6, 6)})
    (tmp_path / "notes.txt").write_text("not an image")
    dataset = data.load(tmp_path)
    assert dataset.name == str(tmp_path)
    assert dataset.labels is None
    assert dataset.samples.shape == (3, 3, 6, 6)
    for sample, name in zip(dataset.samples, ("a.png", "b.png", "c/d.bmp"), strict=True):
        levels = np.asarray(Image.open(tmp_path / name)).transpose(2, 0, 1)
        assert torch.equal(sample, torch.from_numpy(levels.astype(np.float32)) / 127.5 - 1)
    assert torch.equal(data.load(str(tmp_path), 6).samples, dataset.samples)


def test_sub_folders_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder_of(tmp_path, {f"{name}.png": (4, 4) for name in ("dog/1", "dog/2", "cat/old/9", "cat/3", "ape/1")})
    dataset = data.load(tmp_path)
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 1, 1, 2, 2]
    assert dataset.classes == 3
    dogs = np.asarray(Image.open(tmp_path / "dog/1.png")).transpose(2, 0, 1)
    assert torch.equal(dataset.samples[3], torch.from_numpy(dogs.astype(np.float32)) / 127.5 - 1)
    folder_of(tmp_path, {"stray.png": (4, 4)})
    assert data.load(tmp_path).labels is None, "an image that lies in no class"
    assert data.load(tmp_path / "dog").labels is None
    only = folder_of(tmp_path / "only", {"one/a.png": (4, 4)})
    assert data.load(only).labels is None, "one class tells nothing"


def test_the_middle_square_is_scaled(tmp_path: Path) -> None:
    levels = np.zeros((8, 14, 3), dtype=np.uint8)
    levels[:, 3:11] = np.random.default_rng(0).integers(0, 256, (8, 8, 3))
    Image.fromarray(levels).save(tmp_path / "wide.png")
    middle = Image.fromarray(levels[:, 3:11])
    for size in (8, 4, 12):
        expected = np.asarray(middle.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        found = (data.load(tmp_path, size).samples[0] + 1) * 127.5
        assert np.array_equal(found.round().to(torch.uint8).numpy(), expected)


def test_mixed_sizes_need_a_size(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a.png": (8, 8), "b.png": (12, 8)})
    with pytest.raises(ValueError, match=r"b\.png has 12 x 8 pixels, images before it 8 x 8: give a size \(--size N\)"):
        data.load(tmp_path)
    assert data.load(tmp_path, 8).shape == (3, 8, 8)
    folder_of(tmp_path, {"a.png": (12, 8)})
    with pytest.raises(ValueError, match=r"a\.png has 12 x 8 pixels, which is no square: give a size \(--size N\)"):
        data.load(tmp_path)


def test_an_empty_folder_and_a_broken_image_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} holds no image"):
        data.load(tmp_path)
    folder_of(tmp_path, {"a.png": (8, 8)})
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"b\.png cannot be used: not a PNG"):
        data.load(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the administrator may read everything")
def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0)
    with pytest.raises(PermissionError) as raised:
        data.load(locked)
    assert raised.value.filename == str(locked)
    locked.chmod(0o700)


def test_a_folder_that_fails_to_be_listed_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: object) -> Iterator[os.DirEntry[str]]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match=str(tmp_path)):
        data.load(tmp_path)


def test_more_than_memory_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path / "images", {"a.png": (8, 8), "b.png": (8, 8)})
    np.save(tmp_path / "a.npy", np.zeros((2, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 8, 8, 3), np.uint8))
    np.save(tmp_path / "v.npy", np.zeros((2, 192), np.float32))
    needed = 4 * 2 * 3 * 8 * 8
    monkeypatch.setattr(files, "MAX_BYTES", needed)
    for name in ("images", "a.npy", "a.npz", "v.npy"):
        assert len(data.load(tmp_path / name)) == 2
    monkeypatch.setattr(files, "MAX_BYTES", needed - 1)
    for name in ("images", "a.npy", "a.npz", "v.npy"):
        with pytest.raises(ValueError, match=rf"{name}.* 2 samples of shape .* GiB, more than"):
            data.load(tmp_path / name)
    for name in ("images", "a.npy", "a.npz"):
        assert data.load(tmp_path / name, 4).shape == (3, 4, 4)


# --- arrays


def levels(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 5),
    side=st.integers(4, 9),
    channels=st.sampled_from([1, 3]),
    dtype=st.sampled_from(["u1", "<f4", ">f4", "f8"]),
)
def test_every_layout_of_the_same_images_is_the_same_data(n: int, side: int, channels: int, dtype: str) -> None:
    images = levels(n, channels, side, side)
    expected = torch.from_numpy(images.astype(np.float32)) / 127.5 - 1
    stored = images if dtype == "u1" else expected.double().numpy().astype(dtype)
    layouts = [stored, stored.transpose(0, 2, 3, 1), np.asfortranarray(stored)]
    if channels == 1:
        layouts.append(stored[:, 0])
    with tempfile.TemporaryDirectory() as folder:
        for layout in layouts:
            np.save(f"{folder}/x.npy", layout)
            np.savez(f"{folder}/x.npz", images=layout, labels=np.arange(n, dtype=np.uint8))
            plain, archive = data.load(f"{folder}/x.npy"), data.load(f"{folder}/x.npz")
            assert plain.samples.dtype == torch.float32
            assert torch.equal(plain.samples, expected)
            assert torch.equal(archive.samples, expected)
            assert plain.labels is None
            assert archive.labels is not None
            assert archive.labels.tolist() == list(range(n))


def test_large_arrays_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "x.npy", levels(10, 4, 4))
    whole = data.load(tmp_path / "x.npy", 8).samples
    for rows in (1, 3, 9, 10):
        monkeypatch.setattr(files, "_ROWS", rows)
        assert torch.equal(data.load(tmp_path / "x.npy", 8).samples, whole)


def test_vectors_keep_their_values_and_have_no_size(tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(0, 100, (7, 5))
    np.savez_compressed(tmp_path / "x.npz", samples=points, y=np.array([0, 1, 2, 0, 1, 2, 4]))
    dataset = data.load(tmp_path / "x.npz")
    assert torch.equal(dataset.samples, torch.from_numpy(points).float())
    assert dataset.classes == 5
    assert not dataset.is_image
    with pytest.raises(
        ValueError, match=r"x\.npz cannot be used: size is for images, and it holds vectors \[5\]; got 8"
    ):
        data.load(tmp_path / "x.npz", 8)


def test_arrays_are_cut_and_scaled_as_image_files_are(tmp_path: Path) -> None:
    # Far enough from black and white that the filter's overshoot, which Pillow clips in between, stays inside.
    images = levels(3, 20, 16, 3) // 2 + 64
    for i, image in enumerate(images):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.png")
    np.save(tmp_path / "x.npy", images)
    for size in (8, 16, 24):
        difference = data.load(tmp_path / "x.npy", size).samples - data.load(tmp_path / "images", size).samples
        # Pillow rounds to levels after each of the two directions.
        assert float(difference.abs().max()) < 2.5 / 127.5
    with pytest.raises(ValueError, match="16 x 20 pixels, which is no square"):
        data.load(tmp_path / "x.npy")


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_below_one_is_refused(size: int, tmp_path: Path) -> None:
    folder_of(tmp_path, {"a.png": (4, 4)})
    np.save(tmp_path / "x.npy", levels(2, 4, 4))
    for name in (tmp_path, tmp_path / "x.npy", "huggingface:mnist"):
        with pytest.raises(ValueError, match=f"size must be at least 1, got {size}"):
            data.load(name, size)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (levels(4, 3, 8, 3), "cannot be told which axis is of channels"),
        (levels(4, 8, 8, 4), "no axis has 1 or 3 channels"),
        (levels(4, 8), "vectors must be floating point, got uint8"),
        (levels(4), "got shape \\[4\\]"),
        (levels(0, 8, 8), "got shape \\[0, 8, 8\\]"),
        (levels(2, 3, 8, 8, 8), "got shape"),
        (levels(4, 8, 8).astype(np.int64), "must be uint8 or float16, float32 or float64, got int64"),
        (levels(4, 8, 8).astype(bool), "got bool"),
        (np.zeros((4, 8), complex), "got complex128"),
        (levels(4, 8, 8).astype(np.float32), r"must lie in \[-1, 1\], got 0 to 255"),
        (np.full((4, 8, 8), np.nan), "must lie in"),
        (np.full((4, 8), np.inf), "NaN or infinite"),
        (np.full((4, 8), 1e300), "NaN or infinite"),
        (np.zeros((4, 8), [("a", "f4")]), "got \\["),
        (np.array(7.0), "got shape \\[\\]"),
    ],
)
def test_arrays_that_are_no_samples_are_refused(array: np.ndarray[Any, Any], message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "x.npz", x=array)
    for name in ("x.npy", "x.npz"):
        with pytest.raises(ValueError, match=rf"{name} cannot be used: .*{message}"):
            data.load(tmp_path / name)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "none of the arrays x, images, samples, arr_0, only none at all"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, "only mu, sigma"),
        ({"x": levels(4, 8, 8), "images": levels(4, 8, 8)}, "x and images, of which one"),
        ({"x": levels(4, 8, 8), "y": np.zeros(4, int), "labels": np.zeros(4, int)}, "y and labels, of which one"),
        ({"x": levels(4, 8, 8), "y": np.zeros(3, int)}, r"labels must be integers \[4\], got int64 of shape \[3\]"),
        ({"x": levels(4, 8, 8), "y": np.zeros(4)}, "labels must be integers .* got float64"),
        ({"x": levels(4, 8, 8), "y": np.array([0, 1, -1, 2])}, "from -1 to 2"),
        ({"x": levels(4, 8, 8), "y": np.array([0, 1, 2**40, 2])}, "at most 65536 classes"),
    ],
)
def test_archives_that_are_no_data_set_are_refused(
    arrays: dict[str, np.ndarray[Any, Any]], message: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=rf"x\.npz cannot be used: .*{message}"):
        data.load(tmp_path / "x.npz")


def test_an_array_without_a_name_is_found(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", levels(4, 8, 8))
    assert data.load(tmp_path / "x.npz").shape == (1, 8, 8)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_nothing_in_an_array_is_executed(tmp_path: Path) -> None:
    bomb = Bomb(tmp_path / "exploded")
    array = np.array([[bomb]], dtype=object)
    np.save(tmp_path / "array.npy", array, allow_pickle=True)
    np.savez(tmp_path / "x.npz", x=array)
    np.savez(tmp_path / "y.npz", x=levels(1, 8, 8), y=array)
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(bomb))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(bomb))
    for name in ("array.npy", "x.npz", "y.npz", "pickle.npy", "pickle.npz"):
        with pytest.raises(ValueError, match=rf"{name} cannot be used"):
            data.load(tmp_path / name)
    assert not bomb.path.exists()
    pickle.loads((tmp_path / "pickle.npz").read_bytes())
    assert bomb.path.exists(), "the bomb of this test is a dud"


def test_a_header_that_promises_more_than_there_is_allocates_nothing(tmp_path: Path) -> None:
    text = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000, 1448, 1448), }"
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text
    (tmp_path / "x.npy").write_bytes(header + b"\0" * 100)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", header + b"\0" * 100)
    with pytest.raises(ValueError, match=r"x\.npz cannot be used: the array x is cut off"):
        data.load(tmp_path / "x.npz")
    with pytest.raises(ValueError, match=r"x\.npy cannot be used"):
        data.load(tmp_path / "x.npy")


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_damaged_files_are_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    if suffix == "npy":
        np.save(path, levels(3, 8, 8))
    else:
        np.savez_compressed(path, x=levels(3, 8, 8), y=np.arange(3))
    content = path.read_bytes()
    for length in range(0, len(content), 29):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"x\.{suffix} cannot be used"):
            data.load(path)
    random = np.random.default_rng(0)
    messages = []
    for _ in range(300):
        damaged = bytearray(content)
        damaged[random.integers(len(content))] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        try:
            data.load(path)
        except ValueError as error:
            messages.append(str(error))
    assert all(f"x.{suffix} cannot be used" in message for message in messages)
    # Of an .npy file only the header can be checked.
    assert len(messages) > (100 if suffix == "npz" else 10)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not an array")
    with pytest.raises(ValueError, match=r"notes\.txt is neither a folder of images nor"):
        data.load(tmp_path / "notes.txt")
    np.savez(tmp_path / "x.npz", x=levels(1, 8, 8))
    (tmp_path / "x.npz").rename(tmp_path / "x.npy")
    with pytest.raises(ValueError, match=r"x\.npy cannot be used: it is an archive under another name"):
        data.load(tmp_path / "x.npy")


# --- data sets of other packages, by stand-ins


class Rows:
    """A list with the attributes of a data set of either package."""

    def __init__(self, rows: list[Any], features: dict[str, Any] | None = None) -> None:
        self.rows, self.features = rows, features

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def image_of(mode: str = "RGB", width: int = 6, height: int = 6) -> Image.Image:
    return Image.fromarray(levels(height, width, 3)).convert(mode)


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """Stands for torchvision.datasets; its data sets are made of `module.rows`, once they are there."""
    package, module = ModuleType("torchvision"), ModuleType("torchvision.datasets")
    module.rows = [(image_of("L"), i % 3) for i in range(5)]  # type: ignore[attr-defined]

    class VisionDataset(Rows):
        pass

    class MNIST(VisionDataset):
        def __init__(self, root: str, train: bool = True, transform: Any = None, download: bool = False) -> None:
            assert train
            self.root = Path(root)
            if download:
                self.root.mkdir(parents=True, exist_ok=True)
            if not self.root.exists():
                raise RuntimeError("Dataset not found. You can use download=True to download it")
            super().__init__(module.rows)  # type: ignore[attr-defined]

    class FakeData(VisionDataset):
        def __init__(self, size: int = 1000) -> None:
            super().__init__(module.rows)  # type: ignore[attr-defined]

    class Kinetics(VisionDataset):
        def __init__(self, root: str, frames_per_clip: int) -> None:
            raise AssertionError("made without what it needs")

    entries = {"VisionDataset": VisionDataset, "MNIST": MNIST, "FakeData": FakeData, "Kinetics": Kinetics, "os": os}
    for name, entry in entries.items():
        setattr(module, name, entry)
    package.datasets = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)
    monkeypatch.setenv("LIPGAN_DATA", str(tmp_path / "cache"))
    monkeypatch.delenv("LIPGAN_DOWNLOAD", raising=False)
    return module


def test_torchvision_downloads_only_when_allowed(
    torchvision: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=rf"torchvision:MNIST cannot .*{tmp_path}.*not found.*unless LIPGAN_DOWNLOAD=1"
    ):
        data.load("torchvision:MNIST")
    monkeypatch.setenv("LIPGAN_DOWNLOAD", "0")
    with pytest.raises(ValueError, match="unless LIPGAN_DOWNLOAD=1"):
        data.load("torchvision:MNIST")
    monkeypatch.setenv("LIPGAN_DOWNLOAD", "1")
    dataset = data.load("torchvision:MNIST")
    assert dataset.name == "torchvision:MNIST"
    assert dataset.shape == (1, 6, 6)
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 1, 2, 0, 1]
    expected = torch.from_numpy(np.asarray(torchvision.rows[0][0]).astype(np.float32)) / 127.5 - 1
    assert torch.equal(dataset.samples[0, 0], expected)
    (tmp_path / "cache").rmdir()
    monkeypatch.delenv("LIPGAN_DOWNLOAD")
    assert len(data.load("torchvision:MNIST", 4, download=True)) == 5
    assert data.load("torchvision:MNIST", 4).shape == (1, 4, 4), "what is there needs no download"


def test_torchvision_names_and_options(torchvision: ModuleType) -> None:
    assert len(data.load("torchvision:FakeData")) == 5
    for name, message in (
        ("MNISTT", "unknown data set of torchvision 'MNISTT'; did you mean MNIST"),
        ("VisionDataset", "unknown data set of torchvision"),
        ("os", "unknown data set of torchvision"),
        ("Kinetics", "Kinetics cannot be loaded .*frames_per_clip"),
        ("", "lacks the name of a data set, as in torchvision:MNIST"),
    ):
        with pytest.raises(ValueError, match=message):
            data.load(f"torchvision:{name}")


def test_colour_anywhere_makes_three_channels(torchvision: ModuleType) -> None:
    torchvision.rows = [(image_of("L"), 0), (image_of("RGB"), 1), (image_of("1"), 2), (image_of("P"), 3)]
    samples = data.load("torchvision:FakeData").samples
    assert samples.shape == (4, 3, 6, 6)
    assert torch.equal(samples[0, 0], samples[0, 2])
    assert not torch.equal(samples[1, 0], samples[1, 2])
    expected = torch.from_numpy(levels(6, 6, 3).transpose(2, 0, 1).astype(np.float32)) / 127.5 - 1
    assert torch.equal(samples[1], expected)
    assert set(samples[2].unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("target", [torch.zeros(40), "left", 0.5, None, True, (1, 2)])
def test_targets_that_are_no_classes_are_left_out(torchvision: ModuleType, target: Any) -> None:
    torchvision.rows = [(image_of(), 1), (image_of(), target)]
    assert data.load("torchvision:FakeData").labels is None


def test_rows_that_are_no_images_are_refused(torchvision: ModuleType) -> None:
    torchvision.rows = [(image_of(), 1), (torch.zeros(3, 6, 6), 1)]
    with pytest.raises(ValueError, match="sample 1 of torchvision:FakeData is Tensor, not an image"):
        data.load("torchvision:FakeData")
    torchvision.rows = [(image_of(), 1), (image_of(width=7), 1)]
    with pytest.raises(ValueError, match=r"image 1 of torchvision:FakeData has 7 x 6 pixels, .*--size N"):
        data.load("torchvision:FakeData")
    torchvision.rows = [(image_of(), 1), ()]
    with pytest.raises(ValueError, match="sample 1 of torchvision:FakeData cannot be loaded"):
        data.load("torchvision:FakeData")
    torchvision.rows = []
    with pytest.raises(ValueError, match="torchvision:FakeData holds no image"):
        data.load("torchvision:FakeData")


class Feature:
    """Stands for the types of columns, which are told apart by the names of their classes."""


class ClassLabel(Feature):
    pass


class Value(Feature):
    pass


@pytest.fixture
def huggingface(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Stands for the package datasets; `module.calls` is what it was asked for, and whether it was offline then."""
    module = ModuleType("datasets")
    image = type("Image", (Feature,), {})
    module.config = SimpleNamespace(HF_HUB_OFFLINE=False)  # type: ignore[attr-defined]
    module.features = {"id": Value(), "picture": image(), "fine": ClassLabel(), "label": ClassLabel()}  # type: ignore[attr-defined]
    module.calls = []  # type: ignore[attr-defined]

    def load_dataset(path: str, split: str | None = None, trust_remote_code: bool | None = None) -> Rows:
        module.calls.append((path, split, trust_remote_code, module.config.HF_HUB_OFFLINE))  # type: ignore[attr-defined]
        if path == "absent":
            raise ConnectionError("Couldn't reach 'absent' on the Hub (OfflineModeIsEnabled)\nand more")
        rows = [{"id": i, "picture": image_of(), "fine": 5, "label": i} for i in range(3)]
        return Rows(rows, module.features)  # type: ignore[attr-defined]

    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.delenv("LIPGAN_DOWNLOAD", raising=False)
    return module


def test_hugging_face_stays_offline_and_runs_no_code(huggingface: ModuleType) -> None:
    dataset = data.load("huggingface:user/some")
    assert dataset.name == "huggingface:user/some"
    assert dataset.samples.shape == (3, 3, 6, 6)
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 1, 2]
    data.load("huggingface:user/some", 4, download=True)
    assert huggingface.calls == [("user/some", "train", False, True), ("user/some", "train", False, False)]
    assert huggingface.config.HF_HUB_OFFLINE is False
    with pytest.raises(
        ValueError, match=r"huggingface:absent cannot .* Hub \(Off.*Enabled\); nothing .* LIPGAN_DOWNLOAD=1$"
    ):
        data.load("huggingface:absent")
    assert huggingface.config.HF_HUB_OFFLINE is False


def test_hugging_face_columns(huggingface: ModuleType) -> None:
    huggingface.load_dataset = lambda path, split: Rows(  # as newer versions have it
        [{"picture": image_of(), "fine": 5, "id": "x"}], huggingface.features
    )
    del huggingface.features["label"]
    dataset = data.load("huggingface:some")
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [5]
    del huggingface.features["fine"]
    assert data.load("huggingface:some").labels is None
    del huggingface.features["picture"]
    with pytest.raises(ValueError, match="huggingface:some has no column of images, only id"):
        data.load("huggingface:some")


@pytest.mark.parametrize(("name", "package"), [("torchvision:MNIST", "torchvision"), ("huggingface:mnist", "datasets")])
def test_packages_that_are_not_installed_are_named(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"{name} needs the package {package}: pip install {package}"):
        data.load(name)


# --- the data set and its order


@pytest.mark.parametrize(
    ("samples", "labels", "message"),
    [
        (torch.zeros(0, 2), None, "n >= 1"),
        (torch.zeros(3), None, "n >= 1"),
        (torch.zeros(3, 2, dtype=torch.int64), None, "floating point, got torch.int64"),
        (torch.full((3, 2), float("nan")), None, "NaN"),
        (torch.tensor([[0.0, 1.0], [-float("inf"), 0.0]]), None, "NaN or infinite"),
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64), r"labels must be \[3\]"),
        (torch.zeros(3, 2), torch.zeros(3, dtype=torch.int32), "labels must be int64, got torch.int32"),
        (torch.zeros(3, 2), torch.tensor([0, -1, 1]), "of 'mine' run from -1 to 1"),
        (torch.zeros(3, 2), torch.tensor([0, 2**16, 1]), "at most 65536 classes"),
    ],
)
def test_dataset_refuses(samples: torch.Tensor, labels: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Dataset("mine", samples, labels)


@pytest.mark.parametrize(
    ("modes", "std", "message"),
    [
        (torch.zeros(2, 2), None, "belong together"),
        (None, 0.1, "belong together"),
        (torch.zeros(2, 3), 0.1, r"modes must be \[k, d\]"),
        (torch.zeros(0, 2), 0.1, r"modes must be \[k, d\]"),
        (torch.full((2, 2), float("nan")), 0.1, "finite"),
        (torch.zeros(2, 2, dtype=torch.int64), 0.1, "floating-point"),
        (torch.zeros(2, 2), 0.0, "mode_std must be positive and finite, got 0"),
        (torch.zeros(2, 2), float("nan"), "mode_std must be positive and finite, got nan"),
    ],
)
def test_dataset_refuses_modes_that_do_not_fit(modes: torch.Tensor | None, std: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Dataset("mine", torch.zeros(3, 2), None, modes, std)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dataset_tells_what_it_holds(dtype: torch.dtype) -> None:
    plain = Dataset("mine", torch.zeros(3, 2, dtype=dtype))
    assert (plain.classes, plain.is_image, plain.shape) == (0, False, (2,))
    images = Dataset("mine", torch.zeros(3, 1, 4, 4, dtype=dtype), torch.tensor([0, 4, 2]))
    assert (images.classes, images.is_image, images.shape) == (5, True, (1, 4, 4))
    assert not Dataset("mine", torch.zeros(3, 2, 4, 4, dtype=dtype)).is_image


@pytest.mark.parametrize(("n", "batch_size"), [(10, 3), (10, 10), (7, 16), (1, 4)])
def test_every_epoch_visits_every_sample_once(n: int, batch_size: int) -> None:
    order = BatchOrder(n, seed=3)
    visited = torch.cat([order.next(batch_size) for _ in range(3 * n)])
    assert len(visited) == 3 * n * batch_size
    epochs = visited[: 3 * n].view(3, n)
    for epoch in epochs:
        assert epoch.sort().values.tolist() == list(range(n))


def test_order_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = BatchOrder(100, seed=5).next(100)
    torch.manual_seed(2)
    assert torch.equal(first, BatchOrder(100, seed=5).next(100))
    assert not torch.equal(first, BatchOrder(100, seed=6).next(100))


@pytest.mark.parametrize("batches", [0, 1, 4, 5])
def test_order_resumes_where_it_was_saved(batches: int) -> None:
    whole, first, second = (BatchOrder(10, seed=1), BatchOrder(10, seed=1), BatchOrder(10, seed=99))
    for _ in range(batches):
        assert torch.equal(whole.next(4), first.next(4))
    second.load_state_dict(first.state_dict())
    for _ in range(10):
        assert torch.equal(whole.next(4), second.next(4))


def test_order_refuses_the_state_of_another_data_set() -> None:
    with pytest.raises(ValueError, match="10 samples, the data set has 11"):
        BatchOrder(11, seed=0).load_state_dict(BatchOrder(10, seed=0).state_dict())
