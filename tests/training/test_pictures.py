"""Pictures of samples and of training, decoded and looked at by their pixels."""

import io
import math
from typing import Any

import matplotlib.axes
import matplotlib.figure
import numpy as np
import pytest
import study_checks
import torch
from PIL import Image
from torch import Tensor

from lipgan import data
from lipgan.data import Dataset
from lipgan.training import pictures
from lipgan.training.pictures import (
    Strip,
    captioned,
    curves,
    evaluation_page,
    image_bytes,
    picture,
    sample_grid,
    samples_shown,
)


def decoded(content: bytes) -> np.ndarray[Any, Any]:
    """``[h, w, 3]`` levels of a PNG file."""
    image = Image.open(io.BytesIO(content), formats=["PNG"])
    return np.asarray(image.convert("RGB")).astype(int)


# --- grids of images


def test_grid_shows_every_sample_in_reading_order() -> None:
    samples = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 1, 8, 8)
    picture = torch.frombuffer(bytearray(sample_grid(samples).tobytes()), dtype=torch.uint8)
    width, height = sample_grid(samples).size
    cells = picture.view(2, height // 2, 3, width // 3)
    centers = cells[:, height // 4, :, width // 6].flatten().tolist()
    assert centers[:5] == [0, 64, 128, 191, 255]
    assert centers[5] == 96, "the empty cell has the level of the gaps"


def test_grid_of_colours_and_bad_shapes() -> None:
    assert sample_grid(torch.zeros(4, 3, 8, 8)).mode == "RGB"
    for shape in ((0, 1, 8, 8), (4, 2, 8, 8), (4, 8, 8)):
        with pytest.raises(ValueError, match="samples must be"):
            sample_grid(torch.zeros(shape))
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        sample_grid(torch.zeros(4, 1, 8, 8), columns=0)


def test_pixels_stay_crisp() -> None:
    """Magnified by nearest neighbours: a picture has no level but those of its samples and of the gaps."""
    samples = torch.tensor([-1.0, 1.0]).repeat(32).view(1, 1, 8, 8).expand(64, 1, 8, 8)
    picture = sample_grid(samples)
    assert min(picture.size) >= 900
    assert set(np.unique(np.asarray(picture)).tolist()) == {0, 96, 255}


def test_classes_have_a_column_each_under_their_number() -> None:
    # Of ten classes in turn, of which each has a level of its own.
    samples = torch.linspace(-1, 1, 10).repeat(8).view(80, 1, 1, 1).expand(80, 1, 16, 16)
    shown = decoded(picture(samples, None, "unused", classes=10))
    grid = np.asarray(sample_grid(samples, columns=10))
    strip = shown.shape[0] - grid.shape[0]
    assert (shown[strip:] == grid[..., None]).all()
    cells = grid.reshape(8, grid.shape[0] // 8, 10, -1)
    centres = cells[:, cells.shape[1] // 2, :, cells.shape[3] // 2]
    assert centres.tolist() == [np.linspace(0, 255, 10).round().tolist()] * 8
    # Every column has its own dark letters in the middle of the white strip, and none touches the border.
    letters = shown[:strip, :, 0].reshape(strip, 10, -1)
    assert (letters[0] == 255).all()
    assert (letters[-1] == 255).all()
    assert all((letters[:, k] < 64).any() for k in range(10))
    assert len({letters[:, k].tobytes() for k in range(10)}) == 10
    dark = np.argwhere(letters[:, 0] < 128)
    centre = (dark.max(0) + dark.min(0)) / 2
    assert abs(centre - (np.array(letters[:, 0].shape) - 1) / 2).max() <= 2


@pytest.mark.parametrize("classes", [0, 1, 17])
def test_no_class_and_too_many_make_a_plain_grid(classes: int) -> None:
    samples = torch.rand(20, 3, 8, 8) * 2 - 1
    assert picture(samples, None, "unused", classes) == image_bytes(sample_grid(samples))


# --- points


def colours(content: bytes) -> dict[str, np.ndarray[Any, Any]]:
    """Where a picture has the blue of the samples and the grey of the data: ``[n, 2]`` rows and columns."""
    pixels = decoded(content)
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    grey = (abs(red - 178) < 4) & (abs(green - 178) < 4) & (abs(blue - 178) < 4)
    # Single grey pixels belong to the edges of letters.
    grey &= np.roll(grey, 1, 0) & np.roll(grey, -1, 0) & np.roll(grey, 1, 1) & np.roll(grey, -1, 1)
    return {"samples": np.argwhere(blue - red > 60), "data": np.argwhere(grey)}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What matplotlib is told: titles, the points of every label, the limits, the scale."""
    told: dict[str, Any] = {}

    def record(name: str, note: Any, owner: Any = matplotlib.axes.Axes) -> None:
        original = getattr(owner, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            # Afterwards, since what matplotlib puts off until then calls itself.
            note(args, kwargs)
            return result

        monkeypatch.setattr(owner, name, call)

    record("set_title", lambda args, kwargs: told.update(title=args[0]))
    record("suptitle", lambda args, kwargs: told.update(title=args[0]), matplotlib.figure.Figure)
    record("set_xlim", lambda args, kwargs: told.update(x=args[:2]))
    record("set_ylim", lambda args, kwargs: told.update(y=args[:2]))
    record("set_yscale", lambda args, kwargs: told.update(scale=args[0]))
    record("set_ylabel", lambda args, kwargs: told.setdefault("panels", []).append(args[0]))
    record("scatter", lambda args, kwargs: told.update({kwargs["label"]: torch.stack([*args[:2]], 1)}))
    record("hist", lambda args, kwargs: told.update({kwargs["label"]: torch.as_tensor(args[0])}))
    record("plot", lambda args, kwargs: told.update({kwargs["label"]: list(zip(*args[:2], strict=True))}))
    return told


def test_images_are_a_grid() -> None:
    samples = torch.rand(5, 3, 8, 8) * 2 - 1
    assert picture(samples, None, "unused") == image_bytes(sample_grid(samples))
    assert picture(samples, data.load("digits", 8), "unused") == image_bytes(sample_grid(samples))


def test_points_lie_over_the_data_with_equal_axes(drawn: dict[str, Any]) -> None:
    ring = data.load("ring")
    samples = torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.5, 0.5]]).requires_grad_()
    content = picture(samples, ring, "wgan on ring, step 5")
    assert drawn["title"] == "wgan on ring, step 5"
    assert torch.equal(drawn["samples"], samples.detach().double())
    assert torch.equal(drawn["data"], ring.samples[:5000].double())
    (left, right), (bottom, top) = drawn["x"], drawn["y"]
    assert right - left == pytest.approx(top - bottom)
    found = colours(content)
    height, width, _ = decoded(content).shape
    assert height == width
    data_pixels = found["data"]
    in_legend = data_pixels[:, 0] > 0.95 * height
    data_pixels = data_pixels[~in_legend]
    # Eight modes on a circle: their bounding box is a square of pixels.
    assert np.ptp(data_pixels[:, 0]) == pytest.approx(np.ptp(data_pixels[:, 1]), abs=3)
    # One unit in pixels, by the diameter of the circle and the width of its modes.
    unit = np.ptp(data_pixels[:, 1]) / float(np.ptp(ring.samples[:, 0].numpy()))
    centre = (data_pixels.max(0) + data_pixels.min(0)) / 2
    inside = abs(found["samples"] - centre).max(1) < 1.5 * unit
    offsets = (found["samples"][inside] - centre) / unit
    for x, y in samples.tolist():
        assert min(math.hypot(column - x, -row - y) for row, column in offsets) < 0.05


def test_what_lies_outside_is_counted_and_does_not_move_the_frame(drawn: dict[str, Any]) -> None:
    ring = data.load("ring")
    picture(torch.zeros(4, 2), ring, "a")
    frame = drawn["x"], drawn["y"]
    samples = torch.zeros(6, 2)
    samples[0, 0], samples[1, 1], samples[2, 0] = 1e30, float("nan"), -float("inf")
    picture(samples, ring, "a")
    assert drawn["title"] == "a\n3 of 6 samples lie outside"
    assert (drawn["x"], drawn["y"]) == frame
    assert len(drawn["samples"]) == 3
    picture(samples.fill_(float("nan")), ring, "a")
    assert drawn["title"] == "a\n6 of 6 samples lie outside"
    picture(samples, None, "a")
    assert drawn["title"] == "a\n6 of 6 samples lie outside"


def test_without_data_the_samples_make_the_frame(drawn: dict[str, Any]) -> None:
    samples = torch.tensor([[100.0, 0.0], [110.0, 5.0]])
    picture(samples, None, "a")
    assert drawn["title"] == "a"
    assert "data" not in drawn
    assert drawn["x"] == pytest.approx((99, 111))
    assert drawn["y"] == pytest.approx((-3.5, 8.5))
    picture(torch.ones(3, 2), None, "points that coincide have a frame too")
    assert drawn["x"] == pytest.approx((0, 2))


def test_of_many_coordinates_the_first_two_are_shown(drawn: dict[str, Any]) -> None:
    five = Dataset("five", torch.randn(40, 5))
    samples = torch.zeros(3, 5)
    samples[:, 2] = 1e9
    picture(samples, five, "a")
    assert drawn["title"] == "a\nthe first two of 5 coordinates"
    assert drawn["samples"].shape == (3, 2)


def test_one_coordinate_is_a_histogram(drawn: dict[str, Any]) -> None:
    line = Dataset("line", torch.linspace(-1, 1, 50)[:, None])
    found = colours(picture(torch.tensor([[0.25], [0.5], [9.0]]), line, "a"))
    assert drawn["title"] == "a\n1 of 3 samples lie outside"
    assert drawn["samples"].tolist() == [0.25, 0.5]
    assert len(drawn["data"]) == 50
    assert len(found["data"]) > 10_000, "bars are filled"
    assert decoded(picture(torch.full((2, 1), 9.0), line, "a")).shape == (945, 945, 3)


@pytest.mark.parametrize(
    ("samples", "dataset", "message"),
    [
        (torch.zeros(0, 2), None, r"n >= 1 and d >= 1, got shape \(0, 2\)"),
        (torch.zeros(2, 0), None, "d >= 1"),
        (torch.zeros(2, 3), data.segments(0.0, 2), r"shape of the data, \(2,\), got \(3,\)"),
        (torch.zeros(4), None, "samples must be"),
    ],
)
def test_what_cannot_be_drawn_is_refused(samples: Tensor, dataset: Dataset | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        picture(samples, dataset, "a")


def test_how_many_samples_make_a_picture() -> None:
    assert samples_shown((3, 16, 16)) == samples_shown((3, 16, 16), 1) == samples_shown((3, 16, 16), 17) == 64
    assert samples_shown((1, 16, 16), 10) == 80
    assert samples_shown((2,)) == samples_shown((2,), 8) == 2000


# --- curves


def row(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "critic_loss": -1.0 / step, "generator_loss": 0.5, **values}


def test_every_quantity_has_its_panel(drawn: dict[str, Any]) -> None:
    history = [
        row(20, sigma=2.0, penalty=None, estimate=3.0, critic_gradient_norm=1.0, noise=0.5),
        row(40, sigma=2.5, penalty=0.25, estimate=2.0, generator_gradient_norm=1.5),
    ]
    content = curves(history, "wgan-gp on ring, step 40")
    assert drawn["panels"] == ["loss (mean since the last point)", "estimate of the critic", "control"]
    assert drawn["title"] == "wgan-gp on ring, step 40"
    assert drawn["critic loss"] == [(20, -0.05), (40, -0.025)]
    assert drawn["estimate"] == [(20, 3.0), (40, 2.0)]
    assert drawn["gradient penalty"] == [(40, 0.25)]
    assert drawn["gradient norm of the critic"] == [(20, 1.0)]
    assert drawn["gradient norm of the generator"] == [(40, 1.5)]
    assert drawn["noise"] == [(20, 0.5)]
    assert "scale" not in drawn
    assert decoded(content).shape == (960, 945, 3)


def test_what_is_missing_or_no_number_is_left_out(drawn: dict[str, Any]) -> None:
    values = {"sigma": None, "penalty": float("nan"), "estimate": float("inf"), "note": "text", "flag": True}
    content = curves([row(20, **values), {"step": 40, "critic_loss": None}], "a")
    assert drawn["panels"] == ["loss (mean since the last point)"]
    assert drawn["critic loss"] == [(20, -0.05)]
    assert set(drawn) - {"x", "y"} == {"panels", "title", "critic loss", "generator loss"}
    assert decoded(content).shape == (600, 945, 3)


def test_an_evaluation_has_panels_of_its_own(drawn: dict[str, Any]) -> None:
    digits = {"fid": 7.5, "confident": 0.75, "classes": 10.0}
    ring = {"sliced_wasserstein": 0.5, "modes": 8.0, "high_quality": 0.25}
    curves([row(20, noise=0.5, **digits, **ring)], "a")
    panels = ["loss (mean since the last point)", "distance to data", "share of samples", "number", "control"]
    assert drawn["panels"] == panels
    assert drawn["FID"] == [(20, 7.5)]
    assert drawn["classified with confidence above 0.9"] == [(20, 0.75)]
    assert drawn["near a mode"] == [(20, 0.25)]


def test_numbers_are_counted_from_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that stays as it is has no scale of its own, and none has fractions."""
    figures: list[matplotlib.figure.Figure] = []
    monkeypatch.setattr(pictures, "as_png", lambda figure: figures.append(figure) or b"")
    curves([row(20, classes=10.0), row(40, classes=10.0)], "a")
    (axes,) = [axes for axes in figures[0].axes if axes.get_ylabel() == "number"]
    assert axes.get_ylim() == pytest.approx((0, 11.1))
    assert all(float(tick).is_integer() for tick in axes.get_yticks())


def test_distances_over_decades_are_logarithmic_too(drawn: dict[str, Any]) -> None:
    curves([row(20, fid=500.0), row(40, fid=4.0)], "a")
    assert drawn["scale"] == "log"


def test_lines_differ_in_colour_and_in_dashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """By lightness alone, too, for readers who see no colours."""
    styles: list[tuple[str, str]] = []
    plot = matplotlib.axes.Axes.plot

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        styles.append((kwargs["color"], str(kwargs["linestyle"])))
        return plot(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", record)
    curves([row(20, a=1.0, b=2.0, c=3.0, d=4.0), row(40)], "a")
    losses, control = styles[:2], styles[2:]
    for lines in (losses, control):
        colours, dashes = zip(*lines, strict=True)
        assert len(set(colours)) == len(set(dashes)) == len(lines)


@pytest.mark.parametrize(
    ("values", "logarithmic"),
    [
        ([1.0, 100.0], False),
        ([1.0, 101.0], True),
        ([0.0, 1.0, 101.0], True),
        ([-1.0, 1.0, 1000.0], False),
        ([0.0], False),
    ],
)
def test_control_is_logarithmic_beyond_two_decades(
    values: list[float], logarithmic: bool, drawn: dict[str, Any]
) -> None:
    curves([row(20 * i, penalty=value) for i, value in enumerate(values, 1)], "a")
    assert drawn.get("scale") == ("log" if logarithmic else None)


def test_a_run_that_has_not_begun_has_curves_too() -> None:
    assert decoded(curves([], "sngan on digits, step 0")).shape == (600, 945, 3)


def test_no_text_covers_another(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(pictures, "as_png", lambda figure: seen.append(study_checks.covered(figure)) or b"")
    every = {"estimate": 1.0, "fid": 9.0, "confident": 0.5, "classes": 8.0, "sigma": 1.0, "penalty": 0.001}
    every |= {"critic_gradient_norm": 1.0, "generator_gradient_norm": 300.0}
    curves([row(20, **every), row(40, **every)], "wgan-gp on digits, step 40")
    picture(torch.zeros(3, 2), data.load("ring"), "gan on ring, step 1")
    picture(torch.zeros(3, 1), Dataset("line", torch.randn(40, 1)), "gan on line, step 1")
    chords = data.load("chords")
    picture(chords.samples[:16], chords, "seqgan on chords, step 1")
    images = torch.zeros(64, 1, 8, 8)
    rows = [("prdc", "precision 0.91, recall 0.83, density 0.9, coverage 0.71", "5 nearest neighbours")] * 4
    evaluation_page(images, images, rows, "2,000 samples of step 300 against 1,797 of digits")
    assert seen == [[]] * 5
    # That it would be seen.
    figure = matplotlib.figure.Figure()
    figure.text(0.5, 0.5, "one text")
    figure.text(0.55, 0.5, "another one")
    figure.text(0.95, 0.2, "longer than there is place")
    assert [text.split("'")[1] for text in study_checks.covered(figure)] == ["longer than there is place", "one text"]


# --- sentences and sequences


def test_sentences_stand_under_their_images_and_strips_below() -> None:
    samples = torch.stack([torch.full((1, 8, 8), level) for level in (-1.0, 1.0, 0.0)])
    strip = Strip("all dark", "all bright", samples)
    page = np.asarray(captioned(samples, ["dark", "bright", "grey"], [strip]).convert("L")).astype(int)
    cell = page.shape[1] // 3
    centres = [cell // 2 + cell * k for k in range(3)]
    below = page.shape[0] - cell // 2 - 40
    for row in (cell // 2, below):
        assert [int(page[row, x]) for x in centres] == pytest.approx([0, 255, 128], abs=1)
    # Something is written under each image, and above the strip.
    for x in centres:
        assert page[cell : cell + 20, x - cell // 3 : x + cell // 3].min() < 100
    with pytest.raises(ValueError, match="captions must be 3, one for each sample, got 1"):
        captioned(samples, ["dark"])


def test_chords_that_the_grammar_forbids_are_coloured() -> None:
    dataset = data.load("chords")
    orange = np.array([0xD5, 0x5E, 0x00])

    def coloured(samples: Tensor) -> int:
        return int((np.abs(decoded(picture(samples, dataset, "chords")) - orange).sum(2) < 10).sum())

    assert samples_shown(dataset.shape) == 16
    broken = dataset.samples[:16].clone()
    broken[0, -1] = dataset.samples[0, 0].roll(1)
    assert coloured(dataset.samples[:16]) == 0
    assert coloured(broken) > 500
    # Without the data there is no grammar.
    assert decoded(picture(dataset.samples[:3], None, "symbols")).shape[2] == 3
