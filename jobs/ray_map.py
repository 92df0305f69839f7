"""A parallel map on a Ray cluster."""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ddpm_pipeline.config.evaluation import EvaluateConfig
from ddpm_pipeline.errors import DamageError, JobError, UserError
from ddpm_pipeline.jobs.ray_session import ray_cluster, require_resources
from ddpm_pipeline.parallel import MapWorkers, ParallelMap, serial_map
from ddpm_pipeline.telemetry.terminal import echo

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")

RETRIES = 3
"""How often an item whose worker died is repeated elsewhere. An item that kills every worker must end the job."""
TASKS_PER_CPU = 2
"""Tasks submitted ahead, so that no worker waits for the driver."""


class RayMap:
    """A `ParallelMap` of tasks on the cluster that this process is connected to."""

    def __init__(self, max_tasks: int | None = None, gpus_per_task: float = 0) -> None:
        """`max_tasks` at a time; None = as many as keep every core, or every GPU, of the cluster busy."""
        self._max_tasks = max_tasks
        self._gpus_per_task = gpus_per_task
        self.workers: set[tuple[str, int]] = set()
        """(node, process) of every worker that ran a task."""

    def __call__(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        import ray

        task: Any = ray.remote(
            num_cpus=1,
            num_gpus=self._gpus_per_task,
            max_retries=RETRIES,
            max_calls=0,  # or Ray would start a new process for each task on a GPU
        )(_attempted_on_gpu if self._gpus_per_task else _attempted)
        shared = ray.put(work)  # once, not with every item
        max_tasks = self._max_tasks or self._tasks_that_fill(ray.cluster_resources())
        in_progress: deque[Any] = deque()
        try:
            for item in items:
                in_progress.append(task.remote(shared, item))
                if len(in_progress) >= max_tasks:
                    yield self._result(in_progress.popleft())
            while in_progress:
                yield self._result(in_progress.popleft())
        finally:
            for left in in_progress:
                ray.cancel(left)

    def _tasks_that_fill(self, resources: Mapping[str, float]) -> int:
        if self._gpus_per_task:
            return max(1, int(resources.get("GPU", 0) / self._gpus_per_task))
        return TASKS_PER_CPU * max(1, int(resources.get("CPU", 1)))

    def _result(self, reference: Any) -> Any:
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            worker, result, error = ray.get(reference)
        except RayTaskError:
            raise  # a bug: its traceback is wanted
        except RayError as lost:
            raise JobError(
                f"cluster: a task of this job lost its worker {RETRIES + 1} times ({type(lost).__name__}); "
                "see the workers' logs (out of memory?), or unset RAY_ADDRESS to run in this process"
            ) from None
        self.workers.add(worker)
        if error is not None:
            raise error
        return result


@contextmanager
def ray_workers(num_workers: int, section: str) -> Generator[ParallelMap]:
    """A map of `num_workers` tasks at a time, a core each, on the cluster that RAY_ADDRESS names; 0 = in this process.

    UserError naming `section` where the cluster has fewer cores.
    """
    if num_workers == 0:
        yield serial_map
        return
    with ray_cluster():
        yield _cpu_map(num_workers, section)


@contextmanager
def measuring_workers(config: EvaluateConfig, section: str, used_gpus: bool) -> Generator[MapWorkers]:
    """Where models are measured: as `ray_workers`, with a GPU for each task where `config.gpus_per_task` asks for it.

    used_gpus: whether the job that is judged used GPUs, which decides if the settings do not. UserError naming
    `section` if the cluster lacks what the settings ask for.
    """
    gpus = config.gpus_per_task
    each = 1.0 if gpus is None and used_gpus else gpus or 0.0
    if each and config.num_workers == 0 and _gpu_here():
        yield MapWorkers(serial_map, measuring_gpu())
    elif each and os.environ.get("RAY_ADDRESS"):
        with ray_cluster():
            if gpus is None and not _cluster_has_gpus():
                log.warning("%s: the cluster has no GPU now: measuring on the CPU", section)
                yield MapWorkers(_cpu_map(config.num_workers, section))
                return
            require_resources(max(1, config.num_workers), 1, each, section)
            gpu = _gpu_of_cluster(each, section)
            yield MapWorkers(RayMap(config.num_workers or None, each), gpu)
    elif gpus:
        raise UserError(
            f"{section}.gpus_per_task: {gpus:g}, but torch can use no GPU of this machine, and RAY_ADDRESS names no "
            "cluster; leave it out to measure on the CPU"
        )
    else:
        with ray_workers(config.num_workers, section) as cpu_map:
            yield MapWorkers(cpu_map)


def _cpu_map(num_workers: int, section: str) -> ParallelMap:
    """Of the cluster that this process is connected to; 0 = in this process."""
    if num_workers == 0:
        return serial_map
    require_resources(num_workers, 1, 0, section)
    return RayMap(num_workers)


def measuring_gpu() -> str:
    """Name of this process's GPU."""
    from ddpm_pipeline.devices import measuring  # imports torch

    return measuring.measuring_gpu()


def _gpu_of_cluster(gpus_per_task: float, section: str) -> str:
    """Name of the cluster's GPUs, once they are checked. UserError if they cannot do the work, or are of two models."""
    from ddpm_pipeline.cluster import Workers, require_fit_workers

    setting = f"{section}.gpus_per_task"
    kinds = require_fit_workers(Workers(1, gpus_per_task, setting), threading.Event())
    names = sorted({kind.name for kind in kinds})
    if len(names) != 1:
        raise UserError(
            f"{setting}: the cluster has {' and '.join(names) or 'no GPU'}, and what is compared must be measured on "
            "one model of GPU; use a cluster with one, or set it to 0 to measure on CPUs"
        )
    return names[0]


def _gpu_here() -> bool:
    import torch

    return torch.cuda.is_available()


def _cluster_has_gpus() -> bool:
    """Whether the cluster has a GPU, or may add one."""
    import ray

    from ddpm_pipeline.cluster import grows

    return ray.cluster_resources().get("GPU", 0.0) > 0 or grows()


@contextmanager
def ray_map_for(items: int, at_least: int, local_paths: bool) -> Generator[ParallelMap | None]:
    """A map on the cluster that RAY_ADDRESS names; None without such a cluster, or for fewer than `at_least` items.

    Items that are `local_paths` go to a cluster on this machine only: other machines may not see the same files.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address or items < at_least or (local_paths and not _on_this_machine(address)):
        yield None
        return
    with ray_cluster():
        ray_map = RayMap()
        yield ray_map
    echo(f"cluster  {len(ray_map.workers)} worker processes")


def _attempted(work: Callable[[T], R], item: T) -> tuple[tuple[str, int], R | None, Exception | None]:
    """Errors in one line come back as values: raised, Ray would wrap them in its traceback."""
    import ray

    worker = (ray.get_runtime_context().get_node_id(), os.getpid())
    try:
        return worker, work(item), None
    except (UserError, DamageError) as error:
        return worker, None, error


def _attempted_on_gpu(work: Callable[[T], R], item: T) -> tuple[tuple[str, int], R | None, Exception | None]:
    """As `_attempted`; gives the GPU's memory back, which the next task may use from another process."""
    import torch

    try:
        return _attempted(work, item)
    finally:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _on_this_machine(address: str) -> bool:
    host = urlsplit(address if "://" in address else f"ray://{address}").hostname or address
    return host in ("auto", "local", "localhost", "::1") or host.startswith("127.")
