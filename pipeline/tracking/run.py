"""MLflow runs: opened, described and ended by the driver; workers only get the run id."""

import logging
import re
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.telemetry.redaction import redact
from ddpm_pipeline.tracking.connect import (
    ArtifactsDeniedError,
    TrackingError,
    require_server,
    retry_request,
    retry_requests,
    tracking_client,
    tracking_uri,
)
from ddpm_pipeline.tracking.direct_artifacts import direct_artifacts

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

log = logging.getLogger(__name__)

KEY_TAG = "ddpm.key"
HEARTBEAT_TAG = "ddpm.heartbeat"
REASON_TAG = "ddpm.end_reason"
RESUMES_TAG = "ddpm.resumes"
OPENED_TAG = "ddpm.opened_by"
STALE_TAG = "ddpm.closed_as_stale"
"""Set on a run that was closed from outside for lack of activity: the next heartbeat reopens it."""
CONFIG_PATH = "config/config.yaml"
MAX_PARAMS = 8  # the UI repeats every parameter above each image

EndStatus = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class Run:
    """One MLflow run as its driver sees it."""

    run_id: str
    experiment_id: str
    name: str
    key: str
    status: str
    """RUNNING, FINISHED, FAILED, KILLED or SCHEDULED, as of the call that returned this."""
    started_seconds: float
    """Unix time of the first start; a resumed run keeps it."""
    url: str
    tracking_uri: str
    resumed: bool = False

    def __str__(self) -> str:
        """The address of its page."""
        return self.url


def open_run(
    experiment: str,
    name: str,
    *,
    key: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    config_yaml: str,
    description: str | None = None,
    color: str | None = None,
    parent_run_id: str | None = None,
    reopen_finished: bool = False,
    uri: str | None = None,
) -> Run:
    """Open the run that `key` identifies: resume the unfinished one, or create a new one.

    Where the run `parent_run_id` is in the same experiment, the page shows the new one below it.

    With `reopen_finished` a finished run is resumed too, for example when a generation is extended.

    Safe to repeat after a crash at any point: missing parts are added, existing params stay as first written, and the
    config is written again with the same content. Raises UserError for an unusable server or experiment, ValueError for
    more than 8 params: the full settings belong in `config_yaml`.
    """
    if len(params) > MAX_PARAMS:
        raise ValueError(f"params: at most {MAX_PARAMS}, got {len(params)}; the rest is in config_yaml")
    _check_key(key)
    address = require_server(uri)
    client = tracking_client(address)

    def attempt() -> Run:
        experiment_id = _experiment_id(client, experiment)
        found = _search(client, experiment_id, key, unfinished_only=not reopen_finished)
        parent = parent_run_id if _is_in(client, parent_run_id, experiment_id) else None
        all_tags = _run_tags(key, tags, description, color, parent)
        if found is None:
            made = client.create_run(experiment_id, tags=all_tags, run_name=redact(name))
        else:
            made = _resume(client, found, all_tags)
        _log_missing_params(client, made, params)
        try:
            put_text(client, made.info.run_id, CONFIG_PATH, redact(config_yaml))
        except ArtifactsDeniedError as error:  # nothing of this run can be stored, so no job will ever end it
            finish(made.info.run_id, "FAILED", str(error), uri=address)
            raise
        return _view(made, address, key, status="RUNNING", resumed=found is not None)

    return retry_request(f"opening run {name} in experiment {experiment!r}", attempt)


def find_run(experiment: str, key: str, uri: str | None = None) -> Run | None:
    """The newest run with this key in any state, or None; a finished one takes precedence over later failures."""
    _check_key(key)
    client = tracking_client(uri)

    def attempt() -> Run | None:
        found = client.get_experiment_by_name(experiment)
        if found is None or found.lifecycle_stage != "active":
            return None
        run = _search(client, found.experiment_id, key, finished_only=True) or _search(
            client, found.experiment_id, key
        )
        return None if run is None else _view(run, tracking_uri(uri), key)

    return retry_request(f"looking for a run in experiment {experiment!r}", attempt)


@retry_requests("looking for a run")
def find_latest_run(
    experiment: str | None = None, *, key_prefix: str = "", uri: str | None = None
) -> Run | None:
    """The pipeline's latest run whose key starts with `key_prefix`, in one experiment or in all; or None."""
    client = tracking_client(uri)
    if experiment is not None:
        found = client.get_experiment_by_name(experiment)
        experiments = [] if found is None else [found.experiment_id]
    else:
        experiments = [e.experiment_id for e in client.search_experiments(max_results=10_000)]
    if not experiments:
        return None
    where = f"tags.`{KEY_TAG}` LIKE '{key_prefix}%'"
    page = client.search_runs(experiments, where, max_results=1, order_by=["attributes.start_time DESC"])
    return _view(page[0], tracking_uri(uri), page[0].data.tags[KEY_TAG]) if page else None


def finish(
    run_id: str,
    status: EndStatus,
    reason: str | None = None,
    *,
    uri: str | None = None,
    wait_seconds: float = 60.0,
) -> bool:
    """End the run; False when the server was unreachable (`ddpm cleanup` closes it later)."""
    client = tracking_client(uri)

    def end() -> None:
        if reason:
            client.set_tag(run_id, REASON_TAG, redact(reason)[:5000])
        if STALE_TAG in client.get_run(run_id).data.tags:
            client.delete_tag(run_id, STALE_TAG)  # a late heartbeat must not reopen what ended
        client.set_terminated(run_id, status)

    try:
        retry_request(f"ending run {run_id}", end, wait_seconds)
    except TrackingError as error:
        log.warning("%s", error)
        return False
    return True


