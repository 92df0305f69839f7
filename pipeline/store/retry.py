"""Bounded, jittered retries."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pipeline.telemetry.counters import increment

T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how long to try.

    `attempts` in all, with pauses that double from `first_pause_seconds` up to `longest_pause_seconds`, each
    drawn evenly between half and all of that ("equal jitter"), so that the many clients of a server that has
    just come back do not return in step.
    """

    attempts: int = 8
    first_pause_seconds: float = 0.1
    longest_pause_seconds: float = 10.0

    def pause_seconds(self, failures: int) -> float:
        """How long to wait after the `failures`-th failure in a row (from 1)."""
        whole = min(self.longest_pause_seconds, self.first_pause_seconds * 2 ** (failures - 1))
        # Timing only: nothing that is computed depends on this draw.
        return whole * random.uniform(0.5, 1.0)


def retrying(policy: RetryPolicy, may_retry: Callable[[Exception], bool], action: Callable[[], T]) -> T:
    """`action()`, repeated while it fails with what `may_retry` accepts; the last failure is raised."""
    failures = 0
    while True:
        try:
            return action()
        except Exception as error:
            failures += 1
            if failures >= policy.attempts or not may_retry(error):
                raise
            increment("store_retries")
            time.sleep(policy.pause_seconds(failures))
