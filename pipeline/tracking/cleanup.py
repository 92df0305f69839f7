"""Cleanup: close runs that a killed driver left RUNNING, and remove spools that are fully delivered."""

import logging
import shutil
import time
import uuid
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm_pipeline.private_files import require_own
from ddpm_pipeline.tracking.connect import require_server, tracking_client
from ddpm_pipeline.tracking.journal import Journal
from ddpm_pipeline.tracking.run import (
    HEARTBEAT_TAG,
    KEY_TAG,
    OPENED_TAG,
    REASON_TAG,
    STALE_TAG,
    EndStatus,
    reopen,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun


log = logging.getLogger(__name__)

MAX_CLOCK_SKEW_SECONDS = 60.0
"""How far clocks may differ. S3 refuses signatures 15 minutes off; charts and leases suffer long before."""


@dataclass(frozen=True)
class ClosedRun:
    """A run that was closed, and how long it had shown no activity."""

    run_id: str
    name: str
    idle_seconds: float

    def __str__(self) -> str:
        """For people."""
        return f"{self.name} ({self.run_id}), silent for {self.idle_seconds / 60:.0f} minutes"


def close_stale_runs(
    experiment: str | None = None,
    idle_minutes: float = 30.0,
    *,
    status: EndStatus = "KILLED",
    now_seconds: float | None = None,
    uri: str | None = None,
) -> list[ClosedRun]:
    """Close the pipeline's runs that are RUNNING without activity for `idle_minutes`; returns them.

    Looks at one experiment, or at all. Activity is the opening of the run and every heartbeat of its spool. Runs of
    other programs are left alone. A closed run can still be resumed by its own driver, and the next heartbeat of a
    job that is alive after all reopens it. A run whose last activity is in the future stays open, with a warning: this
    machine's clock is behind, or its job's was ahead.
    """
    client = tracking_client(require_server(uri))
    now = time.time() if now_seconds is None else now_seconds
    closed: list[ClosedRun] = []
    for run in _running(client, _experiment_ids(client, experiment)):
        idle = now - _last_active(run)
        if idle < -MAX_CLOCK_SKEW_SECONDS:
            log.warning(
                "%s (%s) stays open: its last activity is %.0f minutes in the future; compare this machine's clock "
                "with that of its job's machine, and run ddpm cleanup again",
                run.info.run_name or run.info.run_id,
                run.info.run_id,
                -idle / 60,
            )
        if idle >= idle_minutes * 60 and _close(client, run, idle, status):
            closed.append(ClosedRun(run.info.run_id, run.info.run_name or run.info.run_id, idle))
    return closed


def _close(client: "MlflowClient", run: "MlflowRun", idle_seconds: float, status: EndStatus) -> bool:
    """Close a run unless it was active since it was listed. MLflow has no conditional write, so this checks before
    and after. Activity that comes still later reopens the run (see Sender.send_heartbeat).
    """
    run_id = run.info.run_id
    fresh = client.get_run(run_id)
    if fresh.info.status != "RUNNING" or _activity(fresh) != _activity(run):
        return False
    client.set_tag(run_id, STALE_TAG, str(time.time()))
    reason = f"no activity for {idle_seconds / 60:.0f} minutes; closed by ddpm cleanup"
    client.set_tag(run_id, REASON_TAG, reason)
    client.set_terminated(run_id, status)
    after = client.get_run(run_id)
    if _activity(after) == _activity(run):
        return True
    reopen(client, after)
    return False


def _activity(run: "MlflowRun") -> tuple[str | None, str | None]:
    """What any activity changes: the heartbeat, and who opened the run."""
    return run.data.tags.get(HEARTBEAT_TAG), run.data.tags.get(OPENED_TAG)


def sweep_spools(root: Path, idle_minutes: float = 30.0, *, now_seconds: float | None = None) -> list[Path]:
    """Remove the spools below `root` that are fully delivered; returns them.

    A spool stays if anything in it is undelivered or refused, if a running process delivers it, or if it was written
    to within `idle_minutes`.
    """
    now = time.time() if now_seconds is None else now_seconds
    if root.exists():
        require_own(root)
    removed: list[Path] = []
    for directory in sorted(path.parent for path in root.glob("*/run.json")):
        if now - _last_written(directory) < idle_minutes * 60 or (directory / "refused.jsonl").exists():
            continue
        with closing(Journal(directory)) as journal:
            # In this order: whoever opens the spool now waits, finds it gone, and creates it anew.
            if journal.is_exclusive() and journal.claim() and journal.undelivered() == 0:
                gone = directory.with_name(f".swept-{uuid.uuid4().hex}")
                directory.rename(gone)
                shutil.rmtree(gone)
                removed.append(directory)
    return removed


def _last_written(directory: Path) -> float:
    """Unix time of the newest file; a running process may meanwhile rename and delete some."""
    newest = 0.0
    for file in directory.rglob("*"):
        with suppress(FileNotFoundError):
            newest = max(newest, file.stat().st_mtime)
    return newest


def _experiment_ids(client: "MlflowClient", experiment: str | None) -> list[str]:
    if experiment is not None:
        found = client.get_experiment_by_name(experiment)
        return [] if found is None else [found.experiment_id]
    return [e.experiment_id for e in client.search_experiments(max_results=10_000)]


def _running(client: "MlflowClient", experiment_ids: list[str]) -> "Iterator[MlflowRun]":
    token: str | None = None
    where = f"attributes.status = 'RUNNING' and tags.`{KEY_TAG}` LIKE '%'"
    while experiment_ids:
        page = client.search_runs(experiment_ids, where, max_results=500, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _last_active(run: "MlflowRun") -> float:
    """Unix time of the newest heartbeat, or of the start."""
    try:
        return max(float(run.data.tags.get(HEARTBEAT_TAG, "0")), run.info.start_time / 1000)
    except ValueError:
        return run.info.start_time / 1000
