"""The coordinator: a small actor that tracks shards in progress, counts attempts and tells workers when to stop.

It holds nothing that must survive: losing it costs the live view of shards in progress, the attempt counts and, until
the driver's next look at other jobs, which shards are theirs.
"""

import time
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class ShardAssignment:
    """The coordinator's answer to a worker."""

    attempt: int
    """Times this shard has been begun, including this one."""
    stop_in_seconds: float | None = None
    """Time left to finish the shard; None unless the job is draining."""
    elsewhere: bool = False
    """Another job has the shard, or has made it: it is not to be begun."""


@dataclass(frozen=True)
class ShardProgress:
    """A shard that a worker is sampling."""

    shard: int
    worker: str
    began_at: float
    images: int


class Coordinator:
    """Tracks shards in progress, attempts, shards of other jobs and the deadline of a drain."""

    def __init__(self) -> None:
        self._in_progress: dict[int, ShardProgress] = {}
        self._attempts: Counter[int] = Counter()
        self._left: frozenset[int] = frozenset()
        self._stop_at: float | None = None

    def begin(self, shard: int, worker: str) -> ShardAssignment:
        """Assign a shard to a worker, unless the job is draining or another job has the shard.

        Counts attempts, those of dead workers too.
        """
        if self._stop_at is not None:
            return ShardAssignment(self._attempts[shard], self._seconds_left())
        if shard in self._left:
            return ShardAssignment(self._attempts[shard], elsewhere=True)
        self._attempts[shard] += 1
        self._in_progress[shard] = ShardProgress(shard, worker, time.time(), 0)
        return ShardAssignment(self._attempts[shard], self._seconds_left())

    def report_images(self, shard: int, done: int) -> ShardAssignment:
        """Record that a worker has sampled `done` images of a shard."""
        known = self._in_progress.get(shard)
        if known is not None:
            self._in_progress[shard] = ShardProgress(shard, known.worker, known.began_at, done)
        return ShardAssignment(self._attempts[shard], self._seconds_left())

    def end(self, shard: int) -> None:
        """Forget a shard: its worker has finished it or given it up."""
        self._in_progress.pop(shard, None)

    def leave(self, shards: frozenset[int]) -> None:
        """Assign none of these from now on, in place of those of the last call: they are other jobs'."""
        self._left = shards

    def drain(self, seconds: float) -> None:
        """Begin no more shards; those in progress must end within `seconds`."""
        if self._stop_at is None:
            self._stop_at = time.monotonic() + seconds

    def in_progress(self) -> list[ShardProgress]:
        """Shards in progress, by number."""
        return [self._in_progress[number] for number in sorted(self._in_progress)]

    def _seconds_left(self) -> float | None:
        return None if self._stop_at is None else max(0.0, self._stop_at - time.monotonic())
