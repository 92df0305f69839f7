"""The ledger: what a prefix holds against what the plan wants, read from listings alone.

A shard counts as done when its record is listed, for the object is written first; before a generation is called
complete, the objects are listed too. Memory is a few bytes a shard, so a million
records fit beside anything.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from pipeline.data.formats.image_stats import ImageStats
from pipeline.errors import DamageError
from pipeline.generate.done_records import DoneRecord, read_record
from pipeline.generate.layout import DONE_PREFIX, SHARD_PREFIX
from pipeline.generate.plan import end_of, num_shards, shard, shard_number
from pipeline.generate.spec import Spec
from pipeline.store import ObjectMissing, Store

_ABSENT = -1
_NOT_LISTED = -2
_HASH = 32  # bytes of a sha256
_READERS = 16


@dataclass
class PrefixListing:
    """One look at the listings of done/ and shards/."""

    sizes: "array[int]"
    """Size of each shard's object, by number; -1 where there is none, -2 where objects were not listed."""
    recorded: bytearray
    """1 for each shard that has a done-record, by number."""
    superseded: list[str] = field(default_factory=list)
    """Keys of smaller counts' tails, records before objects. No job that ends with this count, or a larger one, needs
    them; those of a larger count are never among them."""
    strange: list[str] = field(default_factory=list)
    """Other keys under done/ and shards/: of a larger count, or of no generation at all."""

    def is_done(self, number: int) -> bool:
        """Whether a shard has a record and, if objects were listed, its object."""
        return bool(self.recorded[number]) and self.sizes[number] != _ABSENT

    def missing(self) -> list[int]:
        """Numbers of the shards still to be made, ascending."""
        return [number for number in range(len(self.sizes)) if not self.is_done(number)]


def list_prefix(store: Store, spec: Spec, objects: bool = True) -> PrefixListing:
    """List the records and, if `objects`, the shards themselves. Reads no object."""
    total = num_shards(spec)
    found = PrefixListing(array("q", [_ABSENT if objects else _NOT_LISTED]) * total, bytearray(total))
    tail = shard(spec, total - 1).name
    folders = [(DONE_PREFIX, ".json"), (SHARD_PREFIX, ".tar")]
    for prefix, suffix in folders if objects else folders[:1]:
        for info in store.list(prefix):
            name = info.key[len(prefix) :].removesuffix(suffix) if info.key.endswith(suffix) else ""
            number = shard_number(name)
            if number is None or number >= total:
                found.strange.append(info.key)
            elif name != (tail if number == total - 1 else f"{number:06d}"):
                smaller = "-" in name and (end_of(spec, name) or spec.count) < spec.count
                (found.superseded if smaller else found.strange).append(info.key)
            elif prefix == DONE_PREFIX:
                found.recorded[number] = 1
            else:
                found.sizes[number] = info.size_bytes
    return found


@dataclass
class RecordAggregate:
    """The done-records seen so far, condensed to some forty bytes a shard."""

    tally: ImageStats = field(default_factory=ImageStats)
    """Sums over all shards."""
    classes: Counter[int] = field(default_factory=Counter[int])
    """Samples of each label."""
    seconds: float = 0.0
    """Device time of all shards, added up."""
    num_shards: int = 0
    """Shards seen."""
    _sizes: "array[int]" = field(default_factory=lambda: array("q"))
    _hashes: bytearray = field(default_factory=bytearray)

    def __contains__(self, number: int) -> bool:
        return number < len(self._sizes) and self._sizes[number] != _ABSENT

    def __iter__(self) -> Iterator[int]:
        """Numbers of the shards seen, ascending."""
        return (number for number, size in enumerate(self._sizes) if size != _ABSENT)

    def row(self, number: int) -> tuple[int, str]:
        """Size and sha256 of a shard that was seen."""
        return self._sizes[number], self._hashes[_HASH * number : _HASH * (number + 1)].hex()

    def add(self, number: int, record: DoneRecord) -> None:
        """Count a shard's record in, once."""
        if number in self:
            return
        more = number + 1 - len(self._sizes)
        if more > 0:
            self._sizes.extend([_ABSENT] * more)
            self._hashes.extend(bytes(_HASH * more))
        self._sizes[number] = record.bytes
        self._hashes[_HASH * number : _HASH * (number + 1)] = bytes.fromhex(record.sha256)
        self.num_shards += 1
        self.tally = self.tally + record.tally
        self.classes.update(record.classes or {})
        self.seconds += record.times.seconds

    @property
    def images(self) -> int:
        """Samples in the shards seen."""
        return self.tally.images


def aggregate_records(
    store: Store, spec: Spec, found: PrefixListing, harvest: RecordAggregate
) -> list[tuple[int, str]]:
    """Read the records of done shards that the harvest lacks; check every object's size against its record.

    Returns the numbers of shards that turn out not to be done after all, each with the reason.
    """
    unread = [n for n in range(len(found.sizes)) if found.is_done(n) and n not in harvest]
    undone: list[tuple[int, str]] = []
    for number, record in read_records(store, spec, unread):
        if isinstance(record, DoneRecord):
            harvest.add(number, record)
        else:
            undone.append((number, record))
    for number in harvest:
        size, _ = harvest.row(number)
        if found.is_done(number) and found.sizes[number] != size:
            key = shard(spec, number).key
            undone.append((number, f"{key} has {found.sizes[number]} bytes, its record says {size}"))
    return undone


def read_records(store: Store, spec: Spec, numbers: Iterable[int]) -> Iterator[tuple[int, DoneRecord | str]]:
    """The done-records of shards by number, many at a time; for one that cannot be used, what is wrong with it."""

    def read(number: int) -> tuple[int, DoneRecord | str]:
        try:
            return number, read_record(store, spec, shard(spec, number))
        except (DamageError, ObjectMissing) as error:
            return number, str(error)

    left = iter(numbers)
    with ThreadPoolExecutor(_READERS) as pool:
        while chunk := list(islice(left, 1000)):
            yield from pool.map(read, chunk)
