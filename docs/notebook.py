"""Pages of the documentation as notebooks, for those who want to run and change their code.

A page is the source: its Python blocks, which the tests run, become cells of code, and what is between them cells of
text. ``make docs`` writes the notebooks into build/docs/notebooks.
"""

import json
import re
from pathlib import Path

# A block that the tests leave out stays text.
CODE = re.compile(r"(?<!-->\n)^```python\n(.*?)^```$", re.M | re.S)


def cells(page: str) -> list[tuple[str, str]]:
    """``("markdown" or "code", text)`` of the parts of a page, in order."""
    parts = CODE.split(page)  # text and code in turn
    kinds = ("markdown", "code")
    found = [(kinds[index % 2], part.strip("\n")) for index, part in enumerate(parts)]
    return [(kind, text if kind == "code" else alone(text)) for kind, text in found if text]


def alone(text: str) -> str:
    """Text without what needs the other pages beside it: links to them keep their words."""
    return re.sub(r"\[([^\]]*)\]\((?![a-z]+:)[^)]*\)", r"\1", re.sub(r"<!--.*?-->\n?", "", text))


def notebook(page: str) -> str:
    """The page in the format of Jupyter, version 4.5."""
    parts = []
    for index, (kind, text) in enumerate(cells(page)):
        part = {"id": f"cell-{index}", "cell_type": kind, "metadata": {}, "source": text.splitlines(keepends=True)}
        parts.append(part if kind == "markdown" else {**part, "execution_count": None, "outputs": []})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    content = {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel}, "cells": parts}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def write(pages: list[Path], folder: Path) -> None:
    """A notebook of each page in the folder, under the name of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    for page in pages:
        (folder / f"{page.stem}.ipynb").write_text(notebook(page.read_text(encoding="utf-8")), encoding="utf-8")
