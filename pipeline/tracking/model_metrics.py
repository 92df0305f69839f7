"""Metrics of a model: points that MLflow shows on the model's own page too, with the data set they were measured on.

The key of a point is (metric, timestamp, step, value), so all here may be repeated: a point of the run is told of the
model with the timestamp it has, and others bring theirs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ddpm_pipeline.tracking.connect import retry_requests, tracking_client

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

_MAX_DIGEST = 36  # the server's limit, as for the data sets of a run


@dataclass(frozen=True)
class MeasuredOn:
    """A data set."""

    name: str
    digest: str
    """Of its index."""


@retry_requests("metrics of a model")
def tell_model_metrics(
    run_id: str, model_id: str, names: Sequence[str], step: int, data: MeasuredOn, *, uri: str | None = None
) -> None:
    """Tell the model what the run has measured of it: of each metric the newest point up to `step`, if there is one."""
    client = tracking_client(uri)
    points = [point for name in names if (point := _newest(client, run_id, name, step)) is not None]
    _log(client, run_id, model_id, [(p.key, p.value, p.timestamp, p.step) for p in points], data)


@retry_requests("metrics of a model")
def log_model_metrics(
    run_id: str,
    model_id: str,
    values: Mapping[str, float],
    step: int,
    at_seconds: float,
    data: MeasuredOn,
    *,
    uri: str | None = None,
) -> None:
    """Log values of the model measured at a time (Unix seconds), on its page and on the run's. Others than finite ones
    are left out: MLflow has no NaN of a model.
    """
    time_ms = int(1000 * at_seconds)
    points = [(name, value, time_ms, step) for name, value in values.items() if math.isfinite(value)]
    _log(tracking_client(uri), run_id, model_id, points, data)


def _newest(client: "MlflowClient", run_id: str, name: str, step: int) -> "Metric | None":
    points = [p for p in client.get_metric_history(run_id, name) if p.step <= step and math.isfinite(p.value)]
    return max(points, key=lambda point: point.step, default=None)


def _log(
    client: "MlflowClient",
    run_id: str,
    model_id: str,
    points: Sequence[tuple[str, float, int, int]],
    data: MeasuredOn,
) -> None:
    from mlflow.entities import Metric

    digest = data.digest.removeprefix("sha256:")[:_MAX_DIGEST]
    metrics = [
        Metric(*point, model_id=model_id, dataset_name=data.name, dataset_digest=digest) for point in points
    ]
    if metrics:
        client.log_batch(run_id, metrics=metrics)
