"""HTML pages from the templates in pipeline/templates. Values are escaped; equal values give equal bytes.

A page loads nothing from elsewhere and runs no script but its own: its content security policy names the hashes of its
style and script.
"""

import base64
import functools
import hashlib

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def render_page(template: str, **values: object) -> bytes:
    """A page from its template's file name, UTF-8."""
    return _environment().get_template(template).render(**values).encode()


def png_uri(png: bytes) -> str:
    """A PNG as the address of an image, so that the page needs no other file."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def csp_hash(text: str) -> Markup:
    """The source by which a page's policy allows this style or script and no other; `'none'` for no text."""
    if not text:
        return Markup("'none'")
    return Markup("'sha256-{}'").format(base64.b64encode(hashlib.sha256(text.encode()).digest()).decode())


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("ddpm_pipeline"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["png_uri"] = png_uri
    environment.filters["csp_hash"] = csp_hash
    return environment
