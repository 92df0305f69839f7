"""Counts that any layer may keep and one that speaks to the outside may read: cache hits, calls tried again.

Counts are of this process and only grow, so a reader keeps what it has seen and takes the difference.
"""

import threading
from collections import Counter

_lock = threading.Lock()
_counts: Counter[str] = Counter()


def increment(name: str, more: int = 1) -> None:
    """Add `more` to the count of `name`. Safe from any thread."""
    with _lock:
        _counts[name] += more


def totals() -> dict[str, int]:
    """All counts so far."""
    with _lock:
        return dict(_counts)
