"""Reading a data set once, forward, shard by shard: no cache, no random access, memory for one sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

from ddpm_pipeline.data.formats.images import Pixels, decode_image
from ddpm_pipeline.data.formats.shards import HashingReader, plain_stream, read_samples
from ddpm_pipeline.data.index import Index, read_table
from ddpm_pipeline.data.reading.samples import require_one_shape
from ddpm_pipeline.data.reading.shard_access import hash_mismatch
from ddpm_pipeline.errors import DamageError


@dataclass(frozen=True)
class SequentialSample:
    """A stored sample: pixels uint8 (height, width, channels), label or -1."""

    shard: int
    key: str
    pixels: Pixels
    label: int


def read_sequential(index: Index, shards: Iterable[int] | None = None) -> Iterator[SequentialSample]:
    """Every sample of the given shards (default: all), in stored order, exactly once.

    Broken connections are resumed. Raises DamageError when a sample does not decode, and, after its last sample, when a
    shard's hash or count differs from the index; ObjectChanged when a shard is replaced meanwhile.
    """
    shape = require_one_shape(index)
    for number in range(len(index.shards)) if shards is None else shards:
        entry = index.shards[number]
        where = f"{index.store.uri}/{entry.name}"
        rows = {int(row["offset"]): int(row["label"]) for row in read_table(index, number)}
        count = 0
        with index.store.open(entry.name, etag=index.tag(entry)) as stream:
            hashed = HashingReader(stream)
            with plain_stream(cast(BinaryIO, hashed), where) as plain:
                for key, parts in read_samples(plain, where):
                    for member, data in parts.values():
                        if member.offset not in rows:
                            continue  # not the image of an indexed sample
                        try:
                            pixels = decode_image(data, shape.array_shape)
                        except DamageError as error:
                            place = f"{where}: sample {key!r} at byte {member.offset}"
                            raise DamageError(f"{place}: {error}") from error
                        yield SequentialSample(number, key, pixels, rows[member.offset])
                        count += 1
        if hashed.hash.hexdigest() != entry.sha256 or count != entry.num_samples:
            raise hash_mismatch(where, entry.size_bytes, entry)
