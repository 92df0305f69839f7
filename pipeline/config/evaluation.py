"""Settings of evaluation: the feature network, the metrics, the sampler search, the gate."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ddpm_pipeline.config.base import Settings, refuse_idle
from ddpm_pipeline.config.diffusion import SamplerConfig, SamplerKind
from ddpm_pipeline.config.plugins import FEATURES, METRICS, PluginIdentity, WithPlugin, with_identity
from ddpm_pipeline.config.tracking import TrackConfig, filed_under


class FeaturesConfig(Settings):
    """A small classifier, trained on a labelled data set, whose inner layer is used as feature network."""

    data: str
    """The packed data set; it must have labels."""
    output: str | None = None
    """URI of the folder for `classifier.safetensors` and `classifier.json`. None = beside the index, in
    `<data>/features`."""
    held_out: float = Field(default=0.2, gt=0, lt=1)
    """Share of the samples held out from training, chosen by the seed."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the split, the initial weights and the order of the samples."""
    channels: int = Field(default=32, ge=8, multiple_of=8)
    """Channels of the first convolutions; they double where the image is halved."""
    num_features: int = Field(default=64, ge=2, le=4096)
    """Length of the feature vector. Distances are meaningful with several times as many images as this."""
    steps: int = Field(default=400, ge=1)
    """Optimizer steps. 400 take about ten seconds of one core on 8x8 images."""
    batch_size: int = Field(default=128, ge=2)
    """Samples per step."""
    lr: float = Field(default=3e-3, gt=0)
    """Peak learning rate: linear warm-up over a tenth of the steps, then cosine decay to zero."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Decoupled weight decay (AdamW)."""
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """Share of the features that are zeroed during training, so that no single one dominates."""
    max_shift: int = Field(default=1, ge=0)
    """Training images are shifted by up to this many pixels each way, which keeps their class."""
    cpu_threads: int = Field(default=1, ge=1)
    """Threads of the training. The networks are so small that more threads rarely help."""
    min_accuracy: float = Field(default=0.9, ge=0, le=1)
    """A classifier with a lower held-out accuracy is refused: its features would say little about the images."""


class FeatureNetworkConfig(WithPlugin):
    """The network that maps images to features."""

    PLUGIN_GROUP: ClassVar[str] = FEATURES

    kind: str = Field(default="file", min_length=1, max_length=250, exclude_if=lambda kind: kind == "file")
    """"file": the network at `uri`. Otherwise another package's, by its entry point in `ddpm_pipeline.features` or as
    `module:object`."""
    uri: str | None = None
    """`…/classifier.json` of `ddpm features train`, or a TorchScript file (`.pt`, `.ts`). None = the classifier
    beside the reference data."""
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """sha256 of the file. Required for TorchScript, which contains code; a classifier's card holds its own."""
    input: Annotated[str, Field(pattern=r"^(uint8|unit|signed|imagenet)$")] = "uint8"
    """Input of a TorchScript network: uint8 levels 0..255, float in [0, 1] (unit), in [-1, 1] (signed), or normalized
    by ImageNet's mean and deviation. The NVIDIA Inception file takes uint8."""
    size: int | None = Field(default=None, ge=1)
    """Images are scaled to this edge first (bilinear, anti-aliased). None = not scaled."""
    rgb: bool = False
    """Repeat the channel of a gray image three times first."""
    settings: dict[str, Any] | None = Field(default=None, exclude_if=lambda settings: settings is None)
    """Settings of another package's network."""
    plugin: PluginIdentity | None = Field(default=None, exclude_if=lambda plugin: plugin is None)
    """Its package and version; filled in where it is left out."""

    @model_validator(mode="before")
    @classmethod
    def _identified(cls, data: Any) -> Any:
        return with_identity(FEATURES, data, "file")

    @model_validator(mode="after")
    def _only_settings_that_act(self) -> Self:
        if self.kind != "file":
            refuse_idle(self, ("uri", "sha256", "input", "size", "rgb"), f"for kind {self.kind!r}")
        return self


class MetricConfig(WithPlugin):
    """A metric of another package. `kind` alone may be written as its text."""

    PLUGIN_GROUP: ClassVar[str] = METRICS

    kind: str = Field(min_length=1, max_length=120)
    """Its entry point in `ddpm_pipeline.metrics`, or `module:object`; also the metric's name."""
    settings: dict[str, Any] | None = None
    """Its settings."""
    plugin: PluginIdentity | None = None
    """Its package and version; filled in where it is left out."""

    @model_validator(mode="before")
    @classmethod
    def _identified(cls, data: Any) -> Any:
        return with_identity(METRICS, {"kind": data} if isinstance(data, str) else data, "")


class LikelihoodConfig(Settings):
    """The bound on the negative log-likelihood of held-out images."""

    data: str
    """A packed data set of held-out images; the training data is refused."""
    count: int = Field(default=64, ge=1)
    """Number of its images, from the first. Each takes as many network evaluations as the schedule has steps."""
    batch_size: int = Field(default=64, ge=1)
    """Images per evaluation of the network."""


