"""Done-records: the proof beside a finished shard."""

from typing import Any, Literal

from pydantic import Field

from pipeline.config.base import Settings
from pipeline.config.document import parse_document
from pipeline.errors import DamageError
from pipeline.generate.pixels import Tally
from pipeline.generate.plan import Shard
from pipeline.generate.spec import Spec
from pipeline.store import Store


class Times(Settings):
    """How a shard came to be. The only part of a record that another run of the same work would write otherwise."""

    finished_at: float
    """Seconds since 1970 (UTC) at which the record was written."""
    seconds: float
    """Time the device spent on the shard."""
    upload_seconds: float
    """Time from the last sample to the stored object: encoding that had not finished, packing, upload."""
    attempt: int
    """1 for a shard that was finished at the first try."""
    worker: str
    """Host and process that made it."""
    micro_batch: int
    """Samples the network saw at once; less than the spec's batch size after the device ran out of memory."""
    software: str
    """Versions of what rounds and encodes: torch, Pillow, numpy, and the CPU's or GPU's kind."""


class DoneRecord(Settings):
    """What a finished shard holds."""

    format: Literal[1] = 1
    """Version of the layout of a generation."""
    spec_digest: str
    """The generation it belongs to."""
    key: str
    """Key of the shard."""
    first_index: int
    """Index of its first sample."""
    count: int
    """Samples in it."""
    bytes: int
    """Size of the object."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Hex digest of the object."""
    tally: Tally
    """What its images add up to."""
    classes: dict[int, int] | None
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
