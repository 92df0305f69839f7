"""A discrete-event simulation of a generation's pool of workers: how efficiency holds up with their number.

Workers pull shards as Ray Data gives them out: one at work and one in hand. They differ in speed, some are
stragglers, and any may die; its shards then go back to the head of the queue once the death is noticed, and a new
worker starts in its place. The driver gives out shards one at a time, which limits how many workers it can feed.
"""

import heapq
import random
from collections import deque
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PoolModel:
    """What the simulation is fed with. All times in seconds."""

    shard_seconds: float
    """Device time of a shard on an ordinary worker."""
    shard_spread: float = 0.05
    """Standard deviation of a shard's time, as a share of it."""
    overhead_seconds: float = 0.0
    """Time a worker loses between two shards."""
    dispatch_seconds: float = 1 / 60
    """Time the driver takes to give out one shard."""
    start_seconds: float = 8.0
    """From asking for a worker to its first shard."""
    deaths_per_hour: float = 0.05
    """Of one worker."""
    notice_seconds: float = 15.0
    """From a worker's death to its shards' return to the queue."""
    straggler_share: float = 0.02
    """Share of workers that run at half speed."""
    in_hand: int = 2
    """Shards a worker holds: one at work, the others waiting."""


@dataclass(frozen=True)
class Outcome:
    """How a simulated generation went."""

    workers: int
    makespan_seconds: float
    efficiency: float
    """Time that workers of the same speeds, never dying or waiting, would take, over the makespan."""
    deaths: int


@dataclass
class _Worker:
    speed: float
    held: deque[int] = field(default_factory=deque[int])
    coming: deque[int] = field(default_factory=deque[int])
    """Shards that the driver is handing over."""
    life: int = 0
    """Counts its deaths, so that events of an earlier life are recognised."""
    busy: bool = False
    doing_seconds: float = 0.0
    """Time that the shard at work would take an ordinary worker."""


def simulate(model: PoolModel, workers: int, shards: int, seed: int = 0) -> Outcome:
    """Run one generation of `shards` shards on `workers` workers."""
    pool = _Pool(model, workers, shards, random.Random(seed))
    makespan = pool.run()
    ideal = pool.work_seconds / sum(worker.speed for worker in pool.workers)
    return Outcome(workers, makespan, ideal / makespan, pool.deaths)


class _Pool:
    def __init__(self, model: PoolModel, workers: int, shards: int, chance: random.Random) -> None:
        self.model = model
        self.chance = chance
        slow = {*chance.sample(range(workers), round(model.straggler_share * workers))}
        self.workers = [_Worker(0.5 if number in slow else 1.0) for number in range(workers)]
        self.queue = deque(range(shards))
        self.left = shards
        self.deaths = 0
        self.now = 0.0
        self.work_seconds = 0.0
        self._driver_free_at = 0.0
        self._count = 0
        self._lost: dict[tuple[int, int], list[int]] = {}
        self._events: list[tuple[float, int, str, int, int]] = []

    def run(self) -> float:
        for number in range(len(self.workers)):
            self._plan(self.model.start_seconds, "ready", number)
        while self.left:
            self.now, _, kind, number, life = heapq.heappop(self._events)
            worker = self.workers[number]
            if kind == "return":
                self.queue.extendleft(reversed(self._lost.pop((number, life))))
                self._wake()
            elif life == worker.life:
                getattr(self, f"_{kind}")(number, worker)
        return self.now

    def _plan(self, delay: float, kind: str, number: int) -> None:
        self._count += 1
        event = (self.now + delay, self._count, kind, number, self.workers[number].life)
        heapq.heappush(self._events, event)

    def _ready(self, number: int, worker: _Worker) -> None:
        rate = self.model.deaths_per_hour / 3600
        if rate > 0:
            self._plan(self.chance.expovariate(rate), "death", number)
        self._feed(number, worker)

    def _feed(self, number: int, worker: _Worker) -> None:
        """The driver hands shards over, one after the other, until the worker's hands are full."""
        while self.queue and len(worker.held) + len(worker.coming) < self.model.in_hand:
            worker.coming.append(self.queue.popleft())
            self._driver_free_at = max(self.now, self._driver_free_at) + self.model.dispatch_seconds
            self._plan(self._driver_free_at - self.now, "arrive", number)

    def _arrive(self, number: int, worker: _Worker) -> None:
        worker.held.append(worker.coming.popleft())
        self._begin(number, worker)

    def _begin(self, number: int, worker: _Worker) -> None:
        if worker.busy or not worker.held:
            return
        worker.busy = True
        seconds = model_seconds(self.model, self.chance)
        worker.doing_seconds = seconds
        self._plan(self.model.overhead_seconds + seconds / worker.speed, "done", number)

    def _done(self, number: int, worker: _Worker) -> None:
        worker.held.popleft()
        worker.busy = False
        self.left -= 1
        self.work_seconds += worker.doing_seconds
        self._begin(number, worker)
        self._feed(number, worker)

    def _death(self, number: int, worker: _Worker) -> None:
        self.deaths += 1
        self._lost[number, worker.life] = [*worker.held, *worker.coming]
        self._plan(self.model.notice_seconds, "return", number)
        worker.life += 1
        worker.held.clear()
        worker.coming.clear()
        worker.busy = False
        self._plan(self.model.notice_seconds + self.model.start_seconds, "ready", number)

    def _wake(self) -> None:
        """Shards that came back go to workers with a free hand."""
        for number, worker in enumerate(self.workers):
            if self.queue and not worker.held and not worker.coming:
                self._feed(number, worker)


def model_seconds(model: PoolModel, chance: random.Random) -> float:
    """The time one shard takes an ordinary worker, drawn."""
    return model.shard_seconds * max(0.1, chance.gauss(1.0, model.shard_spread))