class MembershipConfig(Settings):
    """Membership inference: whether a model's losses tell its training images from held-out ones."""

    members: str
    """The packed data set that the model was trained on; any other is refused."""
    held_out: str
    """A packed data set of images of the same kind that the model has not seen, such as the `-held-out` part of a
    pack; the training data is refused."""
    count: int = Field(default=500, ge=20)
    """Images of each, from the first. Shards hold them in random order."""
    num_timesteps: int = Field(default=8, ge=1, le=1000)
    """Network evaluations of an image, at timesteps spread over the schedule's first half."""
    batch_size: int = Field(default=125, ge=1)
    """Images per evaluation of the network."""


class EvaluateConfig(Settings):
    """Evaluation of a set of images against a reference data set."""

    reference: str
    """The packed data set that the images should resemble."""
    network: FeatureNetworkConfig = FeatureNetworkConfig()
    """The feature network."""
    max_images: int = Field(default=10_000, ge=2)
    """Images whose features are compared pair by pair (kernel distance, precision, near duplicates): the first ones by
    index, and as many of the reference. The Fréchet distance always takes all."""
    neighbours: int = Field(default=3, ge=1)
    """k of precision and recall (Kynkäänniemi et al. 2019)."""
    copy_quantile: float = Field(default=0.01, gt=0, lt=1)
    """A sample is a near duplicate when its distance to the nearest reference image is below this quantile of the
    distances between real images and their nearest real neighbors."""
    num_splits: int = Field(default=5, ge=1)
    """Number of splits of the reference into two halves, whose distance is the yardstick of `frechet_ratio`."""
    batch_size: int = Field(default=250, ge=1)
    """Images per evaluation of the feature network."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the splits."""
    num_workers: int = Field(default=0, ge=0)
    """Tasks at a time on the Ray cluster, one core each. 0 = in this process or, where only the cluster has the GPUs
    that `gpus_per_task` asks for, as many as it has. Changes no metric."""
    gpus_per_task: float | None = Field(default=None, ge=0, le=1)
    """GPU of each task that extracts features, computes likelihoods, or samples for the gate and the sampler search:
    on the Ray cluster or, where `num_workers` is 0 and this machine has a GPU, in this process. 0 = the CPU. None = 1
    if the job that is judged used GPUs and there are some, else 0. Evaluations on different models of GPU, or on a GPU
    and a CPU, are not compared: they round differently."""
    likelihood: LikelihoodConfig | None = None
    """Held-out data for `bits_per_dim`, which needs a registered model. None = not computed."""
    membership: MembershipConfig | None = Field(
        default=None, exclude_if=lambda membership: membership is None
    )
    """Also measure membership inference of the registered model that made the samples. None = not."""
    records_only: bool = False
    """Use the feature sums in the done-records, which a generation with `features` writes, and read no samples: fast
    for any size, but only the Fréchet distance and the class accuracy."""
    metrics: tuple[MetricConfig, ...] = Field(
        default=(), max_length=32, exclude_if=lambda metrics: not metrics
    )
    """Metrics of other packages, beside ours. They are among the conditions under which evaluations are compared."""
    track: Annotated[TrackConfig | None, filed_under("evaluation")] = TrackConfig(experiment="evaluation")
    """Where evaluations are logged, if MLFLOW_TRACKING_URI names a server: a run for each generation and set of
    conditions. They are stored beside the generation in any case. None = not logged."""


class TuneConfig(Settings):
    """A search for the sampler of a model: every kind with every number of steps and every guidance scale."""

    model: str
    """`name@alias`, `name/version` or a folder."""
    evaluate: EvaluateConfig
    """How samples are evaluated."""
    kinds: tuple[SamplerKind, ...] = ("ddim", "dpm++2m", "dpm++3m", "unipc", "heun")
    """Samplers to try."""
    steps: tuple[int, ...] = (5, 10, 20, 50)
    """Numbers of steps to try."""
    guidance: tuple[float, ...] = (1.0,)
    """Guidance scales to try; other than 1 needs a network trained with net.null_class."""
    count: int = Field(default=1000, ge=2)
    """Images per candidate; all candidates start from the same noise."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the noise."""
    batch_size: int = Field(default=125, ge=1)
    """Images per evaluation of the network."""
    metric: Literal[
        "frechet", "frechet_ratio", "frechet_ratio_logits", "frechet_to_half", "kernel", "near_copies"
    ] = "frechet"
    """The metric of quality; for each of these lower is better."""
    tolerance: float = Field(default=0.05, ge=0)
    """The recommended sampler is the cheapest whose metric is within this share of the best."""
    output: str = "{root}/tuning"
    """URI of the folder for the table and the plot: `<output>/<model>/`."""
    num_workers: int = Field(default=0, ge=0)
    """Candidates tried at a time on the Ray cluster, one core each. 0 = in this process."""


