"""When to speak up about a job that is not heard of: after a minute, then after two, four and so on."""

import time

STALL_SECONDS = 60.0


class StallDetector:
    """The time since the last news."""

    def __init__(self) -> None:
        self.progress()

    def progress(self) -> None:
        """There is news now."""
        self._since = time.monotonic()
        self._patience = STALL_SECONDS

    def due(self) -> float | None:
        """Seconds without news, when it is time to say so; the next time is when they have doubled."""
        seconds = time.monotonic() - self._since
        if seconds < self._patience:
            return None
        self._patience *= 2
        return seconds
