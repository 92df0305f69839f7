"""Which rank the others wait for: each tells every few seconds what it is doing, also while it waits in a collective.

A rank that is gone, frozen or cut off says nothing; one whose data does not come says that it waits for them, while the
others wait for it inside their step.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

T = TypeVar("T")
MARK_SECONDS = 5.0
SILENT_SECONDS = 20.0
"""A rank that has not told for so long is not running: frozen, gone, or cut off from the driver's node."""


@dataclass(frozen=True)
class RankMark:
    """What a rank is doing."""

    rank: int
    node: str
    """Address of its node."""
    step: int
    """The last step that it finished."""
    awaits_data: bool = False
    """Whether it waits for the data of the next one."""
    node_id: str = ""
    """Ray's id of its node."""


class RankMarker(AbstractContextManager["RankMarker"]):
    """Tells what this rank is doing, from a thread, for as long as the context lasts."""

    def __init__(self, mark: RankMark, send: Callable[[RankMark], object]) -> None:
        self._mark, self._send = mark, send
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="rank-marker", daemon=True)

    def finished(self, step: int) -> None:
        """This rank has finished a step."""
        self._mark = replace(self._mark, step=step)

    def of_data(self, batches: Iterator[T]) -> Iterator[T]:
        """The batches, each awaited as data."""
        while True:
            self._mark = replace(self._mark, awaits_data=True)
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._mark = replace(self._mark, awaits_data=False)
            yield batch

    def __enter__(self) -> "RankMarker":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()

    def _tell(self) -> None:
        while True:
            self._send(self._mark)
            if self._over.wait(MARK_SECONDS):
                return


@dataclass(frozen=True)
class Heard:
    """A mark, and the `time.monotonic()` at which it arrived."""

    mark: RankMark
    at: float


def awaited_ranks(heard: Mapping[int, Heard], world: int, now: float | None = None) -> str | None:
    """The ranks of `world` that the others wait for, and why, in one line; None where nothing sets any apart."""
    now = time.monotonic() if now is None else now
    silent = [one for one in heard.values() if now - one.at > SILENT_SECONDS]
    if len(silent) == len(heard):
        return None  # no group trains
    unheard = [f"rank {rank}" for rank in range(world) if rank not in heard]
    if unheard:
        return f"nothing was heard of {_listed(unheard)}, which should have begun"
    if silent:
        longest = max(now - one.at for one in silent)
        return f"nothing was heard of {_named(silent)} for {longest:.0f} s: frozen, gone or cut off"
    lowest = min((one.mark.step for one in heard.values()), default=0)
    behind = [one for one in heard.values() if one.mark.step == lowest]
    if len(behind) == len(heard):
        behind = [one for one in heard.values() if one.mark.awaits_data]
    if not behind or len(behind) == len(heard):
        return None
    what = "waiting for data" if all(one.mark.awaits_data for one in behind) else "computing"
    return f"the others wait for {_named(behind)}, {what} after step {lowest}"


def _named(some: list[Heard]) -> str:
    marks = sorted((one.mark for one in some), key=lambda mark: mark.rank)
    return _listed([f"rank {mark.rank} (node {mark.node})" for mark in marks])


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
