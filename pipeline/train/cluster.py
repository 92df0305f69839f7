"""The same training on a Ray cluster: Ray Train places the workers, joins them for DDP and replaces lost groups.

Nothing of the result depends on Ray: checkpoints live in our store, and a replaced group starts from the last one.
"""

import logging
import tempfile
import threading
import time
import uuid
from typing import Any

import ray
import ray.exceptions
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchTrainer, get_device
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.errors import DamageError, UserError, WorkFailed
from pipeline.logs import set_up_logging
from pipeline.store import StoreUnreachable
from pipeline.train.loop import NonFiniteError
from pipeline.train.session import OnProgress
from pipeline.train.worker import Place, Task, train_worker

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5


@ray.remote(num_cpus=0)
class Board:
    """Where rank 0 says how far it is and reads whether to stop, and any rank what ended the training for good.

    Lives as long as the driver, on the driver's node.
    """

    def __init__(self) -> None:
        self._news: tuple[int, str] | None = None
        self._stop = False
        self._failure: Exception | None = None

    def note(self, step: int, text: str) -> None:
        """Rank 0: finished steps and a short text."""
        self._news = (step, text)

    def stop_asked(self) -> bool:
        """Rank 0: whether the training shall stop."""
        return self._stop

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


def train_on_cluster(task: Task, on_progress: OnProgress, stop: threading.Event) -> None:
    """Run the training to its end, or to a checkpoint once `stop` is set. Needs a connected `ray`.

    Raises what a worker met and would meet again (UserError, DamageError, NonFiniteError), and WorkFailed when the
    workers failed more often than `workers.max_failures` or the cluster is gone.
    """
    here = ray.get_runtime_context().get_node_id()
    board: Any = Board.options(scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False)).remote()
    with tempfile.TemporaryDirectory(prefix="ddpm-ray-train-") as scratch:
        trainer = _trainer(task, board, scratch)
        try:
            with _watching(board, task.config.steps, on_progress, stop):
                trainer.fit()
        except TrainingFailedError as error:
            _raise_failure(board)
            raise WorkFailed(_given_up(error, task.config.workers.max_failures)) from error
        except ray.exceptions.RayError as error:
            raise WorkFailed(
                f"the Ray cluster was lost while training ({type(error).__name__}); once it is up again, the same "
                "command goes on from the last checkpoint"
            ) from error
        _raise_failure(board)


def _trainer(task: Task, board: Any, scratch: str) -> TorchTrainer:
    workers = task.config.workers
    resources = {"CPU": float(workers.cpus_per_worker)}
    if workers.gpus_per_worker:
        resources["GPU"] = workers.gpus_per_worker
    return TorchTrainer(
        _on_worker,
        train_loop_config={"task": task, "board": board},
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
            # a group that finds no room within a minute counts as the controller's failure: a node that went
            # has a quarter of an hour to come back
            failure_config=FailureConfig(max_failures=workers.max_failures, controller_failure_limit=15),
        ),
    )


def _failure(board: Any) -> Exception | None:
    found: Any = ray.get(board.failure.remote())
    return found


def _raise_failure(board: Any) -> None:
    failure = _failure(board)
    if failure is not None:
        raise failure


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
    task: Task = payload["task"]
    board: Any = payload["board"]
    if _failure(board) is not None:
        return  # this group replaces one that met what this one would meet again
    context = ray.train.get_context()
    rank = context.get_world_rank()
    set_up_logging()
    logging.getLogger("botocore").setLevel(logging.WARNING)  # or it tells where it found its keys
    torch.set_num_threads(task.config.workers.cpus_per_worker)
    place = Place(
        rank=rank,
        world=context.get_world_size(),
        device=torch.device(get_device()),
        node=f"node{context.get_node_rank()}" if context.get_local_rank() == 0 else None,
    )
    try:
        train_worker(task, place, _Remote(board) if rank == 0 else None)
    except StoreUnreachable:
        raise  # another group may have more luck
    except (UserError, DamageError, NonFiniteError) as error:
        ray.get(board.fail.remote(error))
        raise  # returning would leave the other ranks waiting for this one


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

    def __init__(self, board: Any, total: int, on_progress: OnProgress, stop: threading.Event) -> None:
        self._board, self._total, self._tell, self._stop = board, total, on_progress, stop
        self._over = threading.Event()
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
