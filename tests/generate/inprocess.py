"""Whole generations in this process: shards are made in the driver's thread, objects lie in memory, and every write and
delete can be a place where the driver stands still, or dies.
"""

import functools
import hashlib
import io
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

import ddpm_pipeline.generate.driver as driver_module
import ddpm_pipeline.generate.generation_job as job_module
import ddpm_pipeline.generate.sharing as sharing
from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.diffusion.sampler_protocol import OnStep
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.generate.coordinator import Coordinator, ShardProgress
from ddpm_pipeline.generate.driver import generate
from ddpm_pipeline.generate.engine import Engine
from ddpm_pipeline.generate.generation_job import GenerationResult
from ddpm_pipeline.generate.launched_images import LaunchedImages
from ddpm_pipeline.generate.sample_worker import Outcome, SampleWorkerConfig
from ddpm_pipeline.generate.shard_writer import ShardWriter
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.nets.model_files import build_model
from ddpm_pipeline.store import (
    ABSENT,
    FileStore,
    ObjectChanged,
    ObjectInfo,
    ObjectMissing,
    Store,
    open_store,
)

_PATIENCE_SECONDS = 60


class Killed(BaseException):
    """The driver died here."""


class MemoryStore(FileStore):
    """A dictionary as a store; `before(what, key)` is called before each write and delete."""

    def __init__(
        self, objects: dict[str, bytes], before: Callable[[str, str], None] = lambda what, key: None
    ) -> None:
        super().__init__(Path("nowhere"))
        self.objects, self._before = objects, before

    def read(self, key: str) -> bytes:
        try:
            return self.objects[key]
        except KeyError:
            raise ObjectMissing(key) from None

    def open(self, key: str, *, start: int = 0, etag: str | None = None) -> BinaryIO:
        return io.BytesIO(self.read(key)[start:])

    def stat(self, key: str) -> ObjectInfo | None:
        data = self.objects.get(key)
        return None if data is None else _info(key, data)

    def write(self, key: str, data: bytes, *, replaces: str | None = None) -> ObjectInfo:
        existing = self.stat(key)
        if replaces is not None and (ABSENT if existing is None else existing.etag) != replaces:
            raise ObjectChanged(f"{key}: another process has written it meanwhile")
        self._before("write", key)
        self.objects[key] = data
        return _info(key, data)

    def upload(self, key: str, path: Path) -> ObjectInfo:
        return self.write(key, path.read_bytes())

    def list(self, prefix: str = "", start_after: str = "") -> Iterator[ObjectInfo]:
        found = sorted(self.objects.items())
        return (_info(key, data) for key, data in found if key.startswith(prefix) and key > start_after)

    def delete(self, key: str) -> None:
        self._before("delete", key)
        self.objects.pop(key, None)

    def require_container(self, wait_seconds: float | None = None) -> None:
        """It is there."""


def _info(key: str, data: bytes) -> ObjectInfo:
    return ObjectInfo(key, len(data), hashlib.md5(data, usedforsecurity=False).hexdigest())


class Driver:
    """One `generate` in a thread of its own, which stands still before its write or delete number `stop_at`."""

    def __init__(self, config: GenerateConfig, objects: dict[str, bytes], stop_at: int | None = None) -> None:
        self.store: Store = MemoryStore(objects, self._before)
        self.steps: list[str] = []
        self.result: GenerationResult | None = None
        self.error: UserError | None = None
        self._config, self._stop_at = config, stop_at
        self._killed = False
        self._still, self._go = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> bool:
        """Run until it stands still (True), or to its end (False)."""
        self._thread.start()
        assert self._still.wait(_PATIENCE_SECONDS)
        return self._thread.is_alive() and not self._ended()

    def resume(self) -> None:
        """Let it run to its end."""
        self._go.set()
        self._thread.join(_PATIENCE_SECONDS)
        assert not self._thread.is_alive()

    def kill(self) -> None:
        """It dies where it stands: the request it was about to make is its last."""
        self._killed = True
        self.resume()

    def _ended(self) -> bool:
        return self.result is not None or self.error is not None

    def _before(self, what: str, key: str) -> None:
        if key.startswith("jobs/"):
            return  # a heartbeat is on nobody's way
        if self._killed and self._go.is_set():
            raise Killed
        self.steps.append(f"{what} {key}")
        if len(self.steps) == self._stop_at:
            self._still.set()
            assert self._go.wait(_PATIENCE_SECONDS)

    def _run(self) -> None:
        here.store = self.store
        try:
            self.result = generate(self._config)
        except UserError as error:
            self.error = error
        except Killed:
            pass
        finally:
            self._still.set()


