"""The metrics against scipy, torchmetrics and cases whose answer is known."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from ddpm_pipeline.evaluate.metrics import compute_metrics
from ddpm_pipeline.features.distances import (
    frechet_distance,
    inception_score,
    kernel_distance,
    moments_of,
    nearest_distances,
    precision_recall,
)
from tests.evaluate.made import config, measured, vectors


@pytest.mark.parametrize("size", [3, 64])
def test_the_frechet_distance_is_that_of_scipy(size: int) -> None:
    a, b = (moments_of(vectors(500, size, seed, shift=0.3 * seed)) for seed in (0, 1))
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_the_frechet_distance_is_that_of_torchmetrics() -> None:
    a, b = (moments_of(vectors(400, 16, seed, shift=0.1 * seed)) for seed in (0, 1))
    parts = [torch.from_numpy(part) for one in (a, b) for part in (one.mean, one.covariance)]
    assert frechet_distance(a, b) == pytest.approx(float(_compute_fid(*parts)), rel=1e-6)


def test_the_kernel_distance_is_that_of_torchmetrics() -> None:
    a, b = vectors(300, 8, 0).astype(np.float64), vectors(300, 8, 1, shift=0.2).astype(np.float64)
    expected = float(poly_mmd(torch.from_numpy(a), torch.from_numpy(b), degree=3, gamma=None, coef=1.0))
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_identical_sets_are_at_distance_zero() -> None:
    x = vectors(200)
    assert frechet_distance(moments_of(x), moments_of(x)) == 0
    assert kernel_distance(x, x) == 0
    assert precision_recall(x, x) == (1, 1)


def test_a_shifted_gaussian_is_at_the_square_of_its_shift() -> None:
    x = vectors(1000)
    assert frechet_distance(moments_of(x), moments_of(x + np.float32(2))) == pytest.approx(4 * 6, rel=1e-5)


def test_distances_survive_a_covariance_without_full_rank() -> None:
    x = np.repeat(vectors(100, 2), 3, axis=1)
    y = np.repeat(vectors(100, 2, seed=1), 3, axis=1)
    small = frechet_distance(moments_of(x[:, :2]), moments_of(x[:, :2]))
    assert frechet_distance(moments_of(x), moments_of(y)) > small


def test_the_kernel_distance_of_two_draws_is_zero_on_average() -> None:
    values = [kernel_distance(vectors(100, seed=2 * s), vectors(100, seed=2 * s + 1)) for s in range(40)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


def test_precision_falls_for_outliers_and_recall_for_a_missing_part() -> None:
    left, right = vectors(150, seed=0), vectors(150, seed=1, shift=100.0)
    both = np.concatenate([left, right])
    precision, recall = precision_recall(left, both)
    assert precision == 1
    assert recall == pytest.approx(0.5, abs=0.05)
    precision, recall = precision_recall(both, left)
    assert precision == pytest.approx(0.5, abs=0.05)
    assert recall == 1


def test_the_inception_score_counts_confident_classes() -> None:
    assert inception_score(np.eye(5)[np.arange(100) % 5] * 50) == pytest.approx(5)
    assert inception_score(np.zeros((100, 5))) == pytest.approx(1)


def test_the_nearest_neighbor_is_not_the_vector_itself() -> None:
    points = np.array([[0.0], [1.0], [5.0]])
    assert nearest_distances(points, points).tolist() == [0, 0, 0]
    assert nearest_distances(points, points, same=True).tolist() == [1, 1, 4]


def test_too_few_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="two"):
        moments_of(vectors(1))
    with pytest.raises(ValueError, match="two"):
        kernel_distance(vectors(1), vectors(5))
    with pytest.raises(ValueError, match="neighbours"):
        precision_recall(vectors(3), vectors(5))


def test_copies_that_look_different_are_near_by_their_features() -> None:
    real, samples = measured(400, seed=50), measured(200, seed=1)
    before = compute_metrics(samples, real, config())
    limit = np.quantile(nearest_distances(real.vectors, real.vectors, same=True), config().copy_quantile)
    were_near = nearest_distances(samples.vectors, real.vectors) < limit
    samples.vectors[:60] = real.vectors[:60] + 1e-4
    found = compute_metrics(samples, real, config())
    assert before["near_copies_features"].value == were_near.mean() < 0.1
    assert found["near_copies_features"].value == (60 + were_near[60:].sum()) / 200
    assert found["near_copies_features_real"].value == config().copy_quantile
    assert (found["near_copies_features"].n, found["near_copies_features"].n_reference) == (200, 400)
    assert found["near_copies"] == before["near_copies"]
