"""The page of a study: one HTML file with everything in it, for any browser, without a network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape

from lipgan.studies.study import FAILS, HOLDS, LECTURES, UNKNOWN, Analysis, Settings, Study, Table

__all__ = ["overview", "render"]

_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 46rem; color: #1b1b1b; background: #fff;
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
figure { margin: 0; }
figure svg { width: 100%; min-width: 34rem; height: auto; display: block; }
figcaption, .small { color: #444; font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ccc; text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid #666; }
code { font-size: .9em; overflow-wrap: anywhere; }
article { border-left: 4px solid #888; padding: .1rem 0 .1rem .9rem; margin: 1rem 0; }
article p { margin: .3rem 0; }
.verdict { font-weight: 600; }
.holds { border-color: #0072B2; } .verdict.holds { color: #005a8e; }
.fails { border-color: #D55E00; } .verdict.fails { color: #a84300; }
.unknown { border-color: #777; } .verdict.unknown { color: #555; }
"""

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
    return _document(
        study.title,
        f"<h1>{escape(study.title)}</h1>\n<p>Verdict: {_verdict(analysis.verdict)} ({holding} of {len(study.claims)} "
        f"claims hold)</p>\n"
        f'<figure>\n<div class="wide">\n{figure}\n</div>\n<figcaption>{escape(study.caption)}</figcaption>\n</figure>\n'
        f"<h2>Claims, and what was seen</h2>\n{claims}"
        f'<p class="small">{escape(lectures)}.</p>\n'
        f"<h2>Numbers</h2>\n{_table(analysis.table)}"
        f"<h2>What was run</h2>\n<p>{escape(study.method)}</p>\n"
        f"<p>{len(seeds)} seeds ({_seeds(seeds)}), {units} units of work, {_duration(seconds)} on one core. "
        f"Spreads are standard deviations over the seeds.</p>\n"
        f"{_table(_as_table(settings))}"
        f"<p>To repeat it: <code>{escape(command)}</code></p>\n"
        f'<p class="small">{escape(machine)}</p>\n',
    )


def overview(rows: Sequence[tuple[Study, Analysis]]) -> str:
    """The page of several studies, with a link to each in the folder of its name."""
    entries = "".join(
        f'<tr><td><a href="{study.name}/index.html">{escape(study.title)}</a></td>'
        f"<td>{escape(claim.text)}</td><td>{_verdict(finding.verdict)}</td></tr>\n"
        for study, analysis in rows
        for claim, finding in zip(study.claims, analysis.findings, strict=True)
    )
    return _document(
        "Studies",
        '<h1>Studies</h1>\n<div class="wide">\n<table>\n<thead><tr><th>study</th><th>claim</th><th>verdict</th></tr>'
        f"</thead>\n<tbody>\n{entries}</tbody>\n</table>\n</div>\n",
    )


def _document(title: str, body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def _verdict(verdict: str) -> str:
    return f'<span class="verdict {_CLASSES[verdict]}">{_MARKS[verdict]} {escape(verdict)}</span>'


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
    body = "".join("<tr>" + "".join(f"<td>{_unbroken(cell)}</td>" for cell in row) + "</tr>\n" for row in table.cells())
    return f'<div class="wide">\n<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>\n'


def _unbroken(cell: str) -> str:
    """A number stays on one line with its deviation."""
    return escape(cell).replace(" ± ", "&nbsp;±&nbsp;")


def _as_table(settings: Settings) -> Table:
    return Table(("setting", "value"), tuple((name, _in_words(value)) for name, value in settings.items()))


def _in_words(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_in_words, value))
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_in_words(entry)}" for name, entry in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def _seeds(seeds: Sequence[int]) -> str:
    return str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
