"""Bring docs/studies.md up to the results of ``lipgan study all --quick``, and docs/recipes.md to the table of recipes.

    lipgan study all --quick --out runs/studies
    python scripts/gallery.py runs/studies
    lipgan study losses-table --out runs/full
    python scripts/gallery.py --recipes runs/full

Between the markers ``<!-- study NAME -->`` and ``<!-- end -->`` of the page stand figure, caption and verdicts of a
study; they are replaced by what its result folder holds. A study without a section gets one, and one without a result
folder stays as it is. Between ``<!-- studies -->`` and ``<!-- end -->`` is a table of all sections. What stands outside
of the markers, such as remarks, is kept. Figures go to docs/images/studies, with at most 256 colours: with 64
the rarer lines of a figure change theirs.

``--recipes`` takes the trainings of a full run of losses-table, which may be unfinished, into
docs/measurements/recipes.jsonl, and writes what stands between ``<!-- digits -->`` or ``<!-- longer -->`` and
``<!-- end -->`` of docs/recipes.md from all that the file then has. A run that is to add to it starts with it:

    mkdir -p runs/full/losses-table
    cp docs/measurements/recipes.jsonl runs/full/losses-table/units.jsonl
    lipgan study losses-table --seeds 4 --out runs/full
"""

from __future__ import annotations

import argparse
import io
import json
import re
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from lipgan import studies
from lipgan.studies import losses_table, runner
from lipgan.studies.study import FAILS, HOLDS, UNKNOWN

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "studies.md"
RECIPES = ROOT / "docs" / "recipes.md"
TRAININGS = ROOT / "docs" / "measurements" / "recipes.jsonl"
IMAGES = ROOT / "docs" / "images" / "studies"
COLOURS = 256
#: The heading after the last section.
AFTER = "## Change one thing\n"


def block(name: str, content: str) -> str:
    """Content between its markers."""
    return f"<!-- {name} -->\n\n{content}\n<!-- end -->\n"


def pattern(name: str) -> re.Pattern[str]:
    """Finds the block of that name, and its content."""
    return re.compile(rf"<!-- {re.escape(name)} -->\n\n(.*?)\n<!-- end -->\n", re.S)


def section(name: str, verdicts: dict[str, Any]) -> str:
    """Figure, caption and verdicts of a study."""
    study = studies.get(name)
    caption = "\n".join(textwrap.wrap(_plain(study.caption), 120, break_on_hyphens=False))
    rows = "".join(
        f"| {_plain(claim['claim'])} ({_plain(claim['source'])}) | {_plain(claim['seen'])} | {claim['verdict']} |\n"
        for claim in verdicts["claims"]
    )
    picture = f"![{study.title}](images/studies/{name}.png)"
    return f"{picture}\n\n{caption}\n\n| claim | seen | verdict |\n|---|---|---|\n{rows}"


def _plain(text: str) -> str:
    """Text in which Markdown sees no marks."""
    return text.replace("|", "\\|").replace("*", "\\*")


def overview(text: str) -> str:
    """The table of all sections of a page."""
    rows = "| study | claims that hold | verdict of the quick run |\n|---|---|---|\n"
    for name in studies.names():
        found = pattern(f"study {name}").search(text)
        if found is not None:
            verdicts = re.findall(rf"\| ({HOLDS}|{FAILS}|{UNKNOWN}) \|$", found[1], re.M)
            whole = FAILS if FAILS in verdicts else UNKNOWN if UNKNOWN in verdicts else HOLDS
            rows += f"| [{name}](#{name}) | {verdicts.count(HOLDS)} of {len(verdicts)} | {whole} |\n"
    return rows


def update(text: str, found: dict[str, dict[str, Any]]) -> str:
    """The page with the verdicts of some studies, by name."""
    names = studies.names()
    for name, verdicts in found.items():
        new = block(f"study {name}", section(name, verdicts))
        if pattern(f"study {name}").search(text):
            text = pattern(f"study {name}").sub(lambda _, new=new: new, text)
            continue
        later = [f"## {other}\n" for other in names[names.index(name) + 1 :]]
        heading = next((heading for heading in later if f"\n{heading}" in text), AFTER)
        text = text.replace(f"\n{heading}", f"\n## {name}\n\n{new}\n{heading}")
    return pattern("studies").sub(lambda _: block("studies", overview(text)), text)


def figure(path: Path) -> bytes:
    """The picture with fewer colours."""
    with Image.open(path) as picture:
        buffer = io.BytesIO()
        few = picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
        few.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def collect(results: Path, known: Path) -> None:
    """Take the trainings of a result folder into the file of those that are known, one line for each, in order."""
    study, settings = losses_table.STUDY, losses_table.STUDY.settings(False)
    paths = (known, results / study.name / runner.UNITS)
    found = {json.dumps(row.unit): row for path in paths for row in runner.read(path, study.name, settings)}
    places = {name: place for place, name in enumerate(settings["recipes"])}
    rows = sorted(found.values(), key=lambda r: ("length" in r.unit, places[r.unit["recipe"]], r.unit["seed"]))
    runner.write(known, study.name, settings, [replace(row, result=_short(row.result)) for row in rows])


def _short(value: Any) -> Any:
    """With numbers of five digits, which the page rounds to four."""
    if isinstance(value, dict):
        return {name: _short(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_short(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def digits(text: str, path: Path) -> str:
    """The page of the recipes with the tables of what they reach on digits, by the trainings of a file."""
    study, settings = losses_table.STUDY, losses_table.STUDY.settings(False)
    tables = losses_table.tables(settings, runner.read(path, study.name, settings))
    for name, table in zip(("digits", "longer"), tables, strict=True):
        text = pattern(name).sub(lambda _, name=name, table=table: block(name, table.markdown()), text)
    return text


def main() -> None:
    """Read the arguments, and write pages and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", help="the folder that lipgan study all --quick wrote")
    parser.add_argument("--recipes", type=Path, help="the folder that lipgan study losses-table wrote")
    arguments = parser.parse_args()
    if arguments.recipes is not None:
        collect(arguments.recipes, TRAININGS)
        text = RECIPES.read_text(encoding="utf-8")
        RECIPES.write_text(digits(text, TRAININGS), encoding="utf-8")
    if arguments.results is not None:
        gallery(arguments.results)


def gallery(results: Path) -> None:
    """Write page and figures of the studies that have a folder there."""
    found: dict[str, dict[str, Any]] = {}
    for name in studies.names():
        path = results / name / "verdicts.json"
        if not path.exists():
            print(f"{path} is missing: the section stays as it is")
            continue
        found[name] = json.loads(path.read_text(encoding="utf-8"))
        if not found[name]["quick"]:
            raise SystemExit(f"{path} is not of a quick run")
        (IMAGES / f"{name}.png").write_bytes(figure(results / name / "figure.png"))
    PAGE.write_text(update(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    main()
