"""From a checkpoint to a model that others can use: its files, and the models that the run page lists."""

import logging
import tempfile
import threading
from pathlib import Path
from types import TracebackType

from ddpm_pipeline.config.model_card import (
    DistillationInfo,
    ImageShape,
    ModelCard,
    TrainingData,
    TrainingInfo,
    WeightsInfo,
)
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.data.index import label_counts
from ddpm_pipeline.errors import DamageError
from ddpm_pipeline.nets.model_files import save_model
from ddpm_pipeline.store import ObjectMissing
from ddpm_pipeline.tracking import MeasuredOn, log_model, tell_model_metrics
from ddpm_pipeline.train.checkpoint import Checkpoint, finished_steps, load_checkpoint
from ddpm_pipeline.train.finetune import InitialWeights
from ddpm_pipeline.train.state import averaged_network
from ddpm_pipeline.train.training_plan import TrainPlan

log = logging.getLogger(__name__)
LOOK_SECONDS = 5.0
MODEL_METRICS = ("eval/loss", "train/loss", "perf/images_per_s")
"""Metrics of a training that its models' pages show."""


def export_model(plan: TrainPlan, checkpoint: Checkpoint, run_id: str | None, folder: Path) -> ModelCard:
    """Write the averaged weights of a checkpoint (the first average, if it has several) and their card to `folder`."""
    net, average = averaged_network(plan.config, checkpoint.record.step, checkpoint.tensors)
    card = _card(plan, average, checkpoint.record.step, run_id)
    return save_model(folder, net.state_dict(), card)


def _card(plan: TrainPlan, kind: str, step: int, run_id: str | None) -> ModelCard:
    config, index = plan.config, plan.index
    taught = None if config.distillation is None else plan.initial
    if taught is not None:
        return _student_card(config, taught, kind, step, run_id)
    return ModelCard(
        net=config.net,
        schedule=config.schedule,
        objective=config.objective,
        image=ImageShape(channels=config.net.in_channels, size=config.net.image_size),
        class_names=index.class_names,
        data=TrainingData(
            digest=index.digest,
            channel_mean=None if index.channel_mean is None else tuple(index.channel_mean),
            channel_std=None if index.channel_std is None else tuple(index.channel_std),
            class_counts=None if config.net.num_classes is None else label_counts(index),
        ),
        weights=WeightsInfo(kind=kind),
        training=TrainingInfo(
            step=step,
            run_id=run_id,
            init_from=None if plan.initial is None else plan.initial.name,
            init_sha256=None if plan.initial is None else plan.initial.sha256,
        ),
    )


def _student_card(
    config: TrainConfig, teacher: InitialWeights, kind: str, step: int, run_id: str | None
) -> ModelCard:
    """The teacher's card with another objective: a student generates the same images."""
    settings = config.distillation
    assert settings is not None  # checked by the caller
    return teacher.card.model_copy(
        update={
            "objective": config.objective,
            "weights": WeightsInfo(kind=kind),
            "training": TrainingInfo(
                step=step, run_id=run_id, init_from=teacher.name, init_sha256=teacher.sha256
            ),
            "distillation": DistillationInfo(
                teacher=teacher.name,
                teacher_sha256=teacher.sha256,
                method=settings.method,
                sampler=settings.sampler,
                steps=step,
                pairs=settings.pairs,
            ),
        }
    )


def logged_name(name: str, step: int) -> str:
    """Name of the averaged weights after `step` steps on the run page: MLflow requires distinct names."""
    return f"{name}-ema-{step:07d}"


def trained_on(plan: TrainPlan) -> MeasuredOn:
    """The training's data, as the run page names it."""
    return MeasuredOn(plan.config.name, plan.index.digest)


class ModelLog:
    """Context manager that logs every `checkpoint.log_model_every`-th checkpoint as a model, in a thread of the driver.

    The training neither waits for it nor fails because of it: a model that cannot be logged is a warning. A model is
    logged once.
    """

    def __init__(self, plan: TrainPlan, run_id: str) -> None:
        self._plan, self._run_id = plan, run_id
        self._over = threading.Event()
        self._done: set[int] = set()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> None:
        if self._plan.config.checkpoint.log_model_every is not None:
            self._thread = threading.Thread(target=self._watch, name="model-log", daemon=True)
            self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        over = False
        while not over:
            over = self._over.wait(
                LOOK_SECONDS
            )  # read before the last look, which then sees every checkpoint
            try:
                self._look()
            except Exception:
                log.exception("logging checkpoints as models failed; retrying in %.0f s", LOOK_SECONDS)

    def _look(self) -> None:
        config = self._plan.config
        every = config.checkpoint.every_steps * (config.checkpoint.log_model_every or 1)
        for step in finished_steps(self._plan.store):
            # registration logs the last one
            if step % every == 0 and step < config.steps and step not in self._done:
                self._log(step)
                self._done.add(step)

    def _log(self, step: int) -> None:
        plan = self._plan
        try:
            checkpoint = load_checkpoint(plan.store, step)
        except (DamageError, ObjectMissing) as error:
            log.warning("step %d not logged as a model: %s", step, error)
            return
        with tempfile.TemporaryDirectory(prefix="ddpm-model-") as folder:
            export_model(plan, checkpoint, self._run_id, Path(folder))
            tags = {"step": str(step), "data": plan.index.digest, "identity": plan.identity}
            model_id = log_model(
                Path(folder),
                self._run_id,
                tags,
                logged_name=logged_name(plan.config.name, step),
                step=step,
            )
            tell_model_metrics(self._run_id, model_id, MODEL_METRICS, step, trained_on(plan))
