"""One pass over a shard: is it whole, what is in it, and where."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import numpy as np
from pydantic_core import from_json

from pipeline.data.hashing import HashingReader
from pipeline.data.images import EXTENSIONS, ImageShape, decode, probe
from pipeline.data.index import MEMBER, MemberTable, ShardEntry, table_hash
from pipeline.data.moments import Moments, add_moments, moments_of
from pipeline.data.shards import GZIP_MAGIC, Parts, plain_stream, read_samples
from pipeline.errors import DamageError
from pipeline.store import ObjectInfo, ObjectMissing, Store

MAX_SHAPES = 64
"""Shapes listed for a shard; a set of photographs of all sizes would otherwise fill the index with them."""
LABEL_FIELDS = ("label", "class", "cls", "class_id", "target")
MAX_DIGITS = 40
"""Of a class number; Python refuses to read a number of thousands."""
MAX_EXPANSION = 256
"""Plain bytes a gzip may give for each of its own: pictures hardly compress; a bomb does 1000-fold."""


def index_shard(
    store: Store, key: str, *, label_field: str | None = None, pixels: bool = False
) -> tuple[ShardEntry, MemberTable]:
    """The entry and member table of one shard, read in one forward pass.

    `label_field` names the label in samples that carry a json instead of a cls; by default the first of
    LABEL_FIELDS. `pixels` decodes every image as well, for channel statistics and to find damage inside
    images. Raises DamageError naming shard, key and offset; ObjectMissing.
    """
    info = store.stat(key)
    label = f"{store.uri}/{key}"
    if info is None:
        raise ObjectMissing(key, label)
    facts = _Facts(label, label_field, pixels)
    ignored: list[str] = []
    with store.open(key, etag=info.etag) as stream:
        hashed = HashingReader(stream)
        with plain_stream(cast(BinaryIO, hashed), label) as plain:
            counted = _Counted(plain, MAX_EXPANSION * max(info.size_bytes, 1 << 20), label)
            for name, parts in read_samples(counted, label, ignored):
                facts.add(name, parts)
    return shard_entry(
        ShardFacts(facts.rows, facts.shapes, facts.moments, len(ignored)),
        info,
        plain_bytes=counted.total,
        compressed=hashed.head == GZIP_MAGIC,
        sha256=hashed.hash.hexdigest(),
    )


@dataclass(frozen=True)
class ShardFacts:
    """What the samples of a shard tell: (offset, size, CRC-32, label) of each image, and what they have in common."""

    rows: Sequence[tuple[int, int, int, int]]
    shapes: Collection[ImageShape]
    moments: Moments | None
    ignored_members: int = 0


def shard_entry(
    facts: ShardFacts, info: ObjectInfo, *, plain_bytes: int, compressed: bool, sha256: str
) -> tuple[ShardEntry, MemberTable]:
    """Entry and member table of the shard that the store holds as `info`."""
    table = np.array(facts.rows, MEMBER)
    entry = ShardEntry(
        name=info.key,
        num_samples=len(table),
        size_bytes=info.size_bytes,
        plain_bytes=plain_bytes,
        compressed=compressed,
        sha256=sha256,
        etag=info.etag,
        table_sha256=table_hash(table),
        shapes=tuple(sorted(facts.shapes)[:MAX_SHAPES]),
        num_labelled=int((table["label"] >= 0).sum()),
        max_label=int(table["label"].max(initial=-1)),
        ignored_members=facts.ignored_members,
        channel_sums=None if facts.moments is None else facts.moments.sums,
        channel_squares=None if facts.moments is None else facts.moments.squares,
    )
    return entry, table


@dataclass
class _Facts:
    """What gathers while a shard goes by."""

    shard: str
    label_field: str | None
    pixels: bool
    rows: list[tuple[int, int, int, int]] = field(default_factory=list[tuple[int, int, int, int]])
    shapes: set[ImageShape] = field(default_factory=set[ImageShape])
    moments: Moments | None = None

    def add(self, key: str, parts: Parts) -> None:
        extension = image_extension(parts, f"{self.shard}: sample {key!r}")
        member, data = parts[extension]
        try:
            shape = probe(data)
            if self.pixels:
                self.moments = add_moments(self.moments, moments_of(decode(data, shape)))
        except DamageError as error:
            raise DamageError(f"{self.shard}: {member.name!r} at byte {member.offset}: {error}") from error
        if member.size_bytes >= 1 << 32:
            raise DamageError(f"{self.shard}: {member.name!r}: larger than 4 GiB")
        self.shapes.add(shape)
        number = label_of(parts, self.label_field, f"{self.shard}: sample {key!r}")
        self.rows.append((member.offset, member.size_bytes, zlib.crc32(data), number))


def image_extension(parts: Any, where: str) -> str:
    """The extension of a sample's one image. Raises DamageError for none or several."""
    found = [extension for extension in parts if extension.rpartition(".")[2] in EXTENSIONS]
    if len(found) != 1:
        raise DamageError(f"{where}: {len(found)} images (of {sorted(parts)}); exactly one is expected")
    return found[0]


def label_of(parts: Parts, label_field: str | None, where: str) -> int:
    """The class of a sample from its cls, or its json's label; -1 if it has none.

    Raises DamageError for a label that is not a number from 0 to 2^31 - 1.
    """
    if "cls" in parts:
        text = parts["cls"][1].strip()
        if not text.isdigit() or len(text) > MAX_DIGITS or int(text) >= 1 << 31:
            raise DamageError(f"{where}: its .cls holds {text[:40]!r}; a class number is expected")
        return int(text)
    if "json" not in parts:
        return -1
    try:
        content = from_json(parts["json"][1])
    except ValueError as error:
        raise DamageError(f"{where}: its .json is damaged: {error}") from error
    fields = (label_field,) if label_field else LABEL_FIELDS
    value: Any = next((content[f] for f in fields if isinstance(content, dict) and f in content), None)
    if value is None:
        return -1
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise DamageError(f"{where}: its .json has the label {value!r}; a class number is expected")
    return value


class _Counted:
    """Counts plain bytes, and stops a stream that gives absurdly many."""

    def __init__(self, stream: BinaryIO, limit: int, label: str) -> None:
        self.stream, self.limit, self.label, self.total = stream, limit, label, 0

    def read(self, size: int, /) -> bytes:
        if self.total + size > self.limit:  # before reading: the whole of a bomb might not fit in memory
            raise DamageError(f"{self.label}: expands beyond {self.limit} bytes: a decompression bomb")
        data = self.stream.read(size)
        self.total += len(data)
        return data
