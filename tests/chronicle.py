"""How long a job under attack took to go on after each strike, told at the end of the session, passed or not.

A slow machine and a job that stood still look alike from outside; the record tells them apart.
"""

import re
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

PROPERTY = "chronicle"
"""Name of a test's property that `tests/conftest.py` prints as lines of the session's summary."""
SLOW_SECONDS = 60.0
"""A recovery of this length is told together with what the job said meanwhile."""
POLL_SECONDS = 0.5
TOLD = re.compile(
    r"no news|no progress|trying again|waits? (for|in)|is away|Attempting to start|Started training|goes on|failed: "
)
MOST_LINES = 40


class Chronicle:
    """Watches how far a job is, and what its log says, from a thread."""

    def __init__(self, progress: Callable[[], int], log: Path) -> None:
        """`progress`: how far the job is in the store, growing."""
        self._progress, self._log = progress, log
        self._began = time.monotonic()
        self._grown: list[tuple[float, int]] = []
        self._said: list[tuple[float, str]] = []
        self._struck: list[tuple[str, float, float, int]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="chronicle", daemon=True)
        self._thread.start()

    @contextmanager
    def strike(self, name: str) -> Generator[None]:
        """Around what is done to the job."""
        began = self._now()
        try:
            yield
        finally:
            self._struck.append((name, began, self._now(), self._progress()))

    def end(self) -> list[str]:
        """A line a strike, those of the slow ones followed by the job's own words."""
        self._over.set()
        self._thread.join()
        lines: list[str] = []
        for name, began, ended, step in self._struck:
            # what the job saved as it was struck is no recovery
            on = next((now for now, at in self._grown if now > ended and at > step), None)
            took = (self._now() if on is None else on) - began
            went = "never went on" if on is None else f"went on after {took:.0f} s"
            lines.append(f"at {began:4.0f} s, step {step:4}: {name} ({ended - began:.0f} s), {went}")
            if took > SLOW_SECONDS:
                said = [f"  {now:4.0f} s  {line}" for now, line in self._said if began <= now <= began + took]
                lines += said[-MOST_LINES:]
        return [*lines, f"ended after {self._now():.0f} s"]

    def _now(self) -> float:
        return time.monotonic() - self._began

    def _watch(self) -> None:
        read = 0
        while not self._over.wait(POLL_SECONDS):
            step = self._progress()
            if not self._grown or step > self._grown[-1][1]:
                self._grown.append((self._now(), step))
            with self._log.open("rb") as file:
                file.seek(read)
                whole, _, _ = file.read().rpartition(b"\n")
            read += len(whole) + 1 if whole else 0
            for line in whole.decode(errors="replace").splitlines():
                if TOLD.search(line):
                    self._said.append((self._now(), line[:200]))
