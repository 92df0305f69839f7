"""The same training on a Ray cluster: Ray Train places the workers, joins them for DDP and replaces lost groups.

Nothing of the result depends on Ray: checkpoints live in our store, and a replaced group starts from the last one.
"""

import logging
import math
import os
import tempfile
import threading
import time
import uuid
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
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.errors import DamageError, JobError, UserError
from pipeline.progress import Progress
from pipeline.store import StoreUnreachable
from pipeline.telemetry.logs import set_up_logging
from pipeline.telemetry.stall import StallDetector
from pipeline.train.loop import NonFiniteError
from pipeline.train.rendezvous import Rendezvous
from pipeline.train.worker import (
    TrainTask,
    UnreachableError,
    WorkerContext,
    WorkerGroupStartError,
    train_worker,
)

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
ROOM_VARIABLE, ROOM_SECONDS = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30"
"""How long Ray waits for room for all workers before it says that there is none."""
NO_ROOM = "WorkerGroupStartupTimeoutError"
"""What Ray calls that; the class is not public."""
MOST_STARTS = 30
"""How often there may be no room: a node that went has a quarter of an hour to come back."""
LIVES_SECONDS = 10.0
"""Rank 0 has asked whether to stop within this time, or it is gone."""


@ray.remote(num_cpus=0)
class TrainCoordinator:
    """Where rank 0 says how far it is and reads whether to stop, and any rank what ended the training for good.

    Lives as long as the driver, on the driver's node.
    """

    def __init__(self) -> None:
        self._news: tuple[int, str] | None = None
        self._stop = False
        self._failure: Exception | None = None
        self._heard_at = -math.inf

    def note(self, step: int, text: str) -> None:
        """Rank 0: finished steps and a short text."""
        self._news = (step, text)

    def stop_asked(self) -> bool:
        """Rank 0, every half second: whether the training shall stop."""
        self._heard_at = time.monotonic()
        return self._stop

    def silence_seconds(self) -> float:
        """Driver: since rank 0 of any group last asked; infinite before the first did."""
        return time.monotonic() - self._heard_at

    def fail(self, error: Exception) -> None:
        """A rank: it met what would be met again. The first to say so is heard."""
        self._failure = self._failure or error

    def failure(self) -> Exception | None:
        """What ended the training for good."""
        return self._failure

    def read(self) -> tuple[int, str] | None:
        """Driver: the latest news, or None before the first."""
        return self._news

    def ask_to_stop(self) -> None:
        """Driver: save and end."""
        self._stop = True


def train_on_cluster(task: TrainTask, progress: Progress, stop: threading.Event) -> None:
    """Run the training to its end, or to a checkpoint once `stop` is set. Needs a connected `ray`.

    Raises what a worker met and would meet again (UserError, DamageError, NonFiniteError), and JobError when the
    workers failed more often than `workers.max_failures` or the cluster is gone. WorkerGroupStartError: the caller
    shall leave the cluster, join it again and call this again.
    """
    here = ray.get_runtime_context().get_node_id()
    board: Any = TrainCoordinator.options(
        scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False)
    ).remote()
    os.environ.setdefault(ROOM_VARIABLE, ROOM_SECONDS)
    with tempfile.TemporaryDirectory(prefix="ddpm-ray-train-") as scratch:
        try:
            with _watching(board, task.config.steps, progress, stop):
                _fit(task, board, scratch, stop)
        except TrainingFailedError as error:
            _raise_failure(board)
            raise JobError(_given_up(error, task.config.workers.max_failures)) from error
        except ray.exceptions.RayError as error:
            raise JobError(_what_ended_it(error)) from error
        _raise_failure(board)


def _fit(task: TrainTask, board: Any, scratch: str, stop: threading.Event) -> None:
    """Train to the end, and wait for room where there is none: a lost node may come back.

    Raises WorkerGroupStartError for what the job answers by starting over.
    """
    for start in range(1, MOST_STARTS + 1):
        try:
            return _run(_trainer(task, board, scratch))
        except ControllerError as error:
            reason = _cause(error.controller_failure)
            if isinstance(reason, UserError | UnreachableError):
                raise reason from None
            if type(reason).__name__ != NO_ROOM and not stop.is_set():
                words = " ".join(str(reason).split())[:200] or type(reason).__name__
                raise WorkerGroupStartError(f"workers were lost before they trained ({words})") from None
            if start == MOST_STARTS:
                raise
        if stop.is_set():
            return None
        log.warning("no room for all workers; looking again, %d of %d", start + 1, MOST_STARTS)
    return None


def _cause(error: BaseException) -> BaseException:
    """What a worker met, out of Ray's wrapping."""
    return error.cause if isinstance(error, ray.exceptions.RayTaskError) else error


def _run(trainer: TorchTrainer) -> None:
    """`trainer.fit()` in a thread: in the main one Ray would put a handler of its own in the place of the job's.

    It would end on Ctrl-C without a checkpoint, and hold on to the controller.
    """
    met: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:  # noqa: BLE001  (raised where it is waited for)
            met.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_SECONDS)
    if met:
        raise met.pop()


def _trainer(task: TrainTask, board: Any, scratch: str) -> TorchTrainer:
    workers = task.config.workers
    resources = {"CPU": float(workers.cpus_per_worker)}
    if workers.gpus_per_worker:
        resources["GPU"] = workers.gpus_per_worker
    return TorchTrainer(
        _on_worker,
        train_loop_config={"task": task, "board": board},
        torch_config=Rendezvous(),
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers,
            elastic_resize_monitor_interval_s=workers.resize_seconds,
            use_gpu=workers.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        # Ray's own bookkeeping; a fresh name each time, because resuming is our checkpoints' work
        run_config=RunConfig(
            name=f"{task.config.name}-{uuid.uuid4().hex[:8]}",
            storage_path=scratch,
            # its tracebacks of lost groups would bury our line on them; Ray's own log files keep them
            logging_config=LoggingConfig("CRITICAL"),
            # what keeps a group from training is the controller's failure; `_fit` and the job answer it
            failure_config=FailureConfig(max_failures=workers.max_failures, controller_failure_limit=0),
        ),
    )


