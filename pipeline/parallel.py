"""One function over many items: here one by one, in threads, or on whatever a caller passes in, such as a cluster."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, NamedTuple, Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")
GRACE_SECONDS = 2.0
"""How long an interrupted map waits for work in progress. What still runs then ends with the process."""


class ParallelMap(Protocol):
    """Yields `work(item)` for each item, in the order of the items. An error that `work` raises ends the map.

    A map over processes needs `work` and items that can be pickled, and `work` that may run twice for one item: it is
    repeated where a process died.
    """

    def __call__(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]: ...


def serial_map(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """In the caller's thread, one item at a time."""
    return map(work, items)


class MapWorkers(NamedTuple):
    """Where models are measured."""

    map: ParallelMap
    gpu: str | None = None
    """Name of the GPU that each item has; None = items run on CPUs."""


HERE = MapWorkers(serial_map)
"""In this process, on the CPU."""
OpenWorkers = Callable[[bool], AbstractContextManager[MapWorkers]]
"""Starts workers, or connects to them, for as long as the context lasts. The argument says whether the job that is to
be judged used GPUs, which decides where the settings do not.
"""


def in_process(used_gpus: bool = False) -> AbstractContextManager[MapWorkers]:
    """An `OpenWorkers` without workers: here, on the CPU."""
    return nullcontext(HERE)


def thread_map(num_threads: int, ended: Event | None = None) -> ParallelMap:
    """Threads of this process. Hashing, decoding and waiting for a store release the interpreter's lock.

    A map that ends before its last item sets `ended`, so that work in progress can check it and stop. An interrupt
    (Ctrl-C) waits for that work at most GRACE_SECONDS, any other error as long as it takes.
    """

    def map_in_threads(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        threads = _Threads(num_threads)
        in_progress: deque[Future[R]] = deque()
        grace_seconds: float | None = None
        try:
            for item in items:
                in_progress.append(threads.submit(work, item))
                if len(in_progress) > 2 * num_threads:
                    yield in_progress.popleft().result()
            while in_progress:
                yield in_progress.popleft().result()
        except BaseException as error:
            if ended is not None:
                ended.set()
            if isinstance(error, KeyboardInterrupt):
                grace_seconds = GRACE_SECONDS
            raise
        finally:
            for future in in_progress:
                future.cancel()
            threads.close(grace_seconds)

    return map_in_threads


class _Threads:
    """Like ThreadPoolExecutor, but the process can end without waiting for a thread that hangs."""

    def __init__(self, count: int) -> None:
        self._work: SimpleQueue[tuple[Future[Any], Callable[[Any], Any], Any] | None] = SimpleQueue()
        self._threads = [Thread(target=self._run, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[T], R], item: T) -> Future[R]:
        """The future result of `work(item)`."""
        future: Future[R] = Future()
        self._work.put((future, work, item))
        return future

    def close(self, grace_seconds: float | None) -> None:
        """Wait at most `grace_seconds` for the threads to end; None = as long as it takes."""
        for _ in self._threads:
            self._work.put(None)
        deadline = None if grace_seconds is None else time.monotonic() + grace_seconds
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while (task := self._work.get()) is not None:
            future, work, item = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work(item))
            except BaseException as error:  # noqa: BLE001 - raised to the caller by result()
                future.set_exception(error)
