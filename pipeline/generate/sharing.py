"""Several jobs at one prefix: which shards a job leaves to others, and in which order it hands out the rest.

A job's heartbeat names the shards that its workers have in hand, and those that it announces: the next ones to be
handed out. A job announces a shard before it is begun, and looks at the others' heartbeats before and after, so that
of two jobs that want the same shard one leaves it. Jobs begin at different places and rarely meet.

Nothing but speed depends on this: objects and records are written conditionally, and workers look for a record first.
A heartbeat that is lost, late, forged or unreadable costs shards that are made twice, or a wait: CLAIM_SECONDS for a
job that is gone, STUCK_SECONDS for one that says it is alive and does nothing.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, takewhile

from ddpm_pipeline.generate.heartbeat import (
    EVERY_SECONDS,
    MAX_ANNOUNCED,
    Heartbeat,
    read_heartbeats_by_key,
)
from ddpm_pipeline.generate.plan import shard_number
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.store import retry_during_outage

CLAIM_SECONDS = 15.0
"""How long the shards of a job whose heartbeat does not change are left to it."""
STUCK_SECONDS = 600.0
"""How long the shards of a job that makes no progress are left to it."""
_SOONEST_SECONDS = 0.5
_LOOK_AHEAD = 1000  # shards whose records are listed: one request
_LOOK_AHEAD_SPAN = 5 * _LOOK_AHEAD


@dataclass(frozen=True)
class _Seen:
    """A job's heartbeat, and when it last changed by the clock of the one who reads it."""

    beat: Heartbeat
    changed_at: float
    progressed_at: float

    def next(self, beat: Heartbeat, now: float) -> "_Seen":
        changed = beat.updated_at != self.beat.updated_at
        progressed = _progress(beat) != _progress(self.beat)
        return _Seen(beat, now if changed else self.changed_at, now if progressed else self.progressed_at)

    def is_live(self, now: float) -> bool:
        return (
            self.beat.state == "running"
            and now - self.changed_at < CLAIM_SECONDS
            and now - self.progressed_at < STUCK_SECONDS
        )


def _progress(beat: Heartbeat) -> tuple[int, int, int]:
    return beat.images_made, sum(unit.images for unit in beat.under_way), len(beat.failed)


class OtherJobs:
    """The other jobs of a generation, as their heartbeats show them."""

    def __init__(self, generation: Generation, job: str) -> None:
        """`job`: the one that looks."""
        self._generation = generation
        self._job = job
        self._seen: dict[str, _Seen] = {}
        self._images: dict[str, int] = {}
        self._announced: frozenset[str] = frozenset()
        self.met: dict[str, str] = {}
        """Labels of all jobs that were seen alive, by id."""

    def look(self) -> None:
        """Read the heartbeats. StoreUnreachable."""
        now, digest = time.monotonic(), self._generation.spec.digest
        found: dict[str, _Seen] = {}
        for key, beat in read_heartbeats_by_key(self._generation.store).items():
            known = self._seen.get(key)
            if beat is None and known is not None:
                found[key] = known  # it is just being replaced
            if beat is None or beat.job == self._job or beat.spec_digest != digest:
                continue
            # Clocks of two machines may differ, so a job's own clock only says whether it is worth a first wait.
            first = _Seen(beat, now if beat.alive else float("-inf"), now)
            found[key] = first if known is None else known.next(beat, now)
            self._images[key] = beat.images_made
        self._seen = found
        self.met |= {beat.job: beat.label for beat in self.live()}

    def live(self) -> list[Heartbeat]:
        """Those that run and make progress, oldest first."""
        now = time.monotonic()
        return [seen.beat for _, seen in sorted(self._seen.items()) if seen.is_live(now)]

    def rank(self) -> int:
        """How many of them have begun shards, or are ahead of the one that looks by their names."""
        return sum(bool(beat.under_way or beat.announced) or beat.job < self._job for beat in self.live())

    def images_made(self) -> int:
        """Images in the shards that they have finished, those that have ended since included."""
        return sum(self._images.values())

    def announce(self, numbers: Iterable[int]) -> None:
        """Note what the one that looks announces: a shard that two announce is left to the job that began first."""
        self._announced = frozenset(self._generation.shard(number).name for number in numbers)

    def held(self) -> set[int]:
        """Shards that they have in hand or have announced."""
        names: set[str] = set()
        for beat in self.live():
            mine = self._announced if self._job < beat.job else frozenset[str]()
            names |= {unit.shard for unit in beat.under_way} | (set(beat.announced) - mine)
        total = self._generation.num_shards
        found = ((shard_number(name), name) for name in names)
        # A tail of another count is another shard.
        return {
            number
            for number, name in found
            if number is not None and number < total and self._generation.shard(number).name == name
        }