def _failure(board: Any) -> Exception | None:
    found: Any = ray.get(board.failure.remote())
    return found


def _raise_failure(board: Any) -> None:
    failure = _failure(board)
    if failure is not None:
        raise failure


def _what_ended_it(error: ray.exceptions.RayError) -> str:
    """One line: the cluster went away, or it could not begin, which another try would meet again."""
    text = str(error).strip() or type(error).__name__
    began = isinstance(error, ray.exceptions.RayActorError) and "creation task" not in text
    if began or isinstance(error, ray.exceptions.GetTimeoutError):
        return (
            f"the Ray cluster was lost while training ({type(error).__name__}); once it is up again, the same command "
            "goes on from the last checkpoint"
        )
    return (
        f"the cluster could not start the training ({text.splitlines()[-1].strip()[:300]}); mend that first"
    )


def _given_up(error: TrainingFailedError, max_failures: int) -> str:
    """One line: what the last of the lost groups met."""
    what, reason = "Ray gave up", str(error)
    if isinstance(error, WorkerGroupError):
        rank, first = min(error.worker_failures.items())
        log.error("rank %d failed", rank, exc_info=first)
        what = f"workers were lost more often than workers.max_failures={max_failures} allows"
        reason = f"rank {rank}: {str(first).strip().splitlines()[-1]}"
    return f"{what} ({' '.join(reason.split())[:300]}); the same command goes on from the last checkpoint"


def _on_worker(payload: dict[str, Any]) -> None:
    """The body of a Ray Train worker."""
    task: TrainTask = payload["task"]
    board: Any = payload["board"]
    if _failure(board) is not None:
        return  # this group replaces one that met what this one would meet again
    context = ray.train.get_context()
    rank = context.get_world_rank()
    set_up_logging()
    logging.getLogger("botocore").setLevel(logging.WARNING)  # or it tells where it found its keys
    torch.set_num_threads(task.config.workers.cpus_per_worker)
    place = WorkerContext(
        rank=rank,
        world=context.get_world_size(),
        device=torch.device(get_device()),
        node=f"node{context.get_node_rank()}" if context.get_local_rank() == 0 else None,
    )
    try:
        if rank == 0:
            log.info("%d workers train together", place.world)
        train_worker(task, place, _Remote(board) if rank == 0 else None)
    except (UserError, DamageError, NonFiniteError) as error:
        if not isinstance(error, StoreUnreachable):  # another group may have more luck
            ray.get(board.fail.remote(error))
        raise  # returning would leave the other ranks waiting for this one
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        log.error(
            "rank %d ends (%s: %s); another group goes on, if it may", rank, type(error).__name__, reason
        )
        raise


class _Remote:
    """The driver as rank 0 sees it, through the board; a thread asks, so that no step waits for an answer."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._stop = threading.Event()
        threading.Thread(target=self._listen, name="driver", daemon=True).start()

    def tell(self, step: int, note: str) -> None:
        self._board.note.remote(step, note)

    def asks_to_stop(self) -> bool:
        return self._stop.is_set()

    def _listen(self) -> None:
        while not self._stop.is_set():
            time.sleep(POLL_SECONDS)
            try:
                if ray.get(self._board.stop_asked.remote(), timeout=5):
                    self._stop.set()
            except (ray.exceptions.RayError, TimeoutError):
                continue  # the cluster recovers, or the driver is gone and Ray ends this process


class _watching:  # noqa: N801  (reads as a phrase after `with`)
    """Carries news from the board to the caller, and the caller's wish to stop to the board, in a thread."""

    def __init__(self, board: Any, total: int, progress: Progress, stop: threading.Event) -> None:
        self._board, self._total, self._tell, self._stop = board, total, progress, stop
        self._over = threading.Event()
        self._step: int | None = None
        self._quiet = StallDetector()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        asked = False
        while not self._over.is_set():
            self._look()
            self._say_if_quiet()
            if self._stop.is_set() and not asked:
                self._board.ask_to_stop.remote()
                asked = True
            time.sleep(POLL_SECONDS)

    def _look(self) -> None:
        try:
            news: tuple[int, str] | None = ray.get(self._board.read.remote(), timeout=5)
        except (ray.exceptions.RayError, TimeoutError):
            return  # no news while the cluster recovers; the training itself reports failure
        if news is not None:
            self._tell(news[0], self._total, news[1])
            if news[0] != self._step:
                self._step = news[0]
                self._quiet.progress()

    def _say_if_quiet(self) -> None:
        quiet = self._quiet.due()
        if quiet is None:
            return
        try:
            silence: float | None = ray.get(self._board.silence_seconds.remote(), timeout=5)
        except (ray.exceptions.RayError, TimeoutError):
            silence = None
        log.warning(stall_reason(quiet, self._step or 0, silence))


def stall_reason(quiet_seconds: float, step: int, silence_seconds: float | None) -> str:
    """A line for a training without news; `silence_seconds`: since rank 0 was heard, None where nobody can say."""
    if silence_seconds is None:
        what = "the cluster does not answer"
    elif silence_seconds < LIVES_SECONDS:
        what = "its workers live: they wait for the store or for each other, or their steps are long"
    else:
        what = "no workers are at it: Ray starts them, or waits for room for them"
    return f"no news for {quiet_seconds:.0f} s, after step {step}: {what}"
