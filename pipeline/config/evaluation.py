"""Settings of evaluation: the feature network, the measures, the gate."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.base import Settings
from pipeline.config.diffusion import SamplerConfig, SamplerKind
from pipeline.config.tracking import TrackConfig, filed_under


class FeaturesConfig(Settings):
    """A small classifier, trained on a labelled data set, whose inner layer serves as feature network."""

    data: str
    """The packed data set; it must have labels."""
    output: str | None = None
    """URI of the folder for `classifier.safetensors` and `classifier.json`. None = beside the index, in
    `<data>/features`."""
    held_out: float = Field(default=0.2, gt=0, lt=1)
    """Share of the samples that the classifier never trains on, drawn by (seed, row)."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Names the split, the initial weights and the order of the samples."""
    channels: int = Field(default=32, ge=8, multiple_of=8)
    """Channels of the first convolutions; they double where the image is halved."""
    num_features: int = Field(default=64, ge=2, le=4096)
    """Length of the feature vector. Distances need several times as many images as this to mean much."""
    steps: int = Field(default=400, ge=1)
    """Optimiser steps. 400 take some ten seconds of one core on 8x8 images."""
    batch_size: int = Field(default=128, ge=2)
    """Samples a step."""
    lr: float = Field(default=3e-3, gt=0)
    """Peak of the learning rate; it rises for a tenth of the steps and falls to zero along a cosine."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Decoupled, per unit of learning rate (AdamW)."""
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """Share of the features that are zeroed while training, so that no single one decides."""
    max_shift: int = Field(default=1, ge=0)
    """Training images are moved by up to this many pixels each way, which keeps their class."""
    cpu_threads: int = Field(default=1, ge=1)
    """Threads of the training. The networks are so small that more threads mostly wait for each other."""
    min_accuracy: float = Field(default=0.9, ge=0, le=1)
    """A classifier whose held-out accuracy is lower is refused: what it calls alike says nothing."""


class FeatureNetworkConfig(Settings):
    """Which network turns images into features."""

    uri: str | None = None
    """`…/classifier.json` of `ddpm features train`, or a TorchScript file (`.pt`, `.ts`). None = the classifier
    beside the reference data."""
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """Of the file. Required for TorchScript, whose code is run; a classifier's card holds its own."""
    input: Annotated[str, Field(pattern=r"^(uint8|unit|signed|imagenet)$")] = "uint8"
    """What a TorchScript network is given: uint8 levels 0..255, float in [0, 1] (unit), in [-1, 1] (signed), or
    normalised by ImageNet's mean and deviation. The NVIDIA Inception file takes uint8."""
    size: int | None = Field(default=None, ge=1)
    """Images are scaled to this edge first (bilinear, anti-aliased). None = as they are."""
    rgb: bool = False
    """Repeat a grey image's channel three times first."""


class LikelihoodConfig(Settings):
    """The bound on the negative log-likelihood of images that the model never saw."""

    data: str
    """A packed data set that is not the training data; that one is refused."""
    count: int = Field(default=64, ge=1)
    """Its first so many images. Each costs as many network evaluations as the schedule has steps."""
    batch_size: int = Field(default=64, ge=1)
    """Images the network sees at once."""


class EvaluateConfig(Settings):
    """One set of images against a reference data set."""

    reference: str
    """The packed data set that the images should look like."""
    network: FeatureNetworkConfig = FeatureNetworkConfig()
    """The feature network."""
    max_images: int = Field(default=10_000, ge=2)
    """Images whose features are compared pair by pair (kernel distance, precision, near-copies): the first so
    many by index, and as many of the reference. The Fréchet distance always takes all."""
    neighbours: int = Field(default=3, ge=1)
    """k of precision and recall (Kynkäänniemi et al. 2019)."""
    copy_quantile: float = Field(default=0.01, gt=0, lt=1)
    """A sample is a near-copy when it is nearer to a reference image than this share of real images is to
    another real one."""
    num_splits: int = Field(default=5, ge=1)
    """Ways the reference is cut into two halves; the halves' distance is the measure of what is good."""
    batch_size: int = Field(default=250, ge=1)
    """Images the feature network sees at once."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Names the splits."""
    num_workers: int = Field(default=0, ge=0)
    """Shards measured at a time on the Ray cluster, a core each. 0 = in this process. Changes no figure."""
    likelihood: LikelihoodConfig | None = None
    """Held-out data for `bits_per_dim`; it needs the model, so it is for generations of a registered one. None = it is
    not measured."""
    records_only: bool = False
    """Take the feature sums of the done-records, which a generation with `features` leaves there, and read no sample:
    quick for any size, and gives the Fréchet distance and the class accuracy only."""
    track: Annotated[TrackConfig | None, filed_under("evaluation")] = TrackConfig(experiment="evaluation")
    """Where a generation's figures are logged, if MLFLOW_TRACKING_URI names a server: a run for each generation and
    terms. They are kept beside the generation in any case. None = not logged."""


