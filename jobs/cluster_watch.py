"""Noticing that the cluster a driver joined is no more.

When a head dies for good, Ray ends its drivers after a minute. When a new, empty cluster takes the old one's address
before that, Ray's driver joins it quietly and waits for ever for actors that nobody there has heard of. The driver's
own node tells the two apart: the new cluster does not know it.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

from pipeline.errors import JobError
from pipeline.telemetry.terminal import echo

POLL_SECONDS = 3.0
SURE_AFTER_SECONDS = 12.0
"""Absent for this long is gone: the list may lag behind a node that has just joined."""
FAREWELL_SECONDS = 90.0
"""For closing the run and leaving Ray, which may wait for answers that cannot come."""
SAYING = (
    "the Ray cluster was replaced while the job ran: its head died and a new one answers at the same address; "
    "start the same command again, it goes on from what is safe in the store"
)


@contextmanager
def watch_cluster(is_known: Callable[[], bool]) -> Generator[None]:
    """Raise JobError in the main thread once `is_known` (asked from a thread) has said no for some seconds.

    Where the main thread hangs even then, the process ends with exit code 1. Does nothing outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(_number: int, _frame: FrameType | None) -> None:
        raise JobError(SAYING)

    over = threading.Event()
    before = signal.signal(signal.SIGUSR1, give_up)
    thread = threading.Thread(target=_watch, args=(is_known, over), name="cluster", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        signal.signal(signal.SIGUSR1, before)


def _watch(is_known: Callable[[], bool], over: threading.Event) -> None:
    absent_since: float | None = None
    while not over.wait(POLL_SECONDS):
        try:
            known = is_known()
        except Exception:  # noqa: BLE001  (nobody answers: Ray itself decides for how long to try)
            continue
        if known:
            absent_since = None
        elif absent_since is None:
            absent_since = time.monotonic()
        elif time.monotonic() - absent_since > SURE_AFTER_SECONDS:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            if not over.wait(FAREWELL_SECONDS):
                echo(f"failed: {SAYING}", error=True)
                os._exit(1)
            return