GATE_METRICS = (
    "frechet",
    "kernel",
    "precision",
    "recall",
    "near_copies",
    "near_copies_features",
    "class_accuracy",
    "inception_score",
    "membership_auc",
    "evaluations_per_image",
    "images_per_device_second",
)
"""Our metrics that the gate can compare. Those of other packages have the names of their entry points."""
MEMBERSHIP = "membership_auc"
COST_METRICS: dict[str, Literal["lower", "higher"]] = {
    "evaluations_per_image": "lower",
    "images_per_device_second": "higher",
}
"""Those of the cost of samples, with the direction that is better."""
WARM_UP_BATCHES = 2
"""Batches before any is timed: kernels are chosen in the first and, on a GPU, captured in the second."""
MIN_TIMED_BATCHES = 3
"""Fewer full batches would give no interval of `images_per_device_second`."""


class Rule(Settings):
    """What the gate requires of one metric."""

    better: Literal["lower", "higher"]
    """Which direction is better."""
    must: Literal["improve", "keep"] = "keep"
    """improve: the confidence interval of the improvement lies above 0. keep: it lies above `-tolerance`, so the metric
    is not worse by more than that."""
    tolerance: float = Field(default=0.0, ge=0)
    """Accepted loss, in the unit of the metric."""


def _default_rules() -> dict[str, Rule]:
    return {
        "frechet": Rule(better="lower", must="improve"),
        "class_accuracy": Rule(better="higher", tolerance=0.01),
        "near_copies": Rule(better="lower", tolerance=0.01),
    }


class BaselineConfig(Settings):
    """What a challenger is compared with, instead of the champion under the same sampler."""

    model: str | None = Field(default=None, min_length=1)
    """`name@alias` or `name/version` of a registered model, such as the teacher of a distilled one. None = the
    champion."""
    sampler: SamplerConfig | None = None
    """Sampler of this model alone. None = the gate's."""

    @model_validator(mode="after")
    def _names_something(self) -> Self:
        if self.model is None and self.sampler is None:
            raise ValueError("names neither model nor sampler; name one, or leave it out")
        return self


class GateConfig(Settings):
    """How a challenger is compared with the champion: same noise, classes, reference and feature network."""

    evaluate: EvaluateConfig
    """How samples are evaluated."""
    rules: dict[str, Rule] = Field(default_factory=_default_rules)
    """Rules by metric: frechet, kernel, precision, recall, near_copies, near_copies_features, class_accuracy,
    inception_score; of privacy: membership_auc, which needs evaluate.membership; of cost: evaluations_per_image,
    images_per_device_second; and those of other packages that evaluate.metrics names. A rule for a metric that the
    models do not have, such as the accuracy of a model without classes, is skipped."""
    baseline: BaselineConfig | None = None
    """Another model to compare the challenger with, or another sampler for the champion. None = the champion, with
    `sampler`."""
    count: int = Field(default=1000, ge=2)
    """Images per model."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the noise and of the bootstrap."""
    sampler: SamplerConfig = SamplerConfig(kind="dpm++2m", num_steps=20)
    """Sampler of both models, or of the challenger where `baseline` has its own."""
    batch_size: int = Field(default=125, ge=1)
    """Images per evaluation of the network."""
    resamples: int = Field(default=200, ge=20)
    """Resamplings of the bootstrap."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Confidence level of the intervals."""

    @property
    def names_baseline(self) -> bool:
        """Whether the gate compares with a model that it names, and so can judge the first version of a name."""
        return self.baseline is not None and self.baseline.model is not None

    @model_validator(mode="after")
    def _knows_metrics(self) -> Self:
        known = [*GATE_METRICS, *(metric.kind for metric in self.evaluate.metrics)]
        for name in self.rules:
            if name not in known:
                raise ValueError(
                    f"rules.{name}: unknown; known are {', '.join(known)}, and what evaluate.metrics names"
                )
        return self

    @model_validator(mode="after")
    def _can_measure_membership(self) -> Self:
        if MEMBERSHIP in self.rules and self.evaluate.membership is None:
            raise ValueError(f"rules.{MEMBERSHIP} needs evaluate.membership; set it, or leave the rule out")
        return self

    @model_validator(mode="after")
    def _can_measure_cost(self) -> Self:
        for name, better in COST_METRICS.items():
            if name in self.rules and self.rules[name].better != better:
                raise ValueError(f"rules.{name}: {better} is better; write better: {better}")
        least = (WARM_UP_BATCHES + MIN_TIMED_BATCHES) * self.batch_size
        if "images_per_device_second" in self.rules and self.count < least:
            raise ValueError(
                f"rules.images_per_device_second needs {WARM_UP_BATCHES + MIN_TIMED_BATCHES} full batches, of which "
                f"{WARM_UP_BATCHES} are not timed; raise count to {least}, or lower batch_size"
            )
        return self


class PromoteConfig(Settings):
    """A comparison of challenger and champion."""

    model: str
    """Registered name."""
    challenger: str = "challenger"
    """Alias of the version that is to become champion."""
    champion: str = "champion"
    """Alias of the current champion; it moves to the challenger if that passes."""
    gate: GateConfig
    """How the two are compared."""
