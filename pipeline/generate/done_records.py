"""Done-records: the proof beside a finished shard."""

from typing import Any, Literal

from pipeline.config.base import Settings
from pipeline.config.bounds import Bytes, Count, Date, Key, Label, Name, Number, Seconds, Sha256, Text
from pipeline.config.json_document import parse_document
from pipeline.data.formats.image_stats import ImageStats
from pipeline.errors import DamageError
from pipeline.generate.plan import Shard
from pipeline.generate.spec import Spec
from pipeline.store import Store


class Times(Settings):
    """How a shard came to be. The only part of a record that another run of the same work would write otherwise."""

    finished_at: Date
    """Seconds since 1970 (UTC) at which the record was written."""
    seconds: Seconds
    """Time the device spent on the shard."""
    upload_seconds: Seconds
    """Time from the last sample to the stored object: encoding that had not finished, packing, upload."""
    attempt: Number
    """1 for a shard that was finished at the first try."""
    worker: Name
    """Host and process that made it."""
    micro_batch: Number
    """Samples the network saw at once; less than the spec's batch size after the device ran out of memory."""
    software: Text
    """Versions of what rounds and encodes: torch, Pillow, numpy, and the CPU's or GPU's kind."""


class DoneRecord(Settings):
    """What a finished shard holds."""

    format: Literal[1] = 1
    """Version of the layout of a generation."""
    spec_digest: Sha256
    """The generation it belongs to."""
    key: Key
    """Key of the shard."""
    first_index: Count
    """Index of its first sample."""
    count: Count
    """Samples in it."""
    bytes: Bytes
    """Size of the object."""
    sha256: Sha256
    """Hex digest of the object."""
    tally: ImageStats
    """What its images add up to."""
    classes: dict[Label, Count] | None
    """Samples of each label; None without classes."""
    features: dict[str, Any] | None = None
    """Sums of the evaluation network's features; None while nobody has computed them."""
    times: Times
    """How it came to be."""


def read_record(store: Store, spec: Spec, unit: Shard) -> DoneRecord:
    """The done-record of a shard. DamageError when it is none, or that of other work."""
    where = f"{store.uri}/{unit.done_key}"
    record = parse_document(DoneRecord, store.read(unit.done_key), where, "a done-record")
    check_record(record, spec, unit, where)
    return record


def check_record(record: DoneRecord, spec: Spec, unit: Shard, where: str) -> None:
    """DamageError unless the record is about this shard of this generation."""
    expected = (spec.digest, unit.key, unit.first, unit.count)
    found = (record.spec_digest, record.key, record.first_index, record.count)
    names = ("spec_digest", "key", "first_index", "count")
    for name, wanted, got in zip(names, expected, found, strict=True):
        if wanted != got:
            raise DamageError(f"{where}: {name} is {got}, but the plan says {wanted}")
    values = unit.count * spec.size**2
    tally, classes = record.tally, record.classes
    if (tally.images, tally.values, len(tally.sums)) != (unit.count, values, spec.channels):
        raise DamageError(f"{where}: tally is not that of {unit.count} images of this size")
    if (classes is None) != (spec.classes is None) or sum(
        (classes or {0: unit.count}).values()
    ) != unit.count:
        raise DamageError(f"{where}: classes do not add up to {unit.count}")
