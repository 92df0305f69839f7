"""Doing the same to many things at once: by threads here, or by whatever a caller brings along, a cluster say."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Spread(Protocol):
    """`work` of each item, in the order of the items. What `work` raises ends it.

    With a spread over processes, `work` and the items must be picklable, and `work` may be done twice for an item
    whose process died: it must not matter.
    """

    def __call__(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]: ...


def by_threads(num_threads: int) -> Spread:
    """Threads of this process. Hashing, decoding and waiting for a store release the interpreter's lock."""

    def spread(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        with ThreadPoolExecutor(num_threads) as pool:
            under_way: deque[Future[R]] = deque()
            try:
                for item in items:
                    under_way.append(pool.submit(work, item))
                    if len(under_way) > 2 * num_threads:
                        yield under_way.popleft().result()
                while under_way:
                    yield under_way.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    return spread
