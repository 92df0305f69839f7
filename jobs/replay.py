"""`ddpm replay`: deliver what ended jobs left in their spools, and say what could not be delivered."""

from collections.abc import Iterator
from pathlib import Path

from jobs.runner import DONE, FAILED
from pipeline.telemetry.terminal import echo
from pipeline.tracking import Replayed, replay_all, spool_folder


def run(folder: Path | None) -> int:
    """Replay the spools in `folder`, or this machine's; exit code 1 unless MLflow then has all that they held."""
    found = replay_all(folder or spool_folder())
    for place, replayed in found.items():
        echo(replayed.problem or f"{place}: {', '.join(_words(replayed)) or 'delivered'}")
    echo(f"{len(found)} spools looked at")
    return DONE if all(replayed.complete for replayed in found.values()) else FAILED


def _words(replayed: Replayed) -> Iterator[str]:
    if replayed.waiting:
        yield f"{replayed.waiting:,} points and files still wait: run it again"
    if replayed.passed_over:
        yield f"{replayed.passed_over:,} damaged lines passed over"
    if replayed.refused:
        yield f"{replayed.refused:,} records refused by MLflow, kept in refused.jsonl"
