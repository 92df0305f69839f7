"""Scanning a shard in one pass: checks it and collects its samples, labels and offsets."""

from __future__ import annotations

import re
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import numpy as np
from pydantic_core import from_json

from ddpm_pipeline.config.bounds import MAX_CLASSES
from ddpm_pipeline.data.formats.image_stats import ImageStats, image_stats
from ddpm_pipeline.data.formats.images import EXTENSIONS, PixelShape, decode_image, probe
from ddpm_pipeline.data.formats.shards import GZIP_MAGIC, HashingReader, Parts, plain_stream, read_samples
from ddpm_pipeline.data.index import MEMBER, MemberTable, ShardEntry, table_hash
from ddpm_pipeline.errors import DamageError
from ddpm_pipeline.store import ObjectInfo, ObjectMissing, Store

MAX_SHAPES = 64
"""Shapes listed per shard, so that images of many sizes do not fill the index."""
LABEL_FIELDS = ("label", "class", "cls", "class_id", "target")
NO_LABELS = "none"
MAX_DIGITS = 40
"""Digits in a class number; Python refuses to parse numbers of thousands of digits."""
MAX_LISTED = 20
"""Skipped samples listed in an index per shard."""
_NUMBER = re.compile(r"-?[0-9]+(\.0+)?")
_CLASS_NUMBER = (
    f"expected a class number from 0 to {MAX_CLASSES - 1}, -1 for none, or a name from classes.txt beside the "
    "shards (one per line, in order of class numbers); --label-field none ignores labels"
)
MAX_EXPANSION = 256
"""Largest expansion of a gzip: images hardly compress; a decompression bomb expands 1000-fold."""


@dataclass(frozen=True)
class ScanOptions:
    """How to interpret the samples of shards."""

    label_field: str | None = None
    """The field of a sample's JSON that holds its class; None for the first of LABEL_FIELDS, NO_LABELS for none."""
    image: str | None = None
    """Extension of the image to use where samples have several; None where each has one."""
    class_names: tuple[str, ...] | None = None
    """Class names by number, for labels that are names."""
    skip_unreadable: bool = False
    """Skip and report samples whose image cannot be read, instead of failing."""
    pixels: bool = False
    """Decode every image, for channel statistics and to find damage inside images."""


def index_shard(
    store: Store,
    key: str,
    *,
    label_field: str | None = None,
    pixels: bool = False,
    options: ScanOptions | None = None,
) -> tuple[ShardEntry, MemberTable]:
    """The entry and member table of one shard, read in one forward pass.

    `options` override `label_field` and `pixels`. Raises DamageError naming shard, key and offset; ObjectMissing.
    """
    options = options or ScanOptions(label_field, pixels=pixels)
    info = store.stat(key)
    label = f"{store.uri}/{key}"
    if info is None:
        raise ObjectMissing(key, label)
    scan = _ShardScan(label, options)
    ignored: list[str] = []
    with store.open(key, etag=info.etag) as stream:
        hashed = HashingReader(stream)
        with plain_stream(cast(BinaryIO, hashed), label) as plain:
            counted = _BoundedReader(plain, MAX_EXPANSION * max(info.size_bytes, 1 << 20), label)
            for name, parts in read_samples(counted, label, ignored):
                scan.add(name, parts)
    return shard_entry(
        ShardSummary(
            scan.rows,
            scan.shapes,
            scan.stats,
            len(ignored) + scan.without_image,
            tuple(scan.skipped),
        ),
        info,
        plain_bytes=counted.total,
        compressed=hashed.head == GZIP_MAGIC,
        sha256=hashed.hash.hexdigest(),
    )


@dataclass(frozen=True)
class ShardSummary:
    """Contents of a shard: (offset, size, CRC-32, label) of each image, shapes and statistics."""

    rows: Sequence[tuple[int, int, int, int]]
    shapes: Collection[PixelShape]
    stats: ImageStats
    ignored_members: int = 0
    skipped: tuple[str, ...] = ()


def shard_entry(
    summary: ShardSummary, info: ObjectInfo, *, plain_bytes: int, compressed: bool, sha256: str
) -> tuple[ShardEntry, MemberTable]:
    """Entry and member table of the shard stored as `info`."""
    table = np.array(summary.rows, MEMBER)
    entry = ShardEntry(
        name=info.key,
        num_samples=len(table),
        size_bytes=info.size_bytes,
        plain_bytes=plain_bytes,
        compressed=compressed,
        sha256=sha256,
        etag=info.etag,
        table_sha256=table_hash(table),
        shapes=tuple(sorted(summary.shapes)[:MAX_SHAPES]),
        num_labelled=int((table["label"] >= 0).sum()),
        max_label=int(table["label"].max(initial=-1)),
        ignored_members=summary.ignored_members,
        skipped=summary.skipped[:MAX_LISTED],
        num_skipped=len(summary.skipped),
        channel_sums=summary.stats.sums or None,
        channel_squares=summary.stats.squares or None,
    )
    return entry, table


