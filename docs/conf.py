"""Sphinx configuration of the documentation: ``make docs`` builds it into build/docs, with warnings as errors.

The site needs no network, neither to be built nor to be read: formulas become MathML, in a font that comes with it.
"""

import importlib
import posixpath
import re
import sys
from importlib.util import find_spec
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import SphinxError
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

import lipgan

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import notebook  # noqa: E402

logger = logging.getLogger(__name__)

project = "lipgan"
author = "the lipgan maintainers"
copyright = author
version = release = lipgan.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["images"]
default_role = "py:obj"
highlight_language = "none"

html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"lipgan {release}"
# Formulas want a font with a table for mathematics, which few systems have: ziamath brings STIX Two Math.
FONT = Path(find_spec("ziamath").origin).parent / "fonts" / "STIXTwoMath-Regular.ttf"
html_static_path = ["_static", str(FONT)]
html_css_files = ["lipgan.css"]
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# `$5$` and "3$" are prose where a space or a digit says so.
myst_dmath_allow_space = False
myst_dmath_allow_digits = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# torch.nn.Module documents methods at length that our layers only override.
autodoc_inherit_docstrings = False
# Classes of lipgan.compat are documented where the package that they derive from is not installed, too.
autodoc_mock_imports = ["torchmetrics"]
# The values of tables are longer than their pages.
autodoc_default_options = {"members": True, "no-value": True}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

# Pages that show a file of the repository's root, which has to be readable there, too.
ROOT_PAGES = {"index": "README.md", "contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}
ROOT_LINKS = {name: f"{page}.md" for page, name in ROOT_PAGES.items()}


def show_root_page(app: Sphinx, page: str, source: list[str]) -> None:
    """Put the text of the root's file in place of the page's own, with links as seen from docs/."""
    if page not in ROOT_PAGES:
        return

    def relink(match: re.Match[str]) -> str:
        target = match[1]
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        return f"]({ROOT_LINKS.get(target) or posixpath.relpath(target, 'docs')})"

    file = ROOT / ROOT_PAGES[page]
    app.env.note_dependency(str(file))
    _, _, navigation = source[0].partition("<!-- navigation -->")
    source[0] = re.sub(r"\]\(([^)\s]+)\)", relink, file.read_text(encoding="utf-8")) + navigation


# Pages that can be had as notebooks, too: those whose code is the point.
NOTEBOOKS = [*sorted((ROOT / "docs" / "howto").glob("*.md")), ROOT / "docs" / "metrics.md"]


def offer_notebook(app: Sphinx, page: str, source: list[str]) -> None:
    file = ROOT / "docs" / f"{page}.md"
    if file in NOTEBOOKS:
        place = posixpath.relpath(f"notebooks/{file.stem}.ipynb", posixpath.dirname(page) or ".")
        source[0] += f'\n<p class="notebook"><a href="{place}" download>This page as a notebook</a></p>\n'


def write_notebooks(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        notebook.write(NOTEBOOKS, Path(app.outdir) / "notebooks")


BRACKET = 'lspace="0" rspace="0" stretchy="false"'


def mathml(node: nodes.Element, block: bool) -> str:
    try:
        markup = tex2mathml(node.astext(), as_block=block)
        # Browsers take a bar for an infix operator, with space around it, unless it says that it is a bracket; and they
        # stretch brackets to the height of the line.
        markup = re.sub(r'<mo class="mathopen">([|‖])</mo>', rf'<mo form="prefix" {BRACKET}>\1</mo>', markup)
        markup = re.sub(r"<mo>([|‖])</mo>", rf'<mo form="postfix" {BRACKET}>\1</mo>', markup)
        return re.sub("<mo>([⟨⟩])</mo>", r'<mo stretchy="false">\1</mo>', markup)
    except (MathError, IndexError, SyntaxError) as error:
        raise SphinxError(f"{node.source}:{node.line}: no MathML of {node.astext()!r}: {error}") from error


def visit_math(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(mathml(node, block=False))
    raise nodes.SkipNode


def visit_math_block(self: HTML5Translator, node: nodes.math_block) -> None:
    self.body.append(f'<div class="formula">{mathml(node, block=True)}</div>')
    raise nodes.SkipNode


def split_attributes(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Give attributes that are described together a line each: ``:ivar a, b:`` would be an ``b`` of the type ``a,``."""
    for start in reversed(range(len(lines))):
        if match := re.fullmatch(r"(:ivar )(\w+(?:, \w+)+)(:.*)", lines[start]):
            end = start + 1
            while end < len(lines) and lines[end].startswith("  "):
                end += 1
            rest = lines[start + 1 : end]
            lines[start:end] = [line for own in match[2].split(", ") for line in (match[1] + own + match[3], *rest)]


def leave_out(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Fields of a named tuple say nothing beside the class, which describes them."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def find_undocumented(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn of names in the ``__all__`` of a module with a page that are themselves on no page."""
    domain = env.domains.python_domain
    documented = {id(found) for name in domain.objects if (found := resolve(name)) is not None}
    for module in sorted(domain.modules):
        names = getattr(importlib.import_module(module), "__all__", ())
        for name in names:
            full = f"{module}.{name}"
            if not name.startswith("__") and full not in domain.objects and id(resolve(full)) not in documented:
                logger.warning("%s is public and not in the reference", full, location="api/index")


def resolve(name: str) -> object:
    """What has that public name, and perhaps others; None for a method or a field."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except (ImportError, ValueError):
        return None


def setup(app: Sphinx) -> None:
    app.connect("source-read", show_root_page)
    app.connect("source-read", offer_notebook)
    app.connect("build-finished", write_notebooks)
    app.connect("autodoc-process-docstring", split_attributes, priority=600)  # after napoleon
    app.connect("autodoc-skip-member", leave_out)
    app.connect("env-check-consistency", find_undocumented)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
