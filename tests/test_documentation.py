"""The Python examples of the documentation run: code blocks of the Markdown pages, and doctests of the package.

A block below the line ``<!-- not run: REASON -->`` is left out. The blocks of a page run in order, in one namespace.
"""

import contextlib
import doctest
import importlib
import importlib.util
import io
import json
import math
import re
from pathlib import Path

import pytest
import torch

import lipgan

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- not run: (?P<reason>.+) -->\n+)?^```python\n(?P<code>.*?)^```$", re.M | re.S)


def blocks(page: Path) -> list[re.Match[str]]:
    return list(BLOCK.finditer(page.read_text(encoding="utf-8")))


def modules_with_examples() -> list[str]:
    """The modules of lipgan that have a line with ``>>>``; the others need not be imported."""
    files = [file for file in sorted((ROOT / "lipgan").rglob("*.py")) if ">>> " in file.read_text(encoding="utf-8")]
    return [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]


class Checker(doctest.OutputChecker):
    """Takes numbers for equal that differ in their fourth digit: the last ones depend on the instruction set."""

    NUMBER = re.compile(r"-?\d+\.\d*(?:e[+-]?\d+)?")

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        if super().check_output(want, got, optionflags):
            return True
        wanted, found = ([float(x) for x in self.NUMBER.findall(text)] for text in (want, got))
        close = len(wanted) == len(found) and all(map(lambda x, y: abs(x - y) <= 2e-4 * (1 + abs(x)), wanted, found))
        return close and super().check_output(self.NUMBER.sub("x", want), self.NUMBER.sub("x", got), optionflags)


@pytest.fixture(autouse=True)
def _scratch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks_run(page):
    namespace = {"__name__": "__main__"}
    text = page.read_text(encoding="utf-8")
    for block in blocks(page):
        if block["reason"]:
            continue
        # Blank lines in front give an error the line number of the page.
        code = "\n" * text.count("\n", 0, block.start("code")) + block["code"]
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code, str(page), "exec"), namespace)


@pytest.mark.parametrize("name", modules_with_examples())
def test_doctests(name):
    module = importlib.import_module(name)
    # What the examples take for granted beside the names of their own module.
    given = {
        "lipgan": lipgan,
        "math": math,
        "torch": torch,
        "critic": torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1)),
        "real": torch.rand(4, 1, 8, 8),
        "fake": torch.rand(4, 1, 8, 8),
        "images": torch.rand(4, 1, 8, 8),
        "loss": torch.zeros(()),
    }
    runner = doctest.DocTestRunner(
        Checker(), verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    )
    tests = [test for test in doctest.DocTestFinder().find(module, globs={**given, **vars(module)}) if test.examples]
    assert tests, f"{name} has '>>>' outside of its docstrings"
    report = io.StringIO()
    failed = sum(runner.run(test, out=report.write).failed for test in tests)
    assert failed == 0, report.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_name_files_that_exist(page):
    """Relative links, and paths of the repository in code spans."""
    text = page.read_text(encoding="utf-8")
    links = [page.parent / link for link in re.findall(r"\]\(([^)#\s]+)", text) if not re.match(r"[a-z]+:", link)]
    paths = [ROOT / path for path in re.findall(r"`((?:csrc|docs|kernels|lipgan|scripts|tests)/[\w./]*)`", text)]
    missing = [str(path) for path in links + paths if not path.exists()]
    assert not missing, missing


def test_figures_of_studies_are_those_of_their_page():
    """What docs/metrics.md quotes with a deviation stands in docs/studies.md, where `scripts/gallery.py` puts it."""
    quoted = re.findall(
        r"-?[\d.]+ ± [\d.]+(?:e-\d+)?(?<!\.)", (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    )
    studies = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
    assert quoted
    assert [figure for figure in quoted if figure not in studies] == []


PAGE = """# Title

See [the other](other.md) and [a site](https://example.org).

```python
x = 1
```

<!-- not run: takes a GPU -->
```python
y = 2
```

```bash
lipgan doctor
```

```python
z = x + 1
```
"""


def test_a_notebook_has_the_code_that_runs_here_and_all_of_the_text():
    spec = importlib.util.spec_from_file_location("notebook", ROOT / "docs" / "notebook.py")
    notebook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(notebook)
    content = json.loads(notebook.notebook(PAGE))
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in content["cells"]]
    assert [kind for kind, _ in cells] == ["markdown", "code", "markdown", "code"]
    assert cells[0][1] == "# Title\n\nSee the other and [a site](https://example.org)."
    assert cells[2][1] == "```python\ny = 2\n```\n\n```bash\nlipgan doctor\n```"
    namespace = {}
    for kind, text in cells:
        if kind == "code":
            exec(text, namespace)
    assert (namespace["x"], namespace["z"]) == (1, 2)
    # The same blocks as `test_code_blocks_run` takes, of every page.
    for page in PAGES:
        code = [text for kind, text in notebook.cells(page.read_text(encoding="utf-8")) if kind == "code"]
        assert code == [block["code"].strip("\n") for block in blocks(page) if not block["reason"]], page