class TuneConfig(Settings):
    """A search for the sampler of a model: every kind with every number of steps and every guidance."""

    model: str
    """`name@alias`, `name/version` or a folder."""
    evaluate: EvaluateConfig
    """The measure."""
    kinds: tuple[SamplerKind, ...] = ("ddim", "dpm++2m", "heun")
    """Samplers to try."""
    steps: tuple[int, ...] = (5, 10, 20, 50)
    """Numbers of steps to try."""
    guidance: tuple[float, ...] = (1.0,)
    """Guidance scales to try; other than 1 needs a network trained with net.null_class."""
    count: int = Field(default=1000, ge=2)
    """Images of each candidate; all candidates draw from the same noise."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Names the noise."""
    batch_size: int = Field(default=125, ge=1)
    """Images the network sees at once."""
    metric: Literal[
        "frechet", "frechet_ratio", "frechet_ratio_logits", "frechet_to_half", "kernel", "near_copies"
    ] = "frechet"
    """The figure that is quality; of each of these lower is better."""
    tolerance: float = Field(default=0.05, ge=0)
    """The recommended sampler is the cheapest whose metric is within this share of the best."""
    output: str = "{root}/tuning"
    """URI of the folder for the table and the plot: `<output>/<model>/`."""
    num_workers: int = Field(default=0, ge=0)
    """Candidates tried at a time on the Ray cluster, a core each. 0 = in this process."""


Figure = Literal[
    "frechet", "kernel", "precision", "recall", "near_copies", "class_accuracy", "inception_score"
]
"""What the gate can compare."""


class Rule(Settings):
    """What the gate asks of one figure."""

    better: Literal["lower", "higher"]
    """Which way is good."""
    must: Literal["improve", "keep"] = "keep"
    """improve: the interval of the improvement lies above 0. keep: the figure may not be worse by more than
    `tolerance` with the same certainty."""
    tolerance: float = Field(default=0.0, ge=0)
    """Loss that is overlooked, in the figure's own unit."""


def _default_rules() -> dict[Figure, Rule]:
    return {
        "frechet": Rule(better="lower", must="improve"),
        "class_accuracy": Rule(better="higher", tolerance=0.01),
        "near_copies": Rule(better="lower", tolerance=0.01),
    }


class GateConfig(Settings):
    """How a challenger is compared with the champion: the same noise, classes, sampler, reference and network."""

    evaluate: EvaluateConfig
    """The measure."""
    rules: dict[Figure, Rule] = Field(default_factory=_default_rules)
    """What is asked, by figure: frechet, kernel, precision, recall, near_copies, class_accuracy, inception_score. One
    that the models do not have, such as the accuracy of a model without classes, is left out."""
    count: int = Field(default=1000, ge=2)
    """Images of each model."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Names the noise, and the draws of the bootstrap."""
    sampler: SamplerConfig = SamplerConfig(kind="dpm++2m", num_steps=20)
    """The reverse process of both."""
    batch_size: int = Field(default=125, ge=1)
    """Images the network sees at once."""
    resamples: int = Field(default=200, ge=20)
    """Draws of the bootstrap."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Share of the draws inside an interval."""


class PromoteConfig(Settings):
    """One turn of the gate."""

    model: str
    """Registered name."""
    challenger: str = "challenger"
    """Alias of the version that wants to be champion."""
    champion: str = "champion"
    """Alias of the version in office; it moves if the challenger passes."""
    gate: GateConfig
    """How they are compared."""
