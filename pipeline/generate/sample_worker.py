"""The Ray actor that writes shards, and the row that reports each attempt."""

import logging
import os
import socket
import time
import traceback
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.evaluation import FeatureNetworkConfig
from ddpm_pipeline.config.generation import GuardConfig
from ddpm_pipeline.config.model_card import ModelCard
from ddpm_pipeline.devices import is_context_lost, limit_memory
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.features.networks import open_network
from ddpm_pipeline.features.shard_sums import FeatureSums
from ddpm_pipeline.generate.coordinator import ShardAssignment
from ddpm_pipeline.generate.device_check import UnfitDevice
from ddpm_pipeline.generate.done_records import DoneRecord
from ddpm_pipeline.generate.encoders import EncoderProcesses, Encoders, EncoderThread
from ddpm_pipeline.generate.engine import Engine, set_up_torch
from ddpm_pipeline.generate.gpu_meter import GpuMeter
from ddpm_pipeline.generate.guards import GuardTripped
from ddpm_pipeline.generate.plan import shard
from ddpm_pipeline.generate.shard_writer import ShardCancelled, ShardWriter, StoredRecord
from ddpm_pipeline.generate.spec import Spec
from ddpm_pipeline.nets.model_files import build_model
from ddpm_pipeline.retry import RetryPolicy
from ddpm_pipeline.store import open_store
from ddpm_pipeline.telemetry.logs import located, name_process, set_up_logging
from ddpm_pipeline.telemetry.prometheus import JobMetrics

PAUSES = RetryPolicy(first_pause_seconds=1.0, longest_pause_seconds=30.0)
# A worker that dies may have been preempted, which says nothing about its shard. Only a shard that was begun far more
# often than it may fail is taken for the cause.
DEATHS_PER_ATTEMPT = 5
_LEVELS = {"done": logging.INFO, "abandoned": logging.INFO, "elsewhere": logging.DEBUG}
log = logging.getLogger(__name__)
Rows = dict[str, npt.NDArray[Any]]


class Outcome(Settings):
    """Result of one attempt at a shard."""

    shard: int
    """Number of the shard."""
    status: Literal["done", "failed", "guard", "abandoned", "unfit", "elsewhere"]
    """`guard`: worthless images; `abandoned`: the job is draining; `unfit`: the worker's GPU is of another kind than
    the generation's, so the shard has not been attempted; `elsewhere`: left to another job."""
    record: DoneRecord | None = None
    """The done-record, if `done`."""
    record_tag: str | None = None
    """The tag that the store gave the record; None if another attempt has written it."""
    made_twice: bool = False
    """Whether another attempt finished the shard while this one sampled it."""
    error: str | None = None
    """The error in one line, if any."""
    worker: str
    """Host and process."""
    node: str | None = None
    """Ray's id of the worker's node, if `unfit`."""

    @classmethod
    def done(cls, number: int, stored: StoredRecord, worker: str) -> "Outcome":
        """The outcome of an attempt that left, or found, a record."""
        return cls(
            shard=number,
            status="done",
            record=stored.record,
            record_tag=stored.etag,
            made_twice=stored.made_twice,
            worker=worker,
        )


@dataclass(frozen=True)
class SampleWorkerConfig:
    """What each worker of a job is started with. Small: the weights travel through Ray's object store."""

    spec: Spec
    card: ModelCard
    output: str
    guards: GuardConfig
    max_attempts: int
    features: FeatureNetworkConfig | None = None


