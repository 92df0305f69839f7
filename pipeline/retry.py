"""Patience with a service that is away for a while: work that is done is not thrown away for it."""

import logging
import math
import os
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import Outage, UserError

T = TypeVar("T")
OUTAGE_SECONDS = 300.0
PAUSE_SECONDS = 2.0
START_VARIABLE = "DDPM_START_WAIT_SECONDS"
START_SECONDS = 60.0
_log = logging.getLogger(__name__)


def retry_during_outage(action: Callable[[], T], seconds: float = OUTAGE_SECONDS) -> T:
    """`action()`, again and again while the service does not answer; it must be safe to repeat.

    The store retries by itself for some seconds; this bridges its restarts. Raises the Outage when the service stayed
    away for `seconds`.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return action()
        except Outage as error:
            left = deadline - time.monotonic()
            if left < PAUSE_SECONDS:
                raise
            _log.warning("%s; trying again, for up to %.0f s", error, left)
        time.sleep(PAUSE_SECONDS)


def start_seconds() -> float:
    """How long a job that begins waits for a service that is away. Raises UserError for a value that is no number."""
    told = os.environ.get(START_VARIABLE)
    try:
        seconds = START_SECONDS if told is None else float(told)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UserError(
            f"{START_VARIABLE}={told!r}: not a number of seconds; write one, or 0 to wait for nothing"
        )
    return seconds
