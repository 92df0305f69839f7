"""`ddpm inspect`: contents and damage of a data set. Reads everything once and continues after damage."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import BinaryIO, cast

import numpy as np

from ddpm_pipeline.data.formats.contact_sheet import CELL_PIXELS, image_grid, in_rows, scaled
from ddpm_pipeline.data.formats.image_stats import ImageStats, image_stats
from ddpm_pipeline.data.formats.images import Pixels, PixelShape, decode_image, probe
from ddpm_pipeline.data.formats.shards import HashingReader, Parts, plain_stream, read_samples
from ddpm_pipeline.data.index import Index, load_index
from ddpm_pipeline.data.location import Location
from ddpm_pipeline.data.packing.build_index import find_shards, sidecar_class_names
from ddpm_pipeline.data.packing.scan_shard import ScanOptions, image_extension, sample_label
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.progress import Progress
from ddpm_pipeline.store import Store, open_store


@dataclass(frozen=True)
class Inspection:
    """The result of reading a whole data set."""

    uri: str
    index_digest: str | None
    """None without a usable index; `damage` says why."""
    num_shards: int
    num_samples: int
    size_bytes: int
    shapes: dict[str, int]
    """Number of images of each shape, written width x height x channels; most frequent first."""
    classes: dict[str, int] | None
    channel_mean: list[float] | None
    """In uint8 units; None when shapes differ."""
    channel_std: list[float] | None
    without_image: int
    """Samples without an image: a license, for example. They are not part of the data set."""
    damage: tuple[str, ...]
    """One line for each damaged sample or shard, with its location."""
    contact_sheet: Pixels
    """uint8 (height, width, 3): samples spread over the shards."""


def inspect(
    uri: str, *, num_tiles: int = 64, label_field: str | None = None, progress: Progress | None = None
) -> Inspection:
    """Read all shards of a data set, indexed or not. Progress counts shards.

    Raises UserError when there are no shards, or the store cannot be used; damage is reported, not raised.
    """
    location, found = find_shards(uri)
    keys = [info.key for info in found]
    store = open_store(location.root)
    damage = [f"{uri}: {name} is missing" for name in location.missing(keys)]
    index = _index_of(uri, damage)
    counts = _InspectionCounts(
        _scan_options(location, keys, index, label_field), -(-num_tiles // len(keys)), damage=damage
    )
    indexed = {} if index is None else {shard.name: shard.sha256 for shard in index.shards}
    size_bytes = 0
    for done, key in enumerate(keys, 1):
        size_bytes += _read_shard(store, key, indexed.get(key), counts)
        if progress is not None:
            progress(done, len(keys))
    names = None if index is None else index.class_names
    mean, std = counts.mean_and_std()
    return Inspection(
        uri=uri,
        index_digest=None if index is None else index.digest,
        num_shards=len(keys),
        num_samples=sum(counts.shapes.values()),
        size_bytes=size_bytes,
        shapes={str(shape): count for shape, count in counts.shapes.most_common()},
        classes=_by_class_name(counts.labels, names),
        channel_mean=mean,
        channel_std=std,
        without_image=counts.without_image,
        damage=tuple(counts.damage),
        contact_sheet=_contact_sheet(counts.tiles[:num_tiles]),
    )


@dataclass
class _InspectionCounts:
    options: ScanOptions
    tiles_per_shard: int
    shapes: Counter[PixelShape] = field(default_factory=Counter[PixelShape])
    labels: Counter[int] = field(default_factory=Counter[int])
    damage: list[str] = field(default_factory=list[str])
    tiles: list[Pixels] = field(default_factory=list[Pixels])
    stats: ImageStats = field(default_factory=ImageStats)
    without_image: int = 0

    def add(self, where: str, key: str, parts: Parts, keep: bool) -> None:
        """Count a sample, or its damage."""
        sample_name = f"{where}: sample {key!r}"
        try:
            extension = image_extension(parts, sample_name, self.options.image)
            if extension is None:
                self.without_image += 1
                return
            member, data = parts[extension]
            sample_name = f"{sample_name} at byte {member.offset}"
            shape = probe(data)
            pixels = decode_image(data, shape.array_shape)
            label = sample_label(parts, self.options, sample_name)
        except DamageError as error:
            text = str(error)
            self.damage.append(text if text.startswith(where) else f"{sample_name}: {text}")
            return
        self.shapes[shape] += 1
        self.labels[label] += 1
        self.stats += image_stats(pixels[None])
        if keep:
            self.tiles.append(scaled(pixels, CELL_PIXELS))  # at most that much memory each

    def mean_and_std(self) -> tuple[list[float] | None, list[float] | None]:
        """Mean and standard deviation of each channel, over images of one shape."""
        if len(self.shapes) != 1:
            return None, None
        return list(self.stats.mean), list(self.stats.std)


def _contact_sheet(tiles: list[Pixels]) -> Pixels:
    if not tiles:
        return np.full((CELL_PIXELS, CELL_PIXELS, 3), 255, np.uint8)
    return image_grid(in_rows(tiles))


def _index_of(uri: str, damage: list[str]) -> Index | None:
    try:
        return load_index(uri)
    except (UserError, DamageError) as error:
        damage.append(str(error))
        return None


def _scan_options(
    location: Location, keys: list[str], index: Index | None, label_field: str | None
) -> ScanOptions:
    """The options of the index, if there is one."""
    if index is None:
        return ScanOptions(label_field, class_names=sidecar_class_names(location, keys))
    return ScanOptions(label_field or index.label_field, index.image_extension, index.class_names)


def _read_shard(store: Store, key: str, sha256: str | None, counts: _InspectionCounts) -> int:
    """Count one shard's samples, up to the first damage of the tar. Returns its size in bytes."""
    where = f"{store.uri}/{key}"
    info = store.stat(key)
    max_tiles = len(counts.tiles) + counts.tiles_per_shard
    try:
        with store.open(key) as stream:
            hashed = HashingReader(stream)
            with plain_stream(cast(BinaryIO, hashed), where) as plain:
                for name, parts in read_samples(plain, where):
                    counts.add(where, name, parts, keep=len(counts.tiles) < max_tiles)
        if sha256 is not None and hashed.hash.hexdigest() != sha256:
            counts.damage.append(f"{where}: its SHA-256 differs from the index")
    except DamageError as error:
        counts.damage.append(str(error))
    return 0 if info is None else info.size_bytes


def _by_class_name(labels: Counter[int], names: tuple[str, ...] | None) -> dict[str, int] | None:
    if set(labels) <= {-1}:
        return None
    class_names = names or ()
    return {class_names[n] if 0 <= n < len(class_names) else str(n): labels[n] for n in sorted(labels)}