class Here(threading.local):
    """What belongs to the thread of a driver."""

    store: Store | None = None
    job: object = None


here = Here()


def _store(uri: str) -> Store:
    return here.store or open_store(uri)


class _Remembering(Engine):
    """Samples the same images once."""

    def launch(self, index: torch.Tensor, on_step: OnStep | None = None) -> LaunchedImages:
        return self._launch(tuple(index.tolist()))

    @functools.cache  # noqa: B019 - both live as long as the tests
    def _launch(self, index: tuple[int, ...]) -> LaunchedImages:
        return super().launch(torch.tensor(index))


_engines: dict[str, Engine] = {}


class Pool:
    """What stands for the workers: a writer and a coordinator."""

    def __init__(self, config: SampleWorkerConfig, weights: bytes, selector: dict[str, str]) -> None:
        if config.spec.digest not in _engines:
            net = build_model(config.card, weights, where="test")
            _engines[config.spec.digest] = _Remembering(config.spec, net, config.card)
        self.writer = ShardWriter(_engines[config.spec.digest], _store(config.output), config.guards)
        self.writer.generation = Generation(self.writer.generation.store, config.spec)
        self.coordinator = Coordinator()

    def in_progress(self) -> list[ShardProgress]:
        return self.coordinator.in_progress()

    def leave(self, shards: frozenset[int]) -> None:
        self.coordinator.leave(shards)

    def drain(self, seconds: float) -> None:
        """Nothing is in progress."""


class Stream:
    """What stands for the tasks: each shard is made when it is asked for."""

    def __init__(
        self,
        config: GenerateConfig,
        pool: Pool,
        numbers: list[int],
        remaining: Callable[[list[int]], list[int]],
    ) -> None:
        self._pool, self._numbers = pool, remaining(numbers)

    def poll(self, seconds: float) -> list[Outcome] | None:
        if not self._numbers:
            return None
        return [self._attempt(self._pool.writer, self._numbers.pop(0))]

    def _attempt(
        self, writer: ShardWriter, number: int, should_stop: Callable[[], bool] = lambda: False
    ) -> Outcome:
        coordinator = self._pool.coordinator
        if coordinator.begin(number, "here").elsewhere:
            return Outcome(shard=number, status="elsewhere", worker="here")
        stored = writer.write(writer.generation.shard(number), should_stop=should_stop)
        coordinator.end(number)
        return Outcome.done(number, stored, "here")

    def close(self) -> None:
        """Nothing is open."""


def _accept(config: GenerateConfig) -> None:
    """There is room for any worker."""


@contextmanager
def without_cluster() -> Generator[None]:
    """`generate` makes its shards in the thread that calls it, with the store of its Driver if there is one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver_module, "open_store", _store)
        patch.setattr(driver_module, "require_pool_resources", _accept)
        patch.setattr(job_module, "start_pool", Pool)
        patch.setattr(job_module, "OutcomeStream", Stream)
        patch.setattr(sharing, "CLAIM_SECONDS", 0.0)  # who stands still here is not waited for
        yield


def run_alone(config: GenerateConfig, objects: dict[str, bytes]) -> Driver:
    """A driver from start to end."""
    driver = Driver(config, objects)
    driver.start()
    return driver
