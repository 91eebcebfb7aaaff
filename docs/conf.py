"""How the site is made: Markdown through MyST, docstrings through autodoc, formulas as MathML; nothing comes from the network.

scripts/build_docs.py copies this folder, fills the generated parts in and calls Sphinx on the copy.
"""

import re
import sys
from pathlib import Path

import latex2mathml.converter
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring
from sphinx.writers.html5 import HTML5Translator

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import hybridize  # noqa: E402

project = "hybridize"
copyright = "the hybridize authors, Apache-2.0"
version = release = hybridize.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["messages.yaml", "conf.py"]
myst_enable_extensions = ["dollarmath", "attrs_inline"]
myst_heading_anchors = 3

autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
SECTIONS = Config(napoleon_use_rtype=False)
NOTE = re.compile(r"(Numerics|Cost|Source|Letters)\b.*[:.]")
SIGNS = re.compile(r"[*|\\]|_(?=\W|$)")

html_theme = "furo"
html_title = f"hybridize {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_math_renderer = "mathml"
html_theme_options = {"navigation_with_keys": False}
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "a11y-high-contrast-dark"


def _formula(translator: HTML5Translator, node: nodes.Element, display: str) -> None:
    translator.body.append(latex2mathml.converter.convert(node.astext(), display=display))
    raise nodes.SkipNode


def inline_formula(translator: HTML5Translator, node: nodes.Element) -> None:
    """A formula within a line, which browsers draw themselves."""
    _formula(translator, node, "inline")


def block_formula(translator: HTML5Translator, node: nodes.Element) -> None:
    """A formula on lines of its own, in a box that scrolls where the page is narrower."""
    translator.body.append('<div class="formula" tabindex="0" role="group" aria-label="formula">')
    for part in node.astext().split("\n\n"):
        translator.body.append(latex2mathml.converter.convert(part, display="block"))
    translator.body.append("</div>")
    raise nodes.SkipNode


def plain_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text with names in backticks and Google's sections: what reStructuredText would read as its own
    signs is escaped, and the paragraphs behind the sections (Numerics, Cost, Source) stand apart."""
    out: list[str] = []
    hanging = False
    for line in lines:
        if NOTE.match(line):
            out.append("")
            hanging = True
        elif not line.startswith("    "):
            hanging = False
        pieces = (line.strip() if hanging else line).split("`")
        pieces[::2] = (SIGNS.sub(lambda found: f"\\{found[0]}", piece) for piece in pieces[::2])
        out.append("``".join(pieces))
    if what not in ("attribute", "property"):
        out = GoogleDocstring(out, SECTIONS, app, what, name, obj, options).lines()
    lines[:] = out


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (inline_formula, None), (block_formula, None))
    app.connect("autodoc-process-docstring", plain_docstring)
