"""Formulas as MathML, written into the page when it is built.

MathJax is fetched from a network when a page is read, and image renderers need a LaTeX installation. Browsers draw
MathML themselves, so the pages need neither, and a formula that cannot be converted is a warning, which the build treats
as an error.
"""

from __future__ import annotations

import html

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.typing import ExtensionMetadata
from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)

STYLE = """
math[display="block"] { margin: 0.8em 0; overflow-x: auto; }
div.math { position: relative; }
div.math .eqno { position: absolute; right: 0; }
"""


def to_mathml(latex: str, display: str, node: nodes.Node) -> str:
    """Convert one formula; an unreadable one is shown as text, with a warning."""
    try:
        return convert(latex.strip(), display=display)
    except Exception as error:  # noqa: BLE001 - the converter raises many types
        logger.warning("cannot convert the formula %r: %r", latex, error, location=node)
        return f"<code>{html.escape(latex)}</code>"


def visit_inline(self: HTML5Translator, node: nodes.math) -> None:
    """Write a formula inside a line."""
    self.body.append(to_mathml(node.astext(), "inline", node))
    raise nodes.SkipNode


def visit_block(self: HTML5Translator, node: nodes.math_block) -> None:
    """Write a displayed formula with its number, if it has one."""
    self.body.append(self.starttag(node, "div", CLASS="math"))
    if node.get("number"):
        self.body.append(f'<span class="eqno">({node["number"]})</span>')
    latex = node.astext()
    # A line break at the top level is understood only inside an environment.
    if "\\\\" in latex and "\\begin" not in latex:
        latex = rf"\begin{{aligned}}{latex}\end{{aligned}}"
    self.body.append(to_mathml(latex, "block", node))
    self.body.append("</div>\n")
    raise nodes.SkipNode


def add_style(app: Sphinx) -> None:
    """Add the rules for displayed formulas to every page."""
    if app.builder.format == "html":
        app.add_css_file(None, body=STYLE)


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the renderer under the name ``mathml``."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    app.connect("builder-inited", add_style)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
