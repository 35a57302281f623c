"""What the tests of studies share: a study on its smallest settings, and what a page must be."""

import dataclasses
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from typing import Any

from lipgan.studies import Analysis, Finished, Study, figures, get
from lipgan.studies.runner import compute

# Elements without an end tag.
VOID = {"meta", "link", "br", "hr", "img", "input", "path", "use", "rect", "line", "circle"}


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
    """The figure of these units as PNG."""
    with figures.style():
        return figures.as_png(study.draw(study.settings(False), rows))


def verdicts(study: Study, rows: Sequence[Finished]) -> dict[str, str]:
    """By the keys of the claims."""
    analysis: Analysis = study.analyse(study.settings(False), rows)
    assert [finding.claim for finding in analysis.findings] == [claim.key for claim in study.claims]
    return {finding.claim: finding.verdict for finding in analysis.findings}


def changed(rows: Sequence[Finished], change: Any) -> list[Finished]:
    """The units with ``change(unit, result)`` in place of each result: what a rule must answer to."""
    return [Finished(row.unit, change(row.unit, dict(row.result)), row.seconds) for row in rows]


class Page(HTMLParser):
    """Checks that tags are balanced and nothing is fetched; ``text`` is what a reader sees."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        assert source.startswith("<!DOCTYPE html>\n")
        self.feed(source)
        self.close()
        assert not self.open, f"not closed: {self.open}"
        assert len(self.ids) == len(set(self.ids)), "an id twice"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._look(tag, attrs)
        if tag not in VOID or (self.open and "svg" in self.open):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._look(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            assert "@import" not in data
            assert "http" not in data
        else:
            self.text += data

    def _look(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        assert tag not in ("script", "link", "iframe", "object", "metadata")
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice"
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "xlink:href", "srcset", "data"):
                assert str(value).startswith(("#", "data:image/png;base64,")), f"<{tag} {name}={value}> is fetched"
            for target in re.findall(r"url\((.*?)\)", str(value)):
                assert target.startswith("#"), f"{target} is fetched"
