"""The same training in this process, without Ray: for a debugger, a profiler, or a single machine."""

import threading

import torch

from pipeline.train.session import OnProgress
from pipeline.train.worker import Place, Task, train_worker


def train_alone(task: Task, on_progress: OnProgress, stop: threading.Event) -> None:
    """Train here as the only worker, on a GPU if the settings ask for one; ends early once `stop` is set."""
    workers = task.config.workers
    device = torch.device("cuda" if workers.gpus_per_worker else "cpu")

    def report(step: int, note: str) -> bool:
        on_progress(step, task.config.steps, note)
        return stop.is_set()

    torch.set_num_threads(workers.cpus_per_worker * workers.num_workers)
    train_worker(task, Place(rank=0, world=1, device=device), report)
