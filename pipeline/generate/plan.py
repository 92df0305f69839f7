"""The plan: a spec cut into shards and batches by arithmetic alone.

Shard k holds the samples at offsets [k·S, (k+1)·S) from the first index, where S is the shard size. The last shard
may hold fewer; it is then a *tail* and has its count in its key, `000009-0500`. Raising the count later adds the full
shard `000009`, and the tail is deleted only after the new manifest is written: no object that a manifest names ever
changes.

The batches of a shard do not depend on the count: a tail's last batch is sampled whole, and samples beyond the count
are dropped. So each sample is always computed in the same batch, and its bytes depend only on the spec's digest and
its index.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from ddpm_pipeline.config.bounds import MAX_IMAGES, MAX_SHARDS
from ddpm_pipeline.generate.layout import DONE_PREFIX, SHARD_PREFIX
from ddpm_pipeline.generate.spec import Spec


@dataclass(frozen=True)
class Shard:
    """One unit of work: samples [first, first + count)."""

    number: int
    first: int
    count: int
    name: str

    @property
    def samples(self) -> range:
        """Indexes of its samples."""
        return range(self.first, self.first + self.count)

    @property
    def key(self) -> str:
        """Key of the tar."""
        return f"{SHARD_PREFIX}{self.name}.tar"

    @property
    def done_key(self) -> str:
        """Key of the done-record."""
        return f"{DONE_PREFIX}{self.name}.json"


@dataclass(frozen=True)
class SampleBatch:
    """Samples of one network call: [first, first + size), of which the first `keep` are stored."""

    first: int
    size: int
    keep: int

    @property
    def samples(self) -> range:
        """Indexes of all its samples, including those that are dropped."""
        return range(self.first, self.first + self.size)


def num_shards(spec: Spec) -> int:
    """Shards of the whole generation."""
    return -(-spec.count // spec.shard_size)


def shard(spec: Spec, number: int) -> Shard:
    """Shard `number`. ValueError if the plan has no such shard."""
    if not 0 <= number < num_shards(spec):
        raise ValueError(f"number must be in 0..{num_shards(spec) - 1}, not {number}")
    start = number * spec.shard_size
    count = min(spec.shard_size, spec.count - start)
    name = f"{number:06d}" if count == spec.shard_size else f"{number:06d}-{count:04d}"
    return Shard(number=number, first=spec.first_index + start, count=count, name=name)


def shards(spec: Spec) -> Iterator[Shard]:
    """All shards in order."""
    return (shard(spec, number) for number in range(num_shards(spec)))


def shard_number(name: str) -> int | None:
    """The number in a shard's name (`000009` or `000009-0500`), or None for any other name."""
    number, _, count = name.partition("-")
    whole = number.isdecimal() and len(number) >= 6 and (not count or count.isdecimal())
    return int(number) if whole and not name.endswith("-") else None


def end_of(spec: Spec, name: str) -> int | None:
    """The smallest count whose plan has a shard of this name; None if no plan has."""
    number = shard_number(name)
    if number is None:
        return None
    tail = name.partition("-")[2]
    count = number * spec.shard_size + (int(tail) if tail else spec.shard_size)
    if number >= MAX_SHARDS or not number * spec.shard_size < count <= MAX_IMAGES - spec.first_index:
        return None
    return count if shard(spec.model_copy(update={"count": count}), number).name == name else None


def batches(spec: Spec, unit: Shard) -> Iterator[SampleBatch]:
    """The batches of a shard, in order; the sum of their `keep` is the shard's count."""
    nominal_end = unit.first + spec.shard_size
    for first in range(unit.first, unit.first + unit.count, spec.batch_size):
        size = min(spec.batch_size, nominal_end - first)
        yield SampleBatch(first=first, size=size, keep=min(size, unit.first + unit.count - first))


def locate(spec: Spec, index: int) -> tuple[Shard, SampleBatch]:
    """The shard and the batch that hold sample `index`. ValueError if it is not part of the generation."""
    offset = index - spec.first_index
    if not 0 <= offset < spec.count:
        raise ValueError(
            f"index must be in {spec.first_index}..{spec.first_index + spec.count - 1}, not {index}"
        )
    unit = shard(spec, offset // spec.shard_size)
    number = (index - unit.first) // spec.batch_size
    return unit, next(islice(batches(spec, unit), number, None))
