"""Being asked to end: by SIGTERM, as spot machines and schedulers send it, or by Ctrl-C."""

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

from pipeline.telemetry.terminal import echo


@contextmanager
def on_stop_signal(ask: Callable[[], None], saying: str) -> Generator[None]:
    """Call `ask` on SIGTERM and on the first Ctrl-C instead of ending, so that a job ends where it can go on from.

    A second Ctrl-C ends at once. To be entered after Ray is joined, whose own handler would end the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's affair
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        echo(f"{signal.Signals(number).name}: {saying}", error=True)
        ask()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
