"""The bootstrap: metrics of samples that are resampled with replacement, for the confidence of a comparison.

A resampling is a weight for each sample, so what does not depend on the weights is computed once.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ddpm_pipeline.config.evaluation import EvaluateConfig, MetricConfig
from ddpm_pipeline.diffusion.noise import Stream, randint
from ddpm_pipeline.evaluate.metrics import measure_by_plugin
from ddpm_pipeline.evaluate.nearest_reference import nearest_vectors
from ddpm_pipeline.features.distances import (
    Array,
    GaussianMoments,
    Vectors,
    frechet_distance,
    manifold_radii,
    moments_of,
    pair_kernel,
    square_distances,
    within,
)
from ddpm_pipeline.features.feature_set import FeatureSet

Statistic = Callable[[Array], float]
"""From weights (N,) of the samples, whole numbers that add up to N, to a metric."""


@dataclass(frozen=True)
class BootstrapEstimate:
    """A metric with its values over all resamplings."""

    value: float
    """Of the samples as they are."""
    resampled: Array
    """(R,): of each resampling."""

    @classmethod
    def of(cls, statistic: Statistic, weights: Sequence[Array]) -> "BootstrapEstimate":
        """A statistic under equal weights and under each of `weights`."""
        return cls(statistic(np.ones_like(weights[0])), np.array([statistic(w) for w in weights]))

    def interval(self, confidence: float) -> tuple[float, float]:
        """The middle `confidence` of the resampled values."""
        tail = (1 - confidence) / 2
        low, high = np.quantile(self.resampled, [tail, 1 - tail])
        return float(low), float(high)


def statistics(samples: FeatureSet, real: FeatureSet, config: EvaluateConfig) -> dict[str, Statistic]:
    """The metrics that take weights, for samples (N) against a reference. Reference images are not resampled."""
    reference = moments_of(real.vectors)
    vectors = samples.vectors.astype(np.float64)
    out: dict[str, Statistic] = {
        "frechet": lambda weights: frechet_distance(weighted_moments(vectors, weights), reference),
        "kernel": _kernel(samples.vectors, real.vectors[: config.max_images]),
    }
    near = real.vectors[: config.max_images]
    if len(near) > config.neighbours:
        out["precision"] = _share(within(samples.vectors, near, manifold_radii(near, config.neighbours)))
    if len(samples) > config.neighbours:
        out["recall"] = _recall(samples.vectors, near, config.neighbours)
    thumbnails = real.thumbnails[: config.max_images]
    out["near_copies"] = _near_copies(samples.thumbnails, thumbnails, config.copy_quantile)
    out["near_copies_features"] = _near_copies(samples.vectors, near, config.copy_quantile)
    if samples.logits is not None:
        out["inception_score"] = _inception_score(samples.logits)
    if samples.logits is not None and samples.labels is not None:
        out["class_accuracy"] = _share(samples.logits.argmax(1) == samples.labels)
    return out | {metric.kind: _of_plugin(metric, samples, real) for metric in config.metrics}


def draws(count: int, resamples: int, seed: int) -> Iterator[Array]:
    """Weights (count,) of each resampling, a function of (seed, number): equal for every set of `count`
    samples, so that sets made from the same noise are compared sample by sample."""
    index = torch.arange(count)
    for draw in range(resamples):
        rows = randint(seed, Stream.ORDER_SAMPLES, index, count, step=draw)
        yield torch.bincount(rows, minlength=count).double().numpy()


def weighted_moments(vectors: Array, weights: Array) -> GaussianMoments:
    """Mean and unbiased covariance of vectors (N, F), each counted as often as its weight."""
    total = float(weights.sum())
    mean = weights @ vectors / total
    centered = vectors - mean
    return GaussianMoments(int(total), mean, (centered * weights[:, None]).T @ centered / (total - 1))


def _of_plugin(metric: MetricConfig, samples: FeatureSet, real: FeatureSet) -> Statistic:
    """Another package's metric knows no weights: it gets each sample as often as it was drawn."""

    def statistic(weights: Array) -> float:
        rows = np.repeat(np.arange(len(samples)), weights.astype(np.int64))
        return measure_by_plugin(metric, samples.part(rows), real)

    return statistic


def _near_copies(samples: Vectors, real: Vectors, quantile: float) -> Statistic:
    """The share of samples that are nearer to a real image than this share of the real images is to another."""
    nearest = nearest_vectors(samples, real, quantile)
    return _share(nearest.distances < nearest.limit)


def _share(hits: npt.NDArray[np.bool_]) -> Statistic:
    values = hits.astype(np.float64)
    return lambda weights: float(weights @ values / weights.sum())


def _recall(samples: Vectors, real: Vectors, neighbours: int) -> Statistic:
    """Share of real vectors (M, F) inside the manifold of the samples (N, F) that were drawn, however often each.

    A sample drawn twice is not its own neighbor: the balls reach to the k-th nearest other sample that was drawn.
    """

    @functools.cache
    def geometry() -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """(N, N): neighbors of each sample, nearest first, and squared distances; (M, N): from real to samples."""
        between_samples = square_distances(samples, samples)
        np.fill_diagonal(between_samples, -1.0)  # first of its own row, even before a duplicate
        order = between_samples.argsort(1).astype(np.int32)
        ranked = np.take_along_axis(between_samples, order, 1).astype(np.float32)
        return order, ranked, square_distances(real, samples).astype(np.float32)

    def statistic(weights: Array) -> float:
        order, ranked, across = geometry()
        drawn = weights > 0
        rank = (drawn[order].cumsum(1, dtype=np.int32) <= neighbours).sum(1).clip(max=len(drawn) - 1)
        radii = np.where(drawn, ranked[np.arange(len(drawn)), rank], -1.0)
        return float((across <= radii).any(1).mean())

    return statistic


def _inception_score(logits: Vectors) -> Statistic:
    log_p = torch.log_softmax(torch.from_numpy(np.asarray(logits, np.float64)), 1).numpy()
    p = np.exp(log_p)
    negative_entropy = (p * log_p).sum(1)

    def statistic(weights: Array) -> float:
        share = weights / weights.sum()
        marginal = share @ p
        return float(np.exp(share @ negative_entropy - marginal @ np.log(marginal)))

    return statistic


def _kernel(samples: Vectors, real: Vectors) -> Statistic:
    """The kernel distance under weights; without pairs of a sample with itself, however often it is drawn."""
    between_samples, across, between_real = (
        pair_kernel(samples, samples),
        pair_kernel(samples, real),
        pair_kernel(real, real),
    )
    np.fill_diagonal(between_samples, 0.0)
    np.fill_diagonal(between_real, 0.0)
    towards = across.mean(1)
    constant = float(between_real.sum() / (len(between_real) * (len(between_real) - 1)))

    def statistic(weights: Array) -> float:
        total = float(weights.sum())
        pairs = total * total - float((weights * weights).sum())
        return float(weights @ between_samples @ weights / pairs + constant - 2 * (weights @ towards) / total)

    return statistic
