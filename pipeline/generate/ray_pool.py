"""An elastic pool of Ray workers that pull shards, and the stream of their outcomes."""

import logging
import queue
import threading
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import ray.data
from ray.exceptions import GetTimeoutError, RayActorError

from ddpm_pipeline.cluster import GROWS_VARIABLE, described, grows, living_nodes, on_node, reason_line
from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.generate.coordinator import Coordinator, ShardProgress
from ddpm_pipeline.generate.sample_worker import Outcome, SampleWorker, SampleWorkerConfig

# Ray Data balances by blocks of one shard each; its bookkeeping grows with their number, so the plan is cut in waves.
WAVE_SHARDS = 5_000
# One shard on the device, one being encoded and uploaded.
SHARDS_PER_WORKER = 2
CLOSE_SECONDS = 30.0
log = logging.getLogger(__name__)
_MAP_OPERATOR = "ray.data._internal.execution.operators.map_operator"


def require_pool_resources(config: GenerateConfig) -> None:
    """UserError unless some node with the workers' labels is large enough for one, or the cluster may add one, which is
    said.
    """
    nodes = [node["Resources"] for node in living_nodes(config.node_labels)]
    where = described(config.node_labels)
    for resource, setting, wanted in (
        ("CPU", "cpus_per_worker", config.cpus_per_worker),
        ("GPU", "gpus_per_worker", config.gpus_per_worker),
    ):
        largest = max((node.get(resource, 0) for node in nodes), default=0)
        if wanted <= largest:
            continue
        fault = f"{setting}: a worker needs {wanted:g}, but the largest node of {where} has {largest:g}"
        if not grows():
            raise UserError(
                f"{fault}; lower it, add a node, or set {GROWS_VARIABLE}=1 if the cluster scales by itself"
            )
        log.warning("%s now; waiting until a larger one is added", fault)


@dataclass(frozen=True)
class WorkerPool:
    """What a job's workers share on the cluster: their settings, the weights and the coordinator."""

    config: SampleWorkerConfig
    weights: Any
    coordinator: Any
    selector: dict[str, str] = field(default_factory=dict[str, str])
    """Ray's label selector for the nodes of the workers."""

    def in_progress(self) -> list[ShardProgress]:
        """Shards that workers are sampling now; empty if the coordinator does not answer."""
        try:
            return ray.get(self.coordinator.in_progress.remote(), timeout=5)
        except (RayActorError, GetTimeoutError):
            return []

    def leave(self, shards: frozenset[int]) -> None:
        """Begin none of these from now on: they are other jobs'. In place of those of the last call."""
        try:
            ray.get(self.coordinator.leave.remote(shards), timeout=5)
        except (RayActorError, GetTimeoutError):
            return  # workers find out by themselves what is done

    def drain(self, seconds: float) -> None:
        """Tell every worker to end within `seconds`."""
        self.coordinator.drain.remote(seconds)


def start_pool(config: SampleWorkerConfig, weights: bytes, selector: dict[str, str]) -> WorkerPool:
    """Put the weights into Ray's object store and start the coordinator on the driver's node."""
    driver_node = on_node(ray.get_runtime_context().get_node_id())
    actor: Any = ray.remote(Coordinator)  # Any: Ray's types lag behind its scheduling strategies
    coordinator = actor.options(num_cpus=0, max_restarts=-1, scheduling_strategy=driver_node).remote()
    return WorkerPool(config, ray.put(weights), coordinator, selector)


class OutcomeStream:
    """Outcomes of attempts at the shards `numbers`, in order of arrival, from a thread of its own.

    The caller polls, so it can watch the clock and signals however long a shard takes. `remaining`, called in that
    thread, says which shards of a wave are still to be handed out when it begins.
    """

    def __init__(
        self,
        config: GenerateConfig,
        pool: WorkerPool,
        numbers: list[int],
        remaining: Callable[[list[int]], list[int]] = list,
    ) -> None:
        self._config = config
        self._pool = pool
        self._numbers = numbers
        self._remaining = remaining
        self._queue: queue.Queue[Outcome | BaseException | None] = queue.Queue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._pump, name="outcomes", daemon=True)
        self._thread.start()

    def poll(self, seconds: float) -> list[Outcome] | None:
        """Outcomes that have arrived, waiting at most `seconds` for the first; None after the last one."""
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
                raise RuntimeError(f"Ray failed: {reason_line(item)}") from item
            outcomes.append(item)
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return outcomes

    def close(self) -> None:
        """Take no more outcomes and let Ray end the workers, which it does at the next outcome.

        Call it after `WorkerPool.drain`, so that one arrives soon: Ray Data's thread must not outlive the connection.
        """
        self._closed.set()
        self._thread.join(CLOSE_SECONDS)

    def _pump(self) -> None:
        try:
            for start in range(0, len(self._numbers), WAVE_SHARDS):
                wave = self._remaining(self._numbers[start : start + WAVE_SHARDS])
                if not wave:
                    continue
                with closing(_wave(self._config, self._pool, wave)) as outcomes:
                    for outcome in outcomes:
                        self._queue.put(outcome)
                        if self._closed.is_set():
                            return
        except Exception as error:  # noqa: BLE001 - raised by `poll`
            self._queue.put(error)
        finally:
            self._queue.put(None)


def _without_remark(record: logging.LogRecord) -> bool:
    """Drop a warning about what every GPU worker here does: take CPUs and a GPU. Their placement is tested by Ray."""
    return "Specifying both num_cpus and num_gpus" not in record.getMessage()


def _wave(config: GenerateConfig, pool: WorkerPool, numbers: list[int]) -> Generator[Outcome]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # A pool is busy when every worker has its shards; Ray's default of 1.75 is more than we ever queue.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 0.95
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger(_MAP_OPERATOR).addFilter(_without_remark)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns about disabled bars
    max_workers = config.max_workers or config.num_workers
    actors = ray.data.ActorPoolStrategy(
        min_size=min(config.num_workers, len(numbers)),
        max_size=min(max_workers, len(numbers)),
        max_tasks_in_flight_per_actor=SHARDS_PER_WORKER,
        max_concurrent_calls_per_actor=SHARDS_PER_WORKER,
        enable_true_multi_threading=True,
    )
    units = [{"shard": number} for number in numbers]
    dataset = ray.data.from_items(units, override_num_blocks=len(units)).map_batches(
        SampleWorker,  # pyright: ignore[reportArgumentType] - Ray's types lack classes with NumPy batches
        fn_constructor_args=(pool.config, [pool.weights], pool.coordinator),
        batch_size=1,
        batch_format="numpy",
        num_cpus=config.cpus_per_worker,
        num_gpus=config.gpus_per_worker,
        label_selector=pool.selector or None,
        compute=actors,
    )
    for block in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
        for text in np.asarray(block["outcome"]).tolist():
            yield Outcome.model_validate_json(text)
