"""From the features of samples and reference to metrics, each with the number of images behind it."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ddpm_pipeline.config.evaluation import EvaluateConfig, MetricConfig
from ddpm_pipeline.config.plugins import require_plugin
from ddpm_pipeline.diffusion.noise import Stream, permutation
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.evaluate.document import Metric
from ddpm_pipeline.evaluate.nearest_reference import NearestReference, nearest_reference, nearest_vectors
from ddpm_pipeline.features.distances import (
    class_accuracy,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from ddpm_pipeline.features.exact_sums import sums_of
from ddpm_pipeline.features.feature_set import FeatureSet

Rows = npt.NDArray[np.int64]


class Halves(NamedTuple):
    """Rows of the reference in two halves of equal size."""

    a: Rows
    b: Rows


def compute_metrics(
    samples: FeatureSet,
    reference: FeatureSet,
    config: EvaluateConfig,
    nearest: NearestReference | None = None,
) -> dict[str, Metric]:
    """Every metric that the two sets admit. UserError for sets of different networks or image sizes.

    `nearest` is what `nearest_reference` finds for the same arguments, where the caller has it already.
    """
    if samples.network != reference.network:
        raise UserError("network: samples and reference have features of different networks; evaluate again")
    nearest = nearest or nearest_reference(samples, reference, config)
    out = _distances(samples, reference, config) | _pairwise(samples, reference, config)
    out |= _near_duplicates(samples, reference, nearest) | _near_in_features(samples, reference, config)
    if samples.logits is not None:
        out["inception_score"] = Metric(value=inception_score(samples.logits), n=len(samples), n_reference=0)
        if samples.labels is not None:
            accuracy = class_accuracy(samples.logits, samples.labels)
            out["class_accuracy"] = Metric(value=accuracy, n=len(samples), n_reference=0)
    out |= {metric.kind: _of_plugin(metric, samples, reference) for metric in config.metrics}
    return dict(sorted(out.items()))


class MeasureMetric(Protocol):
    """What a metric of another package does: a number from the features of samples and reference, a function of its
    arguments alone. `FeatureSet` has vectors, logits, labels and thumbnails. settings: of the plug-in's own class.
    """

    def __call__(self, samples: FeatureSet, reference: FeatureSet, settings: Any, /) -> float: ...


def measure_by_plugin(metric: MetricConfig, samples: FeatureSet, reference: FeatureSet) -> float:
    """The value of another package's metric. UserError where the package is missing, or is another version."""
    measure: MeasureMetric = require_plugin(metric, "evaluate.metrics").plugin.load()
    return float(measure(samples, reference, metric.options))


def _of_plugin(metric: MetricConfig, samples: FeatureSet, reference: FeatureSet) -> Metric:
    value = measure_by_plugin(metric, samples, reference)
    return Metric(value=value, n=len(samples), n_reference=len(reference))


def halves(count: int, config: EvaluateConfig) -> Iterator[Halves]:
    """The ways to split `count` rows into two halves, functions of the seed; an odd row is left out."""
    half = count // 2
    for number in range(config.num_splits):
        order = permutation(config.seed, Stream.ORDER_SAMPLES, count, step=number).numpy()
        yield Halves(order[:half], order[half : 2 * half])


def frechet_ratio(
    samples: npt.NDArray[np.float32], reference: npt.NDArray[np.float32], config: EvaluateConfig
) -> tuple[float, float]:
    """The samples' distance to halves of the reference, and the halves' to each other: means over the splits.

    Distances grow as sets shrink, so all are taken between sets of one size, that of a half. ValueError when there
    are fewer samples.
    """
    size = len(reference) // 2
    if len(samples) < size:
        raise ValueError(f"samples holds {len(samples)} vectors, a half {size}")
    to_halves: list[float] = []
    between_halves: list[float] = []
    for number, (a, b) in enumerate(halves(len(reference), config)):
        rows = permutation(config.seed, Stream.ORDER_SHARDS, len(samples), step=number).numpy()[:size]
        moments = [sums_of(vectors).moments() for vectors in (samples[rows], reference[a], reference[b])]
        to_halves += [frechet_distance(moments[0], moments[1]), frechet_distance(moments[0], moments[2])]
        between_halves.append(frechet_distance(moments[1], moments[2]))
    return float(np.mean(to_halves)), float(np.mean(between_halves))


