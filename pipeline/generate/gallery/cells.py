"""The images of a gallery as cells: decoded, scaled down if they are large, in a file that is mapped into memory.

So the memory that a gallery takes does not depend on its number of images.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ddpm_pipeline.data.formats.contact_sheet import MAX_CELL_PIXELS, scaled
from ddpm_pipeline.data.formats.images import decode_image
from ddpm_pipeline.data.formats.npy import Pixels
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.generate.done_records import DoneRecord
from ddpm_pipeline.generate.plan import Shard
from ddpm_pipeline.generate.spec import Spec
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.generate.stored_images import stored_images
from ddpm_pipeline.parallel import thread_map
from ddpm_pipeline.progress import Progress

_READERS = 4
NO_LABEL = -1


@dataclass(frozen=True)
class SourceShard:
    """A finished shard, of which the first `count` images are shown."""

    unit: Shard
    record: DoneRecord
    count: int


@dataclass(frozen=True)
class Cells:
    """The N images of a gallery, ascending by index."""

    spec: Spec
    shards: Sequence[SourceShard]
    indexes: npt.NDArray[np.int64]
    """(N,): index of each image."""
    labels: npt.NDArray[np.int64]
    """(N,): class of each image; NO_LABEL without classes."""
    pixels: npt.NDArray[np.uint8]
    """(N, h, w, C): native size, or scaled down."""
    micro_batches: npt.NDArray[np.int64]
    """(N,): images per network call, from the shards' records."""
    small: npt.NDArray[np.uint8] | None = field(default=None)
    """(N, P): see `training_neighbours.small_pixels`; None unless they were asked for."""

    @property
    def is_native(self) -> bool:
        """Whether a cell has the pixels of its image."""
        return self.pixels.shape[1] == self.spec.size


def source_shards(generation: Generation, limit: int) -> list[SourceShard]:
    """The finished shards that hold the first `limit` images. UserError where there is none; DamageError for a record
    that cannot be used.
    """
    spec = generation.spec
    if spec.channels not in (1, 3):
        raise UserError(f"{generation.uri}: its images have {spec.channels} channels; a gallery shows 1 or 3")
    end = spec.first_index + limit
    wanted = [number for number in generation.listing().done() if generation.shard(number).first < end]
    found: list[SourceShard] = []
    for number, record in generation.read_records(wanted):
        unit = generation.shard(number)
        if isinstance(record, str):
            raise DamageError(f"{record}; run: ddpm verify {generation.uri}")
        found.append(SourceShard(unit, record, min(unit.count, end - unit.first)))
    if not found:
        raise UserError(
            f"{generation.uri}: no shard is finished yet; try again when ddpm status shows images"
        )
    return found


def read_cells(
    generation: Generation,
    shards: Sequence[SourceShard],
    scratch: Path,
    progress: Progress,
    with_small: bool = False,
) -> Cells:
    """Read, check and decode the images of shards into a file below `scratch`. Progress counts images.

    DamageError for a shard whose bytes are not those of its record, or that holds other images than the plan says.
    """
    spec = generation.spec
    starts = np.concatenate([[0], np.cumsum([shard.count for shard in shards])]).astype(np.int64)
    count, edge = int(starts[-1]), min(spec.size, MAX_CELL_PIXELS)
    pixels = np.lib.format.open_memmap(
        scratch / "cells.npy", "w+", dtype=np.uint8, shape=(count, edge, edge, spec.channels)
    )
    work = partial(_read_shard, generation, pixels, with_small)
    labels = np.empty(count, np.int64)
    small: list[npt.NDArray[np.uint8]] = []
    placed = zip(shards, starts[:-1].tolist(), strict=True)
    for number, (part, part_small) in enumerate(thread_map(_READERS)(work, placed)):
        labels[starts[number] : starts[number + 1]] = part
        if part_small is not None:
            small.append(part_small)
        progress(int(starts[number + 1]), count, "reading")
    return Cells(
        spec=spec,
        shards=shards,
        indexes=np.concatenate([np.arange(s.unit.first, s.unit.first + s.count) for s in shards]),
        labels=labels,
        pixels=pixels,
        micro_batches=np.concatenate([np.full(s.count, s.record.times.micro_batch) for s in shards]),
        small=np.concatenate(small) if with_small else None,
    )


def _read_shard(
    generation: Generation,
    pixels: npt.NDArray[np.uint8],
    with_small: bool,
    placed: tuple[SourceShard, int],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8] | None]:
    """Fill the rows of a shard; returns its labels and, if wanted, small pixels."""
    (shard, start), spec, unit = placed, generation.spec, placed[0].unit
    data = generation.store.read(unit.key)
    if hashlib.sha256(data).hexdigest() != shard.record.sha256:
        raise DamageError(
            f"{generation.uri}/{unit.key}: has not the sha256 of its record; run: ddpm verify {generation.uri}"
        )
    labels = np.full(shard.count, NO_LABEL, np.int64)
    whole: list[Pixels] = []
    for place, image in enumerate(stored_images(data, spec, unit)):
        if place >= shard.count:
            break
        if (label := image.label) is not None:
            labels[place] = label
        decoded = decode_image(image.data, spec.image_shape)
        pixels[start + place] = scaled(decoded, 1, MAX_CELL_PIXELS)
        if with_small:
            whole.append(decoded)
    if not with_small:
        return labels, None
    from ddpm_pipeline.features.training_neighbours import small_pixels  # imports torch

    return labels, small_pixels(np.stack(whole))
