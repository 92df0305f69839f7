"""The actor between the driver of a training and its workers. It imports nothing that computes: torch would take longer
to load than the process itself to start.
"""

import math
import time
from dataclasses import dataclass

import ray

from ddpm_pipeline.cluster import draining_nodes
from ddpm_pipeline.train.rank_watch import Heard, RankMark, awaited_ranks


@dataclass(frozen=True)
class DriverNode:
    """Where the driver runs."""

    id: str
    address: str


@ray.remote(num_cpus=0)
class TrainCoordinator:
    """Ray actor between driver and workers: progress of rank 0, requests to stop, and the fatal error of any rank.

    Runs on the driver's node and ends with the driver.
    """

    def __init__(self, node: DriverNode) -> None:
        self._node = node
        self._drained: tuple[str, ...] = ()
        self._last_report: tuple[int, str] | None = None
        self._stop = False
        self._failure: Exception | None = None
        self._polled_at = -math.inf
        self._heard: dict[int, Heard] = {}
        self._world = 0

    def begin_group(self, world: int) -> None:
        """Rank 0: a new group of this size trains."""
        self._heard.clear()
        self._drained = ()
        self._world = world

    def mark(self, mark: RankMark) -> None:
        """Every rank of a group, every few seconds: what it is doing."""
        self._heard[mark.rank] = Heard(mark, time.monotonic())

    def awaited_ranks(self) -> str | None:
        """The ranks that the others wait for, in one line, if any."""
        return awaited_ranks(self._heard, self._world)

    def report(self, step: int, note: str) -> None:
        """Rank 0: finished steps and a short text."""
        self._last_report = (step, note)

    def stop_requested(self) -> bool:
        """Rank 0, every half second: whether to save a checkpoint and end.

        The driver asks for it, or Ray drains a node that the group needs: it will be taken away.
        """
        self._polled_at = time.monotonic()
        if not self._drained:
            needed = {self._node.id: self._node.address}
            needed |= {one.mark.node_id: one.mark.node for one in self._heard.values()}
            self._drained = tuple(sorted({needed[node] for node in draining_nodes() if node in needed}))
        return self._stop or bool(self._drained)

    def drained(self) -> tuple[str, ...]:
        """Driver: addresses of the drained nodes for which the last group was asked to end."""
        return self._drained

    def silence_seconds(self) -> float:
        """Driver: time since rank 0 of any group last polled; infinite before the first poll."""
        return time.monotonic() - self._polled_at

    def fail(self, error: Exception) -> None:
        """Any rank: an error that a new group would meet again. The first one is kept."""
        self._failure = self._failure or error

    def failure(self) -> Exception | None:
        """The fatal error, if any."""
        return self._failure

    def last_report(self) -> tuple[int, str] | None:
        """Driver: the latest report, or None before the first."""
        return self._last_report

    def request_stop(self) -> None:
        """Driver: save a checkpoint and end."""
        self._stop = True
