"""Ray's errors in one line. Ray's own text is a coloured traceback of several processes; the cause is its last line."""

import re

from ray.exceptions import RayTaskError

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_MOST_CHARACTERS = 600
_QUALIFIED = re.compile(r"^(?:[A-Za-z_]\w*\.)+(?=[A-Z]\w*(?:Error|Exception|Interrupt)\b)")


def cause_of(error: BaseException) -> BaseException:
    """The error that a task or worker raised, out of Ray's wrapping."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def reason_line(error: BaseException) -> str:
    """The cause in one line: of a traceback the last line, without colours, cut between words if it is very long.

    The type is named where the message alone may not say what happened.
    """
    cause = cause_of(error)
    lines = [line.strip() for line in _ANSI.sub("", str(cause)).splitlines() if line.strip()]
    if not lines:
        return type(cause).__name__
    is_traceback = any(line.startswith(('File "', "Traceback ", "ray::")) for line in lines)
    text = _QUALIFIED.sub("", lines[-1]) if is_traceback else " ".join(lines)
    if len(text) > _MOST_CHARACTERS:
        text = text[:_MOST_CHARACTERS].rsplit(None, 1)[0] + " …"
    return text
