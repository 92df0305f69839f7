"""Settings of a training: what determines the weights, and beside it how the work is carried out."""

import hashlib
import json
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, field_validator, model_validator

from ddpm_pipeline.config.base import Settings, refuse_idle
from ddpm_pipeline.config.bounds import NodeLabels
from ddpm_pipeline.config.data import DataConfig
from ddpm_pipeline.config.device_kind import Matmul
from ddpm_pipeline.config.diffusion import ObjectiveConfig, SamplerConfig, ScheduleConfig, TimestepsConfig
from ddpm_pipeline.config.distillation import DistillationConfig
from ddpm_pipeline.config.evaluation import GateConfig
from ddpm_pipeline.config.net import Net
from ddpm_pipeline.config.plugins import without_versions
from ddpm_pipeline.config.tracking import TrackConfig, filed_under

_EXPERIMENT = "training"
MOST_LOADER_PROCESSES = 4
"""Of each worker, unless the settings ask for more."""


class OptimizerConfig(Settings):
    """Adam and the learning rate over the steps."""

    kind: Literal["adam", "adamw"] = "adam"
    """adamw decouples weight decay from the gradient (Loshchilov & Hutter 2019)."""
    lr: float = Field(default=2e-4, gt=0)
    """Learning rate after warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running mean and the running square of the gradient."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the running square."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Per unit of learning rate. 0 = none."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    decay: Literal["none", "cosine", "linear"] = "none"
    """Course of the learning rate from the end of warm-up to the last step; cosine and linear end at 0."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest global L2 norm of the gradient; a larger one is scaled down. None = no clipping."""


class EMAConfig(Settings):
    """The averaged weights that sampling uses."""

    kind: Literal["constant", "power"] = "constant"
    """constant: DDPM's exponential average with one decay. power: averages whose length grows with the training (Karras
    et al. 2024, EDM2, section 3.1), as many at once as there are `widths`."""
    decay: float = Field(default=0.9999, ge=0, lt=1)
    """Decay per step of the "constant" average."""
    warmup: bool = True
    """Start the "constant" average shorter, or early samples show the random initial weights."""
    widths: tuple[Annotated[float, Field(ge=0.001, le=0.28)], ...] = Field(default=(0.05, 0.10), min_length=1)
    """Lengths of the "power" averages, relative to the training so far (sigma_rel; EDM2's pair). A checkpoint holds
    them all; samples, eval/loss and the exported model are of the first."""

    @model_validator(mode="after")
    def _only_settings_that_act(self) -> Self:
        idle = ("widths",) if self.kind == "constant" else ("decay", "warmup")
        refuse_idle(self, idle, f'for kind "{self.kind}"')
        if len({round(width, 3) for width in self.widths}) != len(self.widths):
            raise ValueError("widths must differ in their first three decimals, which name them")
        return self


class CheckpointConfig(Settings):
    """When the whole training state is written to the store, and how long it stays there."""

    every_steps: int = Field(default=1000, ge=1)
    """Steps between checkpoints."""
    keep_last: int = Field(default=3, ge=1)
    """Older checkpoints are deleted once this many newer, whole ones exist. At least two stay: workers that begin
    may be reading the one before the newest."""
    keep_best: int = Field(default=1, ge=0)
    """This many with the lowest eval/loss are kept however old they are."""
    eval_samples: int = Field(default=256, ge=0, le=1_000_000)
    """Samples in eval/loss, the loss of the averaged weights at every checkpoint: always the same samples, noise and
    timesteps. 0 = not measured, and no checkpoint is the best."""
    log_model_every: int | None = Field(default=None, ge=1)
    """Every so many checkpoints the averaged weights become a logged model, which the run page lists and MLflow can
    load. None = only those of the model that is registered in the end."""

    @model_validator(mode="after")
    def _only_settings_that_act(self) -> Self:
        if self.eval_samples == 0:
            refuse_idle(self, ("keep_best",), "while eval_samples is 0")
        return self