@retry_requests("describing a run")
def describe(run_id: str, markdown: str, *, uri: str | None = None) -> None:
    """Set the run's description; `image_markdown(run_id, path)` embeds one of its artifacts."""
    tracking_client(uri).set_tag(run_id, "mlflow.note.content", redact(markdown))


def image_markdown(run_id: str, path: str, text: str = "") -> str:
    """Markdown that shows the run's artifact at `path` inside its description."""
    return f"![{text}](get-artifact?path={path}&run_uuid={run_id})"


@retry_requests("tags of a run")
def set_tags(run_id: str, tags: Mapping[str, str], *, uri: str | None = None) -> None:
    """Set tags (lineage, links) on a run."""
    from mlflow.entities import RunTag

    clean = [RunTag(k, str(v)) for k, v in redact(tags).items()]
    tracking_client(uri).log_batch(run_id, tags=clean)


def put_text(client: "MlflowClient", run_id: str, path: str, text: str) -> None:
    """Write one text artifact of a run; the same path is replaced."""
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / Path(path).name
        local.write_text(text, encoding="utf-8")
        parent = str(Path(path).parent)
        with direct_artifacts(lambda: str(client.get_run(run_id).info.artifact_uri)):
            client.log_artifact(run_id, str(local), None if parent == "." else parent)


def run_url(address: str, experiment_id: str, run_id: str) -> str:
    """The address of the run's page; without the parameter the UI starts in its GenAI mode."""
    return f"{address}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def _check_key(key: str) -> None:
    if not key or any(c in key for c in "'\"`\n") or len(key) > 500:
        raise ValueError(f"key: 1 to 500 characters without quotes, got {key!r}")


def _experiment_id(client: "MlflowClient", name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name)
        except MlflowException as error:
            found = client.get_experiment_by_name(name)  # another driver may have created it
            if found is None:
                raise UserError(f"experiment {name!r}: MLflow refuses it ({error.message})") from None
    if found.lifecycle_stage != "active":
        raise UserError(
            f"experiment {name!r}: was deleted on the server; restore it there or choose another name"
        )
    return found.experiment_id


def _is_in(client: "MlflowClient", run_id: str | None, experiment_id: str) -> bool:
    """Whether a run is one of this experiment's: below one of another, MLflow would show it nowhere."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return False
    try:
        return client.get_run(run_id).info.experiment_id == experiment_id
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False  # deleted since


def _search(
    client: "MlflowClient",
    experiment_id: str,
    key: str,
    unfinished_only: bool = False,
    finished_only: bool = False,
) -> "MlflowRun | None":
    where = f"tags.`{KEY_TAG}` = '{key}'"
    if unfinished_only:
        where += " and attributes.status != 'FINISHED'"
    if finished_only:
        where += " and attributes.status = 'FINISHED'"
    page = client.search_runs([experiment_id], where, max_results=1, order_by=["attributes.start_time DESC"])
    return page[0] if page else None


def _run_tags(
    key: str, tags: Mapping[str, str], description: str | None, color: str | None, parent_run_id: str | None
) -> dict[str, str]:
    own = {
        KEY_TAG: key,
        HEARTBEAT_TAG: str(time.time()),
        OPENED_TAG: uuid.uuid4().hex,
        # The list of runs shows the command as their source.
        "mlflow.source.name": f"ddpm {key.partition('/')[0]}",
        "mlflow.source.type": "LOCAL",
    }
    if description is not None:
        own["mlflow.note.content"] = redact(description)
    if color is not None:
        own["mlflow.runColor"] = color
    if parent_run_id is not None:
        own["mlflow.parentRunId"] = parent_run_id
    return {**{k: str(v) for k, v in redact(tags).items()}, **own}


def _resume(client: "MlflowClient", run: "MlflowRun", tags: dict[str, str]) -> "MlflowRun":
    from mlflow.entities import RunTag

    before = run.data.tags.get(RESUMES_TAG, "")
    resumes = int(before) + 1 if re.fullmatch(r"[0-9]{1,9}", before) else 1
    again = [RunTag(k, v) for k, v in {**tags, RESUMES_TAG: str(resumes)}.items()]
    client.log_batch(run.info.run_id, tags=again)
    reopen(client, run)
    return run


def reopen_if_closed_as_stale(client: "MlflowClient", run_id: str) -> bool:
    """For a caller that knows that the run is alive: reopen it if it was closed as stale; returns whether it was."""
    run = client.get_run(run_id)
    if STALE_TAG not in run.data.tags:
        return False
    log.warning("run %s was closed as stale; reopened", run_id)
    reopen(client, run)
    return True


def reopen(client: "MlflowClient", run: "MlflowRun") -> None:
    """Set a run to RUNNING again, and remove the tags of its closing."""
    client.update_run(run.info.run_id, status="RUNNING")
    for tag in (REASON_TAG, STALE_TAG):
        if tag in run.data.tags:
            client.delete_tag(run.info.run_id, tag)


def _log_missing_params(client: "MlflowClient", run: "MlflowRun", params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    new = [Param(k, str(v)) for k, v in redact(params).items() if k not in run.data.params]
    for name in sorted(set(params) & set(run.data.params)):
        if str(redact(params)[name]) != run.data.params[name]:
            log.warning("run %s: param %s stays %s", run.info.run_id, name, run.data.params[name])
    if new:
        client.log_batch(run.info.run_id, params=new)


def _view(run: "MlflowRun", address: str, key: str, status: str | None = None, resumed: bool = False) -> Run:
    info = run.info
    return Run(
        run_id=info.run_id,
        experiment_id=info.experiment_id,
        name=info.run_name or info.run_id,
        key=key,
        status=status or info.status,
        started_seconds=info.start_time / 1000,
        url=run_url(address, info.experiment_id, info.run_id),
        tracking_uri=address,
        resumed=resumed,
    )
