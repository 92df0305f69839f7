"""Images of a shard read, scaled and encoded: the part of packing that is spread over threads or processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from pipeline.config.data import PackConfig
from pipeline.data.formats.image_stats import ImageStats, image_stats
from pipeline.data.formats.images import PixelShape
from pipeline.data.formats.npy import Pixels, encode_npy
from pipeline.data.formats.png import encode_png
from pipeline.data.packing.pack_plan import ShardPlan
from pipeline.data.packing.resize import ImageInfo, source_digest, to_pixels
from pipeline.data.packing.sources import Source, read_item
from pipeline.errors import DamageError

MAX_TASK_IMAGES = 64
"""Images of one run of work: some milliseconds to some seconds."""
TASK_BYTES = 1 << 24
"""Pixels of one run: what is encoded and not yet written is a few runs a thread."""


@dataclass(frozen=True)
class EncodeTask:
    """Some of the images of a shard, in order, and the hashes they had when they were looked at."""

    items: tuple[int, ...]
    hashes: tuple[str, ...]


@dataclass(frozen=True)
class EncodedImages:
    """The files of a run's images, in order, and sums over their pixels."""

    payloads: tuple[bytes, ...]
    stats: ImageStats


def encode_tasks(unit: ShardPlan, facts: Sequence[ImageInfo], shape: PixelShape) -> Iterator[EncodeTask]:
    """The runs a shard is made of."""
    each = shape.channels * shape.height * shape.width
    length = max(1, min(MAX_TASK_IMAGES, TASK_BYTES // each))
    for first in range(0, len(unit.items), length):
        items = unit.items[first : first + length]
        yield EncodeTask(items, tuple(facts[i].sha256 for i in items))


def run_encode_task(
    config: PackConfig, shape: PixelShape, source: Source, encoder: int, run: EncodeTask
) -> EncodedImages:
    """Encode a run; `encoder`: see pipeline.data.formats.png.

    Raises DamageError naming an image that is no longer what it was when it was looked at.
    """
    encode = partial(encode_png, encoder=encoder) if config.payload == "png" else encode_npy
    payloads: list[bytes] = []
    all_pixels: list[Pixels] = []
    for item, wanted in zip(run.items, run.hashes, strict=True):
        name = source.items[item].name
        try:
            data = read_item(source, item)
            pixels = to_pixels(config, data)
        except DamageError as error:
            raise DamageError(f"{name}: {error}; it changed while being packed: pack again") from error
        if source_digest(data) != wanted or pixels.shape != shape.array_shape:
            raise DamageError(f"{name}: it changed while being packed: pack again")
        all_pixels.append(pixels)
        payloads.append(encode(pixels))
    return EncodedImages(tuple(payloads), image_stats(np.stack(all_pixels)))