class GridConfig(Settings):
    """Images of fixed seeds, logged while training."""

    every_steps: int = Field(default=1000, ge=1)
    """Steps between grids; one is also drawn before the first step and after the last."""
    count: int = Field(default=64, ge=1)
    """Images in a grid. With classes, they are dealt out evenly."""
    sampler: SamplerConfig = SamplerConfig(kind="dpm++2m", num_steps=20)
    """How the grid is sampled; few steps suffice for a look."""


class WorkerConfig(Settings):
    """The processes that train together. Their number changes the speed, not the sequence of samples."""

    num_workers: int | tuple[int, int] = 1
    """DDP processes. Two numbers [fewest, most] make the group elastic: a lost node shrinks it, one that comes grows
    it, each from the last checkpoint on."""
    resize_seconds: float = Field(default=60.0, gt=0)
    """Pause between two looks at whether an elastic group could grow. No effect on one of fixed size. Growing goes
    back to the last checkpoint, so it should be well above the time between two."""
    cpus_per_worker: int = Field(default=1, ge=1)
    """Cores, and torch threads, of each."""
    gpus_per_worker: float = Field(default=0, ge=0)
    """GPUs of each: 1, or 0 = train on the CPU. A single worker may take a part of a GPU and of its memory: 0.5."""
    node_labels: NodeLabels = Field(default={})
    """Labels that a node of the cluster must have to get workers, such as `{ray.io/accelerator-type: H100}`."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """What each worker holds. ddp: the whole state. fsdp: a part of weights, gradients, moments and averages, for
    networks whose state exceeds one device; slower. Checkpoints are the same, and a training may go on with the other.
    A group that has shrunk to one worker holds it all."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which gradients are sent and summed between workers. bfloat16 halves the traffic, rounds each
    gradient to 8 bits, and names another training."""
    max_failures: int = Field(default=3, ge=0)
    """Lost worker groups that are replaced before the job gives up."""
    collective_seconds: int = Field(default=1800, ge=60)
    """Longest wait of a worker for the others in one call; then the group is lost and replaced. It must exceed five
    minutes, for which a loader waits for a store that is down, and the time in which rank 0 evaluates and draws."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Samples a forward pass; the rest of a worker's share is accumulated. None = as many as a worker's memory holds by
    estimate: of its device, or of its cores' part of the machine. Another size rounds sums otherwise, so weights are
    bit-identical on like hardware only, unless it is given."""

    @field_validator("num_workers", mode="before")
    @classmethod
    def _counts(cls, value: object) -> object:
        """Said once, where pydantic would say for each of the two forms why it is not that."""
        counts = cast(list[object], [*value] if isinstance(value, list | tuple) else [value, value])
        if len(counts) != 2 or not all(type(count) is int and count >= 1 for count in counts):
            raise ValueError(f"{value!r} is neither a number from 1 nor two of them, [fewest, most]")
        if cast(int, counts[0]) > cast(int, counts[1]):
            raise ValueError(f"{value!r}: the fewest come first; write {counts[::-1]!r}")
        return value

    @model_validator(mode="after")
    def _gpus_that_can_be_used(self) -> Self:
        gpus = self.gpus_per_worker
        if gpus > 1:
            raise ValueError(
                f"gpus_per_worker is {gpus:g}, but a worker computes on one GPU and the rest would idle; set it to 1, "
                "and num_workers to the number of GPUs"
            )
        if 0 < gpus < 1 and self.most > 1:
            raise ValueError(
                f"gpus_per_worker is {gpus:g} with {self.most} workers, but NCCL needs a whole GPU for each; set it to "
                "1, or num_workers to 1"
            )
        return self

    @model_validator(mode="after")
    def _only_settings_that_act(self) -> Self:
        if self.most == 1:
            refuse_idle(self, ("sharding", "reduce_dtype"), "with one worker")
        return self

    @property
    def fewest(self) -> int:
        """Workers that must be there."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most(self) -> int:
        """Workers that are used where there is room for them."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


class TrainingSettings(Settings):
    """What every training has, of a model from images and of a student from a teacher."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)
    """Name of the run, and of the model it registers."""
    runs: str = "{root}/runs"
    """Place for checkpoints: <runs>/<name>-<identity>/ is this run's."""
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig = EMAConfig()
    steps: int = Field(ge=1)
    """Optimiser steps."""
    global_batch: int = Field(default=128, ge=1)
    """Samples a step, over all workers. Does not change with their number."""
    timesteps: TimestepsConfig = TimestepsConfig()
    seed: int = Field(default=0, ge=0)
    """Names the initial weights, the order of the samples, timesteps, noise, flips and dropout."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the network (autocast). Noising, loss and weights are float32 always."""
    matmul: Matmul = "ieee"
    """Arithmetic of float32 matrix products and convolutions on a GPU. ieee: full float32. tf32: their inputs are
    rounded to 10 bits, which is faster and names another training."""
    deterministic: bool = True
    """On a GPU, use only algorithms whose result does not change from run to run, so that a training that was
    interrupted ends in the same bits on the same kind of GPU and software. `--dry-run` on a GPU measures the cost."""
    compile: bool = False
    """Compile the network with torch.compile: a slower start, faster steps."""
    max_skipped_steps: int = Field(default=10, ge=0)
    """Steps with a non-finite gradient that are skipped before the run fails."""
    log_every_steps: int = Field(default=50, ge=1)
    """Steps in one point of a chart; a point is their mean."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    grid: GridConfig = GridConfig()
    gate: GateConfig | None = None
    """How the finished model is compared with the champion, which it replaces if it passes. None = it stays the
    challenger until `ddpm promote`. The first model of a name is champion without a contest."""
    workers: WorkerConfig = WorkerConfig()
    track: Annotated[TrackConfig, filed_under(_EXPERIMENT)] = TrackConfig(experiment=_EXPERIMENT)

    @field_validator("precision", mode="before")
    @classmethod
    def _no_loss_scaling(cls, value: object) -> object:
        """Its small gradients would become 0 without loss scaling."""
        if value == "float16":
            raise ValueError('"float16" loses small gradients; use "bfloat16", which is as fast')
        return value

    @model_validator(mode="after")
    def _gpu_settings_that_act(self) -> Self:
        if self.workers.gpus_per_worker == 0:
            refuse_idle(self, ("matmul", "deterministic"), "while workers.gpus_per_worker is 0")
        if self.precision != "float32":
            refuse_idle(self, ("matmul",), f"with precision {self.precision}, which has no float32 products")
        return self

    @model_validator(mode="after")
    def _checked(self) -> Self:
        workers, batch = self.workers.most, self.global_batch
        if batch < workers:
            raise ValueError(
                f"global_batch {batch} is less than workers.num_workers {workers}: some would idle"
            )
        if self.optimizer.warmup_steps > self.steps:
            raise ValueError(
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} exceeds steps {self.steps}"
            )
        if self.checkpoint.every_steps % self.log_every_steps:
            raise ValueError(
                f"checkpoint.every_steps {self.checkpoint.every_steps} must be a multiple of log_every_steps "
                f"{self.log_every_steps}, or a restart would log half a point twice"
            )
        if self.compile and self.workers.sharding == "fsdp":
            raise ValueError(
                "compile and workers.sharding fsdp exclude each other: weights that are collected block by block break "
                "the compiled graph; set one of them"
            )
        return self


class TrainConfig(TrainingSettings):
    """A training run."""

    data: DataConfig
    net: Net
    """The network: a U-Net, or with `kind` another package's."""
    schedule: ScheduleConfig = ScheduleConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    init_from: str | None = None
    """Fine-tuning: the weights to begin with. A registered model (`name@alias`, `name/3`), or a directory, of a
    diffusers pipeline or as `ddpm import` writes it; network, schedule and target must be those of this training. None
    = drawn from `seed`. An alias means what it means when the command is started; write a version to be able to go on
    later."""
    label_drop: float = Field(default=0.0, ge=0, le=1)
    """Share of samples trained without their label, as classifier-free guidance needs (Ho & Salimans 2022)."""
    distillation: DistillationConfig | None = None
    """How a teacher, which `init_from` names, teaches a model of few steps. `ddpm distill` sets it; None = images
    teach."""

    @model_validator(mode="after")
    def _drops_labels_for_guidance(self) -> Self:
        if self.distillation is not None:
            return self
        if bool(self.label_drop) != self.net.null_class:
            raise ValueError(
                "label_drop above 0 and net.null_class=true belong together; set both or neither"
            )
        return self

    @model_validator(mode="after")
    def _draws_by_weights_that_differ(self) -> Self:
        if not self.timesteps.importance:
            return self
        if self.objective.weighting == "uniform":
            raise ValueError(
                "timesteps.importance needs weights that differ; set objective.weighting=min-snr, or leave it out"
            )
        if self.objective.variance == "learned":
            raise ValueError(
                "timesteps.importance would hardly ever draw some timesteps, and a learned variance needs all; "
                "leave it out"
            )
        return self

    def reading(self) -> DataConfig:
        """How a worker reads: `data`, with a number of loader processes."""
        if self.data.num_workers is not None:
            return self.data
        workers = self.workers
        spare = workers.cpus_per_worker - 1 if workers.gpus_per_worker else 0
        return self.data.model_copy(update={"num_workers": min(spare, MOST_LOADER_PROCESSES)})

    def identity(self, data_digest: str, init_sha256: str | None = None) -> dict[str, Any]:
        """Everything that determines the weights, as plain data.

        init_sha256: of the weights that `init_from` names. The number of steps is not in it when the learning rate
        does not depend on it: raising it then continues the same training.
        """
        fields = self.model_dump(mode="json", exclude=_OPERATION)
        order = {"window_shards": self.data.window_shards, "flip": self.data.flip, "crop": self.data.crop}
        fields["data"] = {"digest": data_digest, **order}
        acting = {"decay", "warmup"} if self.ema.kind == "constant" else {"kind", "widths"}
        fields["ema"] = self.ema.model_dump(mode="json", include=acting)
        if init_sha256 is not None:
            fields["init"] = init_sha256
        if self.distillation is None:
            del fields["distillation"]
            if self.optimizer.decay == "none":
                del fields["steps"]
        if self.matmul == "ieee":
            del fields["matmul"]  # trainings had names before there was the setting
        if self.timesteps == TimestepsConfig():
            del fields["timesteps"]  # likewise
        if self.workers.reduce_dtype != "float32":
            fields["reduce_dtype"] = self.workers.reduce_dtype
        return fields

    def digest(self, data_digest: str, init_sha256: str | None = None) -> str:
        """Name of the training: 12 hex digits of the SHA-256 of its identity."""
        return _short_digest(self.identity(data_digest, init_sha256))

    def folder_digest(self, data_digest: str, init_sha256: str | None = None) -> str:
        """Name of its checkpoints' place: `digest`, but the same for all versions of a plug-in, so that another version
        finds the training and refuses it.
        """
        return _short_digest(without_versions(self.identity(data_digest, init_sha256)))


def _short_digest(fields: dict[str, Any]) -> str:
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


_OPERATION = {
    "name",
    "runs",
    "track",
    "data",
    "workers",
    "checkpoint",
    "grid",
    "gate",
    "log_every_steps",
    "compile",
    "deterministic",
    "init_from",
}
"""Settings of how the work is carried out; they do not change which training it is."""
