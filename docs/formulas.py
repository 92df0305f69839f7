"""Writes the formulas of the site as MathML, so that its pages need no script from elsewhere.

A hook of mkdocs.yml: mkdocs calls `on_page_content` with the HTML of each page, in which pymdownx.arithmatex has marked
the formulas.
"""

import html
import re

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: object) -> str:
    """The page, with MathML in place of LaTeX."""
    return _FORMULA.sub(_as_mathml, content)


def _as_mathml(found: re.Match[str]) -> str:
    display = "block" if found[1] == "div" else "inline"
    return convert(html.unescape(found[2]).strip(), display=display)
