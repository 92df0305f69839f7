"""Logging: warnings as text or, with DDPM_LOG=json, every record as a line of JSON.

A JSON line has `time` (UTC), `level`, `logger`, `message`, and the known context: `run`, `rank`, `step`, `shard`.
Secrets are masked in both, tracebacks included.
"""

import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any

from ddpm_pipeline.telemetry.redaction import redact
from ddpm_pipeline.telemetry.terminal import echo, one_line, tolerate_narrow_encodings

FORM_VARIABLE = "DDPM_LOG"
JSON = "json"
PACKAGE = "ddpm_pipeline"
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
# Context of the whole process, and of the current thread.
_process: dict[str, object] = {}
_context: ContextVar[tuple[tuple[str, object], ...]] = ContextVar("log_context", default=())


def as_json() -> bool:
    """Whether this process logs JSON lines."""
    return os.environ.get(FORM_VARIABLE) == JSON


def name_process(**facts: object) -> None:
    """Add context to every later record of this process, such as run=…, rank=…"""
    _process.update(facts)


@contextmanager
def located(**facts: object) -> Generator[None]:
    """Add context to the records of this thread inside the block, such as shard=…"""
    token = _context.set((*_context.get(), *facts.items()))
    try:
        yield
    finally:
        _context.reset(token)


def set_up_logging() -> None:
    """Set up logs and crash tracebacks of this process in the configured format. May be called again."""
    tolerate_narrow_encodings()
    if sys.excepthook is sys.__excepthook__:  # Ray installs its own, which calls the previous one
        sys.excepthook = report_crash
    own = logging.getLogger(PACKAGE)
    # set explicitly: Ray's training workers pass everything from INFO on to the driver's terminal
    own.setLevel(logging.INFO if as_json() else logging.WARNING)
    own.propagate = not as_json()  # parent handlers may use another format
    logging.setLogRecordFactory(_masked_record)
    if not as_json():
        return
    for logger in (own, logging.getLogger()):
        if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
            logger.addHandler(_Stderr())


class JsonLines(logging.Formatter):
    """A record as one line of JSON, with its `extra=` fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        fields: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_process,
            **dict(_context.get()),
            **{key: value for key, value in vars(record).items() if key not in _STANDARD},
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(redact(fields), default=lambda value: redact(str(value)), ensure_ascii=False)


class _Stderr(logging.Handler):
    """Writes to what `sys.stderr` is now, not to what it was when logging was set up."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonLines())

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; a record that cannot be written must not end the job."""
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except (OSError, ValueError):
            self.handleError(record)


def _masked_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    """A record without secrets, whatever logger creates it and whatever handler writes it."""
    record = logging.LogRecord(*args, **kwargs)
    try:
        message = record.getMessage()
    except (TypeError, ValueError):
        return record  # arguments that do not match the message: the handler reports it
    masked = redact(message)
    if str(record.name).partition(".")[0] == PACKAGE:  # our records are one line, whatever names they contain
        masked = one_line(masked)
    if masked != message:
        record.msg, record.args = masked, ()
    if record.exc_info and record.exc_info[0] is not None:
        record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
    return record


def report_crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An excepthook: write the traceback of an uncaught exception in the configured format, secrets masked."""
    if as_json() and issubclass(kind, Exception):
        logging.getLogger(PACKAGE).critical("%s", error, exc_info=(kind, error, trace))
    else:
        # redact the whole text: a private key spans lines
        echo(*redact("".join(traceback.format_exception(kind, error, trace))).splitlines(), error=True)
