"""State of a pack at its destination: the plan, records of finished shards, and the source.

pack-plan.json     written first, agreed on by all jobs that start at once: identifies the pack
parts/             a record and a member table for each finished shard; deleted when the index is written
pack-source.json   written last: a fingerprint of the source, and the index's digest
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.config.json_document import parse_document
from ddpm_pipeline.data.formats.png import ENCODER
from ddpm_pipeline.data.index import (
    MEMBER,
    PACK_REPORT_KEY,
    PLAN_KEY,
    Index,
    MemberTable,
    ShardEntry,
    load_index,
    read_table,
    table_hash,
)
from ddpm_pipeline.data.location import SUFFIXES, Location
from ddpm_pipeline.data.packing.pack_plan import PackPlan, PackReport, ShardPlan, settings_digest
from ddpm_pipeline.data.packing.scan_shard import index_shard
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.store import ABSENT, ObjectInfo, ObjectMissing, Store, open_store
from ddpm_pipeline.store.prefix_claim import agree, clear_claims

SOURCE_KEY, CLAIMS = "pack-source.json", "claims/"
CARD = b"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: shards/*.tar
---
A WebDataset, packed by `ddpm pack`. The shards are `shards/*.tar`; the other files are their index and records.
"""
"""Tells Hugging Face's `load_dataset` which files are the data."""
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Scan = tuple[ShardEntry, MemberTable]
_REPORT = TypeAdapter(PackReport)


class PlanDocument(Settings):
    """Identifies the pack at a destination."""

    digest: Digest
    """Digest of the images and settings."""
    settings: Digest | None = None
    """Digest of the settings; None in plans of earlier versions."""
    listing: Digest | None = None
    """Digest of names and labels; None in plans of earlier versions, and with held-out images."""
    encoder: Annotated[int, Field(ge=1, le=ENCODER)] = 1
    """Version of the image compression, see ddpm_pipeline.data.formats.png; 1 in plans of earlier versions."""

    @property
    def by_bytes(self) -> bool:
        """Whether `shard_bytes` limits the shards; version 0.1.0 had only `shard_size`."""
        return self.settings is not None


class ShardRecord(Settings):
    """The record of a finished shard."""

    plan: Digest
    entry: ShardEntry


class PackedSource(Settings):
    """The source of a pack."""

    fingerprint: Digest | None
    """See ddpm_pipeline.data.packing.fingerprint."""
    index_digest: Digest
    """Digest of the index that the pack wrote."""


def read_destination(config: PackConfig) -> PlanDocument | None:
    """The plan at the destination, or None if it is empty.

    Raises UserError, before any image is read, for a pack with other settings, for other data, and for a URI that
    readers would take for a pattern of shards.
    """
    if Location.of(config.dest).pattern is not None:
        raise UserError(
            f"dest: {config.dest} would be read as a pattern of shards; choose a name without {{, *, ? and .tar"
        )
    store = open_store(config.dest)
    store.require_container()
    plan = _read_plan(store)
    if plan is None:
        other = next((o.key for o in store.list() if o.key.endswith((*SUFFIXES, "index.json"))), None)
        if other is not None and _read_plan(store) is None:  # not of a pack started meanwhile
            raise UserError(f"dest: {config.dest} contains other data ({other}); choose an empty prefix")
        return None
    if plan.settings not in (None, settings_digest(config)):
        raise destination_taken(config.dest)
    return plan


def destination_taken(dest: str) -> UserError:
    """The error for a destination that holds another pack."""
    return UserError(f"dest: {dest} contains a pack of other images or settings; choose an empty prefix")


def begin_pack(store: Store, plan: PackPlan) -> PlanDocument:
    """Claim the destination for this plan. Returns the stored plan. Of several jobs that start at once, one plan wins.

    Raises UserError for jobs with another plan.
    """
    document = PlanDocument(digest=plan.digest, settings=plan.settings, listing=plan.listing, encoder=ENCODER)

    def read() -> str | None:
        found = _read_plan(store)
        return None if found is None else found.model_dump_json()

    agreed = read() or agree(
        store,
        CLAIMS,
        document.model_dump_json(exclude_none=True),
        read,
        lambda text: store.write(PLAN_KEY, text.encode() + b"\n", replaces=ABSENT),
    )
    stored = PlanDocument.model_validate_json(agreed)
    if stored.digest != plan.digest:
        raise destination_taken(store.uri)
    return stored


def refuse_foreign_shards(config: PackConfig, plan: PackPlan) -> None:
    """Raise UserError for shards at the destination that are not of this pack: the index would not match them."""
    keys = {shard.key for shard in plan.shards}
    foreign = [
        o.key for o in open_store(config.dest).list() if o.key.endswith(SUFFIXES) and o.key not in keys
    ]
    if foreign:
        raise UserError(
            f"dest: {config.dest} contains {foreign[0]} ({len(foreign)} such), not part of this pack; move it away"
        )


def finished_report(config: PackConfig, source_fingerprint: str) -> PackReport | None:
    """The report of a finished pack whose source has this fingerprint; None if unknown."""
    store = open_store(config.dest)
    recorded_source = packed_source(store)
    if recorded_source is None or recorded_source.fingerprint != source_fingerprint:
        return None
    try:
        index = load_index(config.dest)
        report = _REPORT.validate_json(store.read(PACK_REPORT_KEY))
    except (UserError, DamageError, ValidationError):
        return None  # the full pack finds and repairs it
    if index.digest != recorded_source.index_digest:
        return None
    return _as_complete(report, index)


