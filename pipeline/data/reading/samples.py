"""Positions to pixels: look up, read, check, decode, flip, crop. A pure function of (index, seed, positions)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple
from zlib import crc32

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddpm_pipeline.config.data import DataConfig
from ddpm_pipeline.data.formats.images import Pixels, PixelShape, decode_image
from ddpm_pipeline.data.index import Index, MemberTable, read_table
from ddpm_pipeline.data.reading.order import GlobalOrder, Int64
from ddpm_pipeline.data.reading.range_reads import MAX_CONCURRENT, RangeAccess
from ddpm_pipeline.data.reading.shard_access import ShardAccess
from ddpm_pipeline.data.reading.shard_cache import open_shard_access
from ddpm_pipeline.diffusion import noise
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.parallel import thread_map
from ddpm_pipeline.store import ObjectChanged

MAX_SUBSTITUTES = 1000
"""Damaged samples in a row to skip before giving up: beyond this the data set, not a sample, is broken."""


@dataclass(frozen=True)
class Samples:
    """Images uint8 (n, C, H, W) in channels-last memory, as decoders write them, labels int64 (n,) or None, one line
    for each replaced damaged sample, and rows int64 (n,): the numbers of the samples in the data set."""

    images: Tensor
    labels: Tensor | None
    damage: tuple[str, ...]
    rows: Tensor


class SampleSource:
    """Samples by position. Cheap to pickle: connections, descriptors and tables are opened on first use."""

    def __init__(self, config: DataConfig, index: Index, seed: int) -> None:
        self.config, self.index, self.seed = config, index, seed
        self.shape = require_one_shape(index)
        if config.crop is not None and config.crop > min(self.shape.height, self.shape.width):
            raise UserError(
                f"data.crop: {config.crop} is larger than the images ({self.shape}); make it smaller"
            )
        self.limit_bytes = config.memory_bytes // max(1, config.num_loader_processes)
        decoded_bytes = index.num_samples * self.shape.channels * self.shape.height * self.shape.width
        self.fits_in_memory = decoded_bytes <= self.limit_bytes // 2
        self._reader: _SampleReader | None = None

    def get(self, positions: Int64, upcoming: Iterable[Int64] = ()) -> Samples:
        """The samples of int64 (n,) positions. Raises DamageError naming shard, sample, offset and cause.

        `upcoming` are the positions of this process's next calls, consumed as needed. It changes the number of
        requests where nothing is cached, never a sample.
        """
        opened = self._reader or self._open()
        opened.prefetch(positions, upcoming)
        shards, members = opened.order.lookup(positions)
        pixels, labels, damage = opened.pixels(shards, members)
        images = self._augmented(pixels, torch.from_numpy(positions))
        rows = torch.from_numpy(self.index.starts[shards] + members)
        return Samples(images, torch.from_numpy(labels) if self.index.labelled else None, damage, rows)

    def close(self) -> None:
        """Release descriptors and memory; the next `get` opens them again."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_reader": None}

    def _open(self) -> _SampleReader:
        self._reader = _SampleReader(self)
        return self._reader

    def _augmented(self, pixels: Pixels, positions: Tensor) -> Tensor:
        """Flips and crops, drawn by position, so they are the same on any rank and after any restart."""
        if self.config.crop is not None:
            edge, count = self.config.crop, len(positions)
            tops = noise.randint(self.seed, noise.Stream.CROP, positions, self.shape.height - edge + 1, 0)
            lefts = noise.randint(self.seed, noise.Stream.CROP, positions, self.shape.width - edge + 1, 1)
            cropped = np.empty((count, edge, edge, self.shape.channels), np.uint8)
            for i, (top, left) in enumerate(zip(tops.tolist(), lefts.tolist(), strict=True)):
                cropped[i] = pixels[i, top : top + edge, left : left + edge]
            pixels = cropped
        images = _channels_first(pixels)
        if self.config.flip:
            mirrored = noise.uniform(self.seed, noise.Stream.FLIP, positions) < 0.5
            images[mirrored] = images[mirrored].flip(-1)
        return images


def _channels_first(pixels: Pixels) -> Tensor:
    """(n, H, W, C) as (n, C, H, W), without a copy."""
    count, height, width, channels = pixels.shape
    images = torch.from_numpy(pixels)
    # One channel is both layouts at once. These strides are the usual ones, by which torch chooses its kernels.
    return images.view(count, 1, height, width) if channels == 1 else images.permute(0, 3, 1, 2)


