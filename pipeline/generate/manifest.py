"""The manifest: the proof that a generation is complete. Written last, replaced whole, never edited.

One JSON document, laid out so that nobody need hold it whole: first what is told of the generation, then the shards,
a line each. Of a million shards these are 160 MB.
"""

import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

from pydantic import Field

from pipeline.config.base import Settings
from pipeline.config.bounds import MAX_SHARDS, Bytes, Count, Date, Key, Label, Name, Seconds, Sha256
from pipeline.config.json_document import parse_document
from pipeline.errors import DamageError
from pipeline.generate.layout import MANIFEST_KEY
from pipeline.generate.listing import RecordAggregate
from pipeline.generate.plan import num_shards, shard
from pipeline.generate.spec import Spec, canonical, pretty
from pipeline.store import ObjectMissing, Store

_SHARDS = b'  "shards": [\n'
_END = b"  ]\n}\n"


Level = Annotated[float, Field(ge=0, le=255)]


class ManifestShard(Settings):
    """One shard of a complete generation."""

    key: Key
    """Key of the tar, relative to the prefix."""
    first_index: Count
    """Index of its first sample."""
    count: Count
    """Samples in it."""
    bytes: Bytes
    """Size of the object."""
    sha256: Sha256
    """Hex digest of the object."""


class Statistics(Settings):
    """What the whole generation adds up to."""

    channel_mean: tuple[Level, ...]
    """Mean of each channel, uint8 levels."""
    channel_std: tuple[Level, ...]
    """Standard deviation of each channel, uint8 levels."""
    constant: Count
    """Images of one flat colour."""
    saturated: Count
    """Images of nothing but 0 and 255."""
    classes: dict[Label, Count] | None
    """Samples of each label; None without classes."""


class ManifestTimes(Settings):
    """The only part of a manifest that another run of the same work would write otherwise."""

    finished_at: Date
    """Seconds since 1970 (UTC)."""
    device_seconds: Seconds
    """Device time of all shards, added up."""


class Manifest(Settings):
    """What is told of a complete generation, before its shards: who sees this object sees all of them."""

    format: Literal[1] = 1
    """Version of the layout of a generation."""
    spec_digest: Sha256
    """Names the generation."""
    spec: Spec
    """What determined its bits, the model's version and hash among it."""
    count: Count
    """Samples, exactly."""
    class_names: tuple[Name, ...] | None
    """Names of the labels."""
    num_shards: int = Field(ge=1, le=MAX_SHARDS)
    """Shards, listed in order of their samples under `shards` in the document; see `read_entries`."""
    statistics: Statistics
    """Sums over all images."""
    times: ManifestTimes
    """When, and how long."""


def make_manifest(spec: Spec, harvest: RecordAggregate, class_names: tuple[str, ...] | None) -> Manifest:
    """The manifest of a complete harvest. ValueError when a shard or a sample is lacking."""
    if harvest.num_shards != num_shards(spec) or harvest.images != spec.count:
        raise ValueError(
            f"harvest holds {harvest.num_shards} shards and {harvest.images} samples, the plan "
            f"{num_shards(spec)} and {spec.count}"
        )
    statistics = Statistics(
        channel_mean=harvest.tally.mean,
        channel_std=harvest.tally.std,
        constant=harvest.tally.constant,
        saturated=harvest.tally.saturated,
        classes=dict(sorted(harvest.classes.items())) if spec.classes is not None else None,
    )
    return Manifest(
        spec_digest=spec.digest,
        spec=spec,
        count=spec.count,
        class_names=class_names,
        num_shards=num_shards(spec),
        statistics=statistics,
        times=ManifestTimes(finished_at=time.time(), device_seconds=harvest.seconds),
    )


def make_entries(spec: Spec, harvest: RecordAggregate) -> Iterator[ManifestShard]:
    """Every shard of a complete harvest, in order of its samples."""
    for number in range(num_shards(spec)):
        unit, (size, sha256) = shard(spec, number), harvest.row(number)
        yield ManifestShard(key=unit.key, first_index=unit.first, count=unit.count, bytes=size, sha256=sha256)


def write_manifest(store: Store, manifest: Manifest, entries: Iterable[ManifestShard]) -> None:
    """Publish a generation."""
    with tempfile.TemporaryDirectory(prefix="ddpm-manifest-") as scratch:
        path = Path(scratch) / MANIFEST_KEY
        with path.open("wb") as file:
            file.write(pretty(manifest.model_dump(mode="json")).removesuffix(b"\n}\n") + b",\n" + _SHARDS)
            for place, entry in enumerate(entries):
                file.write((b",\n" if place else b"") + b"    " + canonical(entry.model_dump(mode="json")))
            file.write(b"\n" + _END)
        store.upload(MANIFEST_KEY, path)


def read_manifest(store: Store) -> Manifest | None:
    """The manifest at a prefix, without its shards, or None. DamageError when the object is none."""
    try:
        with store.open(MANIFEST_KEY) as file:
            return _head(file, f"{store.uri}/{MANIFEST_KEY}")
    except ObjectMissing:
        return None


def read_entries(store: Store) -> Iterator[ManifestShard]:
    """Every shard that the manifest at a prefix lists, in order. DamageError when one is lacking or is none."""
    where = f"{store.uri}/{MANIFEST_KEY}"
    with store.open(MANIFEST_KEY) as file:
        for place in range(_head(file, where).num_shards):
            line = file.readline().strip().removesuffix(b",")
            yield parse_document(ManifestShard, line, where, f"a manifest: shards.{place}")
        if file.read() != _END:
            raise DamageError(f"{where}: not a manifest (it does not end after its shards)")


def _head(file: BinaryIO, where: str) -> Manifest:
    lines: list[bytes] = []
    for line in iter(file.readline, b""):
        if line == _SHARDS:
            break
        lines.append(line)
    head = b"".join(lines).rstrip(b",\n") + b"\n}"
    return parse_document(Manifest, head, where, "a manifest; generate again, what is done is kept")
