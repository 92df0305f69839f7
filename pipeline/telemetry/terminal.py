"""Output of commands: one line stays one line, and neither secrets nor control characters get out.

Names come from buckets, archives and other people's jobs. A name with a newline could forge a line of output, and
one with escape sequences could rewrite the terminal (CWE-150), so whatever is not printable is shown as an escape
such as `\\x1b`.
"""

import json
import sys
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ddpm_pipeline.telemetry.redaction import redact

_quiet = ContextVar("quiet", default=False)


@contextmanager
def quiet() -> Generator[None]:
    """`echo` prints only errors in this block: for callers in Python, who are given the facts as objects."""
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)


def one_line(text: str) -> str:
    """`text` with every character that is not printable (newlines, escapes, bidirectional controls, half of a
    surrogate pair) written as its Python escape.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode("ascii")
        for char in text
    )


def echo(*lines: str, error: bool = False) -> None:
    """Print each of `lines` as exactly one line, secrets masked; on stderr for errors and notes about progress.

    One write for all of them, so that threads do not mix their lines.
    """
    if _quiet.get() and not error:
        return
    text = "".join(one_line(redact(line)) + "\n" for line in lines)
    print(text, end="", file=sys.stderr if error else sys.stdout, flush=True)


def echo_json(value: Any) -> None:
    """Print `value` as indented JSON in ASCII, secrets masked; what JSON does not know is printed as text."""
    print(json.dumps(redact(value), indent=2, default=str), flush=True)


def tolerate_narrow_encodings() -> None:
    """Let stdout and stderr write what their encoding (ASCII, Latin-1) lacks as escapes, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # a test's or a notebook's stream may have none
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
