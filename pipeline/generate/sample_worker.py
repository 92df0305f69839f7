"""The body of a Ray actor that makes shards, and the row it answers with."""

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
from ray.exceptions import GetTimeoutError, RayActorError

from pipeline.config.base import Settings
from pipeline.config.evaluation import FeatureNetworkConfig
from pipeline.config.generation import GuardConfig
from pipeline.config.model_card import ModelCard
from pipeline.errors import DamageError, UserError
from pipeline.features.networks import open_network
from pipeline.features.shard_sums import FeatureSums
from pipeline.generate.coordinator import ShardAssignment
from pipeline.generate.done_records import DoneRecord
from pipeline.generate.engine import Engine, set_up_torch
from pipeline.generate.guards import GuardTripped
from pipeline.generate.plan import shard
from pipeline.generate.shard_writer import ShardCancelled, ShardWriter
from pipeline.generate.spec import Spec
from pipeline.nets.model_files import build_model
from pipeline.retry import RetryPolicy
from pipeline.store import open_store
from pipeline.telemetry.logs import located, name_process, set_up_logging
from pipeline.telemetry.prometheus import JobMetrics

PAUSES = RetryPolicy(first_pause_seconds=1.0, longest_pause_seconds=30.0)
# A worker that dies may have been preempted, which says nothing about its shard; only a shard that is begun far
# more often than it may fail is taken for the cause.
DEATHS_PER_ATTEMPT = 5
log = logging.getLogger(__name__)
Rows = dict[str, npt.NDArray[Any]]


class Outcome(Settings):
    """What became of one attempt at a shard."""

    shard: int
    """Number of the shard."""
    status: Literal["done", "failed", "guard", "abandoned"]
    """`guard`: images not worth keeping; `abandoned`: the job is being drained."""
    record: DoneRecord | None = None
    """The done-record, if done."""
    error: str | None = None
    """What went wrong, in one line, if it did."""
    worker: str
    """Host and process."""


@dataclass(frozen=True)
class SampleWorkerConfig:
    """What every worker of a job needs to know. Small: the weights travel through Ray's object store."""

    spec: Spec
    card: ModelCard
    output: str
    guards: GuardConfig
    max_attempts: int
    features: FeatureNetworkConfig | None = None


class SampleWorker:
    """Loads the network once and makes the shards it is given.

    Errors come back as rows: an exception would end the whole job. A worker that fails waits before it takes
    the next shard, longer each time, so that one broken machine cannot run through the whole plan.
    """

    def __init__(self, order: SampleWorkerConfig, weights: list[Any], board: Any) -> None:
        """`weights`: a list of one reference to the weights' bytes; `board`: a handle of the Board actor."""
        set_up_logging()
        name_process(run=f"{order.spec.model.name}-{order.spec.digest[:10]}")
        self.order = order
        self.board = board
        self._meters = JobMetrics("generate", order.spec.model.name)
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self._failures = 0
        self._maker: ShardWriter | None = None
        self._unfit: str | None = None
        try:
            self._maker = self._load(cast(bytes, ray.get(weights[0])))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is reported with the shards it costs
            self._unfit = error_line(error)

    def _load(self, weights: bytes) -> ShardWriter:
        order = self.order
        set_up_torch(order.spec)
        net = build_model(order.card, weights, order.spec.device, where=f"model {order.spec.model.name}")
        network = None if order.features is None else FeatureSums(open_network(order.features, ""))
        engine = Engine(order.spec, net, order.card)
        return ShardWriter(engine, open_store(order.output), order.guards, network)

    def __call__(self, rows: Rows) -> Rows:
        """Numbers of shards in column `shard`; outcomes as JSON in column `outcome`."""
        outcomes = [self._attempt(int(number)).model_dump_json() for number in rows["shard"]]
        return {"outcome": np.array(outcomes, dtype=object)}

    def _attempt(self, number: int) -> Outcome:
        with located(shard=number):
            outcome = self._outcome(number)
            level = logging.INFO if outcome.status in ("done", "abandoned") else logging.WARNING
            log.log(level, "shard %d: %s", number, outcome.error or outcome.status)
        self._meters.add_counted()
        if outcome.status == "failed":
            self._failures += 1
            time.sleep(PAUSES.pause_seconds(self._failures))
        else:
            self._failures = 0
        return outcome

    def _outcome(self, number: int) -> Outcome:
        if self._maker is None:
            return Outcome(shard=number, status="failed", error=self._unfit, worker=self.name)
        watch = _Watch(self.board, number)
        try:
            orders = watch.begin(self.name)
            if orders.stop_in_seconds is not None:
                return Outcome(shard=number, status="abandoned", worker=self.name)
            if orders.attempt > DEATHS_PER_ATTEMPT * self.order.max_attempts:
                died = f"begun {orders.attempt - 1} times; its workers died"
                return Outcome(shard=number, status="failed", error=died, worker=self.name)
            unit = shard(self.order.spec, number)
            record = self._maker.write(unit, orders.attempt, watch.should_stop, watch.images)
            return Outcome(shard=number, status="done", record=record, worker=self.name)
        except ShardCancelled:
            return Outcome(shard=number, status="abandoned", worker=self.name)
        except GuardTripped as error:
            return Outcome(shard=number, status="guard", error=str(error), worker=self.name)
        except Exception as error:  # noqa: BLE001 - reported by the driver, which tries the shard elsewhere
            return Outcome(shard=number, status="failed", error=error_line(error), worker=self.name)
        finally:
            watch.leave()


class _Watch:
    """One shard's line on the board. The board may die: work goes on without it."""

    def __init__(self, board: Any, number: int) -> None:
        self._board = board
        self._number = number
        self._pending: Any = None
        self._stop_at: float | None = None

    def begin(self, worker: str) -> ShardAssignment:
        try:
            return cast(ShardAssignment, ray.get(self._board.begin.remote(self._number, worker), timeout=30))
        except (RayActorError, GetTimeoutError):
            return ShardAssignment(attempt=1)

    def images(self, done: int) -> None:
        """Report without waiting; the answer to the last report is read when it is there."""
        self._read_answer()
        if self._pending is None:
            self._pending = self._board.report_images.remote(self._number, done)

    def should_stop(self) -> bool:
        self._read_answer()
        return self._stop_at is not None and time.monotonic() >= self._stop_at

    def leave(self) -> None:
        self._board.end.remote(self._number)

    def _read_answer(self) -> None:
        if self._pending is None or not ray.wait([self._pending], timeout=0)[0]:
            return
        pending, self._pending = self._pending, None
        try:
            orders = cast(ShardAssignment, ray.get(pending))
        except RayActorError:
            return
        if orders.stop_in_seconds is not None:
            self._stop_at = time.monotonic() + orders.stop_in_seconds


def error_line(error: BaseException) -> str:
    """An error with the place it comes from, in one line."""
    text = " ".join(str(error).split())[:500]
    if isinstance(error, (UserError, DamageError)):
        return text
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({os.path.basename(place.filename)}:{place.lineno})"
