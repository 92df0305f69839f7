"""How long work reports how far it is. Whoever calls it decides what that looks like: a bar, log lines, nothing."""

from typing import Protocol


class Progress(Protocol):
    """Called with `done` of `total` units finished; `note` is a short free text (loss, shard, ...)."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


def no_progress(done: int, total: int, note: str = "") -> None:
    """A `Progress` that reports nothing."""
