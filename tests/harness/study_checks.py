"""What the tests of studies share: a study on its smallest settings, and what a page must be."""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import html5lib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import BboxBase

from lipgan.studies import Analysis, Finished, Study, figures, get
from lipgan.studies.runner import compute


def smaller(name: str, **changes: Any) -> Study:
    """The study with other settings, for the quick run as well."""
    study = get(name)
    unknown = set(changes) - set(study.full)
    assert not unknown, f"{name} has no setting {unknown}"
    return dataclasses.replace(study, full={**study.settings(True), **changes}, quick={})


def finished(study: Study, seeds: Sequence[int] = (0,)) -> list[Finished]:
    """All units, computed here."""
    settings = study.settings(False)
    return [compute(study.run, settings, unit) for unit in study.units(settings, seeds)]


def made(study: Study, result: Any, seeds: Sequence[int] = (0, 1)) -> list[Finished]:
    """Units that nobody has computed, with ``result(unit)`` as their results."""
    units = study.units(study.settings(False), seeds)
    return [Finished(unit, result(unit), 0.1) for unit in units]


def drawn(study: Study, rows: Sequence[Finished]) -> bytes:
    """The figure of these units as PNG; as SVG it is XML, and no text covers another or leaves the figure."""
    with figures.style():
        figure = study.draw(study.settings(False), rows)
        assert ElementTree.fromstring(figures.as_svg(figure)).tag == "{http://www.w3.org/2000/svg}svg"
        assert not covered(figure)
        return figures.as_png(figure)


def covered(figure: Figure) -> list[str]:
    """Texts of a figure that lie over each other, or not wholly within it."""
    figure.draw_without_rendering()
    hidden = [text for axes in figure.axes for text in _hidden(axes)]
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    boxes = [(repr(text.get_text()), text.get_window_extent()) for text in texts if text not in hidden]
    found = [f"{name} leaves the figure" for name, box in boxes if not _within(box, figure.bbox)]
    for (name, a), (other, b) in itertools.combinations(boxes, 2):
        # A pixel of the margins that letters do not fill.
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1:
            found.append(f"{name} over {other}")
    return found


def _hidden(axes: Axes) -> list[Text]:
    """What matplotlib makes and does not draw: labels of ticks beyond the ends, and of axes that are off."""
    hidden: list[Text] = []
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        off = not (axes.axison and axes.get_visible() and axis.get_visible())
        hidden += [axis.label, axis.offsetText] if off else []
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
            if off or not low <= tick.get_loc() <= high:
                hidden += [tick.label1, tick.label2]
    return hidden


def _within(box: BboxBase, outer: BboxBase) -> bool:
    return box.x0 >= outer.x0 - 1 and box.x1 <= outer.x1 + 1 and box.y0 >= outer.y0 - 1 and box.y1 <= outer.y1 + 1


def verdicts(study: Study, rows: Sequence[Finished]) -> dict[str, str]:
    """By the keys of the claims."""
    analysis: Analysis = study.analyse(study.settings(False), rows)
    assert [finding.claim for finding in analysis.findings] == [claim.key for claim in study.claims]
    return {finding.claim: finding.verdict for finding in analysis.findings}


def changed(rows: Sequence[Finished], change: Any) -> list[Finished]:
    """The units with ``change(unit, result)`` in place of each result: what a rule must answer to."""
    return [Finished(row.unit, change(row.unit, dict(row.result)), row.seconds) for row in rows]


class Page:
    """A page as a browser reads it: valid syntax, nothing fetched, each reference within it leads somewhere.

    Attributes:
        seen: the names of all elements, in order.
        text: what a reader sees.
    """

    def __init__(self, source: str) -> None:
        # It reports each error that the standard defines: tags that close nothing, an attribute twice, ...
        parser = html5lib.HTMLParser(namespaceHTMLElements=False)
        root = parser.parse(source)
        errors = [f"line {place[0]}: {code} {values}" for place, code, values in parser.errors]
        assert not errors, errors[:5]
        assert root.get("lang")
        assert (root.findtext("head/title") or "").strip()
        self.seen: list[str] = []
        self.text = ""
        ids: list[str] = []
        targets: list[str] = []
        for element in root.iter():
            if not isinstance(element.tag, str):
                continue  # a comment
            tag = _name(element.tag)
            self.seen.append(tag)
            assert tag not in ("script", "link", "iframe", "object", "metadata")
            attributes = {_name(name): value for name, value in element.attrib.items()}
            assert tag != "img" or attributes.get("alt")
            ids += [attributes["id"]] if "id" in attributes else []
            for name, value in attributes.items():
                if name in ("src", "srcset", "data") or (name == "href" and tag != "a"):
                    inside = value.startswith(("#", "data:image/png;base64,"))
                    assert inside, f"<{tag} {name}={value}> is fetched"
                targets += re.findall(r"url\((.*?)\)", value)
                targets += [value] if name == "href" and value.startswith("#") else []
        for element in root.iter("style"):
            assert "@import" not in (element.text or "")
            assert "http" not in (element.text or "")
            element.text = None
        self.text = "".join(root.itertext())
        assert len(ids) == len(set(ids)), "an id twice"
        assert all(target.startswith("#") and target[1:] in ids for target in targets), targets


def _name(name: str) -> str:
    """Without the name space."""
    return name.rsplit("}", 1)[-1]
