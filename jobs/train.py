"""The training job: check, train on the cluster, register the model, leave a run page.

    ddpm train digits steps=3000

Started again with the same settings it resumes from the last checkpoint, and does nothing once it is done.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from ddpm_pipeline.config.evaluation import GateConfig
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.jobs.ray_map import measuring_workers
from ddpm_pipeline.jobs.ray_session import SUBMITTED, on_stop_signal, ray_cluster, require_resources
from ddpm_pipeline.jobs.runner import DONE, STOPPED, JobArguments, run_job
from ddpm_pipeline.progress import Progress
from ddpm_pipeline.telemetry.terminal import echo
from ddpm_pipeline.tracking import ModelVersion

if TYPE_CHECKING:
    from ddpm_pipeline.train.dry_run import TrainingEstimate
    from ddpm_pipeline.train.training_driver import TrainingResult


def run_call(call: JobArguments, local: bool = False) -> int:
    """Run the job that a call describes; `local` trains in this process, without Ray."""
    return run_job("train", TrainConfig, lambda c, p: run(c, p, local), call, unit="steps", estimate=estimate)


def run(config: TrainConfig, progress: Progress, local: bool = False) -> int:
    """Train, and print how it ended. Raises UserError before any work starts."""
    result = train(config, progress, local)
    echo(*summary(config, result))
    return STOPPED if result.status == "stopped" else DONE


def train(config: TrainConfig, progress: Progress, local: bool = False) -> TrainingResult:
    """Train on the cluster that RAY_ADDRESS names, or in this process; SIGTERM or Ctrl-C saves a checkpoint and ends.

    Raises UserError before any work starts.
    """
    from ddpm_pipeline.train.training_driver import TrainingDriver  # imports torch

    stop = threading.Event()
    name = os.environ.get(SUBMITTED)
    driver = TrainingDriver(
        cluster=_cluster(config, stop, local),
        local=local,
        stop=stop,
        progress=progress,
        run_gate=partial(_run_gate, config.workers.gpus_per_worker > 0),
        tags={"ray.submission_id": name} if name and not local else {},
    )
    return driver.train(config)


def estimate(config: TrainConfig) -> TrainingEstimate:
    """What a training will need, for `--dry-run`."""
    from ddpm_pipeline.train.dry_run import estimate as estimate_training

    return estimate_training(config)


def summary(config: TrainConfig, result: TrainingResult) -> list[str]:
    """The end of a training, one line per fact."""
    if result.status == "stopped":
        return [f"stopped with a checkpoint at step {result.step}; run the same command to resume"]
    lines: list[str] = []
    if result.status == "already complete":
        lines.append(f"already trained: {config.name} has all {config.steps} steps; nothing to do")
    if result.gate is not None:
        lines.append(result.gate)
    lines.append(f"run      {result.run.url}")
    if result.version is not None:
        names = ", ".join(f"{result.version.name}@{alias}" for alias in result.version.aliases)
        lines.append(f"model    {result.version.reference}" + (f"  ({names})" if names else ""))
        lines.append(f"next     ddpm generate model={result.version.reference} output=… count=…")
    return lines


def _cluster(
    config: TrainConfig, stop: threading.Event, local: bool
) -> Callable[[], AbstractContextManager[None]]:
    """Joins the cluster that RAY_ADDRESS names, unless the training is local; SIGTERM or Ctrl-C sets `stop`."""
    joined_before = False

    @contextmanager
    def cluster() -> Generator[None]:
        nonlocal joined_before
        with ExitStack() as stack:
            if not local:
                stack.enter_context(ray_cluster())
                workers = config.workers
                if not joined_before:  # a node lost since then may come back
                    cpus, gpus = workers.cpus_per_worker, workers.gpus_per_worker
                    require_resources(workers.fewest, cpus, gpus, "train.workers", workers.node_labels)
                joined_before = True
            # Installed after Ray's own handler, which would end the process at once.
            stack.enter_context(on_stop_signal(stop.set, "saving a checkpoint, then ending"))
            yield

    return cluster


def _run_gate(used_gpus: bool, gate: GateConfig, version: ModelVersion) -> str:
    from ddpm_pipeline.evaluate.promotion import promote_after_training  # not needed for a first model

    workers = partial(measuring_workers, gate.evaluate, "train.gate.evaluate")
    return promote_after_training(gate, version, workers, used_gpus)
