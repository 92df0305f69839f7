"""Settings of evaluation: the feature network, the measures, the gate, the night."""

from typing import Annotated

from pydantic import Field

from pipeline.config.base import Settings
from pipeline.config.diffusion import SamplerKind


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
    metric: str = "frechet"
    """The figure that is quality; lower is better."""
    tolerance: float = Field(default=0.05, ge=0)
    """The recommended sampler is the cheapest whose metric is within this share of the best."""
    output: str = "{root}/tuning"
    """URI of the folder for the table and the plot: `<output>/<model>/`."""
    num_workers: int = Field(default=0, ge=0)
    """Candidates tried at a time on the Ray cluster, a core each. 0 = in this process."""
