"""Settings of a generation: those that determine its bytes (they become the spec), and those of the work."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ddpm_pipeline.config.base import Settings, refuse_idle
from ddpm_pipeline.config.bounds import (
    MAX_IMAGES,
    MAX_IMAGES_A_SHARD,
    MAX_SHARDS,
    LocalPath,
    NodeLabels,
    Sha256,
)
from ddpm_pipeline.config.cost import CostConfig
from ddpm_pipeline.config.device_kind import Matmul
from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.config.evaluation import FeatureNetworkConfig
from ddpm_pipeline.config.tracking import TrackConfig, filed_under

ClassChoice = Literal["auto", "balanced", "data"] | list[int | str] | dict[int | str, float] | None


def check_plan(first_index: int, count: int, shard_size: int, batch_size: int) -> None:
    """ValueError unless a generation with these numbers can be planned."""
    if first_index + count > MAX_IMAGES:
        raise ValueError(f"first_index + count must be at most {MAX_IMAGES}; keys have twelve digits")
    if batch_size > shard_size:
        raise ValueError("batch_size is larger than shard_size; lower it, or raise shard_size")
    if count > shard_size * MAX_SHARDS:
        raise ValueError(
            f"count needs more than {MAX_SHARDS:,} shards of shard_size {shard_size}; raise shard_size"
        )


def _refuse_idle_matmul(settings: "SpecSettings | SampleConfig") -> None:
    if settings.dtype != "float32":
        refuse_idle(settings, ("matmul",), f"with dtype {settings.dtype}, which multiplies in that precision")


class GuardConfig(Settings):
    """When to stop a generation because its images are worthless. NaN and infinity always stop it."""

    enabled: bool = True
    """False checks for NaN and infinity only."""
    min_images: int = Field(default=64, ge=1)
    """Images to sample before fractions and means are checked; fewer prove too little."""
    max_constant_fraction: float = Field(default=0.05, ge=0, le=1)
    """Largest fraction of images with one value per channel."""
    max_saturated_fraction: float = Field(default=0.5, ge=0, le=1)
    """Largest fraction of images whose values are all 0 or 255."""
    max_mean_drift: float = Field(default=0.75, gt=0)
    """Largest distance of a channel's mean from the training data's, in the training data's standard deviations.
    Checked if the model's card has those statistics and classes are even or as in the training data."""


class SpecSettings(Settings):
    """The settings that determine a generation's bytes. Another value is another generation."""

    model: str = Field(min_length=1)
    """`name@alias`, `name/version`, or a folder that holds model.safetensors and model.json."""
    weights: str | None = None
    """Required kind of weights, such as `ema`; a model with another kind is refused. None accepts any."""
    count: int = Field(ge=1)
    """Exact number of images. May be raised later, which extends the same generation."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the noise: the same seed and index give the same image."""
    first_index: int = Field(default=0, ge=0)
    """Index of the first image; a second prefix can continue where another ended."""
    classes: ClassChoice = "auto"
    """Classes of the images. `balanced`: every class in turn; a list of labels or names: those in turn; a
    mapping from label or name to weight: drawn at random by (seed, index); `data`: drawn so, each class as often as it
    occurs in the training data; None: sampling without classes. `auto` is balanced for a network with classes and None
    for one without."""
    sampler: SamplerConfig = SamplerConfig()
    """The reverse process: kind, steps, guidance."""
    image_format: Literal["png", "webp", "npy"] = "png"
    """png and webp are lossless; npy is the plain array (height, width, channels) of uint8."""
    provenance: bool | None = None
    """Mark each PNG and WebP as synthetic, in XMP, with the digest of its generation and its index; npy has no place
    for a mark. Changes bytes, not pixels. None = yes, unless the prefix holds a generation without marks already."""
    shard_size: int = Field(default=1000, ge=1, le=MAX_IMAGES_A_SHARD)
    """Images per shard. A failure costs at most a shard, so a shard should take a few minutes at most."""
    batch_size: int = Field(default=64, ge=1, le=MAX_IMAGES_A_SHARD)
    """Images per network call. Changes bytes: rounding depends on the batch."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the network's arithmetic; the schedule always uses full precision."""
    matmul: Matmul = "ieee"
    """Products and convolutions of float32 numbers on a GPU. ieee: full float32. tf32: inputs rounded to 10 bits,
    several times faster on Ampere and later. Changes bytes; without a GPU it is refused, as it has no effect."""
    cpu_threads: int = Field(default=1, ge=1, le=4096)
    """Threads of a worker without GPU. Changes bytes: sums split differently round differently."""
    compile: bool = False
    """Compile the network with torch.compile: faster after a minute of warm-up, but rounding differs."""

    @model_validator(mode="after")
    def _can_be_planned(self) -> Self:
        check_plan(self.first_index, self.count, self.shard_size, self.batch_size)
        _refuse_idle_matmul(self)
        return self


