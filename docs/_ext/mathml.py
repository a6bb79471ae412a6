"""Formulas as MathML, written into the page when it is built.

MathJax is fetched from a network when a page is read, and image renderers need a LaTeX installation. Browsers draw
MathML themselves, so the pages need neither. A formula that cannot be converted is a warning, which the build treats as
an error.
"""

from __future__ import annotations

import html
import re

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.typing import ExtensionMetadata
from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)


SIZED = re.compile(r"\\[bB]igg?[lr]?\s*(\(|\)|\[|\]|\\\{|\\\})")
OPENING = {"(", "[", r"\{"}
# A function's name stands apart from what follows it, unless that is a bracket or the name carries an index.
FUNCTION = re.compile(r"(?<!<msub>)(?<!<msup>)(<mi>(?:log|exp|min|max|sup|inf|det|tr|sin|cos|tanh)</mi>)(?=<m[insfu])")


def prepare(latex: str) -> str:
    """Rewrite what the converter gets wrong: an exponent would hang on the bare closing bracket of a sized pair."""
    # Two commands that the converter does not know, by ones that mean the same and that it does.
    latex = latex.replace("{aligned}", "{split}").replace(r"\arg", r"\operatorname{arg}")
    sized = SIZED.findall(latex)
    if 2 * sum(bracket in OPENING for bracket in sized) != len(sized):
        return latex  # not in pairs
    return SIZED.sub(lambda m: (r"\left" if m.group(1) in OPENING else r"\right") + m.group(1), latex)


def to_mathml(latex: str, display: str, node: nodes.Node) -> str:
    """Convert one formula; an unreadable one is shown as text, with a warning."""
    try:
        written = convert(prepare(latex.strip()), display=display)
        # An unknown command or a stray column mark is written out as text, without an error.
        if unread := re.findall(r">(\\[^<]*|&)<", written):
            raise ValueError(f"not understood: {', '.join(unread)}")
        return FUNCTION.sub(r'\1<mspace width="0.17em"/>', written)
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
        latex = rf"\begin{{split}}{latex}\end{{split}}"
    self.body.append(to_mathml(latex, "block", node))
    self.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the renderer under the name ``mathml``."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
