"""Pages that stand alone: one HTML file with everything in it, for any browser, without a network."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["document", "duration", "in_words", "picture", "table"]

_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 46rem; color: #1b1b1b; background: #fff;
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
figure { margin: 0; }
figure svg { width: 100%; min-width: 34rem; height: auto; display: block; }
figcaption, .small { color: #444; font-size: .9rem; }
img { max-width: 100%; height: auto; display: block; }
.wide img { min-width: 34rem; }
.frames { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: .75rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ccc; text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid #666; }
td.number { white-space: nowrap; }
code { font-size: .9em; overflow-wrap: anywhere; }
article { border-left: 4px solid #888; padding: .1rem 0 .1rem .9rem; margin: 1rem 0; }
article p { margin: .3rem 0; }
.verdict { font-weight: 600; }
.holds { border-color: #0072B2; } .verdict.holds { color: #005a8e; }
.fails { border-color: #D55E00; } .verdict.fails { color: #a84300; }
.unknown { border-color: #777; } .verdict.unknown { color: #555; }
"""


def document(title: str, body: str) -> str:
    """A whole page of that title (text) and body (HTML)."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text, which may be wider than the page; a number stays on one line with its deviation."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>\n" for row in rows)
    return f'<div class="wide">\n<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>\n'


def picture(png: bytes, description: str) -> str:
    """An image within the page, with what a reader hears who cannot see it."""
    return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{escape(description)}">'


def in_words(value: object) -> str:
    """A JSON value as a reader likes it."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(in_words, value))
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {in_words(entry)}" for name, entry in value.items())
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)


def duration(seconds: float) -> str:
    """With its unit."""
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _cell(text: str) -> str:
    number = re.fullmatch(r"[-+±.,\de ]+|-?inf|nan", text) is not None
    return f'<td class="number">{escape(text)}</td>' if number else f"<td>{escape(text)}</td>"