class GenerateConfig(SpecSettings):
    """A generation: its spec, its output prefix, and its workers."""

    output: str = Field(min_length=1)
    """Prefix to fill, `s3://bucket/path` or `file:///path`. One prefix holds one generation."""
    num_workers: int = Field(default=2, ge=1)
    """Workers to start with; also the minimum."""
    max_workers: int | None = Field(default=None, ge=1)
    """Maximum number of workers, reached while the cluster has room and shards wait. None = num_workers."""
    cpus_per_worker: float = Field(default=1, ge=0)
    """Logical CPUs a worker reserves. Beside a GPU one launches kernels, and the others encode images."""
    gpus_per_worker: float = Field(default=0, ge=0)
    """GPU a worker reserves; 0.5 puts two workers on one GPU, which share its memory. 0 = sample on the CPU."""
    node_labels: NodeLabels = Field(default={})
    """Labels that a node of the cluster must have to get workers, such as `{ray.io/accelerator-type: H100}`."""
    max_attempts: int = Field(default=3, ge=1)
    """Attempts at a shard, each on another worker, before it is reported as failed."""
    drain_seconds: float = Field(default=20.0, ge=0)
    """Time to finish shards in progress after SIGTERM; unfinished ones are then given up and leave nothing behind."""
    guards: GuardConfig = GuardConfig()
    """When to stop a generation of worthless images."""
    features: FeatureNetworkConfig | None = None
    """A feature network, named by its uri, whose sums workers add to the done-records, so that evaluating takes no
    second pass over the samples. Changes no sample. None = no sums."""
    features_missing: Literal["refuse", "skip"] = "refuse"
    """When there is no such network (yet): refuse the generation, or skip the sums and say so. Presets skip: one can
    generate before a classifier is trained."""
    cost: CostConfig = CostConfig()
    """What a device costs."""
    track: Annotated[TrackConfig | None, filed_under("generation")] = TrackConfig(experiment="generation")
    """The MLflow run of this generation. None = no tracking."""
    name: str | None = None
    """Name of the MLflow run. None = made from the model and the output."""

    @model_validator(mode="after")
    def _workers_make_sense(self) -> Self:
        if self.max_workers is not None and self.max_workers < self.num_workers:
            raise ValueError("max_workers is less than num_workers; raise it, or leave it out")
        if self.gpus_per_worker > 1:
            raise ValueError(
                f"gpus_per_worker {self.gpus_per_worker:g}: a worker samples on one GPU, so others would idle; write "
                "1 and raise num_workers"
            )
        if not self.gpus_per_worker:
            refuse_idle(self, ("matmul",), "on a CPU")
        return self


class SampleConfig(Settings):
    """A few images, sampled in this process."""

    model: str = Field(min_length=1)
    """`name@alias`, `name/version`, or a folder that holds model.safetensors and model.json."""
    output: LocalPath = "samples"
    """Folder for the images and grid.png; made if need be."""
    count: int = Field(default=16, ge=1, le=MAX_IMAGES_A_SHARD)
    """Number of images."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the noise."""
    first_index: int = Field(default=0, ge=0)
    """Index of the first image."""
    only: list[int] | None = Field(default=None, min_length=1)
    """Indexes of the images to write. All `count` images are sampled, because rounding depends on the batch that an
    image is sampled in. None = write all."""
    classes: ClassChoice = "auto"
    """Classes of the images, as for a generation."""
    sampler: SamplerConfig = SamplerConfig()
    """The reverse process."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the network's arithmetic."""
    matmul: Matmul = "ieee"
    """Products of float32 numbers on a GPU, as for a generation."""
    batch_size: int = Field(default=64, ge=1)
    """Images per network call."""
    device: Literal["cpu", "cuda"] | None = None
    """Where to sample; CPUs and GPUs round differently. None = on a GPU, if there is one."""
    cpu_threads: int | None = Field(default=None, ge=1, le=4096)
    """Threads on a CPU, as for a generation. None = as many as torch chooses."""
    compile: bool = False
    """Compile the network with torch.compile, as for a generation."""
    image_format: Literal["png", "webp", "npy"] = "png"
    """Encoding of the images, as for a generation."""
    provenance: bool = True
    """Mark the images as synthetic, as for a generation."""
    spec_digest: Sha256 | None = None
    """Digest of the generation that the marks name, to draw its images byte for byte. None = the digest of a
    generation with these settings."""

    @model_validator(mode="after")
    def _has_no_idle_setting(self) -> Self:
        _refuse_idle_matmul(self)
        if not self.provenance:
            refuse_idle(self, ("spec_digest",), "without provenance")
        if self.device == "cuda":
            refuse_idle(self, ("cpu_threads",), "on a GPU")
        elif self.device == "cpu":
            refuse_idle(self, ("matmul",), "on a CPU")
        return self

    @model_validator(mode="after")
    def _draws_what_it_writes(self) -> Self:
        end = self.first_index + self.count
        for index in self.only or ():
            if not self.first_index <= index < end:
                raise ValueError(
                    f"only holds {index}, but the images are {self.first_index} to {end - 1}; change first_index "
                    "or count"
                )
        return self
