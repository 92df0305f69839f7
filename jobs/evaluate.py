"""Evaluation of a finished generation: `ddpm evaluate digits --prefix s3://bucket/samples/digits`.

The metrics are printed and stored beside the prefix, as `<prefix>.evaluation.json` and
`<prefix>.neighbours.png`, never inside it: a generation contains nothing but itself.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ddpm_pipeline.config.evaluation import EvaluateConfig
from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.jobs.ray_map import measuring_workers
from ddpm_pipeline.jobs.runner import DONE, JobArguments, run_job, settings_of
from ddpm_pipeline.progress import Progress
from ddpm_pipeline.telemetry.terminal import echo, echo_json

if TYPE_CHECKING:
    from ddpm_pipeline.evaluate.document import Evaluation


def run_call(call: JobArguments, prefix: str | None = None, against: str | None = None) -> int:
    """Evaluate `prefix`, or the prefix that the preset generates into; `against` is shown beside it."""

    def work(config: EvaluateConfig, progress: Progress) -> int:
        return run(config, prefix or output_of(call), progress, call.as_json, against)

    return run_job("evaluate", EvaluateConfig, work, call, unit="images")


def run(
    config: EvaluateConfig,
    output: str,
    progress: Progress,
    as_json: bool = False,
    against: str | None = None,
) -> int:
    """Evaluate, log, print. UserError where `against` was evaluated under other conditions, or never."""
    from ddpm_pipeline.evaluate.document import (
        evaluation_uri,
        load_evaluation,
        neighbours_uri,
        require_comparable,
        table,
    )

    other = None if against is None else load_evaluation(against)
    if against is not None and other is None:
        raise UserError(f"--against: {against} has no evaluation; run: ddpm evaluate --prefix {against}")
    evaluation = measure(config, output, progress)
    if other is not None:
        require_comparable(evaluation, other)
    logged = log_evaluation(config, evaluation)
    if as_json:
        echo_json(evaluation.model_dump(mode="json"))
        return DONE
    echo(*table(evaluation, other))
    echo(f"stored     {evaluation_uri(output)}")
    if evaluation.neighbours_sha256 is not None:
        echo(f"picture    {neighbours_uri(output)}")
    if logged is not None:
        echo(f"mlflow     {logged}")
    return DONE


def measure(config: EvaluateConfig, output: str, progress: Progress) -> Evaluation:
    """Evaluate the complete generation at a prefix, where the settings say, and store the document beside it."""
    from ddpm_pipeline.evaluate.measure import evaluate_generation

    return evaluate_generation(config, output, progress, partial(measuring_workers, config, "evaluate"))


def log_evaluation(config: EvaluateConfig, evaluation: Evaluation) -> str | None:
    """Log it in MLflow: a line that says where, or why not; None where tracking is off."""
    from ddpm_pipeline.evaluate.evaluation_runs import try_to_log

    return try_to_log(evaluation, config.track)


def output_of(call: JobArguments) -> str:
    """The prefix that the call's preset generates into. UserError where the call names no preset."""
    if call.preset is None:
        raise UserError("prefix: name the output prefix of a generation, or a preset that generates one")
    return settings_of(GenerateConfig, "generate", JobArguments(preset=call.preset, files=call.files)).output
