"""The same training in this process, without Ray: for a debugger, a profiler, or a single machine."""

import threading

import torch

from pipeline.train.session import OnProgress
from pipeline.train.worker import Place, Task, train_worker


class _Here:
    """The driver of a training in this process."""

    def __init__(self, total: int, on_progress: OnProgress, stop: threading.Event) -> None:
        self._total, self._on_progress, self._stop = total, on_progress, stop

    def tell(self, step: int, note: str) -> None:
        self._on_progress(step, self._total, note)

    def asks_to_stop(self) -> bool:
        return self._stop.is_set()


def train_alone(task: Task, on_progress: OnProgress, stop: threading.Event) -> None:
    """Train here as the only worker, on a GPU if the settings ask for one; ends early once `stop` is set."""
    workers = task.config.workers
    device = torch.device("cuda" if workers.gpus_per_worker else "cpu")

    torch.set_num_threads(workers.cpus_per_worker * workers.most)
    place = Place(rank=0, world=1, device=device, node="node0")
    train_worker(task, place, _Here(task.config.steps, on_progress, stop))
