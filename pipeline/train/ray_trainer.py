"""Training on a Ray cluster: Ray Train places the workers, joins them for DDP and replaces lost groups.

The result does not depend on Ray: checkpoints live in our store, and a replacement group starts from the last one.
"""

import logging
import os
import tempfile
import threading
import time
import uuid
from dataclasses import replace
from typing import Any

import ray
import ray.exceptions
import ray.train
import torch
from ray.train import (
    ControllerError,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    WorkerGroupError,
)
from ray.train.torch import TorchTrainer, get_device

from ddpm_pipeline.cluster import cause_of, draining_nodes, on_node, reason_line
from ddpm_pipeline.devices.remedies import fact_of, unfit_remedy
from ddpm_pipeline.errors import DamageError, JobError, UserError
from ddpm_pipeline.progress import Progress
from ddpm_pipeline.store import StoreUnreachable
from ddpm_pipeline.telemetry.logs import set_up_logging
from ddpm_pipeline.telemetry.stall import StallDetector
from ddpm_pipeline.train.loop import NonFiniteError
from ddpm_pipeline.train.rank_watch import RankMark, RankMarker
from ddpm_pipeline.train.rendezvous import Rendezvous
from ddpm_pipeline.train.train_coordinator import DriverNode, TrainCoordinator
from ddpm_pipeline.train.train_task import TrainTask, UnreachableError, WorkerGroupStartError
from ddpm_pipeline.train.worker import WorkerContext, train_worker

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
START_TIMEOUT_VARIABLE, START_TIMEOUT_SECONDS = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30"
"""How long Ray waits for free resources for all workers."""
START_TIMEOUT_ERROR = "WorkerGroupStartupTimeoutError"
"""Ray's error when they do not become free; the class is not public."""
MAX_STARTS = 30
"""Attempts to find free resources: a lost node has a quarter of an hour to come back."""
UNUSED_CALLBACKS = ("DatasetsCallback", "PlacementGroupCleanerCallback")
"""Classes of Ray's, which are not public. Where a later Ray has other names, their actors are started again."""
HEARTBEAT_SECONDS = 10.0
"""Rank 0 polls the coordinator at least this often while it is alive."""


def train_on_cluster(task: TrainTask, progress: Progress, stop: threading.Event) -> None:
    """Run the training to its end, or to a checkpoint once `stop` is set. Needs a connected `ray`.

    Raises the fatal error of a worker (UserError, DamageError, NonFiniteError), and JobError when workers failed more
    often than `workers.max_failures` or the cluster is gone. On WorkerGroupStartError the caller should leave the
    cluster, join it again and call this again.
    """
    node = DriverNode(ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address())
    coordinator: Any = TrainCoordinator.options(scheduling_strategy=on_node(node.id)).remote(node)
    os.environ.setdefault(START_TIMEOUT_VARIABLE, START_TIMEOUT_SECONDS)
    with tempfile.TemporaryDirectory(prefix="ddpm-ray-train-") as scratch:
        try:
            with _ProgressWatch(coordinator, task.config.steps, progress, stop):
                _fit(task, coordinator, scratch, stop)
        except TrainingFailedError as error:
            _raise_failure(coordinator)
            raise JobError(_workers_failure(error, task.config.workers.max_failures)) from error
        except ray.exceptions.RayError as error:
            raise JobError(_cluster_failure(error)) from error
        _raise_failure(coordinator)


def _fit(task: TrainTask, coordinator: Any, scratch: str, stop: threading.Event) -> None:
    """Train to the end: with another group where a node is drained, and waiting for free resources if need be.

    Raises WorkerGroupStartError where the job should start over.
    """
    start = 1
    while True:
        try:
            step = _run(_trainer(task, coordinator, scratch))
        except ControllerError as error:
            reason = cause_of(error.controller_failure)
            if isinstance(reason, UserError | UnreachableError):
                raise reason from None
            if type(reason).__name__ != START_TIMEOUT_ERROR and not stop.is_set():
                remedy = unfit_remedy(reason)
                if remedy is not None:  # a new group would meet it again
                    raise UserError(f"workers cannot train there: {fact_of(reason)}; {remedy}") from None
                raise WorkerGroupStartError(
                    f"workers were lost before they trained ({reason_line(reason)})"
                ) from None
            if start == MAX_STARTS:
                raise
            start += 1
            if not stop.is_set():
                log.warning("no free resources for all workers; retrying, %d of %d", start, MAX_STARTS)
        else:
            if step is None or step >= task.config.steps:
                return
            if not stop.is_set():
                _leave_drained(coordinator, step)
            start = 1
        if stop.is_set():
            return


