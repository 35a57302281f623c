"""Figures of the studies, in the style of `lipgan.training.style`, and their files."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from lipgan.training.style import COLOURS, DASHES, MARKERS, WIDTH, as_png, style

__all__ = [
    "COLOURS",
    "DASHES",
    "MARKERS",
    "WIDTH",
    "as_png",
    "as_svg",
    "error_bars",
    "panels",
    "plain_ticks",
    "style",
]


def panels(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, ``height`` inches high in all, and its axes in reading order.

    Call it within `style`, whose values most parts of a figure take when they are made.
    """
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def error_bars(
    axes: Axes, x: Any, values: Any, index: int, label: str, *, line: str | None = None, offset: float = 0.0
) -> None:
    """Mean and standard deviation over seeds in the style of series ``index``; values ``[points, seeds]``."""
    table = np.asarray(values, dtype=float)
    deviation = table.std(1, ddof=1) if table.shape[1] > 1 else None
    axes.errorbar(
        np.asarray(x, dtype=float) + offset,
        table.mean(1),
        yerr=deviation,
        color=COLOURS[index],
        marker=MARKERS[index],
        linestyle=DASHES[index % len(DASHES)] if line is None else line,
        label=label,
    )


def plain_ticks(axis: Axis) -> None:
    """Numbers such as 600 at the ticks of a logarithmic axis of a few octaves, in place of powers of ten."""
    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(1.0, 0.5)))


def as_svg(figure: Figure) -> str:
    """The figure as vectors: one element, which may stand in HTML as it is. The same figure gives the same text."""
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    # HTML has neither the declarations in front nor the names of RDF.
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    return text.strip()
