"""Retries: which failures are worth another attempt, how long to pause between attempts, and when to give up.

Every wait for a service uses this module: requests to a store, reads of a broken connection, deliveries to MLflow, jobs
that bridge a restart of either.
"""

import logging
import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from ddpm_pipeline.errors import Outage, UserError

T = TypeVar("T")
OnRetry = Callable[[Exception, float], None]
"""Called before a pause with the failure and the seconds that remain until retries end (may be infinite)."""
START_VARIABLE = "DDPM_START_WAIT_SECONDS"
START_SECONDS = 60.0
_MAX_DOUBLINGS = 60  # of a pause: more would overflow a float in an outage of many hours
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetryPolicy:
    """How long to pause after each failure in a row, and when to give up.

    Pauses double from the first to the longest. Each is drawn evenly between half and all of that ("equal jitter"), so
    that the many clients of a server that has just come back do not all return at once.
    """

    attempts: int | None = 8
    """Including the first; None = no limit."""
    first_pause_seconds: float = 0.1
    longest_pause_seconds: float = 10.0
    total_seconds: float = math.inf
    """Since the first failure in a row; a pause that would end later does not begin."""

    def pause_seconds(self, failures: int) -> float:
        """How long to pause after the `failures`-th failure in a row (from 1)."""
        doublings = min(failures - 1, _MAX_DOUBLINGS)
        whole = min(self.longest_pause_seconds, self.first_pause_seconds * 2**doublings)
        # Timing only: nothing that is computed depends on this draw.
        return whole * random.uniform(0.5, 1.0)


OUTAGE_POLICY = RetryPolicy(
    attempts=None, first_pause_seconds=2.0, longest_pause_seconds=2.0, total_seconds=300.0
)
"""For work in progress, which is not thrown away while a service restarts."""


class Retries:
    """The failures in a row of one piece of work."""

    def __init__(self, policy: RetryPolicy, on_retry: OnRetry | None = None) -> None:
        self._policy, self._on_retry = policy, on_retry
        self._failures, self._failing_since = 0, 0.0

    def pause(self, error: Exception) -> bool:
        """Count a failure and pause; False, without a pause, when it is time to give up."""
        now = time.monotonic()
        if self._failures == 0:
            self._failing_since = now
        self._failures += 1
        pause = self._policy.pause_seconds(self._failures)
        left = self._failing_since + self._policy.total_seconds - now
        attempts = self._policy.attempts
        if pause > left or (attempts is not None and self._failures >= attempts):
            return False
        if self._on_retry is not None:
            self._on_retry(error, left)
        time.sleep(pause)
        return True

    def reset(self) -> None:
        """Start counting anew after a success."""
        self._failures = 0

    @property
    def failing_seconds(self) -> float:
        """Time since the first failure in a row; 0 after a success."""
        return time.monotonic() - self._failing_since if self._failures else 0.0


def call_with_retries(
    action: Callable[[], T],
    may_retry: Callable[[Exception], bool],
    policy: RetryPolicy,
    on_retry: OnRetry | None = None,
) -> T:
    """`action()`, repeated while it fails with what `may_retry` accepts; the last failure is raised."""
    retries = Retries(policy, on_retry)
    while True:
        try:
            return action()
        except Exception as error:
            if not may_retry(error) or not retries.pause(error):
                raise


def retry_during_outage(action: Callable[[], T], seconds: float | None = None) -> T:
    """`action()`, repeated while a service does not answer; it must be safe to repeat.

    Stores retry by themselves for some seconds; this bridges their restarts. Raises the Outage when the service stayed
    away for `seconds` (default: OUTAGE_POLICY).
    """
    policy = OUTAGE_POLICY if seconds is None else replace(OUTAGE_POLICY, total_seconds=seconds)
    return call_with_retries(action, lambda error: isinstance(error, Outage), policy, _log_outage)


def _log_outage(error: Exception, left_seconds: float) -> None:
    _log.warning("%s; retrying for up to %.0f s", error, left_seconds)


def start_seconds() -> float:
    """How long a starting job waits for a service that is away. Raises UserError for a value that is no number."""
    value = os.environ.get(START_VARIABLE)
    try:
        seconds = START_SECONDS if value is None else float(value)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UserError(
            f"{START_VARIABLE}={value!r}: not a number of seconds; set it to one, or to 0 for no waiting"
        )
    return seconds
