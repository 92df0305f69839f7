"""Distances between sets of feature vectors. All in float64; all pure functions of their arrays."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ddpm_pipeline.progress import Progress, no_progress

Array = npt.NDArray[np.float64]
Vectors = npt.NDArray[np.floating[Any]] | npt.NDArray[np.integer[Any]]
_CHUNK = 1024
_BLOCK = 8192


@dataclass(frozen=True)
class GaussianMoments:
    """A set of feature vectors as a Gaussian."""

    count: int
    mean: Array
    """(F,)."""
    covariance: Array
    """(F, F), unbiased."""


def moments_of(vectors: Vectors) -> GaussianMoments:
    """Mean and unbiased covariance of (N, F). ValueError for fewer than two vectors."""
    x = _float64(vectors)
    if len(x) < 2:
        raise ValueError(f"vectors holds {len(x)} rows; a covariance needs two")
    mean = x.mean(0)
    centered = x - mean
    return GaussianMoments(len(x), mean, centered.T @ centered / (len(x) - 1))


def frechet_distance(a: GaussianMoments, b: GaussianMoments) -> float:
    """Squared Fréchet distance of two Gaussians (Heusel et al. 2017, eq. 6): |m1-m2|^2 + tr(C1+C2-2(C1 C2)^1/2).

    The trace of the root is the sum of the roots of the eigenvalues of the symmetric C1^1/2 C2 C1^1/2, which
    are always real. Two equal Gaussians give exactly 0.
    """
    if np.array_equal(a.mean, b.mean) and np.array_equal(a.covariance, b.covariance):
        return 0.0
    values, basis = np.linalg.eigh(a.covariance)
    root = (basis * np.sqrt(values.clip(0))) @ basis.T
    inner = root @ b.covariance @ root
    trace = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2).clip(0)).sum()
    difference = a.mean - b.mean
    return max(
        0.0, float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * trace)
    )


def kernel_distance(a: Vectors, b: Vectors) -> float:
    """Unbiased squared maximum mean discrepancy under (x.y / F + 1)^3 (Bińkowski et al. 2018), over all pairs.

    May be negative by chance. Equal arrays give 0. ValueError for fewer than two vectors in a set.
    """
    x, y = _float64(a), _float64(b)
    if min(len(x), len(y)) < 2:
        raise ValueError("a and b must hold two vectors each")
    if x.shape == y.shape and np.array_equal(x, y):
        return 0.0
    cross = sum(float(block.sum()) for block in _kernel_blocks(x, y)) / (len(x) * len(y))
    return _mean_of_pairs(x) + _mean_of_pairs(y) - 2 * cross


def precision_recall(samples: Vectors, real: Vectors, neighbours: int = 3) -> tuple[float, float]:
    """Share of samples inside the real manifold, and of real ones inside the samples' (Kynkäänniemi et al. 2019).

    A manifold is the union of balls around its vectors, each with the distance to the k-th nearest neighbor as radius.
    """
    x, y = _float64(samples), _float64(real)
    precise = within(x, y, manifold_radii(y, neighbours))
    recalled = within(y, x, manifold_radii(x, neighbours))
    return float(precise.mean()), float(recalled.mean())


def inception_score(logits: Vectors) -> float:
    """exp of the mean divergence of each image's classes from all images' (Salimans et al. 2016), one split."""
    values = _float64(logits)
    log_p = values - values.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    p = np.exp(log_p)
    marginal = p.mean(0)
    return float(np.exp((p * (log_p - np.log(marginal))).sum(1).mean()))


def class_accuracy(logits: Vectors, labels: npt.NDArray[np.integer[Any]]) -> float:
    """Share of images whose largest logit is that of their label."""
    return float((np.asarray(logits).argmax(1) == labels).mean())


def nearest_distances(queries: Vectors, others: Vectors, *, same: bool = False) -> Array:
    """Euclidean distance of each query (N, D) to its nearest of `others` (M, D): (N,).

    `same`: both are one set, and no vector is its own neighbor.
    """
    return nearest_neighbours(queries, others, 1, same=same).distances[:, 0]


class NearestNeighbours(NamedTuple):
    """The k nearest vectors of each query, nearest first."""

    rows: npt.NDArray[np.int64]
    """(N, k): rows in the set that was searched."""
    distances: Array
    """(N, k): Euclidean."""


def nearest_neighbours(
    queries: Vectors,
    others: Vectors,
    k: int,
    *,
    same: bool = False,
    progress: Progress = no_progress,
) -> NearestNeighbours:
    """The k nearest of `others` (M, D) to each query (N, D). ValueError for fewer than k (and itself) in `others`.

    `same`: both are one set, and no vector is its own neighbor. Memory is bounded: blocks are compared with blocks.
    Progress counts queries.
    """
    if len(others) - same < k:
        raise ValueError(f"others holds {len(others)} vectors, fewer than {k} neighbours")
    rows = np.empty((len(queries), k), np.int64)
    squares = np.empty((len(queries), k))
    for start in range(0, len(queries), _CHUNK):
        part = slice(start, start + _CHUNK)
        rows[part], squares[part] = _nearest_of_block(queries[part], others, k, start if same else None)
        progress(min(start + _CHUNK, len(queries)), len(queries))
    return NearestNeighbours(rows, np.sqrt(squares))


def _nearest_of_block(
    queries: Vectors, others: Vectors, k: int, own_row: int | None
) -> tuple[npt.NDArray[np.int64], Array]:
    """Rows and squared distances (B, k); `own_row` is the row in `others` of the first query, if it is one of them."""
    rows = np.empty((len(queries), 0), np.int64)
    squares = np.empty((len(queries), 0))
    place = np.arange(len(queries))
    for start in range(0, len(others), _BLOCK):
        found = square_distances(queries, others[start : start + _BLOCK])
        if own_row is not None:
            inside = (own_row + place >= start) & (own_row + place < start + found.shape[1])
            found[place[inside], own_row + place[inside] - start] = np.inf
        kept = np.argpartition(found, min(k, found.shape[1]) - 1, axis=1)[:, :k]
        rows = np.concatenate([rows, kept + start], axis=1)
        squares = np.concatenate([squares, np.take_along_axis(found, kept, 1)], axis=1)
        order = np.lexsort((rows, squares), axis=1)[:, :k]
        rows, squares = np.take_along_axis(rows, order, 1), np.take_along_axis(squares, order, 1)
    return rows, squares


def manifold_radii(members: Vectors, neighbours: int) -> Array:
    """Squared distance of each vector (M, F) to its k-th nearest neighbor: (M,). ValueError for too few vectors."""
    x = _float64(members)
    if len(x) <= neighbours:
        raise ValueError(f"a manifold of {neighbours} neighbours needs more than {len(x)} vectors")
    radii = np.empty(len(x))
    for start in range(0, len(x), _CHUNK):
        squares = square_distances(x[start : start + _CHUNK], x)
        # The vector itself is included, at distance 0.
        radii[start : start + _CHUNK] = np.partition(squares, neighbours, axis=1)[:, neighbours]
    return radii


def within(queries: Vectors, members: Vectors, radii: Array) -> npt.NDArray[np.bool_]:
    """Which queries (N, F) lie within the squared radius of some member: (N,)."""
    x, y = _float64(queries), _float64(members)
    out = np.empty(len(x), np.bool_)
    for start in range(0, len(x), _CHUNK):
        out[start : start + _CHUNK] = (square_distances(x[start : start + _CHUNK], y) <= radii).any(1)
    return out


def pair_kernel(a: Vectors, b: Vectors) -> Array:
    """(x.y / F + 1)^3 of every pair: (N, M)."""
    return (_float64(a) @ _float64(b).T / a.shape[1] + 1) ** 3


def square_distances(a: Vectors, b: Vectors) -> Array:
    """Squared Euclidean distance of every pair: (N, M)."""
    x, y = _float64(a), _float64(b)
    squares = (x * x).sum(1)[:, None] + (y * y).sum(1)[None] - 2 * (x @ y.T)
    return squares.clip(0)


def _kernel_blocks(x: Array, y: Array) -> Iterator[Array]:
    for start in range(0, len(x), _CHUNK):
        yield pair_kernel(x[start : start + _CHUNK], y)


def _mean_of_pairs(x: Array) -> float:
    total = sum(float(block.sum()) for block in _kernel_blocks(x, x))
    diagonal = ((x * x).sum(1) / x.shape[1] + 1) ** 3
    return (total - float(diagonal.sum())) / (len(x) * (len(x) - 1))


def _float64(values: Vectors) -> Array:
    return np.ascontiguousarray(values, dtype=np.float64)
