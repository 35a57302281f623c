"""Sample grids and training curves, as PNG."""

import io
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

__all__ = ["curves", "evaluation_page", "image_bytes", "sample_grid"]

GRID_PIXELS = 640
GAP_LEVEL = 96


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


def curves(history: Sequence[dict[str, Any]], title: str) -> bytes:
    """Losses above, what keeps the critic Lipschitz below, over the steps, as PNG.

    Args:
        history: rows with the keys step, critic_loss, generator_loss, sigma and penalty, the last two None
            where a recipe has none; may be empty.
        title: printed above.
    """
    # Figure without pyplot: no global state, no window system.
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, control = figure.subplots(2, 1, sharex=True)
    steps = [row["step"] for row in history]
    marker = "o" if len(steps) < 2 else None
    losses.plot(steps, [row["critic_loss"] for row in history], label="critic loss", marker=marker)
    losses.plot(steps, [row["generator_loss"] for row in history], label="generator loss", marker=marker)
    losses.set_ylabel("loss (mean since the last point)")
    losses.set_title(title)
    quantities = (
        ("sigma", "tab:green", "largest sigma of the critic's weights, before division"),
        ("penalty", "tab:red", "gradient penalty"),
    )
    for key, color, label in quantities:
        rows = [row for row in history if row[key] is not None]
        if rows:
            values = [row[key] for row in rows]
            control.plot([row["step"] for row in rows], values, color=color, label=label, marker=marker)
    control.set_xlabel("step (generator updates)")
    for axes in (losses, control):
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(loc="best")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


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
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
