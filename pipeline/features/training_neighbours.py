"""The training images nearest to each sample: by the distance of pixels that near copies are counted with."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ddpm_pipeline.config.model_card import ModelCard
from ddpm_pipeline.data.formats.contact_sheet import scaled
from ddpm_pipeline.data.formats.npy import Pixels
from ddpm_pipeline.data.index import Index
from ddpm_pipeline.data.reading.sequential import SequentialSample, read_sequential
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.features.distances import Array, nearest_distances, nearest_neighbours
from ddpm_pipeline.features.feature_set import THUMB_EDGE, thumbnails
from ddpm_pipeline.progress import Progress

NEAREST = 3
"""Training images shown for each sample."""
_MAX_BYTES = 4_000_000_000
_BATCH = 256


@dataclass(frozen=True)
class TrainingImage:
    """A training image as it is shown."""

    name: str
    """Shard and key of the sample."""
    label: int | None
    pixels: Pixels
    """uint8 (h, w, channels), scaled down if it is large."""


@dataclass(frozen=True)
class TrainingNeighbours:
    """The training images nearest to N samples."""

    rows: npt.NDArray[np.int64]
    """(N, NEAREST): rows of the data set, nearest first."""
    distances: Array
    """(N, NEAREST): Euclidean, in levels, of the pixels scaled down to an edge of at most 32."""
    limit: float
    """A sample whose nearest training image is nearer than this is a near copy."""
    images: dict[int, TrainingImage]
    """The training images by row."""


def require_training_data(index: Index, card: ModelCard, model: str) -> None:
    """UserError unless a data set is what the model was trained on, and has images of the model's shape."""
    if card.data.digest is None:
        raise UserError(f"--data: the card of {model} does not say what it was trained on; leave --data out")
    if index.digest != card.data.digest:
        raise UserError(
            f"--data {index.uri}: is not what {model} was trained on (digest {index.digest[:12]}, and the model's card "
            f"says {card.data.digest[:12]}); name the data set it was trained on"
        )
    shape, size = index.image, card.image.size
    if shape is None or (shape.channels, shape.height, shape.width) != (card.image.channels, size, size):
        raise UserError(
            f"--data {index.uri}: its images are not of the samples' shape, {card.image.channels}x{size}x{size}; "
            "leave --data out"
        )
    edge = min(size, THUMB_EDGE)
    if index.num_samples * card.image.channels * edge**2 > _MAX_BYTES:
        raise UserError(
            f"--data {index.uri}: {index.num_samples:,} images do not fit into memory; leave it out"
        )


def training_neighbours(
    samples: npt.NDArray[np.uint8],
    index: Index,
    *,
    shown_edge: int,
    copy_quantile: float,
    max_images: int,
    progress: Progress,
) -> TrainingNeighbours:
    """The neighbors of samples, given as `small_pixels` uint8 (N, P). Reads the data set once, and its neighbors again.

    The limit of near copies is the quantile of the distances between the first `max_images` real images and their
    nearest real neighbors. Progress counts images: those read, samples compared, neighbors read.
    """
    small = _small_images(index, progress)
    k = min(NEAREST, len(small))
    found = nearest_neighbours(samples, small, k, progress=progress)
    real = small[:max_images]
    limit = (
        float(np.quantile(nearest_distances(real, real, same=True), copy_quantile)) if len(real) > 1 else 0.0
    )
    rows = np.unique(found.rows)
    images = _read_rows(index, rows, shown_edge, progress)
    return TrainingNeighbours(found.rows, found.distances, limit, images)


def small_pixels(images: Pixels) -> npt.NDArray[np.uint8]:
    """(N, P) of images uint8 (N, H, W, C): what distances are taken of."""
    return thumbnails(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))).numpy()


def _small_images(index: Index, progress: Progress) -> npt.NDArray[np.uint8]:
    parts: list[npt.NDArray[np.uint8]] = []
    batch: list[Pixels] = []
    for number, sample in enumerate(read_sequential(index), 1):
        batch.append(sample.pixels)
        if len(batch) == _BATCH or number == index.num_samples:
            parts.append(small_pixels(np.stack(batch)))
            batch = []
            progress(number, index.num_samples, "reading training images")
    return np.concatenate(parts)


def _read_rows(
    index: Index, rows: npt.NDArray[np.int64], shown_edge: int, progress: Progress
) -> dict[int, TrainingImage]:
    """The images of ascending rows; reads only the shards that hold them."""
    images: dict[int, TrainingImage] = {}
    for row, sample in _numbered(index, rows):
        label = sample.label if sample.label >= 0 else None
        name = f"{index.shards[sample.shard].name}, {sample.key}"
        images[row] = TrainingImage(name, label, scaled(sample.pixels, 1, shown_edge))
        progress(len(images), len(rows), "reading nearest images")
    return images


def _numbered(index: Index, rows: npt.NDArray[np.int64]) -> Iterator[tuple[int, SequentialSample]]:
    numbers = np.searchsorted(index.starts, rows, side="right") - 1
    for shard in np.unique(numbers).tolist():
        wanted = set(rows[numbers == shard].tolist())
        for row, sample in enumerate(read_sequential(index, [shard]), int(index.starts[shard])):
            if row in wanted:
                yield row, sample
