"""A generation: a spec and the store that holds its samples.

A shard counts as done when its record is listed, because the object is written first. Before a generation is called
complete, objects are listed too. A listing takes a few bytes of memory per shard.

Two attempts at a shard, by two jobs or after a network split, write the same bytes, unless one computed in smaller
micro-batches or on a device that rounds differently. Then the last object and the last record may be of different
attempts. So a record states the tag that the store gave its object, and where the tags differ the object is hashed.
"""

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from ddpm_pipeline.config.json_document import parse_document
from ddpm_pipeline.errors import DamageError
from ddpm_pipeline.generate import plan
from ddpm_pipeline.generate.done_records import (
    UNKNOWN_TAG,
    DoneRecord,
    RecordAggregate,
    check_record,
    short_tag,
)
from ddpm_pipeline.generate.layout import DONE_PREFIX, SHARD_PREFIX
from ddpm_pipeline.generate.plan import Shard
from ddpm_pipeline.generate.spec import Spec
from ddpm_pipeline.store import ObjectMissing, Store

_ABSENT = -1
_NOT_LISTED = -2
_READERS = 16
_HASHERS = 4  # each holds a shard in memory
_RECORDS_AT_ONCE = 1000


@dataclass
class PrefixListing:
    """The keys under done/ and shards/, compared with the plan."""

    sizes: "array[int]"
    """Size of each shard's object, by number; -1 if it is missing, -2 if objects were not listed."""
    recorded: bytearray
    """1 for each shard that has a done-record, by number."""
    object_tags: "array[int]"
    """Tag of each shard's object, by number; see `short_tag`."""
    record_tags: "array[int]"
    """Tag of each shard's record, by number."""
    superseded: list[str] = field(default_factory=list[str])
    """Keys of the tails of smaller counts, records before objects. No job of this count or a larger one needs them;
    tails of a larger count are never among them."""
    unexpected: list[str] = field(default_factory=list[str])
    """Other keys under done/ and shards/: of a larger count, or of no generation at all."""

    def is_done(self, number: int) -> bool:
        """Whether a shard has a record and, if objects were listed, its object."""
        return bool(self.recorded[number]) and self.sizes[number] != _ABSENT

    def done(self) -> list[int]:
        """Numbers of the shards that are done, ascending."""
        return [number for number in range(len(self.sizes)) if self.is_done(number)]

    def missing(self) -> list[int]:
        """Numbers of the shards that are not done, ascending."""
        return [number for number in range(len(self.sizes)) if not self.is_done(number)]