def _leave_drained(coordinator: Any, step: int) -> None:
    """Say why a group has ended at `step`. JobError where the driver's own node is the one that is drained."""
    drained: tuple[str, ...] = ray.get(coordinator.drained.remote())
    what = f"Ray drains node {', '.join(drained)}: the workers saved a checkpoint at step {step} and ended"
    if ray.get_runtime_context().get_node_id() in draining_nodes():
        raise JobError(
            f"{what}, and this job runs there itself; run the same command on another node to resume"
        )
    log.warning("%s; others go on from there", what)


def _run(trainer: TorchTrainer) -> int | None:
    """`trainer.fit()` in a thread: in the main thread Ray would replace the job's signal handler.

    Ray's would end on Ctrl-C without a checkpoint, and keep the controller. Returns what rank 0 does.
    """
    errors: list[Exception] = []
    steps: list[int | None] = []

    def fit() -> None:
        try:
            steps.append(trainer.fit().return_value)
        except Exception as error:  # noqa: BLE001  (raised below, in the main thread)
            errors.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_SECONDS)
    if errors:
        raise errors.pop()
    return steps.pop()


def _trainer(task: TrainTask, coordinator: Any, scratch: str) -> TorchTrainer:
    workers = task.config.workers
    resources = {"CPU": float(workers.cpus_per_worker)}
    if workers.gpus_per_worker:
        resources["GPU"] = workers.gpus_per_worker
    return _LeanTrainer(
        _on_worker,
        train_loop_config={"task": task, "coordinator": coordinator},
        torch_config=Rendezvous(  # pyright: ignore[reportArgumentType] - Ray asks for what a BackendConfig has
            timeout_s=workers.collective_seconds,
            matmul=task.config.matmul,
            deterministic=task.config.deterministic,
        ),
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers,
            elastic_resize_monitor_interval_s=workers.resize_seconds,
            use_gpu=workers.gpus_per_worker > 0,
            resources_per_worker=resources,
            label_selector=dict(workers.node_labels) or None,
        ),
        # Ray's own bookkeeping; a new name each time, because our checkpoints do the resuming
        run_config=RunConfig(
            name=f"{task.config.name}-{uuid.uuid4().hex[:8]}",
            storage_path=scratch,
            # its tracebacks of lost groups would bury our one line; Ray's own log files keep them
            logging_config=LoggingConfig("CRITICAL"),
            # a group that cannot start is a controller failure; `_fit` and the job handle it
            failure_config=FailureConfig(max_failures=workers.max_failures, controller_failure_limit=0),
        ),
    )


class _LeanTrainer(TorchTrainer):
    """Ray's trainer without two actors that it starts for others, each a process of two CPU seconds or more.

    One serves Ray Data's sets to workers, which ours do not read. The other frees the resources of a group whose
    controller has died; ours ends the job then, and its end frees them.
    """

    def _create_default_callbacks(self) -> list[Any]:
        return [
            one for one in super()._create_default_callbacks() if type(one).__name__ not in UNUSED_CALLBACKS
        ]


def _failure(coordinator: Any) -> Exception | None:
    found: Any = ray.get(coordinator.failure.remote())
    return found


def _raise_failure(coordinator: Any) -> None:
    failure = _failure(coordinator)
    if failure is not None:
        raise failure


def _cluster_failure(error: ray.exceptions.RayError) -> str:
    """One line: the cluster was lost, or it could not start the training, which another attempt would meet again."""
    started = isinstance(error, ray.exceptions.RayActorError) and "creation task" not in str(error)
    if started or isinstance(error, ray.exceptions.GetTimeoutError):
        return (
            f"the Ray cluster was lost while training ({type(error).__name__}); once it is up again, run the same "
            "command to resume from the last checkpoint"
        )
    return f"the cluster could not start the training ({reason_line(error)}); correct that first"


def _workers_failure(error: TrainingFailedError, max_failures: int) -> str:
    """One line: the error of the last group that failed."""
    what, reason = "Ray gave up", reason_line(error)
    if isinstance(error, WorkerGroupError):
        rank, first = min(error.worker_failures.items())
        log.error("rank %d failed", rank, exc_info=first)
        what = f"workers were lost more often than workers.max_failures={max_failures} allows"
        reason = f"rank {rank}: {reason_line(first)}"
    return f"{what} ({reason}); run the same command to resume from the last checkpoint"


