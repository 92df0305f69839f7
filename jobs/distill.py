"""The distillation job: a few-step student of a trained model, by the training job.

    ddpm distill digits-fast

Started again with the same settings it resumes from the last checkpoint, and does nothing once it is done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddpm_pipeline.config.distill_job import DistillConfig
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.jobs.progress_bar import progress_of
from ddpm_pipeline.jobs.runner import JobArguments, run_job
from ddpm_pipeline.jobs.train import run as train
from ddpm_pipeline.progress import Progress

if TYPE_CHECKING:
    from ddpm_pipeline.train.dry_run import TrainingEstimate


def run_call(call: JobArguments, local: bool = False) -> int:
    """Run the job that a call describes; `local` trains in this process, without Ray."""
    return run_job(
        "distill",
        DistillConfig,
        lambda config, progress: run(config, progress, local),
        call,
        unit="steps",
        estimate=estimate_distillation,
    )


def run(config: DistillConfig, progress: Progress, local: bool = False) -> int:
    """Distill, and print how it ended. Raises UserError before any work starts."""
    with progress_of("verify pairs", "shards") as verifying:
        training = plan(config, verifying)
    return train(training, progress, local)


def plan(config: DistillConfig, verifying: Progress) -> TrainConfig:
    """The training of the student. UserError for a teacher or pairs that cannot be used; `verifying` counts shards."""
    from ddpm_pipeline.distill.plan_distillation import plan_distillation

    return plan_distillation(config, verifying)


def estimate_distillation(config: DistillConfig) -> TrainingEstimate:
    """What the training of the student will need. Raises UserError for a teacher that cannot be used."""
    from ddpm_pipeline.distill.plan_distillation import training_to_estimate
    from ddpm_pipeline.train.dry_run import estimate

    return estimate(training_to_estimate(config))
