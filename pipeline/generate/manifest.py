"""The manifest: the proof that a generation is complete. Written last, replaced whole, never edited."""

import time
from typing import Literal

from pydantic import ValidationError

from pipeline.config.base import Settings
from pipeline.errors import DamageError
from pipeline.generate.ledger import Harvest
from pipeline.generate.plan import num_shards, shard
from pipeline.generate.spec import Spec, pretty
from pipeline.store import ObjectMissing, Store

MANIFEST_KEY = "manifest.json"


class ShardEntry(Settings):
    """One shard of a complete generation."""

    key: str
    """Key of the tar, relative to the prefix."""
    first_index: int
    """Index of its first sample."""
    count: int
    """Samples in it."""
    bytes: int
    """Size of the object."""
    sha256: str
    """Hex digest of the object."""


class Statistics(Settings):
    """What the whole generation adds up to."""

    channel_mean: tuple[float, ...]
    """Mean of each channel, uint8 levels."""
    channel_std: tuple[float, ...]
    """Standard deviation of each channel, uint8 levels."""
    constant: int
    """Images of one flat colour."""
    saturated: int
    """Images of nothing but 0 and 255."""
    classes: dict[int, int] | None
    """Samples of each label; None without classes."""


class ManifestTimes(Settings):
    """The only part of a manifest that another run of the same work would write otherwise."""

    finished_at: float
    """Seconds since 1970 (UTC)."""
    device_seconds: float
    """Device time of all shards, added up."""


class Manifest(Settings):
    """A complete generation: who sees this object sees all of it."""

    format: Literal[1] = 1
    """Version of the layout of a generation."""
    spec_digest: str
    """Names the generation."""
    spec: Spec
    """What determined its bits, the model's version and hash among it."""
    count: int
    """Samples, exactly."""
    class_names: tuple[str, ...] | None
    """Names of the labels."""
    shards: tuple[ShardEntry, ...]
    """Every shard, in order of its samples."""
    statistics: Statistics
    """Sums over all images."""
    times: ManifestTimes
    """When, and how long."""


def make_manifest(spec: Spec, harvest: Harvest, class_names: tuple[str, ...] | None) -> Manifest:
    """The manifest of a complete harvest. ValueError when a shard or a sample is lacking."""
    if len(harvest.rows) != num_shards(spec) or harvest.images != spec.count:
        raise ValueError(
            f"harvest holds {len(harvest.rows)} shards and {harvest.images} samples, the plan "
            f"{num_shards(spec)} and {spec.count}"
        )
    entries: list[ShardEntry] = []
    for number in range(num_shards(spec)):
        unit, (size, sha256) = shard(spec, number), harvest.rows[number]
        entry = ShardEntry(key=unit.key, first_index=unit.first, count=unit.count, bytes=size, sha256=sha256)
        entries.append(entry)
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
        shards=tuple(entries),
        statistics=statistics,
        times=ManifestTimes(finished_at=time.time(), device_seconds=harvest.seconds),
    )


def write_manifest(store: Store, manifest: Manifest) -> None:
    """Publish a generation."""
    store.write(MANIFEST_KEY, pretty(manifest.model_dump(mode="json")))


def read_manifest(store: Store) -> Manifest | None:
    """The manifest at a prefix, or None. DamageError when the object is none."""
    try:
        return Manifest.model_validate_json(store.read(MANIFEST_KEY))
    except ObjectMissing:
        return None
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise DamageError(
            f"{store.uri}/{MANIFEST_KEY}: no manifest ({fault['loc']}: {fault['msg']})"
        ) from None
