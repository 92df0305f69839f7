"""The same training in this process, without Ray: for a debugger, a profiler, or a single machine."""

import threading

import torch

from pipeline.config.training import WorkerConfig
from pipeline.errors import UserError
from pipeline.train.session import OnProgress
from pipeline.train.worker import TrainTask, WorkerContext, train_worker


class _LocalDriver:
    """The driver of a training in this process."""

    def __init__(self, total: int, on_progress: OnProgress, stop: threading.Event) -> None:
        self._total, self._on_progress, self._stop = total, on_progress, stop

    def tell(self, step: int, note: str) -> None:
        self._on_progress(step, self._total, note)

    def asks_to_stop(self) -> bool:
        return self._stop.is_set()


def require_device(workers: WorkerConfig) -> None:
    """UserError when the settings ask for a GPU that torch cannot use here."""
    if workers.gpus_per_worker and not torch.cuda.is_available():
        raise UserError(
            f"train.workers.gpus_per_worker: {workers.gpus_per_worker:g} asked for, but torch {torch.__version__} can "
            "use no GPU of this machine (see ddpm doctor); set it to 0 to train on the CPU"
        )


def train_local(task: TrainTask, on_progress: OnProgress, stop: threading.Event) -> None:
    """Train here as the only worker, on a GPU if the settings ask for one; ends early once `stop` is set."""
    workers = task.config.workers
    device = torch.device("cuda" if workers.gpus_per_worker else "cpu")

    torch.set_num_threads(workers.cpus_per_worker * workers.most)
    place = WorkerContext(rank=0, world=1, device=device, node="node0")
    train_worker(task, place, _LocalDriver(task.config.steps, on_progress, stop))