@dataclass
class _ShardScan:
    """Collects the samples of a shard while it is read."""

    shard: str
    options: ScanOptions
    rows: list[tuple[int, int, int, int]] = field(default_factory=list[tuple[int, int, int, int]])
    shapes: set[PixelShape] = field(default_factory=set[PixelShape])
    stats: ImageStats = field(default_factory=ImageStats)
    keys: set[str] = field(default_factory=set[str])
    skipped: list[str] = field(default_factory=list[str])
    without_image: int = 0

    def add(self, key: str, parts: Parts) -> None:
        where = f"{self.shard}: sample {key!r}"
        if key in self.keys:
            raise DamageError(
                f"{where}: occurs twice (the second has {sorted(parts)}): files of a sample must be adjacent; "
                "rewrite the tar sorted by name"
            )
        self.keys.add(key)
        extension = image_extension(parts, where, self.options.image)
        if extension is None and "cls" in parts:
            raise DamageError(
                f"{where}: no image among {sorted(parts)}; a sample with a class needs one, adjacent to its label"
            )
        if extension is None:
            self.without_image += 1
            return
        member, data = parts[extension]
        if member.size_bytes >= 1 << 32:
            raise DamageError(f"{self.shard}: {member.name!r}: larger than 4 GiB")
        try:
            shape = self._shape(data)
        except DamageError as error:
            problem = f"{self.shard}: {member.name!r} at byte {member.offset}: {error}"
            if not self.options.skip_unreadable:
                raise DamageError(f"{problem}; --skip-unreadable skips such samples") from error
            self.skipped.append(problem)
            return
        self.shapes.add(shape)
        number = sample_label(parts, self.options, where)
        self.rows.append((member.offset, member.size_bytes, zlib.crc32(data), number))

    def _shape(self, data: bytes) -> PixelShape:
        shape = probe(data)
        if self.options.pixels:
            self.stats += image_stats(decode_image(data, shape.array_shape)[None])
        return shape


def image_extension(parts: Any, where: str, wanted: str | None = None) -> str | None:
    """The extension of a sample's only image, or `wanted` if the sample has it; None without an image.

    Raises DamageError for several images.
    """
    if wanted is not None:
        return wanted if wanted in parts else None
    found = [extension for extension in parts if extension.rpartition(".")[2] in EXTENSIONS]
    if len(found) > 1:
        raise DamageError(
            f"{where}: {len(found)} images ({sorted(found)}); choose one with --image {found[0]}"
        )
    return found[0] if found else None


def sample_label(parts: Parts, options: ScanOptions, where: str) -> int:
    """The class of a sample from its .cls or the label in its .json; -1 if it has none.

    Raises DamageError for a label that is neither a class number, nor a known class name, nor one-hot.
    """
    if options.label_field == NO_LABELS:
        return -1
    if "cls" in parts:
        return class_number(parts["cls"][1].decode("utf-8", "replace").strip(), options, f"{where}: its .cls")
    if "json" not in parts:
        return -1
    try:
        content = from_json(parts["json"][1])
    except ValueError as error:
        raise DamageError(f"{where}: its .json is damaged: {error}") from error
    fields = (options.label_field,) if options.label_field else LABEL_FIELDS
    name = next((f for f in fields if isinstance(content, dict) and f in content), None)
    return -1 if name is None else class_number(content[name], options, f"{where}: {name!r} of its .json")


def class_number(value: Any, options: ScanOptions, where: str) -> int:
    """A class number from 3, "3", 3.0, a name, or a one-hot list; -1 or null for none. Raises DamageError."""
    names = options.class_names or ()
    if value is None:
        return -1
    if isinstance(value, list) and len(hot := cast(list[Any], value)) > 1:
        if sorted(set(hot), key=str) not in ([0, 1], [0.0, 1.0]) or hot.count(1) != 1:
            raise DamageError(f"{where}: a list that is not one-hot; {_CLASS_NUMBER}")
        return hot.index(1)
    if isinstance(value, str) and value in names:
        return names.index(value)
    if isinstance(value, str) and len(value) <= MAX_DIGITS and _NUMBER.fullmatch(value):
        value = float(value) if "." in value else int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value < MAX_CLASSES:
        raise DamageError(f"{where} holds {str(value)[:40]!r}; {_CLASS_NUMBER}")
    return value


class _BoundedReader:
    """Counts plain bytes, and stops a stream that expands too far."""

    def __init__(self, stream: BinaryIO, limit: int, label: str) -> None:
        self.stream, self.limit, self.label, self.total = stream, limit, label, 0

    def read(self, size: int, /) -> bytes:
        if self.total + size > self.limit:  # before reading: a bomb might not fit in memory
            raise DamageError(f"{self.label}: expands beyond {self.limit} bytes: a decompression bomb")
        data = self.stream.read(size)
        self.total += len(data)
        return data