def _on_worker(payload: dict[str, Any]) -> int | None:
    """The body of a Ray Train worker. Returns the step of the last checkpoint; None if it has not begun to train."""
    task: TrainTask = payload["task"]
    coordinator: Any = payload["coordinator"]
    if _failure(coordinator) is not None:
        return None  # this group replaces one that had a fatal error
    context = ray.train.get_context()
    rank = context.get_world_rank()
    set_up_logging()
    logging.getLogger("botocore").setLevel(logging.WARNING)  # INFO names the source of its keys
    torch.set_num_threads(task.config.workers.cpus_per_worker)
    worker = WorkerContext(
        rank=rank,
        world=context.get_world_size(),
        device=torch.device(get_device()),
        node=f"node{context.get_node_rank()}" if context.get_local_rank() == 0 else None,
    )
    try:
        if rank == 0:
            log.info("training with %d workers", worker.world)
            ray.get(coordinator.begin_group.remote(worker.world))
        node_id = ray.get_runtime_context().get_node_id()
        mark = RankMark(rank, ray.util.get_node_ip_address(), task.finished_steps, node_id=node_id)
        with RankMarker(mark, coordinator.mark.remote) as marker:
            driver = _RemoteDriver(coordinator) if rank == 0 else None
            return train_worker(task, replace(worker, marker=marker), driver)
    except (UserError, DamageError, NonFiniteError) as error:
        if not isinstance(error, StoreUnreachable):  # another group may reach the store
            ray.get(coordinator.fail.remote(error))
        raise  # returning would leave the other ranks waiting for this one
    except Exception as error:
        remedy = unfit_remedy(error)
        if remedy is not None:
            place = f"node {ray.util.get_node_ip_address()}"
            ray.get(coordinator.fail.remote(UserError(f"{place}: {fact_of(error)}; {remedy}")))
            raise
        awaited = _awaited(coordinator)
        log.error(
            "rank %d failed (%s: %s)%s; another group continues if max_failures allows",
            rank,
            type(error).__name__,
            reason_line(error),
            f"; {awaited}" if awaited else "",
        )
        raise


def _awaited(coordinator: Any) -> str | None:
    """The ranks that the others wait for; None also where the coordinator does not answer."""
    try:
        found: str | None = ray.get(coordinator.awaited_ranks.remote(), timeout=5)
    except (ray.exceptions.RayError, TimeoutError):
        return None
    return found


class _RemoteDriver:
    """The driver as rank 0 sees it, through the coordinator; a thread polls, so that no step waits for a response."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator
        self._stop = threading.Event()
        threading.Thread(target=self._poll, name="driver-poll", daemon=True).start()

    def report(self, step: int, note: str) -> None:
        self._coordinator.report.remote(step, note)

    def should_stop(self) -> bool:
        return self._stop.is_set()

    def _poll(self) -> None:
        while not self._stop.is_set():
            time.sleep(POLL_SECONDS)
            try:
                if ray.get(self._coordinator.stop_requested.remote(), timeout=5):
                    self._stop.set()
            except (ray.exceptions.RayError, TimeoutError):
                continue  # the cluster recovers, or the driver is gone and Ray ends this process


class _ProgressWatch:
    """Context manager whose thread passes reports on to the caller, and the request to stop to the coordinator."""

    def __init__(self, coordinator: Any, total: int, progress: Progress, stop: threading.Event) -> None:
        self._coordinator, self._total, self._progress, self._stop = coordinator, total, progress, stop
        self._over = threading.Event()
        self._step: int | None = None
        self._stall = StallDetector()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._forward()

    def _watch(self) -> None:
        requested = False
        while not self._over.is_set():
            self._forward()
            self._warn_if_stalled()
            if self._stop.is_set() and not requested:
                self._coordinator.request_stop.remote()
                requested = True
            time.sleep(POLL_SECONDS)

    def _forward(self) -> None:
        try:
            report: tuple[int, str] | None = ray.get(self._coordinator.last_report.remote(), timeout=5)
        except (ray.exceptions.RayError, TimeoutError):
            return  # the cluster recovers; the training itself reports failure
        if report is not None:
            step, note = report
            self._progress(step, self._total, note)
            if step != self._step:
                self._step = step
                self._stall.progress()

    def _warn_if_stalled(self) -> None:
        stalled = self._stall.due()
        if stalled is None:
            return
        try:
            silence: float | None = ray.get(self._coordinator.silence_seconds.remote(), timeout=5)
        except (ray.exceptions.RayError, TimeoutError):
            silence = None
        log.warning(stall_reason(stalled, self._step, silence, _awaited(self._coordinator)))


def stall_reason(
    stalled_seconds: float, step: int | None, silence_seconds: float | None, awaited: str | None = None
) -> str:
    """A line for a training without progress. `silence_seconds`: since rank 0 last polled, None where unknown;
    `awaited`: which ranks the others wait for, where that is known.
    """
    if awaited is not None:
        what = awaited
    elif silence_seconds is None:
        what = "the cluster does not respond"
    elif silence_seconds < HEARTBEAT_SECONDS:
        what = "workers are alive; they are waiting for the store or each other, or their steps are long"
    else:
        what = "no workers running; Ray is starting them or waiting for free resources"
    last = "no step finished yet" if step is None else f"last step {step}"
    return f"no progress for {stalled_seconds:.0f} s ({last}): {what}"
