"""The style of all figures: of the studies, of a training, of an evaluation.

A figure fills half a page: 6.3 inches wide, letters of 9 points, colours that readers who see fewer of them tell apart,
and markers and dashes beside the colours.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import matplotlib
from matplotlib.figure import Figure

__all__ = ["COLOURS", "DASHES", "MARKERS", "STYLE", "WIDTH", "as_png", "style"]

WIDTH = 6.3
#: Told apart by readers who see fewer colours, and by their dashes where there are none (Okabe and Ito 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

#: The style sheet, as of matplotlib.
STYLE: Mapping[str, Any] = MappingProxyType(
    {
        "font.size": 9,
        "axes.titlesize": 9,
        "figure.titlesize": 9,
        "axes.labelsize": 9,
        "legend.fontsize": 8,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.frameon": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "grid.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.linewidth": 1.6,
        "lines.markersize": 5,
        "errorbar.capsize": 2.5,
        # Letters as outlines: the same picture on every machine.
        "svg.fonttype": "path",
        "svg.hashsalt": "lipgan",
        "savefig.facecolor": "white",
    }
)

_DPI = 150


@contextmanager
def style() -> Iterator[None]:
    """Within, what is drawn has the style sheet."""
    # matplotlib's own type lists every key, and a table of a few of them has another type.
    values: Any = dict(STYLE)
    with matplotlib.rc_context(values):
        yield


def as_png(figure: Figure) -> bytes:
    """The figure as a file of pixels."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()
