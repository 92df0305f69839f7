"""The training job: check, train on the cluster, register the model, leave a run page.

    ddpm train digits steps=3000

Started again with the same settings it goes on from the last checkpoint, and does nothing once it is done.
"""

import logging
import os
import tempfile
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from jobs.dry_run import estimate
from jobs.ray_session import SUBMITTED, ray_cluster, require_resources
from jobs.runner import DONE, STOPPED, JobArguments, run_job
from jobs.signals import on_stop_signal
from pipeline.config.training import TrainConfig, WorkerConfig
from pipeline.errors import JobError
from pipeline.nets import UNet, parameter_count
from pipeline.progress import Progress
from pipeline.telemetry.terminal import echo
from pipeline.tracking import (
    LoggedAlias,
    ModelVersion,
    MoveConflictError,
    Run,
    describe,
    find_run,
    finish,
    link_model,
    log_dataset,
    open_run,
    picture,
    protected_model_sources,
    register,
    require_server,
    resolve,
    set_alias,
    set_tags,
    source_tags,
    versions,
)
from pipeline.train.checkpoint import Checkpoint, checkpoint_uri, latest_checkpoint
from pipeline.train.export import export_model
from pipeline.train.finetune import stage_initial
from pipeline.train.logged_models import ModelLog, logged_name
from pipeline.train.restart import UnreachableError, WorkerGroupStartError
from pipeline.train.run_logger import FINAL_GRID
from pipeline.train.training_plan import TrainPlan, plan_training
from pipeline.train.worker import TrainTask

CHAMPION, CHALLENGER = "champion", "challenger"
MOST_STARTS = 10
"""How often workers may be lost before they train: enough for bad luck, too few for what is broken."""
MOST_UNREACHABLE = 3
"""How often they may fail to join each other: that a worker dies just then is rare, a wrong network stays wrong."""
log = logging.getLogger(__name__)


def run_call(call: JobArguments, alone: bool = False) -> int:
    """Run the job a call describes; `alone` trains in this process, without Ray."""
    return run_job(
        "train", TrainConfig, lambda c, p: train(c, p, alone), call, unit="steps", foresee=estimate
    )


def train(config: TrainConfig, progress: Progress, alone: bool = False) -> int:
    """Check, train, register. Returns the exit code; raises UserError before any work starts."""
    for start in range(1, MOST_STARTS):
        try:
            return _train(config, progress, alone, again=start > 1)
        except WorkerGroupStartError as error:
            if isinstance(error, UnreachableError) and start >= MOST_UNREACHABLE:
                raise JobError(
                    f"{error}; {start} times. Do the nodes reach each other at the addresses that Ray gives them? "
                    "GLOO_SOCKET_IFNAME in the nodes' environment names another interface"
                ) from None
            log.warning("%s; starting over, %d of %d", error, start + 1, MOST_STARTS)
    return _train(config, progress, alone, again=True)


def _train(config: TrainConfig, progress: Progress, alone: bool, again: bool) -> int:
    require_server()
    plan = plan_training(config)
    key = f"train/{config.name}-{plan.identity}-{config.steps}"
    before = find_run(config.track.experiment, key)
    if before is not None and before.status == "FINISHED" and plan.is_trained:
        echo(f"already trained: {config.name} has all {config.steps} steps; nothing to do")
        _say_where(before, _version_of(config.name, before.run_id))
        return DONE
    stop = threading.Event()
    with _cluster(config, alone, again), on_stop_signal(stop.set, "saving, then ending"):
        run = _open(plan, key)
        if plan.finished_steps:
            echo(f"goes on from step {plan.finished_steps} of {config.steps}")
        echo(f"run      {run.url}")
        with _closing(run):
            _work(plan, run, progress, stop, alone)
            checkpoint = latest_checkpoint(plan.store)
            if checkpoint is None or checkpoint.record.step < config.steps:
                return _stopped(run, checkpoint)
            version = publish(plan, run, checkpoint)
            finish(run.run_id, "FINISHED")
    _say_where(run, version)
    return DONE


def publish(plan: TrainPlan, run: Run, checkpoint: Checkpoint) -> ModelVersion:
    """Register the averaged weights as the challenger; champion it becomes where there is none, or by the gate."""
    name, step = plan.config.name, checkpoint.record.step
    with tempfile.TemporaryDirectory(prefix="ddpm-model-") as folder:
        card = export_model(plan, checkpoint, run.run_id, Path(folder))
        version = register(
            name,
            Path(folder),
            run.run_id,
            tags={"step": str(step), "data": plan.index.digest, "identity": plan.identity},
            description=f"{card.weights.kind} weights after {step} steps on {plan.config.data.uri}",
            logged_name=logged_name(name, step),
            step=step,
            checkpoint_uri=checkpoint_uri(plan.store, step),
        )
    set_alias(name, CHALLENGER, version.version)
    office = LoggedAlias(name, CHAMPION)
    if office.follow().version is None:
        with suppress(MoveConflictError):  # another first model came first
            office.move(None, version.version, "first")
    elif plan.config.gate is not None:
        from jobs.promote import after_training  # what a first model never needs

        echo(after_training(plan.config.gate, version))
    describe(run.run_id, _description(plan, run, version))
    return resolve(version.reference)


