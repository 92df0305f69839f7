"""The manifest: the proof that a generation is complete. Written last, replaced as a whole, never edited.

One JSON document in a fixed layout, so that it can be read as a stream: first the facts about the generation, then one
line per shard. A million shards take 160 MB.
"""

import hashlib
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

from pydantic import Field

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.bounds import MAX_SHARDS, Bytes, Count, Date, Key, Label, Name, Seconds, Sha256
from ddpm_pipeline.config.json_document import parse_document
from ddpm_pipeline.errors import DamageError
from ddpm_pipeline.generate.done_records import RecordAggregate
from ddpm_pipeline.generate.layout import MANIFEST_KEY
from ddpm_pipeline.generate.plan import num_shards, shard
from ddpm_pipeline.generate.spec import Spec, canonical, pretty
from ddpm_pipeline.store import ObjectMissing, Store

_SHARDS = b'  "shards": [\n'
_END = b"  ]\n}\n"


Level = Annotated[float, Field(ge=0, le=255)]
Joules = Annotated[float, Field(ge=0, le=1e18)]


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
    """Statistics of all images."""

    channel_mean: tuple[Level, ...]
    """Mean of each channel, uint8 levels."""
    channel_std: tuple[Level, ...]
    """Standard deviation of each channel, uint8 levels."""
    constant: Count
    """Images with one value per channel."""
    saturated: Count
    """Images whose values are all 0 or 255."""
    classes: dict[Label, Count] | None
    """Samples of each label; None without classes."""


class ManifestTimes(Settings):
    """The only part of a manifest that differs between runs of the same spec."""

    finished_at: Date
    """Seconds since 1970 (UTC)."""
    device_seconds: Seconds
    """Seconds of whole devices for all shards: GPUs or, without any, workers with their cores."""
    joules: Joules | None = Field(default=None, exclude_if=lambda joules: joules is None)
    """Energy of the GPUs in that time; left out on CPUs, and where a GPU does not report it."""


class Manifest(Settings):
    """The head of a manifest. If it exists, all shards exist."""

    format: Literal[1] = 1
    """Version of the layout of a generation."""
    spec_digest: Sha256
    """Digest of the spec."""
    spec: Spec
    """What determined its bits, including the model's version and hash."""
    count: Count
    """Exact number of samples."""
    class_names: tuple[Name, ...] | None
    """Names of the labels."""
    evaluations_per_image: Annotated[int, Field(ge=1, lt=2**53)] | None = Field(
        default=None, exclude_if=lambda evaluations: evaluations is None
    )
    """Evaluations of the network for an image: a function of sampler and schedule. None in manifests of versions that
    did not state it."""
    num_shards: int = Field(ge=1, le=MAX_SHARDS)
    """Number of shards. Their entries follow under `shards`; see `read_entries`."""
    statistics: Statistics
    """Statistics of all images."""
    times: ManifestTimes
    """When it was finished, and the device time."""


def make_manifest(
    spec: Spec,
    aggregate: RecordAggregate,
    class_names: tuple[str, ...] | None,
    evaluations_per_image: int | None = None,
) -> Manifest:
    """The manifest of all done-records. ValueError when a shard or a sample is missing."""
    if aggregate.num_shards != num_shards(spec) or aggregate.images != spec.count:
        raise ValueError(
            f"the records hold {aggregate.num_shards} shards and {aggregate.images} samples, the plan "
            f"{num_shards(spec)} and {spec.count}"
        )
    statistics = Statistics(
        channel_mean=aggregate.stats.mean,
        channel_std=aggregate.stats.std,
        constant=aggregate.stats.constant,
        saturated=aggregate.stats.saturated,
        classes=dict(sorted(aggregate.classes.items())) if spec.classes is not None else None,
    )
    return Manifest(
        spec_digest=spec.digest,
        spec=spec,
        count=spec.count,
        class_names=class_names,
        evaluations_per_image=evaluations_per_image,
        num_shards=num_shards(spec),
        statistics=statistics,
        times=ManifestTimes(
            finished_at=time.time(), device_seconds=aggregate.seconds, joules=aggregate.joules
        ),
    )


def make_entries(spec: Spec, aggregate: RecordAggregate) -> Iterator[ManifestShard]:
    """The manifest's entries, one per shard, in order."""
    for number in range(num_shards(spec)):
        unit, (size, sha256) = shard(spec, number), aggregate.row(number)
        yield ManifestShard(key=unit.key, first_index=unit.first, count=unit.count, bytes=size, sha256=sha256)


def write_manifest(store: Store, manifest: Manifest, entries: Iterable[ManifestShard]) -> None:
    """Write the manifest of a complete generation."""
    with tempfile.TemporaryDirectory(prefix="ddpm-manifest-") as scratch:
        path = Path(scratch) / MANIFEST_KEY
        with path.open("wb") as file:
            file.writelines(_parts(manifest, entries))
        store.upload(MANIFEST_KEY, path)


def manifest_sha256(manifest: Manifest, entries: Iterable[ManifestShard]) -> str:
    """Hex digest of the object that `write_manifest` writes."""
    digest = hashlib.sha256()
    for part in _parts(manifest, entries):
        digest.update(part)
    return digest.hexdigest()


def _parts(manifest: Manifest, entries: Iterable[ManifestShard]) -> Iterator[bytes]:
    yield pretty(manifest.model_dump(mode="json")).removesuffix(b"\n}\n") + b",\n" + _SHARDS
    for place, entry in enumerate(entries):
        yield (b",\n" if place else b"") + b"    " + canonical(entry.model_dump(mode="json"))
    yield b"\n" + _END


def read_manifest(store: Store) -> Manifest | None:
    """The head of the manifest at a prefix, or None. DamageError when the object is not a manifest."""
    try:
        with store.open(MANIFEST_KEY) as file:
            return _head(file, f"{store.uri}/{MANIFEST_KEY}")
    except ObjectMissing:
        return None


def read_entries(store: Store) -> Iterator[ManifestShard]:
    """The shards listed by the manifest at a prefix, in order. DamageError when one is missing or malformed."""
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
    return parse_document(Manifest, head, where, "a manifest; the same ddpm generate command writes it again")
