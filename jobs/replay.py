"""`ddpm replay`: deliver what ended jobs left in their spools, and report what could not be delivered."""

from collections.abc import Iterator
from pathlib import Path

from ddpm_pipeline.jobs.runner import DONE, FAILED
from ddpm_pipeline.telemetry.terminal import echo
from ddpm_pipeline.tracking import Replayed, replay_all, spool_folder


def run(folder: Path | None) -> int:
    """Replay the spools in `folder`, or this machine's; exit code 1 unless MLflow then has all that they held."""
    found = replay_all(folder or spool_folder())
    for place, replayed in found.items():
        echo(replayed.problem or f"{place}: {', '.join(_words(replayed)) or 'delivered'}")
    echo(f"{len(found)} spools examined")
    return DONE if all(replayed.complete for replayed in found.values()) else FAILED


def _words(replayed: Replayed) -> Iterator[str]:
    if replayed.waiting:
        yield f"{replayed.waiting:,} points and files not delivered yet: run it again"
    if replayed.damaged:
        yield f"{replayed.damaged:,} damaged lines skipped"
    if replayed.refused:
        yield f"{replayed.refused:,} records rejected by MLflow, kept in refused.jsonl"
