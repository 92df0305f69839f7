"""Experiment tracking on MLflow: runs, a spool that loses no metric, the model registry.

The only package that speaks to MLflow, whose import (over a second) happens with the first call that needs
it.
"""

from ddpm_pipeline.telemetry.redaction import redact
from ddpm_pipeline.tracking.alias_log import AliasHistory, LoggedAlias, Move, MoveConflictError
from ddpm_pipeline.tracking.cleanup import MAX_CLOCK_SKEW_SECONDS, ClosedRun, close_stale_runs, sweep_spools
from ddpm_pipeline.tracking.connect import (
    TrackingError,
    authorization,
    require_server,
    server_version,
    tracking_client,
    tracking_uri,
)
from ddpm_pipeline.tracking.direct_artifacts import artifact_location, try_direct_artifacts
from ddpm_pipeline.tracking.lineage import link_model, log_dataset, source_tags
from ddpm_pipeline.tracking.model_metrics import MeasuredOn, log_model_metrics, tell_model_metrics
from ddpm_pipeline.tracking.pinned_digests import Trusted, require_trusted, trust, trusted
from ddpm_pipeline.tracking.registry import (
    ModelVersion,
    download,
    log_model,
    protected_model_sources,
    register,
    require_registrable,
    resolve,
    set_alias,
    set_version_tags,
    versions,
)
from ddpm_pipeline.tracking.run import (
    Run,
    describe,
    find_latest_run,
    find_run,
    finish,
    image_markdown,
    open_run,
    set_tags,
)
from ddpm_pipeline.tracking.spool import Replayed, Spool, replay, replay_all, spool_folder, spool_of
from ddpm_pipeline.tracking.system_metrics import SystemSampler

__all__ = [
    "MAX_CLOCK_SKEW_SECONDS",
    "AliasHistory",
    "ClosedRun",
    "LoggedAlias",
    "MeasuredOn",
    "ModelVersion",
    "Move",
    "MoveConflictError",
    "Replayed",
    "Run",
    "Spool",
    "SystemSampler",
    "TrackingError",
    "Trusted",
    "artifact_location",
    "authorization",
    "close_stale_runs",
    "describe",
    "download",
    "find_latest_run",
    "find_run",
    "finish",
    "image_markdown",
    "link_model",
    "log_dataset",
    "log_model",
    "log_model_metrics",
    "open_run",
    "protected_model_sources",
    "redact",
    "register",
    "replay",
    "replay_all",
    "require_registrable",
    "require_server",
    "require_trusted",
    "resolve",
    "server_version",
    "set_alias",
    "set_tags",
    "set_version_tags",
    "source_tags",
    "spool_folder",
    "spool_of",
    "sweep_spools",
    "tell_model_metrics",
    "tracking_client",
    "tracking_uri",
    "trust",
    "trusted",
    "try_direct_artifacts",
    "versions",
]
