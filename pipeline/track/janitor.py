"""Runs that nobody ends: a killed driver leaves RUNNING behind, and this closes it."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.track.connect import require_server, tracking_client
from pipeline.track.run import HEARTBEAT_TAG, KEY_TAG, REASON_TAG, EndStatus

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun


@dataclass(frozen=True)
class ClosedRun:
    """A run that was closed, and how long it had been silent."""

    run_id: str
    name: str
    idle_seconds: float


def close_stale_runs(
    experiment: str | None = None,
    idle_minutes: float = 30.0,
    *,
    status: EndStatus = "KILLED",
    now_seconds: float | None = None,
    uri: str | None = None,
) -> list[ClosedRun]:
    """End the pipeline's runs that are RUNNING without a sign of life for `idle_minutes`; returns them.

    Looks at one experiment, or at all. A sign of life is the opening of the run and every heartbeat of its
    spool. Runs of other programs are left alone. A closed run can still be resumed by its own driver.
    """
    client = tracking_client(require_server(uri))
    now = time.time() if now_seconds is None else now_seconds
    closed: list[ClosedRun] = []
    for run in _running(client, _experiment_ids(client, experiment)):
        idle = now - _last_sign(run)
        if idle < idle_minutes * 60:
            continue
        reason = f"no sign of life for {idle / 60:.0f} minutes; closed by the janitor"
        client.set_tag(run.info.run_id, REASON_TAG, reason)
        client.set_terminated(run.info.run_id, status)
        closed.append(ClosedRun(run.info.run_id, run.info.run_name or run.info.run_id, idle))
    return closed


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


def _last_sign(run: "MlflowRun") -> float:
    """Unix time of the newest heartbeat, or of the start."""
    try:
        return max(float(run.data.tags.get(HEARTBEAT_TAG, "0")), run.info.start_time / 1000)
    except ValueError:
        return run.info.start_time / 1000
