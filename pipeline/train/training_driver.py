"""A training from settings to registered model: plan, cluster, workers, registration, and the run page."""

import logging
import tempfile
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import yaml

from ddpm_pipeline.config.evaluation import GateConfig
from ddpm_pipeline.config.training import TrainConfig, WorkerConfig
from ddpm_pipeline.errors import JobError
from ddpm_pipeline.nets import build_net, parameter_count
from ddpm_pipeline.progress import Progress
from ddpm_pipeline.telemetry.terminal import echo
from ddpm_pipeline.tracking import (
    LoggedAlias,
    ModelVersion,
    MoveConflictError,
    Run,
    describe,
    find_run,
    finish,
    image_markdown,
    link_model,
    log_dataset,
    open_run,
    protected_model_sources,
    register,
    require_registrable,
    require_server,
    resolve,
    set_alias,
    set_tags,
    source_tags,
    tell_model_metrics,
    versions,
)
from ddpm_pipeline.train.checkpoint import Checkpoint, checkpoint_uri, latest_checkpoint
from ddpm_pipeline.train.export import MODEL_METRICS, ModelLog, export_model, logged_name, trained_on
from ddpm_pipeline.train.finetune import stage_initial
from ddpm_pipeline.train.fit_machine import require_fit_machine
from ddpm_pipeline.train.run_logger import FINAL_GRID
from ddpm_pipeline.train.train_task import TrainTask, UnreachableError, WorkerGroupStartError
from ddpm_pipeline.train.training_plan import TrainPlan, plan_training
from ddpm_pipeline.train.worker import train_local

CHAMPION, CHALLENGER = "champion", "challenger"
MAX_STARTS = 10
"""Starts of a job whose workers are lost before they train: enough for bad luck, too few for a broken cluster."""
MAX_UNREACHABLE = 3
"""Starts where workers cannot join each other: a worker rarely dies just then, and a wrong network stays wrong."""
log = logging.getLogger(__name__)

Status = Literal["complete", "already complete", "stopped"]
RunGate = Callable[[GateConfig, ModelVersion], str]
"""Judges a model that was just registered, promotes it if it passes, and returns a line on the result."""


@dataclass(frozen=True)
class TrainingResult:
    """How a training ended."""

    status: Status
    """`stopped`: ended on request with a checkpoint; the same command resumes."""
    step: int
    """Of the last checkpoint; 0 without one."""
    run: Run
    version: ModelVersion | None = None
    """The registered model, unless stopped."""
    gate: str | None = None
    """What the gate said, where it ran."""


@dataclass(frozen=True)
class TrainingDriver:
    """What a training needs from the job that runs it."""

    cluster: Callable[[], AbstractContextManager[None]]
    """Entered while workers train: joins the Ray cluster. Entered anew when the job starts over."""
    local: bool
    """Train in this process, without Ray."""
    stop: threading.Event
    """Set to end the training with a checkpoint."""
    progress: Progress
    run_gate: RunGate
    tags: Mapping[str, str]
    """More tags of the run."""

    def train(self, config: TrainConfig) -> TrainingResult:
        """Check, train, register. Raises UserError before any work starts."""
        for start in range(1, MAX_STARTS):
            try:
                return self._train(config)
            except WorkerGroupStartError as error:
                if isinstance(error, UnreachableError) and start >= MAX_UNREACHABLE:
                    raise JobError(
                        f"{error}; failed {start} times. Do the nodes reach each other at the addresses that Ray gives "
                        "them? GLOO_SOCKET_IFNAME in the nodes' environment selects another interface"
                    ) from None
                log.warning("%s; starting over, %d of %d", error, start + 1, MAX_STARTS)
        return self._train(config)

    def _train(self, config: TrainConfig) -> TrainingResult:
        require_server()
        plan = plan_training(config)
        key = f"train/{config.name}-{plan.identity}-{config.steps}"
        known = find_run(config.track.experiment, key)
        if known is not None and known.status == "FINISHED" and plan.is_trained:
            version = _version_of(config.name, known.run_id)
            return TrainingResult("already complete", plan.finished_steps, known, version)
        if self.local:
            require_fit_machine(config)
        with self.cluster():
            if not self.local and not plan.is_trained:
                from ddpm_pipeline.train.fit_cluster import require_fit_cluster  # imports Ray

                require_fit_cluster(config, self.stop)
            run = self._open_run(plan, key)
            if plan.finished_steps:
                echo(f"resuming at step {plan.finished_steps} of {config.steps}")
            echo(f"run      {run.url}")
            with _finishing(run):
                self._take_steps(plan, run)
                checkpoint = latest_checkpoint(plan.store)
                if checkpoint is None or checkpoint.record.step < config.steps:
                    return _stopped(run, checkpoint)
                version, gate = publish(plan, run, checkpoint, self.run_gate)
                finish(run.run_id, "FINISHED")
        return TrainingResult("complete", checkpoint.record.step, run, version, gate)

    def _take_steps(self, plan: TrainPlan, run: Run) -> None:
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
            protected=protected_model_sources(),
            initial_sha256=None if plan.initial is None else plan.initial.sha256,
            started_seconds=run.started_seconds,
            finished_steps=plan.finished_steps,
        )
        with ModelLog(plan, run.run_id):
            if self.local:
                train_local(task, self.progress, self.stop)
            else:
                from ddpm_pipeline.train.ray_trainer import (
                    train_on_cluster,  # imports Ray; see ddpm_pipeline.jobs.ray_session
                )

                train_on_cluster(task, self.progress, self.stop)

    def _open_run(self, plan: TrainPlan, key: str) -> Run:
        config = plan.config
        require_registrable(config.name, plan.identity)
        run = open_run(
            config.track.experiment,
            config.name,
            key=key,
            params=run_params(plan),
            tags={"ddpm.checkpoints": plan.store.uri, **source_tags(), **_ray_tags(), **self.tags},
            config_yaml=yaml.safe_dump({"train": config.model_dump(mode="json")}, sort_keys=False),
            color=config.track.color,
            parent_run_id=_parent(plan),
        )
        _link_initial(plan, run)
        log_dataset(
            run.run_id, config.name, config.data.uri, plan.index.digest, num_samples=plan.index.num_samples
        )
        return run


