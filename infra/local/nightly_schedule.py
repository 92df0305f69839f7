"""The nightly job's schedule as a service of the stack; off unless somebody asks for it."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from infra.local.service import Service

READY = b"schedule: every night"


def schedule_service(
    root: Path, words: Sequence[str], variables: Mapping[str, str], unset: tuple[str, ...]
) -> Service:
    """`ddpm schedule` with these words, pointed at the stack; what was missed while it was off is caught up."""
    log = root / "logs" / "schedule.log"
    return Service(
        name="schedule",
        argv=(sys.executable, "-u", "-m", "jobs.cli", "schedule", *words, "--catch-up"),
        settings=variables,
        url="",
        log=log,
        ports=(),
        is_ready=lambda: log.exists() and READY in _head(log),
        start_seconds=120,
        unset=unset,
        needs_others=True,
    )


def _head(log: Path) -> bytes:
    with log.open("rb") as file:
        return file.read(4096)
