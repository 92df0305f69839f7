"""Units of work on the machines of a Ray cluster, with their results in order."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

from jobs.ray_session import ray_cluster
from pipeline.errors import DamageError, JobError, UserError
from pipeline.parallel import ParallelMap
from pipeline.telemetry.terminal import echo

T = TypeVar("T")
R = TypeVar("R")

RETRIES = 3
"""How often a unit whose worker died is done again, elsewhere. A unit that kills every worker must end the job."""
UNDER_WAY_PER_CPU = 2
"""Units handed out ahead, so that no worker waits for the driver."""


class RayMap:
    """Tasks on the cluster this process has joined (see pipeline.parallel)."""

    def __init__(self, most: int | None = None) -> None:
        """`most` tasks at a time; None = as many as keep every core of the cluster busy."""
        self._most = most
        self.workers: set[tuple[str, int]] = set()
        """(node, process) of whoever did a unit."""

    def __call__(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        import ray

        task: Any = ray.remote(num_cpus=1, max_retries=RETRIES)(_attempted)
        shared = ray.put(work)  # once, not with every unit
        most = self._most or UNDER_WAY_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
        under_way: deque[Any] = deque()
        try:
            for item in items:
                under_way.append(task.remote(shared, item))
                if len(under_way) >= most:
                    yield self._result(under_way.popleft())
            while under_way:
                yield self._result(under_way.popleft())
        finally:
            for left in under_way:
                ray.cancel(left)

    def _result(self, reference: Any) -> Any:
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            who, result, error = ray.get(reference)
        except RayTaskError:
            raise  # a fault of this program: its traceback is wanted
        except RayError as lost:
            raise JobError(
                f"cluster: a unit of this job lost its worker {RETRIES + 1} times ({type(lost).__name__}); "
                "see the workers' logs for why (memory?), or unset RAY_ADDRESS to work here"
            ) from None
        self.workers.add(who)
        if error is not None:
            raise error
        return result


@contextmanager
def ray_map_for(units: int, worth: int, local_paths: bool) -> Generator[ParallelMap | None]:
    """The cluster that RAY_ADDRESS names, for at least `worth` units; None says to stay here.

    Work on `local_paths` goes to a cluster on this machine only: others need not see the same files.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address or units < worth or (local_paths and not _on_this_machine(address)):
        yield None
        return
    with ray_cluster():
        spread = RayMap()
        yield spread
    echo(f"cluster  {len(spread.workers)} worker processes")


def _attempted(work: Callable[[T], R], item: T) -> tuple[tuple[str, int], R | None, Exception | None]:
    """A failure a user can put right comes back as a value: raised, it would be wrapped in Ray's traceback."""
    import ray

    who = (ray.get_runtime_context().get_node_id(), os.getpid())
    try:
        return who, work(item), None
    except (UserError, DamageError) as error:
        return who, None, error


def _on_this_machine(address: str) -> bool:
    host = urlsplit(address if "://" in address else f"ray://{address}").hostname or address
    return host in ("auto", "local", "localhost", "::1") or host.startswith("127.")