def completed(config: PackConfig, plan: PackPlan) -> PackReport | None:
    """The report of exactly this pack if it is complete; None if there is work to do.

    Raises UserError when the destination contains another pack.
    """
    store = open_store(config.dest)
    stored_plan = _read_plan(store)
    if stored_plan is None:
        return None
    if stored_plan.digest != plan.digest:
        raise destination_taken(config.dest)
    if store.stat(PACK_REPORT_KEY) is None:
        return None
    try:
        index = load_index(config.dest)
    except (UserError, DamageError):
        return None  # changed since; it is repaired
    recorded_source = packed_source(store)
    expected = index.digest if recorded_source is None else recorded_source.index_digest
    same = (index.num_samples, index.class_names) == (plan.report.num_samples, plan.class_names)
    if not same or index.digest != expected or [s.name for s in index.shards] != [u.key for u in plan.shards]:
        return None
    delete_records(store, plan)  # left by a job killed at the end
    return _as_complete(plan.report, index)


def finished_shards(config: PackConfig, plan: PackPlan) -> dict[int, Scan]:
    """Shards of the plan that are finished: recorded, or in an index that this pack wrote before."""
    store = open_store(config.dest)
    objects = {info.key: info for info in store.list("shards/")}
    indexed = _indexed_scans(config, store, objects)
    found: dict[int, Scan] = {}
    for shard in plan.shards:
        scan = indexed.get(shard.key) or _recorded_scan(store, plan.digest, shard, objects.get(shard.key))
        if scan is not None:
            found[shard.number] = scan
    return found


def delete_records(store: Store, plan: PackPlan) -> None:
    """Delete what is not needed once the index exists."""
    keys = [key for shard in plan.shards for key in (shard.record_key, shard.table_key)]
    existing = {info.key for info in store.list("parts/")}
    for key in existing.intersection(keys):
        store.delete(key)
    clear_claims(store, CLAIMS)


def packed_source(store: Store) -> PackedSource | None:
    """The source of the pack in this store; None if it is not recorded, or damaged."""
    try:
        return parse_document(PackedSource, store.read(SOURCE_KEY), store.uri, "a packed source")
    except (ObjectMissing, DamageError):
        return None


def sha256_of(store: Store, info: ObjectInfo) -> str:
    """SHA-256 of an object's bytes."""
    digest = hashlib.sha256()
    with store.open(info.key, etag=info.etag) as stream:
        while data := stream.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def _as_complete(report: PackReport, index: Index) -> PackReport:
    return replace(report, index_digest=index.digest, already_complete=True)


def _read_plan(store: Store) -> PlanDocument | None:
    try:
        data = store.read(PLAN_KEY)
    except ObjectMissing:
        return None
    try:
        return parse_document(PlanDocument, data, f"{store.uri}/{PLAN_KEY}", "the plan of a pack")
    except DamageError as error:
        raise UserError(f"dest: {error}; choose an empty prefix, or remove its content") from None


def _indexed_scans(config: PackConfig, store: Store, objects: Mapping[str, ObjectInfo]) -> dict[str, Scan]:
    """The scans in the index, if this pack wrote it. Shards written again since are compared by hash."""
    recorded_source = packed_source(store)
    try:
        index = load_index(config.dest, check=False)
    except (UserError, DamageError):
        return {}
    if recorded_source is None or recorded_source.index_digest != index.digest:
        return {}
    found: dict[str, Scan] = {}
    for number, entry in enumerate(index.shards):
        info = objects.get(entry.name)
        if info is None or info.size_bytes != entry.size_bytes:
            continue
        try:
            if info.etag == entry.etag:
                found[entry.name] = (entry, read_table(index, number, store))
                continue
            scanned, table = index_shard(store, entry.name, pixels=True)
        except (DamageError, ObjectMissing):
            continue  # it is packed again
        if scanned.sha256 == entry.sha256:
            found[entry.name] = (scanned, table)
    return found


def _recorded_scan(store: Store, plan_digest: str, shard: ShardPlan, found: ObjectInfo | None) -> Scan | None:
    """The shard's entry and table, if its record is of this plan and matches the object."""
    if found is None:
        return None
    try:
        record = parse_document(ShardRecord, store.read(shard.record_key), shard.record_key, "a record")
        data = store.read(shard.table_key)
    except (ObjectMissing, DamageError):
        return None  # it is packed again
    entry = record.entry
    same = (entry.name, entry.size_bytes) == (found.key, found.size_bytes)
    if same and entry.etag != found.etag and sha256_of(store, found) == entry.sha256:
        entry = entry.model_copy(update={"etag": found.etag})  # another job wrote the same bytes
    if (
        not same
        or entry.etag != found.etag
        or record.plan != plan_digest
        or len(data) != entry.num_samples * MEMBER.itemsize
    ):
        return None
    table = np.frombuffer(data, MEMBER)
    return (entry, table) if table_hash(table) == entry.table_sha256 else None
