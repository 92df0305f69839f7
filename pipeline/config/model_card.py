"""The model card: what `model.json` says about a network. Plain data, without torch."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.bounds import MAX_CLASSES, Count, Key, Name, Sha256
from ddpm_pipeline.config.diffusion import ObjectiveConfig, SamplerConfig, ScheduleConfig
from ddpm_pipeline.config.net import Net, NetConfig

_Levels = Annotated[tuple[float, ...], Field(max_length=4096)]


class ImageShape(Settings):
    """The shape of the images that a network generates."""

    channels: int = Field(ge=1, le=4096)
    """Color channels: 1 (grayscale) or 3 (RGB)."""

    size: int = Field(ge=1, le=8192)
    """Height and width, pixels."""


class TrainingData(Settings):
    """The data a network was trained on: its digest and its channel statistics."""

    digest: Name | None = None
    """Digest of the index of the shards; None when it is not known (an imported network)."""

    channel_mean: _Levels | None = None
    """Mean of each channel over the training set, in uint8 levels (0..255); None when it was not measured."""

    channel_std: _Levels | None = None
    """Standard deviation of each channel over the training set, in uint8 levels; None: not measured."""

    class_counts: Annotated[tuple[Count, ...], Field(max_length=MAX_CLASSES)] | None = Field(
        default=None, exclude_if=lambda counts: counts is None
    )
    """Training images of each class; None without classes, and in cards of versions that did not count them."""


class WeightsInfo(Settings):
    """Which weights of a training run lie in `model.safetensors`."""

    kind: Name = "ema"
    """Kind of weights: `ema` (exponential moving average), `raw`, or another name given by training."""

    sha256: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    """Hex digest of the bytes of `model.safetensors`; `save_model` fills it in."""


class TrainingInfo(Settings):
    """The training run that produced a network."""

    step: int | None = Field(default=None, ge=0, lt=2**63)
    """Optimizer steps taken; None if unknown."""

    run_id: Name | None = None
    """MLflow run of the training; None if it was not tracked."""

    init_from: Key | None = None
    """Model that was fine-tuned (`name/3`, or a directory); None when trained from scratch."""

    init_sha256: Name | None = None
    """Hex digest of that model's weights."""


class PairsInfo(Settings):
    """A generation whose samples a network was taught with: pairs of initial noise and image."""

    spec: Sha256
    """Digest of its spec."""

    seed: int = Field(ge=0, lt=2**63)
    """Seed of its noise."""

    first_index: Count
    """Index of its first sample."""

    count: Count
    """Number of its samples."""

    def holds_noise_of(self, seed: int, first_index: int, count: int) -> bool:
        """Whether any of the samples with these names starts from noise that the network was trained on."""
        return (
            seed == self.seed
            and first_index < self.first_index + self.count
            and self.first_index < first_index + count
        )


class DistillationInfo(Settings):
    """How a few-step network came from one of many steps."""

    teacher: Key
    """The model it was distilled from: `name/3`, or a directory."""

    teacher_sha256: Sha256
    """Hex digest of the teacher's weights."""

    method: Name
    """How it was taught."""

    sampler: SamplerConfig
    """The teacher's sampler, whose guidance and clipping are baked in."""

    steps: int = Field(ge=0, lt=2**63)
    """Optimizer steps of the distillation."""

    pairs: PairsInfo | None = None
    """The generation it was taught with, if any."""


class ModelCard(Settings):
    """The content of `model.json`: architecture, diffusion process, image shape and origin of a network."""

    format: Literal[1] = 1
    """Version of the file format."""

    net: Net
    """The network's architecture."""

    schedule: ScheduleConfig
    """The noise schedule used in training."""

    objective: ObjectiveConfig
    """What the network predicts."""

    image: ImageShape
    """Shape of the generated images."""

    class_names: Annotated[tuple[Name, ...], Field(max_length=MAX_CLASSES)] | None = None
    """Class names by label; None for a network without classes or with unnamed ones."""

    data: TrainingData = TrainingData()
    """Digest and statistics of the training data."""

    weights: WeightsInfo = WeightsInfo()
    """Kind and hash of the weights stored beside this file."""

    training: TrainingInfo = TrainingInfo()
    """The training run that produced the weights."""

    distillation: DistillationInfo | None = None
    """How it was distilled; None for a model that was trained on images."""

    @field_validator("class_names")
    @classmethod
    def _no_more_names_than_classes(
        cls, names: tuple[str, ...] | None, info: ValidationInfo
    ) -> tuple[str, ...] | None:
        net: NetConfig | None = info.data.get("net")  # absent if it failed validation itself
        classes = None if net is None else net.num_classes
        if names is not None and classes is not None and len(names) > classes:
            raise ValueError(f"{len(names)} names for a network of {classes} classes")
        return names
