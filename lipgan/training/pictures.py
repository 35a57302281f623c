"""Samples and training curves, as PNG."""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from lipgan.data import Dataset
from lipgan.data.chords import CHORDS, legal
from lipgan.training.style import COLOURS, DASHES, WIDTH, as_png, style

__all__ = [
    "LABELS",
    "Strip",
    "captioned",
    "curves",
    "evaluation_page",
    "image_bytes",
    "picture",
    "sample_grid",
    "samples_shown",
]

GRID_PIXELS = 960
GAP_LEVEL = 96
# With more classes than this, columns of classes would be too narrow to look at.
_MOST_COLUMNS = 16
_ROWS_OF_CLASSES = 8
_SEQUENCES, _MOST_SEQUENCES = 16, 64
# Wide enough for the words of a sentence in a legible size.
_CAPTIONED_COLUMNS, _CAPTIONED_CELL = 10, 120

# Of the real points behind a scatter plot: more only hide each other.
_REAL_POINTS = 5000


def sample_grid(samples: Tensor, columns: int | None = None) -> Image.Image:
    """Lay images out in a grid, in reading order, magnified by a whole factor (nearest neighbours).

    Args:
        samples: ``[n, channels, h, w]`` with 1 or 3 channels, floating point, -1 black to 1 white; values
            outside are clipped.
        columns: of the grid; None for a near-square one.

    Raises:
        ValueError: not a non-empty batch of such images, or ``columns`` below 1.
    """
    if samples.ndim != 4 or len(samples) == 0 or samples.shape[1] not in (1, 3):
        raise ValueError(f"samples must be [n, 1 or 3, h, w] with n >= 1, got shape {tuple(samples.shape)}")
    if columns is not None and columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    n, channels, h, w = samples.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    rows = math.ceil(n / columns)
    levels = ((samples.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    levels = F.pad(levels, (0, 0, 0, 0, 0, 0, 0, rows * columns - n), value=GAP_LEVEL)
    # Magnified before the gaps are drawn, so that a gap stays a thin line.
    scale = max(1, GRID_PIXELS // (columns * w))
    levels = levels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    levels = F.pad(levels, (1, 1, 1, 1), value=GAP_LEVEL)
    cells = levels.view(rows, columns, channels, h * scale + 2, w * scale + 2)
    picture = cells.permute(0, 3, 1, 4, 2).reshape(rows * (h * scale + 2), columns * (w * scale + 2), channels)
    return Image.fromarray(picture.squeeze(2).numpy())


def image_bytes(image: Image.Image, format: str = "PNG") -> bytes:
    """The encoded file. ``format`` is a name that Pillow knows."""
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return buffer.getvalue()


class Strip(NamedTuple):
    """Samples between two sentences.

    Attributes:
        start, end: the sentences.
        samples: ``[n, 1 or 3, h, w]``, from one to the other.
    """

    start: str
    end: str
    samples: Tensor


def captioned(samples: Tensor, captions: Sequence[str], strips: Sequence[Strip] = ()) -> Image.Image:
    """Images with a sentence under each, ten to a row, and strips between two sentences below them.

    Args:
        samples: ``[n, 1 or 3, h, w]`` as of `sample_grid`.
        captions: n sentences; long ones take two lines.
        strips: of at most ten images each.

    Raises:
        ValueError: as `sample_grid`, or another number of captions.
    """
    if len(captions) != len(samples):
        raise ValueError(f"captions must be {len(samples)}, one for each sample, got {len(captions)}")
    pictures = [sample_grid(image[None], 1) for image in samples]
    columns = min(_CAPTIONED_COLUMNS, max([len(samples), *(len(strip.samples) for strip in strips)]))
    font, line = _font(13), 16
    cell, row = _CAPTIONED_CELL + 10, _CAPTIONED_CELL + 10 + 2 * line
    rows = math.ceil(len(samples) / columns)
    page = Image.new(pictures[0].mode, (columns * cell, rows * row + len(strips) * (row + line)), "white")
    draw = ImageDraw.Draw(page)

    def place(picture: Image.Image, column: int, top: int) -> None:
        scaled = picture.resize((_CAPTIONED_CELL, _CAPTIONED_CELL), Image.Resampling.NEAREST)
        page.paste(scaled, (column * cell + 5, top + 5))

    for k, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        top = k // columns * row
        place(picture, k % columns, top)
        text = "\n".join(textwrap.wrap(caption, cell // 8, max_lines=2, placeholder=" ..."))
        centre = (k % columns + 0.5) * cell
        draw.multiline_text((centre, top + cell), text, fill="black", font=font, anchor="ma", align="center", spacing=2)
    for k, strip in enumerate(strips):
        top = rows * row + k * (row + line) + line
        draw.text((5, top + line), f"from {strip.start} to {strip.end}", fill="black", font=font)
        for column, image in enumerate(strip.samples[:columns]):
            place(sample_grid(image[None], 1), column, top + 2 * line)
    return page


def _font(size: int) -> ImageFont.FreeTypeFont:
    # Pillow has a font of its own that can be scaled from 10.1 on only.
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _class_columns(samples: Tensor, classes: int) -> Image.Image:
    """A column for each class, its number above; the samples are of class 0, 1, ... in turn."""
    grid = sample_grid(samples, classes)
    cell = grid.width // classes
    strip = cell // 2
    page = Image.new(grid.mode, (grid.width, strip + grid.height), "white")
    page.paste(grid, (0, strip))
    font = _font(strip * 3 // 5)
    draw = ImageDraw.Draw(page)
    for k in range(classes):
        draw.text(((k + 0.5) * cell, strip / 2), str(k), fill="black", font=font, anchor="mm")
    return page


def samples_shown(shape: tuple[int, ...], classes: int = 0, *, sentences: bool = False) -> int:
    """How many samples of that shape make a good `picture`: 64 images, 8 of each class, 2,000 points, 16 sequences.

    Of classes that are ``sentences`` one each, and no more than 100.
    """
    if len(shape) == 2:
        return _SEQUENCES
    if len(shape) != 3:
        return 2000
    if sentences:
        return min(classes, 10 * _CAPTIONED_COLUMNS)
    return _ROWS_OF_CLASSES * classes if 2 <= classes <= _MOST_COLUMNS else 64


@style()
def picture(samples: Tensor, data: Dataset | None, title: str, classes: int = 0) -> bytes:
    """Samples of a generator as PNG: a grid of images, points of the plane over those of the data, or sequences.

    Images of 2 to 16 classes are in columns, one for each class, under its number. Of sequences each has a row of
    symbols, those of the data set "chords" by name and with what its grammar forbids in another colour.

    Points keep the frame of the data, so that pictures of one run can be laid side by side; the title tells how many
    samples lie outside. Of vectors with more than two coordinates the first two are shown, and the title says so; of
    those with one, a histogram.

    Args:
        samples: ``[n, 1 or 3, h, w]`` as of `sample_grid`, ``[n, d]``, or sequences ``[n, length, symbols]`` by their
            largest entries, floating point.
        data: what the samples should look like; None: points alone, in a frame of their own, and symbols by number. Not
            used for images.
        title: printed above points; images have none.
        classes: of a generator that was asked for them in turn, as by `Trainer.sample`; 0 without. Not used for points.

    Raises:
        ValueError: other samples, or none; data of another shape.
    """
    if samples.ndim == 3:
        return _sequences(samples, data, title)
    if samples.ndim != 2:
        in_columns = 2 <= classes <= _MOST_COLUMNS
        return image_bytes(_class_columns(samples, classes) if in_columns else sample_grid(samples))
    n, d = samples.shape
    if n == 0 or d == 0:
        raise ValueError(f"samples must be [n, d] with n >= 1 and d >= 1, got shape {tuple(samples.shape)}")
    if data is not None and data.shape != (d,):
        raise ValueError(f"samples must have the shape of the data, {data.shape}, got {(d,)}")
    points = samples.detach().double().cpu()[:, :2]
    real = None if data is None else data.samples[:_REAL_POINTS].double().cpu()[:, :2]
    points = points[points.isfinite().all(1)]
    frame = _frame(points if real is None else real)
    inside = ((points >= frame[0]) & (points <= frame[1])).all(1)
    title = "\n".join(textwrap.wrap(title, 80))
    if d > 2:
        title += f"\nthe first two of {d} coordinates"
    if n > int(inside.sum()):
        title += f"\n{n - int(inside.sum())} of {n} samples lie outside"

    figure = Figure(figsize=(WIDTH, WIDTH), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    if d == 1:
        _draw_histogram(axes, points[inside], real, frame)
    else:
        _draw_points(axes, points[inside], real, frame)
    # Below the points, where it hides none.
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, markerscale=3)
    return as_png(figure)


def _sequences(samples: Tensor, data: Dataset | None, title: str) -> bytes:
    """A row for each sequence, a cell for each symbol."""
    if len(samples) == 0:
        raise ValueError(f"samples must be [n, length, symbols] with n >= 1, got shape {tuple(samples.shape)}")
    shown = samples[:_MOST_SEQUENCES].detach().float().cpu()
    n, length, symbols = shown.shape
    of_chords = data is not None and data.name == "chords"
    names = list(CHORDS) if of_chords else [str(k) for k in range(symbols)]
    fine = legal(shown) if of_chords else torch.ones(n, length, dtype=torch.bool)
    figure = Figure(figsize=(0.7 * length + 1, 0.4 * n + 1.6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(fine.numpy(), cmap=ListedColormap([COLOURS[1], "0.9"]), vmin=0, vmax=1, aspect="auto")
    for row, sequence in enumerate(shown.argmax(2).tolist()):
        for column, symbol in enumerate(sequence):
            colour = "black" if fine[row, column] else "white"
            axes.text(column, row, names[symbol], ha="center", va="center", color=colour)
    title = "\n".join(textwrap.wrap(title, 80))
    if of_chords:
        title += f"\n{float(fine.double().mean()):.1%} of these chords are allowed by the grammar, the others coloured"
    if len(samples) > n:
        title += f"\nthe first {n} of {len(samples)}"
    axes.set_title(title)
    axes.set_xticks(range(length), [str(k + 1) for k in range(length)])
    axes.set_yticks(range(n), [str(k + 1) for k in range(n)])
    axes.set_xlabel("place in the sequence")
    axes.set_ylabel("sample")
    axes.tick_params(length=0)
    axes.grid(visible=False)
    return as_png(figure)


def _frame(points: Tensor) -> Tensor:
    """The corners ``[2, d]`` of a box around ``points [n, d]``, with a margin; all its sides of one length."""
    if len(points) == 0:
        return torch.stack([-torch.ones(points.shape[1]), torch.ones(points.shape[1])]).double()
    lowest, highest = points.aminmax(dim=0)
    half = 0.6 * float((highest - lowest).max()) or 1.0
    centre = (lowest + highest) / 2
    return torch.stack([centre - half, centre + half])


def _draw_points(axes: Axes, points: Tensor, real: Tensor | None, frame: Tensor) -> None:
    if real is not None:
        axes.scatter(real[:, 0], real[:, 1], s=6, color="0.7", linewidths=0, label="data")
    axes.scatter(points[:, 0], points[:, 1], s=6, color=COLOURS[0], linewidths=0, label="samples", alpha=0.7)
    axes.set_xlim(float(frame[0, 0]), float(frame[1, 0]))
    axes.set_ylim(float(frame[0, 1]), float(frame[1, 1]))
    axes.set_aspect("equal")
    axes.set_xlabel("first coordinate")
    axes.set_ylabel("second coordinate")


def _draw_histogram(axes: Axes, points: Tensor, real: Tensor | None, frame: Tensor) -> None:
    low, high = float(frame[0, 0]), float(frame[1, 0])
    for name, values, color in (("data", real, "0.7"), ("samples", points, COLOURS[0])):
        if values is not None and len(values):
            shape: Literal["stepfilled", "step"] = "stepfilled" if name == "data" else "step"
            axes.hist(
                values[:, 0].numpy(),
                bins=60,
                range=(low, high),
                density=True,
                histtype=shape,
                color=color,
                lw=1.5,
                label=name,
            )
    axes.set_xlim(low, high)
    axes.set_xlabel("coordinate")
    axes.set_ylabel("density")


#: What a legend or a line of text calls the quantities of a history; others go by their keys.
LABELS: Mapping[str, str] = MappingProxyType(
    {
        "sigma": "largest sigma of the critic, before division",
        "penalty": "gradient penalty",
        "classification": "cross entropy of the critic's classifier",
        "critic_gradient_norm": "gradient norm of the critic",
        "generator_gradient_norm": "gradient norm of the generator",
        "fid": "FID",
        "sliced_wasserstein": "sliced Wasserstein distance",
        "confident": "classified with confidence above 0.9",
        "high_quality": "near a mode",
        "digits_as_asked": "digits of the class that the sentence says",
        "count_as_asked": "as many digits as the sentence says",
        "stroke_as_asked": "strokes as the sentence says",
        "classes": "classes found with that confidence",
        "modes": "modes found",
        "legal": "allowed by the grammar",
        "phrases": "different phrases",
        "grammar_nll": "minus log likelihood under the grammar (nats per phrase)",
        "nll": "minus log likelihood of the data (nats)",
        "matching": "score of the right sentence less that of a wrong one",
    }
)

_LOSS = "loss (mean since the last point)"

_AS_ASKED = ("digits_as_asked", "count_as_asked", "stroke_as_asked")
_SHARES = ("confident", "high_quality", "legal", "phrases", "reward", *_AS_ASKED)

# The panels of the curves, from above, and the keys in them; the last one takes all that is left.
_PANELS = (
    (_LOSS, lambda key: key.endswith("_loss")),
    ("estimate of the critic", lambda key: key == "estimate"),
    ("distance to data", lambda key: key in ("fid", "sliced_wasserstein", "grammar_nll")),
    ("share of samples", lambda key: key in _SHARES),
    ("number", lambda key: key in ("classes", "modes")),
    ("control", lambda key: True),
)
_SCALED = ("distance to data", "control")


@style()
def curves(history: Sequence[dict[str, Any]], title: str) -> bytes:
    """What a history says over the steps, as PNG: losses above, what keeps the critic in check below.

    Between them, where there are such numbers, a panel each for the quantity that the critic estimates and for the
    distances, the shares and the numbers of an evaluation.

    Args:
        history: rows with the key step; may be empty. Keys that end in "_loss" are losses, "estimate" is the estimate,
            those of an evaluation are its own, and every other number goes below. Distances and what is below have a
            logarithmic scale where all in the panel span more than two decades and none is negative. A row may lack a
            key that others have; what is None, not a number or not finite is left out.
        title: printed above.
    """
    keys = list(dict.fromkeys(key for row in history for key in row if key != "step"))
    series = {key: points for key in keys if (points := _points(history, key))}
    panels: dict[str, list[str]] = {name: [] for name, _ in _PANELS}
    for key in series:
        panels[next(name for name, belongs in _PANELS if belongs(key))].append(key)
    shown = {name: names for name, names in panels.items() if names or name == _LOSS}

    # Figure without pyplot: no global state, no window system.
    heights = [2.4 if name in (_LOSS, "control") else 1.6 for name in shown]
    figure = Figure(figsize=(WIDTH, max(4, sum(heights))), layout="constrained")
    every = list(figure.subplots(len(shown), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    for axes, (ylabel, names) in zip(every, shown.items(), strict=True):
        for index, key in enumerate(names):
            steps, values = zip(*series[key], strict=True)
            axes.plot(
                steps,
                values,
                color=COLOURS[index % len(COLOURS)],
                linestyle=DASHES[index % len(DASHES)],
                label=LABELS.get(key, key.replace("_", " ")),
                # One point makes no line.
                marker="o" if len(steps) == 1 else None,
            )
        axes.set_ylabel(ylabel)
        if ylabel == "number":
            # From nothing found, in whole numbers: one that does not change has no scale of its own.
            axes.set_ylim(0, 1.1 * max(value for key in names for _, value in series[key]) + 0.1)
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        if names:
            # Above the panel, where it hides no curve.
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, columnspacing=1, borderpad=0)
        if ylabel in _SCALED and _spans_decades([value for key in names for _, value in series[key]]):
            axes.set_yscale("log")
    figure.suptitle("\n".join(textwrap.wrap(title, 80)))
    figure.align_ylabels()
    every[-1].set_xlabel("step (generator updates)")
    if history:
        every[-1].set_xlim(0, 1.02 * max(row["step"] for row in history) or None)
    return as_png(figure)


def _points(history: Sequence[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    pairs = [(row["step"], row.get(key)) for row in history]
    return [
        (step, float(value))
        for step, value in pairs
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    ]


def _spans_decades(values: list[float]) -> bool:
    positive = [value for value in values if value > 0]
    return bool(positive) and min(values) >= 0 and max(positive) > 100 * min(positive)


@style()
def evaluation_page(samples: Tensor, neighbours: Tensor, rows: Sequence[tuple[str, str, str]], title: str) -> bytes:
    """Samples beside the real image nearest to each, and a table of metrics below, on an A4 page, as PNG.

    Args:
        samples: ``[n, 1 or 3, h, w]`` in [-1, 1].
        neighbours: of the same shape, in the same order.
        rows: name, value and definition of each metric.
        title: printed above; long ones are wrapped.
    """
    figure = Figure(figsize=(11.69, 8.27), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(title, 120)))
    grid = figure.add_gridspec(2, 2, height_ratios=(5, 0.6 + 0.3 * len(rows)))
    for column, (name, images) in enumerate((("samples", samples), ("nearest real image of each", neighbours))):
        axes = figure.add_subplot(grid[0, column])
        picture = sample_grid(images)
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(name)
        axes.axis("off")
    axes = figure.add_subplot(grid[1, :])
    axes.axis("off")
    table = axes.table(
        [list(row) for row in rows],
        colLabels=["metric", "value", "definition"],
        colWidths=[0.17, 0.5, 0.33],
        cellLoc="left",
        loc="center",
    )
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.scale(1, 1.4)
    return as_png(figure)
