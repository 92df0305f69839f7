"""Done-records: the JSON document that proves a shard, and sums over many of them."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.bounds import Bytes, Count, Date, Key, Label, Name, Number, Seconds, Sha256, Text
from ddpm_pipeline.data.formats.image_stats import ImageStats
from ddpm_pipeline.errors import DamageError
from ddpm_pipeline.generate.plan import Shard
from ddpm_pipeline.generate.spec import Spec

UNKNOWN_TAG = 0
_ABSENT = -1
_HASH_BYTES = 32  # of a sha256


class GpuUse(Settings):
    """The GPU that made a shard."""

    name: Name
    """As the driver names it."""
    share: Annotated[float, Field(gt=0, le=1)]
    """Part of the GPU that the worker had."""
    joules: Annotated[float, Field(ge=0, le=1e15)] | None
    """That part of the GPU's energy in the device time; None if it is not reported."""


def short_tag(etag: str | None) -> int:
    """The tag of an object as a number of 64 bits, for comparing those of millions; UNKNOWN_TAG for None and ''."""
    if not etag:
        return UNKNOWN_TAG
    return int.from_bytes(hashlib.blake2b(etag.encode(), digest_size=8).digest()) or 1


class Times(Settings):
    """When and where a shard was made: the only part of a record that differs between runs of the same spec."""

    finished_at: Date
    """Seconds since 1970 (UTC) at which the record was written."""
    seconds: Seconds
    """Device time."""
    upload_seconds: Seconds
    """Time from the last sample to the stored object: remaining encoding, packing, upload."""
    attempt: Number
    """1 if the first attempt succeeded."""
    worker: Name
    """Host and process that made the shard."""
    micro_batch: Number
    """Samples per network call in the whole shard; below the spec's batch size after the device ran out of memory."""
    software: Text
    """Versions of torch, Pillow and numpy, of CUDA, cuDNN and driver on a GPU, and the kind of CPU or GPU: what
    rounding and encoding depend on."""
    gpu: GpuUse | None = Field(default=None, exclude_if=lambda use: use is None)
    """The GPU and its energy; left out on a CPU."""
    object_tag: Text | None = None
    """The tag that the store gave the object this record describes. If it has another one, another attempt has written
    it since; None in records of versions that did not state it."""


class DoneRecord(Settings):
    """Content of a finished shard."""

    format: Literal[1] = 1
    """Version of the layout of a generation."""
    spec_digest: Sha256
    """Digest of the generation's spec."""
    key: Key
    """Key of the shard."""
    first_index: Count
    """Index of its first sample."""
    count: Count
    """Number of samples."""
    bytes: Bytes
    """Size of the object."""
    sha256: Sha256
    """Hex digest of the object."""
    tally: ImageStats
    """Statistics of its images."""
    classes: dict[Label, Count] | None
    """Samples of each label; None without classes."""
    features: dict[str, Any] | None = None
    """Sums of the evaluation network's features; None if they were not computed."""
    times: Times
    """When and where it was made."""


def check_record(record: DoneRecord, spec: Spec, unit: Shard, where: str) -> None:
    """DamageError unless the record describes this shard of this generation."""
    expected = (spec.digest, unit.key, unit.first, unit.count)
    found = (record.spec_digest, record.key, record.first_index, record.count)
    names = ("spec_digest", "key", "first_index", "count")
    for name, wanted, got in zip(names, expected, found, strict=True):
        if wanted != got:
            raise DamageError(f"{where}: {name} is {got}, but the plan says {wanted}")
    values = unit.count * spec.size**2
    stats, classes = record.tally, record.classes
    if (stats.images, stats.values, len(stats.sums)) != (unit.count, values, spec.channels):
        raise DamageError(f"{where}: tally does not describe {unit.count} images of this size")
    if (classes is None) != (spec.classes is None) or sum(
        (classes or {0: unit.count}).values()
    ) != unit.count:
        raise DamageError(f"{where}: classes do not add up to {unit.count}")


@dataclass
class GpuTotals:
    """Sums over the shards that GPUs made."""

    images: int = 0
    """Samples in them."""
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    """Seconds of whole GPUs, by name: device time times the worker's share of the GPU."""
    joules: float | None = 0.0
    """Energy; None if it is not known of every shard."""

    def add(self, record: DoneRecord) -> None:
        """Add a shard; nothing if a CPU made it."""
        use = record.times.gpu
        if use is None:
            return
        self.images += record.count
        self.seconds[use.name] = self.seconds.get(use.name, 0.0) + record.times.seconds * use.share
        self.joules = None if self.joules is None or use.joules is None else self.joules + use.joules


@dataclass
class RecordAggregate:
    """Sums over done-records, with size, hash and tags of each shard: about 60 bytes of memory per shard."""

    stats: ImageStats = field(default_factory=ImageStats)
    """Statistics of all images."""
    classes: Counter[int] = field(default_factory=Counter[int])
    """Samples of each label."""
    seconds: float = 0.0
    """Seconds of whole devices: a worker with a part of a GPU counts that part of its device time."""
    num_shards: int = 0
    """Shards added."""
    gpus: GpuTotals = field(default_factory=GpuTotals)
    """Of the shards that GPUs made."""
    _sizes: "array[int]" = field(default_factory=lambda: array("q"))
    _hashes: bytearray = field(default_factory=bytearray)
    _object_tags: "array[int]" = field(default_factory=lambda: array("Q"))
    _record_tags: "array[int]" = field(default_factory=lambda: array("Q"))

    def __contains__(self, number: int) -> bool:
        return number < len(self._sizes) and self._sizes[number] != _ABSENT

    def __iter__(self) -> Iterator[int]:
        """Numbers of the added shards, ascending."""
        return (number for number, size in enumerate(self._sizes) if size != _ABSENT)

    def row(self, number: int) -> tuple[int, str]:
        """Size and sha256 of an added shard."""
        return self._sizes[number], self._hashes[_HASH_BYTES * number : _HASH_BYTES * (number + 1)].hex()

    def tags(self, number: int) -> tuple[int, int]:
        """The tag of an added shard's object as its record states it, and that of the record; see `short_tag`."""
        return self._object_tags[number], self._record_tags[number]

    def add(self, number: int, record: DoneRecord, record_tag: int = UNKNOWN_TAG) -> None:
        """Add a shard's record, which the store gave the tag `record_tag`; a shard that was added before is ignored."""
        if number in self:
            return
        missing = number + 1 - len(self._sizes)
        if missing > 0:
            self._sizes.extend([_ABSENT] * missing)
            self._hashes.extend(bytes(_HASH_BYTES * missing))
            self._object_tags.extend([UNKNOWN_TAG] * missing)
            self._record_tags.extend([UNKNOWN_TAG] * missing)
        self._sizes[number] = record.bytes
        self._hashes[_HASH_BYTES * number : _HASH_BYTES * (number + 1)] = bytes.fromhex(record.sha256)
        self._object_tags[number] = short_tag(record.times.object_tag)
        self._record_tags[number] = record_tag
        self.num_shards += 1
        self.stats = self.stats + record.tally
        self.classes.update(record.classes or {})
        share = 1.0 if record.times.gpu is None else record.times.gpu.share
        self.seconds += record.times.seconds * share
        self.gpus.add(record)

    @property
    def images(self) -> int:
        """Samples in the added shards."""
        return self.stats.images

    @property
    def joules(self) -> float | None:
        """Energy of the GPUs for the added shards; None unless it is known of each."""
        return self.gpus.joules if self.images and self.gpus.images == self.images else None