@contextmanager
def _cluster(config: TrainConfig, alone: bool, again: bool) -> Generator[None]:
    if alone:
        from pipeline.train.local import require_device

        require_device(config.workers)
        yield
        return
    with ray_cluster():
        workers = config.workers
        if not again:  # a node that was lost since may come back
            require_resources(
                workers.fewest, workers.cpus_per_worker, workers.gpus_per_worker, "train.workers"
            )
        yield


def _work(plan: TrainPlan, run: Run, progress: Progress, stop: threading.Event, alone: bool) -> None:
    if plan.is_trained:
        return  # only the registration is missing
    if plan.initial is not None:
        stage_initial(plan.store, plan.initial)
    task = TrainTask(
        config=plan.config,
        identity=plan.identity,
        run_uri=plan.store.uri,
        data_digest=plan.index.digest,
        tracking_uri=run.tracking_uri,
        run_id=run.run_id,
        spared=protected_model_sources(),
        initial_sha256=None if plan.initial is None else plan.initial.sha256,
        started_seconds=run.started_seconds,
        finished_steps=plan.finished_steps,
    )
    with ModelLog(plan, run.run_id):
        if alone:
            from pipeline.train.local import train_local

            train_local(task, progress, stop)
        else:
            from pipeline.train.ray_trainer import train_on_cluster

            train_on_cluster(task, progress, stop)


def _open(plan: TrainPlan, key: str) -> Run:
    config = plan.config
    settings = yaml.safe_dump({"train": config.model_dump(mode="json")}, sort_keys=False)
    run = open_run(
        config.track.experiment,
        config.name,
        key=key,
        params={
            "data": config.data.uri,
            "network_parameters": parameter_count(UNet(config.net)),
            "steps": config.steps,
            "global_batch": config.global_batch,
            "workers": _count(config.workers),
            "lr": config.optimizer.lr,
            "target": config.objective.target,
            "schedule": f"{config.schedule.kind}, T={config.schedule.num_steps}",
        },
        tags={"ddpm.checkpoints": plan.store.uri, **source_tags(), **_ray_tags()},
        config_yaml=settings,
        color=config.track.color,
    )
    _link_initial(plan, run)
    log_dataset(
        run.run_id, config.name, config.data.uri, plan.index.digest, num_samples=plan.index.num_samples
    )
    return run


def _count(workers: WorkerConfig) -> str:
    """How many train together, in words for the run page."""
    few, most = workers.fewest, workers.most
    return str(most) if few == most else f"{few} to {most}"


def _link_initial(plan: TrainPlan, run: Run) -> None:
    """The model that is fine-tuned: its name and hash, and where it is registered, the way to it."""
    if plan.initial is None:
        return
    set_tags(run.run_id, {"ddpm.init_from": plan.initial.name, "ddpm.init_sha256": plan.initial.sha256})
    if plan.initial.version is not None:
        link_model(run.run_id, plan.initial.version)


def _ray_tags() -> dict[str, str]:
    """Ray's names for this job, so that its logs are found from the run page."""
    import ray

    if not ray.is_initialized():
        return {}
    tags = {"ray.job_id": ray.get_runtime_context().get_job_id()}
    submission = os.environ.get(SUBMITTED)
    return tags | ({"ray.submission_id": submission} if submission else {})


@contextmanager
def _closing(run: Run) -> Generator[None]:
    """Whatever ends the job, the run does not stay RUNNING."""
    try:
        yield
    except BaseException as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        finish(run.run_id, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", reason)
        raise


def _stopped(run: Run, checkpoint: Checkpoint | None) -> int:
    step = checkpoint.record.step if checkpoint is not None else 0
    set_tags(run.run_id, {"ddpm.stopped_at_step": str(step)})
    finish(run.run_id, "KILLED", f"asked to stop; checkpoint at step {step}")
    echo(f"stopped with a checkpoint at step {step}; the same command goes on from there")
    return STOPPED


def _description(plan: TrainPlan, run: Run, version: ModelVersion) -> str:
    config = plan.config
    return (
        f"{picture(run.run_id, FINAL_GRID, 'samples')}\n\n"
        f"Model **{version.reference}**: {config.steps} steps of {config.global_batch} images from "
        f"`{config.data.uri}` ({plan.index.num_samples} samples, digest `{plan.index.digest[:12]}`).\n\n"
        f"Checkpoints: `{plan.store.uri}`. Sample grids by step are under *Model metrics* (`samples`), "
        "the whole settings in *Artifacts* under `config/config.yaml`.\n\n"
        f"Next: `ddpm generate {config.name} model={version.reference}`"
    )


def _version_of(name: str, run_id: str) -> ModelVersion | None:
    return next((version for version in reversed(versions(name)) if version.run_id == run_id), None)


def _say_where(run: Run, version: ModelVersion | None) -> None:
    echo(f"run      {run.url}")
    if version is not None:
        names = ", ".join(f"{version.name}@{alias}" for alias in version.aliases)
        echo(f"model    {version.reference}" + (f"  ({names})" if names else ""))
        echo(f"next     ddpm generate model={version.reference} output=… count=…")
