"""Ray's part of a generation: an elastic pool of workers that pull shards, and a stream of what became of them."""

import logging
import os
import queue
import threading
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.data
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.config.generation import GenerateConfig
from pipeline.errors import UserError
from pipeline.generate.coordinator import Coordinator, ShardProgress
from pipeline.generate.sample_worker import Outcome, SampleWorker, SampleWorkerConfig

# A block a shard is what Ray Data balances by; its bookkeeping grows with blocks, so the plan goes in waves.
WAVE_SHARDS = 5_000
# One shard on the device, one encoding and uploading.
SHARDS_PER_WORKER = 2
CLOSE_SECONDS = 30.0
GROWS_VARIABLE = "DDPM_CLUSTER_GROWS"
"""Set where the cluster gets nodes when work waits for them."""


def require_pool_resources(config: GenerateConfig) -> None:
    """UserError unless some node of the cluster is large enough for one worker, or a larger one may yet come."""
    if os.environ.get(GROWS_VARIABLE):
        return
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for resource, field, wanted in (
        ("CPU", "cpus_per_worker", config.cpus_per_worker),
        ("GPU", "gpus_per_worker", config.gpus_per_worker),
    ):
        largest = max((node.get(resource, 0) for node in nodes), default=0)
        if wanted > largest:
            raise UserError(
                f"{field}: a worker asks for {wanted:g}, but the largest node of the cluster has {largest:g}; "
                f"lower it, add a node, or set {GROWS_VARIABLE}=1 if the cluster scales by itself"
            )


@dataclass(frozen=True)
class WorkerPool:
    """A job's shared things on the cluster: the weights, once, and the board."""

    order: SampleWorkerConfig
    weights: Any
    board: Any

    def under_way(self) -> list[ShardProgress]:
        """Shards that workers are at now; empty when the board does not answer."""
        try:
            return ray.get(self.board.in_progress.remote(), timeout=5)
        except (RayActorError, GetTimeoutError):
            return []

    def drain(self, seconds: float) -> None:
        """Ask every worker to end within `seconds`."""
        self.board.drain.remote(seconds)


def start_pool(order: SampleWorkerConfig, weights: bytes) -> WorkerPool:
    """Put the weights into the object store and the board onto the driver's node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    board: Any = ray.remote(
        Coordinator
    )  # options() instead of arguments: Ray's types lag behind its strategies
    board = board.options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote()
    return WorkerPool(order, ray.put(weights), board)


class OutcomeStream:
    """Outcomes of attempts at `numbers`, as they come, from a thread of its own.

    The caller polls, so it stays free to watch the clock and signals however long a shard takes.
    """

    def __init__(self, config: GenerateConfig, crew: WorkerPool, numbers: list[int]) -> None:
        self._config = config
        self._crew = crew
        self._numbers = numbers
        self._queue: queue.Queue[Outcome | BaseException | None] = queue.Queue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._pump, name="outcomes", daemon=True)
        self._thread.start()

    def poll(self, seconds: float) -> list[Outcome] | None:
        """Outcomes that have come, waiting at most `seconds` for the first; None when no more will."""
        try:
            first = self._queue.get(timeout=seconds)
        except queue.Empty:
            return []
        outcomes: list[Outcome] = []
        item: Outcome | BaseException | None = first
        while True:
            if item is None:
                self._queue.put(None)
                return outcomes or None
            if isinstance(item, BaseException):
                raise RuntimeError(f"Ray gave up: {' '.join(str(item).split())[:1000]}") from item
            outcomes.append(item)
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return outcomes

    def close(self) -> None:
        """Take no more outcomes and let Ray end the workers, which it does at the next outcome that comes.

        Call it after `WorkerPool.drain`, so that one comes soon: Ray Data's own thread must not outlive the connection.
        """
        self._closed.set()
        self._thread.join(CLOSE_SECONDS)

    def _pump(self) -> None:
        try:
            for start in range(0, len(self._numbers), WAVE_SHARDS):
                wave = self._numbers[start : start + WAVE_SHARDS]
                with closing(_wave(self._config, self._crew, wave)) as outcomes:
                    for outcome in outcomes:
                        self._queue.put(outcome)
                        if self._closed.is_set():
                            return
        except Exception as error:  # noqa: BLE001 - handed to the thread that polls
            self._queue.put(error)
        finally:
            self._queue.put(None)


def _wave(config: GenerateConfig, crew: WorkerPool, numbers: list[int]) -> Generator[Outcome]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # A pool counts as busy when every worker has its shards in hand; Ray's own 1.75 asks for more than we ever queue.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 0.95
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that it draws no bars
    most = config.max_workers or config.num_workers
    pool = ray.data.ActorPoolStrategy(
        min_size=min(config.num_workers, len(numbers)),
        max_size=min(most, len(numbers)),
        max_tasks_in_flight_per_actor=SHARDS_PER_WORKER,
        max_concurrent_calls_per_actor=SHARDS_PER_WORKER,
        enable_true_multi_threading=True,
    )
    units = [{"shard": number} for number in numbers]
    dataset = ray.data.from_items(units, override_num_blocks=len(units)).map_batches(
        SampleWorker,  # pyright: ignore[reportArgumentType] - Ray's types know no class with a NumPy batch
        fn_constructor_args=(crew.order, [crew.weights], crew.board),
        batch_size=1,
        batch_format="numpy",
        num_cpus=config.cpus_per_worker,
        num_gpus=config.gpus_per_worker,
        compute=pool,
    )
    for block in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
        for text in np.asarray(block["outcome"]).tolist():
            yield Outcome.model_validate_json(text)
