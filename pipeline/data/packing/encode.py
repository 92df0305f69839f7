"""Reading, scaling and encoding the images of a shard: the parallel part of packing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data.formats.image_stats import ImageStats, image_stats
from ddpm_pipeline.data.formats.images import PixelShape
from ddpm_pipeline.data.formats.npy import Pixels, encode_npy
from ddpm_pipeline.data.formats.png import encode_png
from ddpm_pipeline.data.packing.pack_plan import ShardPlan
from ddpm_pipeline.data.packing.resize import ImageInfo, source_digest, to_pixels
from ddpm_pipeline.data.packing.sources import Source, read_item
from ddpm_pipeline.errors import DamageError

MAX_TASK_IMAGES = 64
"""Images per task: milliseconds to seconds of work."""
TASK_BYTES = 1 << 24
"""Bytes of pixels per task. A few tasks per thread are encoded ahead of writing."""


@dataclass(frozen=True)
class EncodeTask:
    """Some images of a shard, in order, and their hashes when they were probed."""

    items: tuple[int, ...]
    hashes: tuple[str, ...]


@dataclass(frozen=True)
class EncodedImages:
    """The encoded images of a task, in order, and their statistics."""

    payloads: tuple[bytes, ...]
    stats: ImageStats


def encode_tasks(shard: ShardPlan, infos: Sequence[ImageInfo], shape: PixelShape) -> Iterator[EncodeTask]:
    """The tasks of a shard."""
    each = shape.channels * shape.height * shape.width
    length = max(1, min(MAX_TASK_IMAGES, TASK_BYTES // each))
    for first in range(0, len(shard.items), length):
        items = shard.items[first : first + length]
        yield EncodeTask(items, tuple(infos[i].sha256 for i in items))


def run_encode_task(
    config: PackConfig, shape: PixelShape, source: Source, encoder: int, task: EncodeTask
) -> EncodedImages:
    """Encode the images of a task; `encoder`: see ddpm_pipeline.data.formats.png.

    Raises DamageError naming an image that changed since it was probed.
    """
    encode = partial(encode_png, encoder=encoder) if config.payload == "png" else encode_npy
    payloads: list[bytes] = []
    all_pixels: list[Pixels] = []
    for item, expected in zip(task.items, task.hashes, strict=True):
        name = source.items[item].name
        try:
            data = read_item(source, item)
            pixels = to_pixels(config, data)
        except DamageError as error:
            raise DamageError(f"{name}: {error}; it changed while being packed: pack again") from error
        if source_digest(data) != expected or pixels.shape != shape.array_shape:
            raise DamageError(f"{name}: it changed while being packed: pack again")
        all_pixels.append(pixels)
        payloads.append(encode(pixels))
    return EncodedImages(tuple(payloads), image_stats(np.stack(all_pixels)))