class _SampleLocation(NamedTuple):
    """A sample's row in the whole data set, and its entry in the index."""

    row: int
    shard: int
    offset: int
    size: int
    crc: int
    label: int


class _SampleReader:
    """Open shards, member tables and decoded samples of one process."""

    def __init__(self, source: SampleSource) -> None:
        self.index, self.shape, self.array_shape = source.index, source.shape, source.shape.array_shape
        self.skips_damage = source.config.on_damage == "skip"
        self.order = GlobalOrder(source.index.counts, source.seed, source.config.window_shards)
        limit_bytes = source.limit_bytes // 2 if source.fits_in_memory else source.limit_bytes
        self.access: ShardAccess = open_shard_access(source.config, source.index, limit_bytes)
        # Tables of two windows: a batch may cross a boundary.
        self._max_tables = 2 * self.order.window_shards
        self.table = lru_cache(maxsize=self._max_tables)(partial(read_table, self.index))
        self._with_table = set[int]()
        self.decoded = (
            _DecodedSamples(source.index.num_samples, self.shape) if source.fits_in_memory else None
        )
        self._prefetched: set[int] = set()

    def prefetch(self, positions: Int64, upcoming: Iterable[Int64]) -> None:
        """For ranged requests: fetch these samples and those of the next calls together, as far as memory allows."""
        if not isinstance(self.access, RangeAccess) or not len(positions):
            return
        if int(positions[0]) in self._prefetched:
            self._prefetched.remove(int(positions[0]))
            return
        remaining = self.access.prefetch_bytes
        batches: list[Int64] = []
        tables: list[tuple[int, MemberTable]] = []
        for batch in itertools.chain([positions], upcoming):
            found = self._by_shard(*self.order.lookup(batch))
            remaining -= sum(int(table["size"].sum()) for _, table in found)
            if remaining < 0 and batches:
                break
            batches.append(batch)
            tables += found
        self._prefetched = {int(batch[0]) for batch in batches[1:] if len(batch)}
        self.access.prefetch(_by_offset(tables))

    def _by_shard(self, shards: Int64, members: Int64) -> list[tuple[int, MemberTable]]:
        numbers: list[int] = np.unique(shards).tolist()
        self._read_tables(numbers)
        return [(shard, self.table(shard)[members[shards == shard]]) for shard in numbers]

    def _read_tables(self, shards: list[int]) -> None:
        """Read the tables that are missing at the same time: in S3 each takes a round trip."""
        missing = [shard for shard in shards if shard not in self._with_table]
        if not missing:
            return
        for _ in thread_map(MAX_CONCURRENT)(self.table, missing):
            continue
        kept = self._with_table if len(self._with_table) + len(missing) <= self._max_tables else set[int]()
        self._with_table = kept.union(shards)

    def pixels(self, shards: Int64, members: Int64) -> tuple[Pixels, Int64, tuple[str, ...]]:
        """Pixels uint8 (n, H, W, C) and labels int64 (n,) of members of shards, int64 (n,) both."""
        rows = self.index.starts[shards] + members
        if self.decoded is not None and self.decoded.known[rows].all():
            return self.decoded.pixels[rows], self.decoded.labels[rows], ()
        out = np.empty((len(rows), *self.array_shape), np.uint8)
        labels, damage = np.empty(len(rows), np.int64), list[str]()
        # Sorted by row: adjacent rows are adjacent on disk.
        order = np.argsort(rows, kind="stable")
        parts = np.split(order, np.flatnonzero(np.diff(shards[order])) + 1)
        numbers = [int(shards[part[0]]) for part in parts]
        self._read_tables(numbers)
        for shard, part in zip(numbers, parts, strict=True):
            self._fill(shard, members[part], part, out, labels, damage)
        if self.decoded is not None and not damage:
            self.decoded.store(rows, out, labels)
        return out, labels, tuple(damage)

    def close(self) -> None:
        self.access.close()

    def _fill(
        self, shard: int, members: Int64, slots: Int64, out: Pixels, labels: Int64, damage: list[str]
    ) -> None:
        """Fill these slots of a batch with samples of one shard. This is the inner loop of training."""
        entries = self.table(shard)[members]
        labels[slots] = entries["label"]
        crcs = entries["crc"].tolist()
        for member, slot, data, crc in zip(
            members.tolist(), slots.tolist(), self._bytes(shard, entries), crcs, strict=True
        ):
            pixels = self._decode(data, out[slot]) if crc32(data) == crc else None
            if pixels is None:
                pixels, labels[slot], problems = self._read_or_substitute(
                    self._location(int(self.index.starts[shard]) + member)
                )
                damage += problems
            if pixels.base is not out:  # not decoded in its place
                out[slot] = pixels

    def _bytes(self, shard: int, entries: MemberTable) -> Iterable[bytes]:
        try:
            return self.access.read_each(shard, entries["offset"].tolist(), entries["size"].tolist())
        except DamageError:
            return [b""] * len(entries)  # no CRC matches; `_read_or_substitute` raises or reports each

    def _decode(self, data: bytes, out: Pixels) -> Pixels | None:
        try:
            return decode_image(data, self.array_shape, out)
        except DamageError:
            return None  # `_read_or_substitute` raises it again with its location

    def _location(self, row: int) -> _SampleLocation:
        shard = int(np.searchsorted(self.index.starts, row, side="right")) - 1
        member = self.table(shard)[row - int(self.index.starts[shard])]
        offset, size, crc, label = (int(member[name]) for name in ("offset", "size", "crc", "label"))
        return _SampleLocation(row, shard, offset, size, crc, label)

    def _read_or_substitute(self, location: _SampleLocation) -> tuple[Pixels, int, list[str]]:
        """A sample or, where damage is skipped, the next intact one, which is the same every time."""
        problems: list[str] = []
        for distance in range(MAX_SUBSTITUTES):
            if distance:
                location = self._location((location.row + 1) % self.index.num_samples)
            try:
                return self._read(location), location.label, problems
            except ObjectChanged:
                raise
            except DamageError as error:
                if not self.skips_damage:
                    raise
                problems.append(str(error))
        raise DamageError(f"{problems[0]} (as are the {MAX_SUBSTITUTES - 1} samples after it)")

    def _read(self, location: _SampleLocation) -> Pixels:
        try:
            return self._read_checked(location)
        except ObjectChanged:
            raise
        except DamageError:
            if not self.access.renew(location.shard):
                raise
        return self._read_checked(location)

    def _read_checked(self, location: _SampleLocation) -> Pixels:
        data = self.access.read(location.shard, location.offset, location.size)
        try:
            if crc32(data) != location.crc:
                raise DamageError("its CRC-32 differs from the index")
            return decode_image(data, self.array_shape)
        except DamageError as error:
            entry = self.index.shards[location.shard]
            name = self._name(location.shard, location.offset)
            raise DamageError(
                f"{self.index.uri}: {entry.name}: {name} at byte {location.offset}: {error}"
            ) from error

    def _name(self, shard: int, offset: int) -> str:
        """The member's name from its tar header, if that is readable."""
        try:
            header = self.access.read(shard, offset - 512, 100)
        except DamageError:
            return "a sample"
        return repr(header.split(b"\0", 1)[0].decode(errors="replace"))


