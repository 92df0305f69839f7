"""The board: one small actor on which workers chalk up what they are at, and from which they read when to stop.

It holds nothing that must survive: a lost board costs the live view of shards under way, and attempt counts.
"""

import time
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class ShardAssignment:
    """What the board tells a worker."""

    attempt: int
    """How many times this shard has been begun, this time included."""
    stop_in_seconds: float | None = None
    """Time left to finish the shard; None while nobody asked to stop."""


@dataclass(frozen=True)
class ShardProgress:
    """A shard that some worker is at."""

    shard: int
    worker: str
    began_at: float
    images: int


class Coordinator:
    """Shards under way, attempts, and the order to stop."""

    def __init__(self) -> None:
        self._under_way: dict[int, ShardProgress] = {}
        self._attempts: Counter[int] = Counter()
        self._stop_at: float | None = None

    def begin(self, shard: int, worker: str) -> ShardAssignment:
        """A worker takes a shard up, unless it is told to stop. Counts attempts, also of workers that died."""
        if self._stop_at is not None:
            return ShardAssignment(self._attempts[shard], self._left())
        self._attempts[shard] += 1
        self._under_way[shard] = ShardProgress(shard, worker, time.time(), 0)
        return ShardAssignment(self._attempts[shard], self._left())

    def report_images(self, shard: int, done: int) -> ShardAssignment:
        """A worker has sampled `done` images of a shard."""
        known = self._under_way.get(shard)
        if known is not None:
            self._under_way[shard] = ShardProgress(shard, known.worker, known.began_at, done)
        return ShardAssignment(self._attempts[shard], self._left())

    def end(self, shard: int) -> None:
        """A worker is through with a shard, one way or another."""
        self._under_way.pop(shard, None)

    def drain(self, seconds: float) -> None:
        """From now on nothing new is begun, and what is under way ends within `seconds`."""
        if self._stop_at is None:
            self._stop_at = time.monotonic() + seconds

    def in_progress(self) -> list[ShardProgress]:
        """Shards under way, by number."""
        return [self._under_way[number] for number in sorted(self._under_way)]

    def _left(self) -> float | None:
        return None if self._stop_at is None else max(0.0, self._stop_at - time.monotonic())
