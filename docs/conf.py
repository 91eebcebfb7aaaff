"""How the site is made: Markdown by MyST, docstrings by autodoc, formulas drawn at build time; nothing comes from the network.

scripts/build_docs.py copies this folder, fills the generated parts in and calls Sphinx on the copy.
"""

import html
import re
import sys
from pathlib import Path

import ziamath
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
# Two hyphens begin an option here.
smartquotes = False
highlight_language = "text"

autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
SECTIONS = Config(napoleon_use_rtype=False)
NOTE = re.compile(r"(Numerics|Cost|Source|Letters)\b.*[:.]")
SIGNS = re.compile(r"[*|\\]|_(?=\W|$)")

# One glyph, one path: nothing in a page is referred to by an id that another picture has too.
ziamath.config.svg2 = False

html_theme = "furo"
html_title = f"hybridize {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_math_renderer = "drawn"
html_theme_options = {"navigation_with_keys": False}
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "a11y-high-contrast-dark"


def _drawn(text: str, display: bool) -> str:
    """A formula as a picture in the colour of the text around it: the same in every browser, whatever fonts it has."""
    drawn = ziamath.Latex(text, size=17 if display else 15, color="currentColor", inline=not display)
    below = "" if display else f' style="vertical-align: {drawn.getyofst():.2f}px"'
    return f'<span class="drawn" role="img" aria-label="{html.escape(" ".join(text.split()))}"{below}>{drawn.svg()}</span>'


def inline_formula(translator: HTML5Translator, node: nodes.Element) -> None:
    """A formula within a line."""
    translator.body.append(_drawn(node.astext(), display=False))
    raise nodes.SkipNode


def block_formula(translator: HTML5Translator, node: nodes.Element) -> None:
    """A formula on lines of its own, in a box that scrolls where the page is narrower."""
    box = '<div class="formula" tabindex="0" role="group" aria-label="formula">'
    translator.body.append(f"{box}{_drawn(node.astext().strip(), display=True)}</div>")
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
    app.add_html_math_renderer("drawn", (inline_formula, None), (block_formula, None))
    app.connect("autodoc-process-docstring", plain_docstring)
