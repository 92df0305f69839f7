"""Doing the same to many things at once: by threads here, or by whatever a caller brings along, a cluster say."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")
GRACE_SECONDS = 2.0
"""How long an interrupted spread waits for work under way. What goes on then ends with the process."""


class ParallelMap(Protocol):
    """`work` of each item, in the order of the items. What `work` raises ends it.

    With a spread over processes, `work` and the items must be picklable, and `work` may be done twice for an item
    whose process died: it must not matter.
    """

    def __call__(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]: ...


def thread_map(num_threads: int, ended: Event | None = None) -> ParallelMap:
    """Threads of this process. Hashing, decoding and waiting for a store release the interpreter's lock.

    What ends the spread before its last item sets `ended`, so that work under way may look and stop. An interrupt
    (Ctrl-C) waits for it no longer than GRACE_SECONDS, anything else as long as it takes.
    """

    def spread(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        threads = _Threads(num_threads)
        under_way: deque[Future[R]] = deque()
        grace_seconds: float | None = None
        try:
            for item in items:
                under_way.append(threads.submit(work, item))
                if len(under_way) > 2 * num_threads:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BaseException as error:
            if ended is not None:
                ended.set()
            if isinstance(error, KeyboardInterrupt):
                grace_seconds = GRACE_SECONDS
            raise
        finally:
            for future in under_way:
                future.cancel()
            threads.close(grace_seconds)

    return spread


class _Threads:
    """As ThreadPoolExecutor, but the process can end without waiting for a thread that hangs."""

    def __init__(self, count: int) -> None:
        self._work: SimpleQueue[tuple[Future[Any], Callable[[Any], Any], Any] | None] = SimpleQueue()
        self._threads = [Thread(target=self._run, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[T], R], item: T) -> Future[R]:
        """`work(item)`, to come."""
        future: Future[R] = Future()
        self._work.put((future, work, item))
        return future

    def close(self, grace_seconds: float | None) -> None:
        """Wait until the threads have ended, so long at most; None for as long as it takes."""
        for _ in self._threads:
            self._work.put(None)
        deadline = None if grace_seconds is None else time.monotonic() + grace_seconds
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while (given := self._work.get()) is not None:
            future, work, item = given
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work(item))
            except BaseException as error:  # noqa: BLE001 - it is raised to whoever waits
                future.set_exception(error)
