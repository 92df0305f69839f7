"""Patience with a store that is away for a while: work that is done is not thrown away for it."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.store.base import StoreUnreachable

T = TypeVar("T")
OUTAGE_SECONDS = 300.0
PAUSE_SECONDS = 2.0
_log = logging.getLogger(__name__)


def patiently(action: Callable[[], T], seconds: float = OUTAGE_SECONDS) -> T:
    """`action()`, again and again while the store does not answer; it must be safe to repeat.

    The store retries by itself for some seconds; this bridges its restarts. Raises StoreUnreachable when it stayed
    away for `seconds`.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return action()
        except StoreUnreachable as error:
            if time.monotonic() + PAUSE_SECONDS > deadline:
                raise
            _log.warning("%s; trying again", error)
        time.sleep(PAUSE_SECONDS)
