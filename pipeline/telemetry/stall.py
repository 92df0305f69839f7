"""Stall detection: when to warn that a job makes no progress, after one minute, then two, four and so on."""

import time

STALL_SECONDS = 60.0


class StallDetector:
    """The time since the last progress."""

    def __init__(self) -> None:
        self.progress()

    def progress(self) -> None:
        """Progress was made now."""
        self._since = time.monotonic()
        self._due_seconds = STALL_SECONDS

    def due(self) -> float | None:
        """Seconds without progress when a warning is due, else None; the next one is due when they have doubled."""
        seconds = time.monotonic() - self._since
        if seconds < self._due_seconds:
            return None
        self._due_seconds *= 2
        return seconds