def _by_offset(tables: list[tuple[int, MemberTable]]) -> Iterator[tuple[int, list[int], list[int]]]:
    """(shard, ascending offsets, sizes) of samples given as several tables."""
    for shard in sorted({shard for shard, _ in tables}):
        table = np.concatenate([part for other, part in tables if other == shard])
        table = table[np.argsort(table["offset"], kind="stable")]
        yield shard, table["offset"].tolist(), table["size"].tolist()


class _DecodedSamples:
    """All samples of a small data set, each decoded once."""

    def __init__(self, num_samples: int, shape: PixelShape) -> None:
        self.pixels: Pixels = np.empty((num_samples, *shape.array_shape), np.uint8)
        self.labels: Int64 = np.empty(num_samples, np.int64)
        self.known: npt.NDArray[np.bool_] = np.zeros(num_samples, np.bool_)

    def store(self, rows: Int64, pixels: Pixels, labels: Int64) -> None:
        self.pixels[rows], self.labels[rows], self.known[rows] = pixels, labels, True


def require_one_shape(index: Index) -> PixelShape:
    """The shape that all images share. Raises UserError when sizes differ."""
    if index.image is None:
        shapes = sorted({shape for shard in index.shards for shape in shard.shapes})
        raise UserError(
            f"{index.uri}: images differ in size ({shapes[0]} to {shapes[-1]}); "
            "resize them with: ddpm pack source=… image_size=…"
        )
    return index.image
