"""Self-contained HTML pages from the templates in pipeline/templates. Values are escaped; equal values, equal bytes."""

import base64
import functools

from jinja2 import Environment, PackageLoader, StrictUndefined


def render_page(template: str, **values: object) -> bytes:
    """A page from its template's file name, UTF-8."""
    return _environment().get_template(template).render(**values).encode()


def png_uri(png: bytes) -> str:
    """A PNG as the address of an image, so that the page needs no other file."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("pipeline"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["png_uri"] = png_uri
    return environment