def publish(
    plan: TrainPlan, run: Run, checkpoint: Checkpoint, run_gate: RunGate
) -> tuple[ModelVersion, str | None]:
    """Register the averaged weights as the challenger. Where there is no champion, they are that too.

    The gate decides, if the settings name one, where there is a champion and where the gate itself names the model to
    compare with; what it said is returned beside the version.
    """
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
    if version.model_id is not None:
        tell_model_metrics(run.run_id, version.model_id, MODEL_METRICS, step, trained_on(plan))
    set_alias(name, CHALLENGER, version.version)
    champion, gate, said = LoggedAlias(name, CHAMPION), plan.config.gate, None
    is_first = champion.reconcile().version is None
    if gate is not None and (gate.names_baseline or not is_first):
        said = run_gate(gate, version)
    elif is_first:
        with suppress(MoveConflictError):  # another first model came first
            champion.move(None, version.version, "first")
    describe(run.run_id, _description(plan, run, version))
    return resolve(version.reference), said


def _worker_range(workers: WorkerConfig) -> str:
    """The number of workers and how they share the work, as text for the run page."""
    few, most = workers.fewest, workers.most
    text = str(most) if few == most else f"{few} to {most}"
    text += ", state divided by FSDP: last bits differ from DDP's" if workers.sharding == "fsdp" else ""
    return text + (", gradients sent in bfloat16" if workers.reduce_dtype == "bfloat16" else "")


def run_params(plan: TrainPlan) -> dict[str, str | float]:
    """What the table of runs shows of a training: at most `MAX_PARAMS` values."""
    config = plan.config
    return {
        "data": config.data.uri,
        "network_parameters": _parameters(config),
        "steps": config.steps,
        "global_batch": config.global_batch,
        "workers": _worker_range(config.workers),
        "lr": config.optimizer.lr,
        **(
            _taught_by(plan)
            or {
                "target": config.objective.target,
                "schedule": f"{config.schedule.kind}, T={config.schedule.num_steps}",
            }
        ),
    }


def _parent(plan: TrainPlan) -> str | None:
    """The run that trained the model which this one starts from, or learns from."""
    version = None if plan.initial is None else plan.initial.version
    return None if version is None else version.run_id or None


def _parameters(config: TrainConfig) -> int:
    with torch.device("meta"):
        return parameter_count(build_net(config.net))


def _taught_by(plan: TrainPlan) -> dict[str, str | float]:
    """Who taught a student, and how; nothing of a training from images."""
    settings = plan.config.distillation
    if settings is None or plan.initial is None:
        return {}
    guidance = settings.sampler.guidance_scale
    method = settings.method + (f", guidance {guidance:g} baked in" if guidance != 1 else "")
    return {"teacher": plan.initial.name, "method": method}


def _sentences(facts: Mapping[str, str | float]) -> str:
    return "".join(f"{name.capitalize()}: {value}. " for name, value in facts.items())


def _link_initial(plan: TrainPlan, run: Run) -> None:
    """Record the model that is fine-tuned: its name and hash, and a link where it is registered."""
    if plan.initial is None:
        return
    set_tags(run.run_id, {"ddpm.init_from": plan.initial.name, "ddpm.init_sha256": plan.initial.sha256})
    if plan.initial.version is not None:
        link_model(run.run_id, plan.initial.version)


def _ray_tags() -> dict[str, str]:
    """Ray's name for this job, so that its logs are found from the run page."""
    import ray

    return {"ray.job_id": ray.get_runtime_context().get_job_id()} if ray.is_initialized() else {}


@contextmanager
def _finishing(run: Run) -> Generator[None]:
    """Whatever ends the job, the run does not stay RUNNING."""
    try:
        yield
    except BaseException as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        finish(run.run_id, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", reason)
        raise


def _stopped(run: Run, checkpoint: Checkpoint | None) -> TrainingResult:
    step = checkpoint.record.step if checkpoint is not None else 0
    set_tags(run.run_id, {"ddpm.stopped_at_step": str(step)})
    finish(run.run_id, "KILLED", f"stopped on request; checkpoint at step {step}")
    return TrainingResult("stopped", step, run)


def _description(plan: TrainPlan, run: Run, version: ModelVersion) -> str:
    config = plan.config
    return (
        f"{image_markdown(run.run_id, FINAL_GRID, 'samples')}\n\n"
        f"Model **{version.reference}**: {config.steps} steps of {config.global_batch} images from "
        f"`{config.data.uri}` ({plan.index.num_samples} samples, digest `{plan.index.digest[:12]}`).\n\n"
        f"{_sentences(_taught_by(plan))}"
        f"Checkpoints: `{plan.store.uri}`. Sample grids by step are under *Model metrics* (`samples`), "
        "all settings in *Artifacts* under `config/config.yaml`.\n\n"
        f"Next: `ddpm generate {config.name} model={version.reference}`"
    )


def _version_of(name: str, run_id: str) -> ModelVersion | None:
    return next((version for version in reversed(versions(name)) if version.run_id == run_id), None)