class SampleWorker:
    """Loads the network once and writes the shards it is given.

    Errors are returned as rows: an exception would end the whole job. A worker that fails waits before it takes the
    next shard, longer each time, so that one broken machine cannot fail the whole plan.
    """

    def __init__(self, config: SampleWorkerConfig, weights: list[Any], coordinator: Any) -> None:
        """`weights`: a list of one reference to the weights' bytes; `coordinator`: a handle of that actor."""
        set_up_logging()
        name_process(run=f"{config.spec.model.name}-{config.spec.digest[:10]}")
        self.config = config
        self.coordinator = coordinator
        self._metrics = JobMetrics("generate", config.spec.model.name)
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self._failures = 0
        self._writer: ShardWriter | None = None
        self._load_error: str | None = None
        self._unfit: str | None = None
        try:
            self._writer = self._load(cast(bytes, ray.get(weights[0])))
        except UnfitDevice as error:
            self._unfit = str(error)
            log.warning("%s: %s", self.name, self._unfit)
        except Exception as error:  # noqa: BLE001 - reported with each shard that fails for it
            self._load_error = error_line(error)

    def _load(self, weights: bytes) -> ShardWriter:
        config = self.config
        set_up_torch(config.spec)
        if config.spec.device == "cuda":
            limit_memory(_gpu_share())
        net = build_model(config.card, weights, config.spec.device, where=f"model {config.spec.model.name}")
        network = None
        if config.features is not None:
            # It runs on the CPU also beside a GPU, where sums must not depend on the number of cores.
            torch.set_num_threads(config.spec.cpu_threads or 1)
            network = FeatureSums(open_network(config.features, ""))
        engine = Engine(config.spec, net, config.card)
        store, meter = open_store(config.output), _gpu_meter(config.spec)
        return ShardWriter(engine, store, config.guards, network, meter, _encoders(config.spec))

    def __call__(self, rows: Rows) -> Rows:
        """Numbers of shards in column `shard`; outcomes as JSON in column `outcome`."""
        outcomes = [self._attempt(int(number)).model_dump_json() for number in rows["shard"]]
        return {"outcome": np.array(outcomes, dtype=object)}

    def _attempt(self, number: int) -> Outcome:
        if self._unfit is not None:  # at once: the driver places no worker here again
            node = ray.get_runtime_context().get_node_id()
            return Outcome(shard=number, status="unfit", error=self._unfit, worker=self.name, node=node)
        with located(shard=number):
            outcome = self._try_shard(number)
            level = _LEVELS.get(outcome.status, logging.WARNING)
            log.log(level, "shard %d: %s", number, outcome.error or outcome.status)
        self._metrics.add_counted()
        if outcome.status == "failed":
            self._failures += 1
            time.sleep(PAUSES.pause_seconds(self._failures))
        else:
            self._failures = 0
        return outcome

    def _try_shard(self, number: int) -> Outcome:
        if self._writer is None:
            return Outcome(shard=number, status="failed", error=self._load_error, worker=self.name)
        report = _ProgressReport(self.coordinator, number)
        try:
            assignment = report.begin(self.name)
            if assignment.stop_in_seconds is not None:
                return Outcome(shard=number, status="abandoned", worker=self.name)
            if assignment.elsewhere:
                return Outcome(shard=number, status="elsewhere", worker=self.name)
            if assignment.attempt > DEATHS_PER_ATTEMPT * self.config.max_attempts:
                died = f"begun {assignment.attempt - 1} times; its workers died"
                return Outcome(shard=number, status="failed", error=died, worker=self.name)
            unit = shard(self.config.spec, number)
            stored = self._writer.write(unit, assignment.attempt, report.should_stop, report.images)
            return Outcome.done(number, stored, self.name)
        except ShardCancelled:
            return Outcome(shard=number, status="abandoned", worker=self.name)
        except GuardTripped as error:
            return Outcome(shard=number, status="guard", error=str(error), worker=self.name)
        except Exception as error:  # noqa: BLE001 - reported by the driver, which tries the shard elsewhere
            if is_context_lost(error):
                _end_process(f"shard {number}: {error_line(error)}")
            return Outcome(shard=number, status="failed", error=error_line(error), worker=self.name)
        finally:
            report.end()


class _ProgressReport:
    """Reports one shard to the coordinator. If the coordinator dies, work continues without it."""

    def __init__(self, coordinator: Any, number: int) -> None:
        self._coordinator = coordinator
        self._number = number
        self._pending: Any = None
        self._stop_at: float | None = None

    def begin(self, worker: str) -> ShardAssignment:
        try:
            return cast(
                ShardAssignment, ray.get(self._coordinator.begin.remote(self._number, worker), timeout=30)
            )
        except (RayActorError, GetTimeoutError):
            return ShardAssignment(attempt=1)

    def images(self, done: int) -> None:
        """Report without waiting; the answer to the previous report is read once it has arrived."""
        self._read_answer()
        if self._pending is None:
            self._pending = self._coordinator.report_images.remote(self._number, done)

    def should_stop(self) -> bool:
        self._read_answer()
        return self._stop_at is not None and time.monotonic() >= self._stop_at

    def end(self) -> None:
        self._coordinator.end.remote(self._number)

    def _read_answer(self) -> None:
        if self._pending is None or not ray.wait([self._pending], timeout=0)[0]:
            return
        pending, self._pending = self._pending, None
        try:
            assignment = cast(ShardAssignment, ray.get(pending))
        except RayActorError:
            return
        if assignment.stop_in_seconds is not None:
            self._stop_at = time.monotonic() + assignment.stop_in_seconds


def _gpu_meter(spec: Spec) -> GpuMeter | None:
    """A meter of the GPU that Ray gave this worker; None on a CPU."""
    if spec.device != "cuda":
        return None
    return GpuMeter(torch.cuda.get_device_name(), _gpu_share())


def _encoders(spec: Spec) -> Encoders:
    """Processes beside a GPU, whose kernels this process's interpreter launches; a thread on the CPU."""
    if spec.device != "cuda":
        return EncoderThread()
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0)
    return EncoderProcesses(max(1, int(cpus) - 1))


def _gpu_share() -> float:
    """The part of a GPU that Ray gave this worker."""
    return ray.get_runtime_context().get_assigned_resources().get("GPU", 1.0)


def _end_process(reason: str) -> None:
    """End this process, so that Ray starts another one: no later call on the GPU would succeed in this one."""
    log.error("%s; the worker ends, because CUDA does not recover from it within a process", reason)
    logging.shutdown()
    os._exit(1)


def error_line(error: BaseException) -> str:
    """An error and where it was raised, in one line."""
    text = " ".join(str(error).split())[:500]
    if isinstance(error, (UserError, DamageError)):
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({os.path.basename(frame.filename)}:{frame.lineno})"
