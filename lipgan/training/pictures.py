"""Samples and training curves, as PNG."""

import io
import math
import textwrap
from collections.abc import Sequence
from typing import Any, Literal

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lipgan.data import Dataset

__all__ = ["curves", "evaluation_page", "image_bytes", "picture", "sample_grid", "samples_shown"]

GRID_PIXELS = 640
GAP_LEVEL = 96

# Of the real points behind a scatter plot: more only hide each other.
_REAL_POINTS = 5000
_DPI = 110


def sample_grid(samples: Tensor) -> Image.Image:
    """Lay images out in a near-square grid, in reading order, magnified by a whole factor.

    Args:
        samples: ``[n, channels, h, w]`` with 1 or 3 channels, floating point, -1 black to 1 white; values
            outside are clipped.

    Raises:
        ValueError: not a non-empty batch of such images.
    """
    if samples.ndim != 4 or len(samples) == 0 or samples.shape[1] not in (1, 3):
        raise ValueError(f"samples must be [n, 1 or 3, h, w] with n >= 1, got shape {tuple(samples.shape)}")
    n, channels, h, w = samples.shape
    columns = math.ceil(math.sqrt(n))
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


def samples_shown(shape: tuple[int, ...]) -> int:
    """How many samples of that shape make a good `picture`: 64 images, or 2,000 points."""
    return 64 if len(shape) == 3 else 2000


def picture(samples: Tensor, data: Dataset | None, title: str) -> bytes:
    """Samples of a generator as PNG: a grid of images, or points of the plane over those of the data.

    Points keep the frame of the data, so that pictures of one run can be laid side by side; the title tells how many
    samples lie outside. Of vectors with more than two coordinates the first two are shown, and the title says so; of
    those with one, a histogram.

    Args:
        samples: ``[n, 1 or 3, h, w]`` as of `sample_grid`, or ``[n, d]``, floating point.
        data: what the samples should look like; None: points alone, in a frame of their own. Not used for images.
        title: printed above points; images have none.

    Raises:
        ValueError: other samples, or none; data of another shape.
    """
    if samples.ndim != 2:
        return image_bytes(sample_grid(samples))
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

    figure = Figure(figsize=(8, 8), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    if d == 1:
        _draw_histogram(axes, points[inside], real, frame)
    else:
        _draw_points(axes, points[inside], real, frame)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", markerscale=3)
    return _png(figure)


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
    axes.scatter(points[:, 0], points[:, 1], s=6, color="tab:blue", linewidths=0, label="samples", alpha=0.7)
    axes.set_xlim(float(frame[0, 0]), float(frame[1, 0]))
    axes.set_ylim(float(frame[0, 1]), float(frame[1, 1]))
    axes.set_aspect("equal")


def _draw_histogram(axes: Axes, points: Tensor, real: Tensor | None, frame: Tensor) -> None:
    low, high = float(frame[0, 0]), float(frame[1, 0])
    for name, values, color in (("data", real, "0.7"), ("samples", points, "tab:blue")):
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
    axes.set_ylabel("density")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


# What the legends call the quantities of a history; others go by their keys.
_LABELS = {
    "sigma": "largest sigma of the critic's weights, before division",
    "penalty": "gradient penalty",
    "critic_gradient_norm": "gradient norm of the critic",
    "generator_gradient_norm": "gradient norm of the generator",
}


def curves(history: Sequence[dict[str, Any]], title: str) -> bytes:
    """What a history says over the steps, as PNG: losses above, what keeps the critic in check below.

    The quantity that the critic estimates has a panel of its own between them, where there is one.

    Args:
        history: rows with the key step; may be empty. Keys that end in "_loss" are losses, "estimate" is the estimate,
            and every other number goes below, on a logarithmic scale where all together span more than two decades and
            none is negative. A row may lack a key that others have; what is None, not a number or not finite is left
            out.
        title: printed above.
    """
    keys = list(dict.fromkeys(key for row in history for key in row if key != "step"))
    series = {key: points for key in keys if (points := _points(history, key))}
    losses = [key for key in series if key.endswith("_loss")]
    estimates = [key for key in series if key == "estimate"]
    control = [key for key in series if key not in losses + estimates]
    panels = [("loss (mean since the last point)", losses)]
    panels += [("estimate of the critic", estimates)] if estimates else []
    panels += [("control", control)] if control else []

    # Figure without pyplot: no global state, no window system.
    figure = Figure(figsize=(8, 3 * max(2, len(panels))), layout="constrained")
    every = list(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0])
    for axes, (ylabel, names) in zip(every, panels, strict=True):
        for index, key in enumerate(names):
            steps, values = zip(*series[key], strict=True)
            label = _LABELS.get(key, key.replace("_", " "))
            # One point makes no line.
            axes.plot(steps, values, f"C{index % 10}", label=label, marker="o" if len(steps) == 1 else None)
        axes.set_ylabel(ylabel)
        axes.grid(alpha=0.3)
        if names:
            axes.legend(loc="best", fontsize="small", framealpha=0.6)
    every[0].set_title("\n".join(textwrap.wrap(title, 80)))
    every[-1].set_xlabel("step (generator updates)")
    if _spans_decades([value for key in control for _, value in series[key]]):
        every[-1].set_yscale("log")
    return _png(figure)


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


def evaluation_page(samples: Tensor, neighbours: Tensor, rows: Sequence[tuple[str, str, str]], title: str) -> bytes:
    """Samples beside the real image nearest to each, and a table of metrics below, on an A4 page, as PNG.

    Args:
        samples: ``[n, 1 or 3, h, w]`` in [-1, 1].
        neighbours: of the same shape, in the same order.
        rows: name, value and definition of each metric.
        title: printed above; long ones are wrapped.
    """
    figure = Figure(figsize=(11.69, 8.27), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(title, 120)), fontsize=9)
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
    return _png(figure)