@dataclass(frozen=True)
class Generation:
    """The samples of `spec` under the prefix of `store`. Keeps nothing in memory: each call reads the store."""

    store: Store
    spec: Spec

    @property
    def uri(self) -> str:
        """The output prefix."""
        return self.store.uri

    @property
    def num_shards(self) -> int:
        """Shards of the whole generation."""
        return plan.num_shards(self.spec)

    def shard(self, number: int) -> Shard:
        """Shard `number` of the plan. ValueError when there is no such shard."""
        return plan.shard(self.spec, number)

    def shards(self) -> Iterator[Shard]:
        """All shards of the plan, in order."""
        return plan.shards(self.spec)

    def with_count(self, count: int) -> "Generation":
        """The same generation with another count."""
        return Generation(self.store, self.spec.model_copy(update={"count": count}))

    def listing(self, objects: bool = True) -> PrefixListing:
        """List the done-records and, if `objects`, the shards themselves. Reads no object."""
        total = self.num_shards
        found = PrefixListing(
            array("q", [_ABSENT if objects else _NOT_LISTED]) * total,
            bytearray(total),
            array("Q", [UNKNOWN_TAG]) * total,
            array("Q", [UNKNOWN_TAG]) * total,
        )
        tail = self.shard(total - 1).name
        folders = [(DONE_PREFIX, ".json"), (SHARD_PREFIX, ".tar")]
        for prefix, suffix in folders if objects else folders[:1]:
            for info in self.store.list(prefix):
                name = info.key[len(prefix) :].removesuffix(suffix) if info.key.endswith(suffix) else ""
                number = plan.shard_number(name)
                if number is None or number >= total:
                    found.unexpected.append(info.key)
                elif name != (tail if number == total - 1 else f"{number:06d}"):
                    count = plan.end_of(self.spec, name) or self.spec.count
                    smaller = "-" in name and count < self.spec.count
                    (found.superseded if smaller else found.unexpected).append(info.key)
                elif prefix == DONE_PREFIX:
                    found.recorded[number] = 1
                    found.record_tags[number] = short_tag(info.etag)
                else:
                    found.sizes[number] = info.size_bytes
                    found.object_tags[number] = short_tag(info.etag)
        return found

    def recorded_between(self, first: int, last: int) -> set[int]:
        """Numbers from `first` to `last` of the shards that have a done-record. Lists few others.

        May miss some from number 1,000,000 on, whose keys stand between those of smaller numbers.
        """
        found: set[int] = set()
        for info in self.store.list(DONE_PREFIX, start_after=self.shard(first - 1).done_key if first else ""):
            number = plan.shard_number(info.key[len(DONE_PREFIX) :].removesuffix(".json"))
            if number is not None and number > last:
                break
            if number is not None and number >= first and info.key == self.shard(number).done_key:
                found.add(number)
        return found

    def read_record(self, unit: Shard) -> DoneRecord:
        """The done-record of a shard. ObjectMissing; DamageError when it is no record, or one of another shard."""
        return self.parse_record(unit, self.store.read(unit.done_key))

    def parse_record(self, unit: Shard, data: bytes) -> DoneRecord:
        """The bytes of a shard's done-record. DamageError as for `read_record`."""
        where = f"{self.uri}/{unit.done_key}"
        record = parse_document(DoneRecord, data, where, "a done-record")
        check_record(record, self.spec, unit, where)
        return record

    def read_records(self, numbers: Iterable[int]) -> Iterator[tuple[int, DoneRecord | str]]:
        """The done-records of shards by number, many at a time; for an unusable one, the error's message."""

        def read(number: int) -> tuple[int, DoneRecord | str]:
            try:
                return number, self.read_record(self.shard(number))
            except (DamageError, ObjectMissing) as error:
                return number, str(error)

        remaining = iter(numbers)
        with ThreadPoolExecutor(_READERS) as pool:
            while chunk := list(islice(remaining, _RECORDS_AT_ONCE)):
                yield from pool.map(read, chunk)

    def intact_record(self, unit: Shard) -> DoneRecord | None:
        """The record of a stored shard; None if record or object is missing or damaged, or if they contradict."""
        stored = self.store.stat(unit.key) if self.store.stat(unit.done_key) is not None else None
        if stored is None:
            return None
        try:
            record = self.read_record(unit)
            if record.bytes != stored.size_bytes:
                return None
            is_stated = record.times.object_tag == stored.etag or self._sha256(unit) == record.sha256
            return record if is_stated else None
        except (DamageError, ObjectMissing):
            return None

    def _sha256(self, unit: Shard) -> str:
        return hashlib.sha256(self.store.read(unit.key)).hexdigest()

    def add_records(self, listing: PrefixListing, aggregate: RecordAggregate) -> list[tuple[int, str]]:
        """Read the done-records that `aggregate` lacks, and compare every object with its record.

        Sizes and tags are compared; an object is read where they leave a doubt. Returns the numbers of shards whose
        record or object is unusable, each with the reason.
        """
        unread = [number for number in listing.done() if number not in aggregate]
        unusable: list[tuple[int, str]] = []
        for number, record in self.read_records(unread):
            if isinstance(record, DoneRecord):
                aggregate.add(number, record, listing.record_tags[number])
            else:
                unusable.append((number, record))
        doubtful: list[int] = []
        replaced: list[int] = []
        for number in aggregate:
            if not listing.is_done(number):
                continue
            size, _ = aggregate.row(number)
            stated, record_tag = aggregate.tags(number)
            if listing.sizes[number] != size:
                key = self.shard(number).key
                unusable.append((number, f"{key} has {listing.sizes[number]} bytes, its record says {size}"))
            elif stated not in (UNKNOWN_TAG, listing.object_tags[number]):
                doubtful.append(number)
            elif record_tag == UNKNOWN_TAG or record_tag != listing.record_tags[number]:
                replaced.append(number)
        unusable += self._contradictions(doubtful, aggregate)
        known = {number for number, _ in unusable}
        again = [number for number in (*doubtful, *replaced) if number not in known]
        for number, record in self.read_records(again):
            if isinstance(record, str):
                unusable.append((number, record))
            elif (record.bytes, record.sha256) != aggregate.row(number):
                unusable.append((number, f"{self.shard(number).done_key} has been replaced"))
        return unusable

    def _contradictions(self, numbers: list[int], aggregate: RecordAggregate) -> list[tuple[int, str]]:
        """Those of the shards whose object has not the hash that their record states, each with the reason."""

        def check(number: int) -> tuple[int, str] | None:
            unit, (_, stated) = self.shard(number), aggregate.row(number)
            try:
                sha256 = self._sha256(unit)
            except (DamageError, ObjectMissing) as error:
                return number, str(error)
            return None if sha256 == stated else (number, f"{unit.key} has not the sha256 of its record")

        with ThreadPoolExecutor(_HASHERS) as pool:
            return [found for found in pool.map(check, numbers) if found is not None]
