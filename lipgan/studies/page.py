"""The page of a study: one HTML file with everything in it, for any browser, without a network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from lipgan._html import document, duration, in_words, table
from lipgan.studies.study import FAILS, HOLDS, LECTURES, UNKNOWN, Analysis, Settings, Study

__all__ = ["overview", "render"]

_CLASSES = {HOLDS: "holds", FAILS: "fails", UNKNOWN: "unknown"}
_MARKS = {HOLDS: "✓", FAILS: "✗", UNKNOWN: "?"}


def render(
    study: Study,
    settings: Settings,
    analysis: Analysis,
    svg: str,
    *,
    seeds: Sequence[int],
    units: int,
    seconds: float,
    command: str,
    machine: str,
) -> str:
    """The page.

    Args:
        svg: the figure, one element.
        seeds: that were run.
        units: how many units of work.
        seconds: what they took together, on one core each.
        command: what repeats the run.
        machine: versions and processor, in a line.
    """
    claims = "".join(
        f'<article class="{_CLASSES[finding.verdict]}">\n<p>{escape(claim.text)} '
        f'<span class="small">({escape(claim.source)})</span></p>\n'
        f"<p>{_verdict(finding.verdict)}: {escape(finding.seen)}</p>\n"
        f'<p class="small">Rule, fixed before the run: {escape(claim.rule)}</p>\n</article>\n'
        for claim, finding in zip(study.claims, analysis.findings, strict=True)
    )
    # A figure in HTML needs no namespaces, and a reader who cannot see it needs its caption.
    figure = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(study.caption)}" ', 1)
    sources = " ".join(claim.source for claim in study.claims)
    lectures = "; ".join(f"{name}: {title}" for name, title in LECTURES.items() if name in sources)
    holding = sum(finding.verdict == HOLDS for finding in analysis.findings)
    return document(
        study.title,
        f"<h1>{escape(study.title)}</h1>\n<p>Verdict: {_verdict(analysis.verdict)} ({holding} of {len(study.claims)} "
        f"claims hold)</p>\n"
        f'<figure>\n<div class="wide">\n{figure}\n</div>\n<figcaption>{escape(study.caption)}</figcaption>\n</figure>\n'
        f"<h2>Claims, and what was seen</h2>\n{claims}"
        f'<p class="small">{escape(lectures)}.</p>\n'
        f"<h2>Numbers</h2>\n{table(analysis.table.columns, analysis.table.cells())}"
        f"<h2>What was run</h2>\n<p>{escape(study.method)}</p>\n"
        f"<p>{_seeds(seeds)}, {units} units of work, {duration(seconds)} on one core. "
        f"Spreads are standard deviations over the seeds.{_chance(study, len(seeds))}</p>\n"
        f"{_settings(settings)}"
        f"<p>To repeat it: <code>{escape(command)}</code></p>\n"
        f'<p class="small">{escape(machine)}</p>\n',
    )


def overview(rows: Sequence[tuple[Study, Analysis]]) -> str:
    """The page of several studies, with a link to each in the folder of its name."""
    entries = ""
    for study, analysis in rows:
        link = f'<a href="{study.name}/index.html">{escape(study.title)}</a>'
        # One cell beside all claims of the study.
        entries += f'<tr><td rowspan="{len(study.claims)}">{link}</td>'
        entries += "<tr>".join(
            f"<td>{escape(claim.text)}</td><td>{_verdict(finding.verdict)}</td></tr>\n"
            for claim, finding in zip(study.claims, analysis.findings, strict=True)
        )
    return document(
        "Studies",
        '<h1>Studies</h1>\n<div class="wide">\n<table>\n<thead><tr><th>study</th><th>claim</th><th>verdict</th></tr>'
        f"</thead>\n<tbody>\n{entries}</tbody>\n</table>\n</div>\n",
    )


def _verdict(verdict: str) -> str:
    return f'<span class="verdict {_CLASSES[verdict]}">{_MARKS[verdict]} {escape(verdict)}</span>'


def _chance(study: Study, seeds: int) -> str:
    """How little a rule asks that few seeds have to pass."""
    if not any("in every seed" in claim.rule for claim in study.claims):
        return ""
    passed = "in the one seed" if seeds == 1 else f"in all of {seeds} seeds"
    return f" A comparison that only chance decides comes out as claimed {passed} one time in {2**seeds}."


def _settings(settings: Settings) -> str:
    return table(("setting", "value"), [(name, in_words(value)) for name, value in settings.items()])


def _seeds(seeds: Sequence[int]) -> str:
    return f"1 seed ({seeds[0]})" if len(seeds) == 1 else f"{len(seeds)} seeds ({seeds[0]} to {seeds[-1]})"
