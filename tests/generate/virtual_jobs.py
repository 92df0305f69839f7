"""Whole generations of several jobs in this process, each with workers of its own, in a virtual time.

Threads run one at a time, in the order in which they wake, so that everything happens in the same order each time.
"""

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import cast

import pytest

import ddpm_pipeline.generate.generation_job as job_module
import ddpm_pipeline.generate.heartbeat as heartbeat_module
import ddpm_pipeline.generate.sharing as sharing
from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.generate.driver import generate
from ddpm_pipeline.generate.generation_job import GenerationResult
from ddpm_pipeline.generate.sample_worker import Outcome
from ddpm_pipeline.generate.shard_writer import ShardWriter
from tests.generate.inprocess import Killed, MemoryStore, Pool, Stream, here, without_cluster

_PATIENCE_SECONDS = 60
_BEGAN = 1_800_000_000.0


class World:
    """A clock that goes on when every thread sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self._asleep: list[tuple[float, int, threading.Event]] = []
        self._count = 0
        self._threads: list[threading.Thread] = []
        self.errors: list[BaseException] = []

    def start(self, action: Callable[[], None], at: float = 0.0) -> None:
        """Run `action` in a thread of its own from `at` on."""
        event = self._alarm(at)

        def run() -> None:
            assert event.wait(_PATIENCE_SECONDS)
            try:
                action()
            except Killed:
                pass
            except BaseException as error:  # noqa: BLE001 - raised by `run`
                self.errors.append(error)
            finally:
                self._wake_next()

        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()

    def sleep(self, seconds: float) -> None:
        """Let others run until the calling thread's time has come."""
        event = self._alarm(self.now + seconds)
        self._wake_next()
        assert event.wait(_PATIENCE_SECONDS)

    def run(self) -> None:
        """Run until every thread has ended."""
        self._wake_next()
        for thread in self._threads:  # threads that threads start are appended
            thread.join(_PATIENCE_SECONDS)
            assert not thread.is_alive()
        for error in self.errors:
            raise error

    def _alarm(self, at: float) -> threading.Event:
        event = threading.Event()
        self._count += 1
        heapq.heappush(self._asleep, (max(at, self.now), self._count, event))
        return event

    def _wake_next(self) -> None:
        if self._asleep:
            self.now, _, event = heapq.heappop(self._asleep)
            event.set()


class Job:
    """One `generate` with `workers` workers, each of which samples a shard in `seconds`."""

    def __init__(
        self, world: World, config: GenerateConfig, objects: dict[str, bytes], seconds: float, at: float = 0.0
    ) -> None:
        self.world, self.seconds = world, seconds
        self.dies_at = float("inf")
        self.ended_at = float("inf")
        self.result: GenerationResult | None = None
        self.progress: list[str] = []
        self._config, self._store = config, MemoryStore(objects, self._before)
        world.start(self._run, at)

    def sleep(self, seconds: float) -> None:
        """As a thread of this job."""
        self.world.sleep(seconds)
        self._before("wake", "")

    def _before(self, what: str, key: str) -> None:
        if self.world.now >= self.dies_at:
            raise Killed

    def _run(self) -> None:
        here.store, here.job = self._store, self

        def note(done: int, total: int, note: str = "") -> None:
            self.progress.append(note)

        self.result = generate(self._config, note)
        self.ended_at = self.world.now


class _Stream(Stream):
    """Workers as threads of the job's world."""

    def __init__(
        self,
        config: GenerateConfig,
        pool: Pool,
        numbers: list[int],
        remaining: Callable[[list[int]], list[int]],
    ) -> None:
        super().__init__(config, pool, numbers, remaining)
        self._job = cast(Job, here.job)
        self._arrived: list[Outcome] = []
        self._at_work = config.num_workers
        for _ in range(config.num_workers):
            known = pool.writer
            writer = ShardWriter(known.engine, known.generation.store, known.guards)
            self._job.world.start(lambda writer=writer: self._work(writer))

    def _work(self, writer: ShardWriter) -> None:
        while self._numbers:
            outcome = self._attempt(writer, self._numbers.pop(0), self._sampling())
            self._arrived.append(outcome)
        self._at_work -= 1

    def _sampling(self) -> Callable[[], bool]:
        """Takes a shard's time when it is first called, and never stops the shard."""
        slept = False

        def sample() -> bool:
            nonlocal slept
            if not slept:
                slept = True
                self._job.sleep(self._job.seconds)
            return False

        return sample

    def poll(self, seconds: float) -> list[Outcome] | None:
        self._job.sleep(seconds)
        arrived, self._arrived = self._arrived, []
        return arrived if arrived or self._at_work else None

    def close(self) -> None:
        """Its threads end by themselves."""


def _pause(stop: threading.Event, seconds: float) -> bool:
    cast(Job, here.job).sleep(seconds)
    return stop.is_set()


@contextmanager
def in_virtual_time() -> Generator[World]:
    """Jobs of this world generate in it."""
    world, claim_seconds = World(), sharing.CLAIM_SECONDS
    clock = SimpleNamespace(
        monotonic=lambda: world.now,
        time=lambda: _BEGAN + world.now,
        strftime=time.strftime,
        gmtime=time.gmtime,
    )
    numbers = itertools.count(90, -1)  # a later job has the name that decides for it
    with without_cluster(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(heartbeat_module, "new_job_id", lambda: f"job-{next(numbers)}")
        patch.setattr(job_module, "OutcomeStream", _Stream)
        patch.setattr(job_module, "pause", _pause)
        patch.setattr(sharing, "CLAIM_SECONDS", claim_seconds)
        for module in (sharing, heartbeat_module):
            patch.setattr(module, "time", clock)
        yield world
