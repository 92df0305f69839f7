"""Counters that any layer may increment and the metrics exporter reads: cache hits, retries.

They are per process and only grow, so a reader remembers the last values and takes the difference.
"""

import threading
from collections import Counter

_lock = threading.Lock()
_counts: Counter[str] = Counter()


def increment(name: str, more: int = 1) -> None:
    """Add `more` to counter `name`. Thread-safe."""
    with _lock:
        _counts[name] += more


def totals() -> dict[str, int]:
    """The values of all counters."""
    with _lock:
        return dict(_counts)
