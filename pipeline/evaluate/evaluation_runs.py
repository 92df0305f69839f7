"""Evaluations in MLflow: a run for each generation and set of conditions, linked to the model version."""

import hashlib
import json
import os
import tempfile
from pathlib import Path

import yaml

from ddpm_pipeline.config.tracking import TrackConfig
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.evaluate.document import Evaluation, load_neighbours, table
from ddpm_pipeline.tracking import (
    MeasuredOn,
    Run,
    Spool,
    TrackingError,
    finish,
    link_model,
    open_run,
    resolve,
    source_tags,
    tell_model_metrics,
)


def log_evaluation(evaluation: Evaluation, config: TrackConfig) -> Run | None:
    """Log the metrics, each with its N, their conditions and the picture; None where no MLflow is configured.

    Logging the same evaluation again reopens the same run. UserError or TrackingError where the server does not answer,
    DamageError where the picture is not the evaluation's.
    """
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        return None
    picture = load_neighbours(evaluation)
    run = _open(evaluation, config)
    version = None if evaluation.model is None else resolve(evaluation.model)
    if version is not None:
        link_model(run.run_id, version)
    step = evaluation.terms.count
    points = {f"quality/{name}": metric.value for name, metric in evaluation.metrics.items()}
    points |= {f"samples/{name}": float(metric.n) for name, metric in evaluation.metrics.items()}
    points |= {f"references/{name}": float(metric.n_reference) for name, metric in evaluation.metrics.items()}
    with tempfile.TemporaryDirectory(prefix="ddpm-evaluation-") as folder:
        spool = Spool(Path(folder), None, run.run_id, send_interval_seconds=config.send_interval_seconds)
        spool.metrics(step, points)
        spool.artifact(
            "evaluation.json", (json.dumps(evaluation.model_dump(mode="json"), indent=2) + "\n").encode()
        )
        if picture is not None:
            spool.artifact("neighbours.png", picture)
        num_left = spool.close(config.close_timeout_seconds)
    if version is not None and version.model_id is not None and not num_left:
        names = [f"quality/{name}" for name in evaluation.metrics]
        data = MeasuredOn(
            evaluation.reference.rstrip("/").rsplit("/", 1)[-1], evaluation.terms.reference_digest
        )
        tell_model_metrics(run.run_id, version.model_id, names, step, data)
    finish(
        run.run_id,
        "FAILED" if num_left else "FINISHED",
        f"{num_left} points were not delivered" if num_left else None,
    )
    if num_left:
        raise TrackingError(f"MLflow at {run.tracking_uri}: did not accept {num_left} metrics")
    return run


def try_to_log(evaluation: Evaluation, config: TrackConfig | None) -> str | None:
    """A line that says where the evaluation was logged, or why it was not; None where logging is off."""
    if config is None:
        return None
    try:
        run = log_evaluation(evaluation, config)
    except (UserError, DamageError, TrackingError) as error:
        return f"not logged: {error}"
    return None if run is None else f"logged at {run.url}"


def _open(evaluation: Evaluation, config: TrackConfig) -> Run:
    conditions = evaluation.terms
    identity = json.dumps([evaluation.subject, evaluation.spec_digest, conditions.model_dump(mode="json")])
    lines = "\n".join(table(evaluation))
    return open_run(
        config.experiment,
        evaluation.subject.rstrip("/").rsplit("/", 1)[-1],
        key=f"evaluate/{hashlib.sha256(identity.encode()).hexdigest()[:32]}",
        params={
            "samples": conditions.count,
            "reference": evaluation.reference,
            "reference_images": conditions.reference_count,
            "network": evaluation.network_label,
            "sampler": evaluation.sampler,
        },
        tags={
            **source_tags(),
            "ddpm.output": evaluation.subject,
            "ddpm.spec": evaluation.spec_digest or "",
            "ddpm.reference_digest": conditions.reference_digest,
            "ddpm.network": conditions.network,
            "ddpm.settings": conditions.settings,
        },
        config_yaml=yaml.safe_dump(evaluation.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        description=f"```\n{lines}\n```",
        color=config.color,
        reopen_finished=True,
    )
