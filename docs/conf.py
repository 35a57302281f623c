"""Sphinx configuration of the documentation: ``make docs`` builds it into build/docs, with warnings as errors.

The site needs no network, neither to be built nor to be read: formulas become MathML, in a font that comes with it.
"""

import posixpath
import re
from importlib.util import find_spec
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.errors import SphinxError
from sphinx.writers.html5 import HTML5Translator

import lipgan

ROOT = Path(__file__).parents[1]

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
autodoc_default_options = {"members": True}
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


def setup(app: Sphinx) -> None:
    app.connect("source-read", show_root_page)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
