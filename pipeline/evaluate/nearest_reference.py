"""The reference image nearest to each sample, by the pixels that near copies are counted with."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ddpm_pipeline.config.evaluation import EvaluateConfig
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.features.distances import Array, Vectors, nearest_distances, nearest_neighbours
from ddpm_pipeline.features.feature_set import FeatureSet


@dataclass(frozen=True)
class NearestReference:
    """For the first N samples the nearest of the first M reference images; at most `max_images` of each."""

    rows: npt.NDArray[np.int64]
    """(N,): rows of the reference."""
    distances: Array
    """(N,): Euclidean, in levels, of the pixels scaled down to an edge of at most 32."""
    between_real: Array
    """(M,): distance of each reference image to its nearest other one."""
    limit: float
    """A sample whose nearest reference image is nearer than this is a near copy."""


def nearest_reference(samples: FeatureSet, reference: FeatureSet, config: EvaluateConfig) -> NearestReference:
    """Compares all pairs. UserError for images of different shapes."""
    if samples.thumbnails.shape[1] != reference.thumbnails.shape[1]:
        raise UserError("reference: its images have another shape than the samples; name the right data set")
    x = samples.thumbnails[: config.max_images].astype(np.float32)
    y = reference.thumbnails[: config.max_images].astype(np.float32)
    return nearest_vectors(x, y, config.copy_quantile)


def nearest_vectors(x: Vectors, y: Vectors, copy_quantile: float) -> NearestReference:
    """The same for vectors (N, D) of samples and (M, D) of the reference, such as features, in their own units."""
    found = nearest_neighbours(x, y, 1)
    between_real = nearest_distances(y, y, same=True)
    limit = float(np.quantile(between_real, copy_quantile))
    return NearestReference(found.rows[:, 0], found.distances[:, 0], between_real, limit)