class Handout:
    """The shards that a job hands out in one round, in their order."""

    def __init__(self, generation: Generation, others: OtherJobs, numbers: list[int], workers: int) -> None:
        """`numbers`: shards to hand out, ascending; `workers`: at most so many begin one at the same time."""
        self.numbers = in_order(numbers, others.rank())
        self.left: frozenset[int] = frozenset()
        """Shards that are not to be begun, because another job has or has made them."""
        self._generation, self._others, self._workers = generation, others, workers
        self._begun = bytearray(generation.num_shards)
        self._first = 0  # of `numbers`; those before it have been begun
        self._num_begun = workers
        self._announced: list[int] = []
        self._exchanged_at = -EVERY_SECONDS

    def begin(self, numbers: Iterable[int]) -> None:
        """Note that these have been begun, or given up."""
        for number in numbers:
            self._num_begun += not self._begun[number]
            self._begun[number] = 1

    def is_due(self) -> bool:
        """Whether to tell the others now: every few seconds, and earlier if most of what was announced is begun."""
        waited = time.monotonic() - self._exchanged_at
        if waited >= EVERY_SECONDS:
            return True
        waiting = sum(not self._begun[number] for number in self._announced)
        is_low = waited >= _SOONEST_SECONDS and 2 * waiting < len(self._announced)
        return is_low and bool(self._others.live())

    def announce(self) -> list[int]:
        """The next shards to be handed out: one a worker, or twice as many as were begun since the last call."""
        self._exchanged_at = time.monotonic()
        size = min(MAX_ANNOUNCED, max(self._workers, 2 * self._num_begun))
        self._num_begun = 0
        self._announced = list(islice((n for n in self._upcoming() if n not in self.left), size))
        self._others.announce(self._announced)
        return self._announced

    def look(self) -> None:
        """See what the others have, and which of the next shards they have made. StoreUnreachable."""
        self._others.look()
        self.left = frozenset(self._others.held() | self._made())

    def remaining(self, numbers: list[int]) -> list[int]:
        """Those of `numbers` that no other job has or has made; the others are given up. StoreUnreachable."""
        if not self._others.met:
            return numbers
        first, last = min(numbers), max(numbers)
        made = retry_during_outage(lambda: self._generation.recorded_between(first, last))
        gone = self._others.held() | made
        for number in gone.intersection(numbers):
            self._begun[number] = 1
        return [number for number in numbers if number not in gone]

    def _made(self) -> set[int]:
        if not self._others.met:
            return set()
        first = next(self._upcoming(), None)
        if first is None:
            return set()
        near = takewhile(lambda n: abs(n - first) < _LOOK_AHEAD_SPAN, islice(self._upcoming(), _LOOK_AHEAD))
        window = list(near)
        return self._generation.recorded_between(min(window), max(window))

    def _upcoming(self) -> Iterator[int]:
        """Shards not begun yet, in order."""
        while self._first < len(self.numbers) and self._begun[self.numbers[self._first]]:
            self._first += 1
        places = range(self._first, len(self.numbers))
        return (number for place in places if not self._begun[number := self.numbers[place]])


def in_order(numbers: list[int], rank: int) -> list[int]:
    """`numbers` as the job with this rank hands them out.

    The first job goes up from the start, the second one down from the end, the next two up and down from the middle,
    then from the quarters, and so on, so that jobs meet late.
    """
    start, part, place = 0.0, 0.5, rank // 2
    while place:  # the bits of `place`, mirrored at the point
        start, part, place = start + part * (place & 1), part / 2, place >> 1
    first = int(len(numbers) * start)
    turned = numbers[first:] + numbers[:first]
    return turned[::-1] if rank % 2 else turned
