"""A parallel map on a Ray cluster."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

from jobs.ray_session import ray_cluster, require_resources
from pipeline.errors import DamageError, JobError, UserError
from pipeline.parallel import ParallelMap, serial_map
from pipeline.telemetry.terminal import echo

T = TypeVar("T")
R = TypeVar("R")

RETRIES = 3
"""How often an item whose worker died is repeated elsewhere. An item that kills every worker must end the job."""
TASKS_PER_CPU = 2
"""Tasks submitted ahead, so that no worker waits for the driver."""


class RayMap:
    """A `ParallelMap` of tasks on the cluster that this process is connected to."""

    def __init__(self, max_tasks: int | None = None) -> None:
        """`max_tasks` at a time; None = as many as keep every core of the cluster busy."""
        self._max_tasks = max_tasks
        self.workers: set[tuple[str, int]] = set()
        """(node, process) of every worker that ran a task."""

    def __call__(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        import ray

        task: Any = ray.remote(num_cpus=1, max_retries=RETRIES)(_attempted)
        shared = ray.put(work)  # once, not with every item
        max_tasks = self._max_tasks or TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
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
        require_resources(num_workers, 1, 0, section)
        yield RayMap(num_workers)


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


def _on_this_machine(address: str) -> bool:
    host = urlsplit(address if "://" in address else f"ray://{address}").hostname or address
    return host in ("auto", "local", "localhost", "::1") or host.startswith("127.")
