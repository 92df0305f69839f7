"""A generation: a spec and the store that holds its samples.

A shard counts as done when its record is listed, because the object is written first. Before a generation is called
complete, objects are listed too. A listing takes a few bytes of memory per shard.
"""

from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from pipeline.config.json_document import parse_document
from pipeline.errors import DamageError
from pipeline.generate import plan
from pipeline.generate.done_records import DoneRecord, RecordAggregate, check_record
from pipeline.generate.layout import DONE_PREFIX, SHARD_PREFIX
from pipeline.generate.plan import Shard
from pipeline.generate.spec import Spec
from pipeline.store import ObjectMissing, Store

_ABSENT = -1
_NOT_LISTED = -2
_READERS = 16
_RECORDS_AT_ONCE = 1000


@dataclass
class PrefixListing:
    """The keys under done/ and shards/, compared with the plan."""

    sizes: "array[int]"
    """Size of each shard's object, by number; -1 if it is missing, -2 if objects were not listed."""
    recorded: bytearray
    """1 for each shard that has a done-record, by number."""
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
        found = PrefixListing(array("q", [_ABSENT if objects else _NOT_LISTED]) * total, bytearray(total))
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
                else:
                    found.sizes[number] = info.size_bytes
        return found

    def read_record(self, unit: Shard) -> DoneRecord:
        """The done-record of a shard. ObjectMissing; DamageError when it is no record, or one of another shard."""
        where = f"{self.uri}/{unit.done_key}"
        record = parse_document(DoneRecord, self.store.read(unit.done_key), where, "a done-record")
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

    def add_records(self, listing: PrefixListing, aggregate: RecordAggregate) -> list[tuple[int, str]]:
        """Read the done-records that `aggregate` lacks, and compare the size of every object with its record.

        Returns the numbers of shards whose record or object is unusable, each with the reason.
        """
        unread = [number for number in listing.done() if number not in aggregate]
        unusable: list[tuple[int, str]] = []
        for number, record in self.read_records(unread):
            if isinstance(record, DoneRecord):
                aggregate.add(number, record)
            else:
                unusable.append((number, record))
        for number in aggregate:
            size, _ = aggregate.row(number)
            if listing.is_done(number) and listing.sizes[number] != size:
                key = self.shard(number).key
                unusable.append((number, f"{key} has {listing.sizes[number]} bytes, its record says {size}"))
        return unusable