def _distances(samples: FeatureSet, reference: FeatureSet, config: EvaluateConfig) -> dict[str, Metric]:
    n, m = len(samples), len(reference)
    whole = frechet_distance(sums_of(samples.vectors).moments(), sums_of(reference.vectors).moments())
    out = {"frechet": Metric(value=whole, n=n, n_reference=m)}
    half = m // 2
    if n < half or half < 2:
        return out
    to_halves, between_halves = frechet_ratio(samples.vectors, reference.vectors, config)
    out["frechet_to_half"] = Metric(value=to_halves, n=half, n_reference=half)
    out["frechet_between_halves"] = Metric(value=between_halves, n=0, n_reference=half)
    out["frechet_ratio"] = Metric(value=to_halves / between_halves, n=half, n_reference=half)
    if samples.logits is not None and reference.logits is not None:
        to_halves, between_halves = frechet_ratio(samples.logits, reference.logits, config)
        out["frechet_ratio_logits"] = Metric(value=to_halves / between_halves, n=half, n_reference=half)
    return out


def _pairwise(samples: FeatureSet, reference: FeatureSet, config: EvaluateConfig) -> dict[str, Metric]:
    x, y = samples.vectors[: config.max_images], reference.vectors[: config.max_images]
    sizes: dict[str, Any] = {"n": len(x), "n_reference": len(y)}
    out = {"kernel": Metric(value=kernel_distance(x, y), **sizes)}
    if min(len(x), len(y)) > config.neighbours:
        precision, recall = precision_recall(x, y, config.neighbours)
        out["precision"] = Metric(value=precision, **sizes)
        out["recall"] = Metric(value=recall, **sizes)
    return out


def _near_in_features(
    samples: FeatureSet, reference: FeatureSet, config: EvaluateConfig
) -> dict[str, Metric]:
    """The same as near copies of pixels, by features: they also find a copy that is moved, mirrored or recolored."""
    x, y = samples.vectors[: config.max_images], reference.vectors[: config.max_images]
    nearest = nearest_vectors(x, y, config.copy_quantile)
    return {
        "near_copies_features": Metric(
            value=float((nearest.distances < nearest.limit).mean()), n=len(x), n_reference=len(y)
        ),
        "near_copies_features_real": Metric(
            value=float((nearest.between_real < nearest.limit).mean()), n=0, n_reference=len(y)
        ),
    }


def _near_duplicates(
    samples: FeatureSet, reference: FeatureSet, nearest: NearestReference
) -> dict[str, Metric]:
    """How close samples are to reference images, compared with how close real images are to each other."""
    to_real, between_real, limit = nearest.distances, nearest.between_real, nearest.limit
    sizes: dict[str, Any] = {"n": len(to_real), "n_reference": len(between_real)}
    every: dict[str, Any] = {"n": len(samples), "n_reference": len(reference)}
    return {
        "near_copies": Metric(value=float((to_real < limit).mean()), **sizes),
        "near_copies_real": Metric(
            value=float((between_real < limit).mean()), n=0, n_reference=len(between_real)
        ),
        "nearest_ratio": Metric(value=float(np.median(to_real) / np.median(between_real)), **sizes),
        "exact_copies": Metric(
            value=float(np.isin(samples.pixel_hashes, reference.pixel_hashes).sum()), **every
        ),
        "duplicates": Metric(
            value=float(len(samples) - len(np.unique(samples.pixel_hashes))), n=len(samples), n_reference=0
        ),
    }
