"""What stands at the place of a pack: its plan, records of finished shards, the source it was made of.

pack-plan.json     written first, by agreement of all who start there at once: which pack this place is for
parts/             a record and a member table beside each finished shard; gone when the index is there
pack-source.json   written last: a fingerprint of the source, and the index's digest
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from pipeline.config.base import Settings
from pipeline.config.data import PackConfig
from pipeline.config.json_document import parse_document
from pipeline.data.formats.png import ENCODER
from pipeline.data.index import (
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
from pipeline.data.location import SUFFIXES, Location
from pipeline.data.packing.pack_plan import PackPlan, PackReport, ShardPlan, settings_digest
from pipeline.data.packing.scan_shard import index_shard
from pipeline.errors import DamageError, UserError
from pipeline.store import ObjectInfo, ObjectMissing, Store, open_store
from pipeline.store.prefix_claim import agree, clear_claims

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
    """Which pack a place is for."""

    digest: Digest
    """Of the images and settings."""
    settings: Digest | None = None
    """Of the settings alone; None in plans of earlier versions."""
    listing: Digest | None = None
    """Of names and labels alone; None in plans of earlier versions, and where some were held out."""
    encoder: Annotated[int, Field(ge=1, le=ENCODER)] = 1
    """Which way images are compressed, see pipeline.data.formats.png; 1 in plans of earlier versions."""

    @property
    def by_bytes(self) -> bool:
        """Whether `shard_bytes` had a part in cutting the shards; version 0.1.0 knew `shard_size` only."""
        return self.settings is not None


class ShardRecord(Settings):
    """The record beside a finished shard."""

    plan: Digest
    entry: ShardEntry


class PackedSource(Settings):
    """What a pack was made of."""

    fingerprint: Digest | None
    """See pipeline.data.packing.fingerprint."""
    index_digest: Digest
    """Of the index that was written then."""


def read_destination(config: PackConfig) -> PlanDocument | None:
    """The plan that stands at the destination, or None for an empty place.

    Raises UserError, before any image is read, when it is of other settings or no pack's, and for an address that
    readers would take for a pattern of shards.
    """
    if Location.of(config.dest).pattern is not None:
        raise UserError(
            f"dest: {config.dest} would be read as a pattern of shards; name it without {{, *, ? and .tar"
        )
    store = open_store(config.dest)
    store.require_container()
    plan = _read_plan(store)
    if plan is None:
        strange = next((o.key for o in store.list() if o.key.endswith((*SUFFIXES, "index.json"))), None)
        if strange is not None and _read_plan(store) is None:  # not of a pack that has begun meanwhile
            raise UserError(f"dest: {config.dest} holds other data ({strange}); choose an empty place")
        return None
    if plan.settings not in (None, settings_digest(config)):
        raise destination_taken(config.dest)
    return plan


def destination_taken(dest: str) -> UserError:
    """The refusal of a place that is taken."""
    return UserError(f"dest: {dest} holds a pack of other images or settings; choose an empty place")


def begin_pack(store: Store, plan: PackPlan) -> PlanDocument:
    """Claim the destination for this plan; what stands there then. Of plans that begin at once one stands.

    Raises UserError for the others.
    """
    document = PlanDocument(digest=plan.digest, settings=plan.settings, listing=plan.listing, encoder=ENCODER)

    def read() -> str | None:
        found = _read_plan(store)
        return None if found is None else found.model_dump_json()

    stands = read() or agree(
        store,
        CLAIMS,
        document.model_dump_json(exclude_none=True),
        read,
        lambda text: store.write(PLAN_KEY, text.encode() + b"\n"),
    )
    standing = PlanDocument.model_validate_json(stands)
    if standing.digest != plan.digest:
        raise destination_taken(store.uri)
    return standing


def refuse_foreign_shards(config: PackConfig, plan: PackPlan) -> None:
    """Raise UserError for shards at the destination that this pack did not make: an index would not fit them."""
    keys = {unit.key for unit in plan.shards}
    stray = [o.key for o in open_store(config.dest).list() if o.key.endswith(SUFFIXES) and o.key not in keys]
    if stray:
        raise UserError(
            f"dest: {config.dest} holds {stray[0]} ({len(stray)} such), which is not of this pack; move it away"
        )


def finished_report(config: PackConfig, seen: str) -> PackReport | None:
    """The report of a finished pack whose source had the fingerprint `seen`; None when that cannot be told."""
    store = open_store(config.dest)
    made_of = packed_source(store)
    if made_of is None or made_of.fingerprint != seen:
        return None
    try:
        index = load_index(config.dest)
        report = _REPORT.validate_json(store.read(PACK_REPORT_KEY))
    except (UserError, DamageError, ValidationError):
        return None  # which the longer way finds out about, and mends
    if index.digest != made_of.index_digest:
        return None
    return _as_complete(report, index)


def completed(config: PackConfig, plan: PackPlan) -> PackReport | None:
    """The report of this very pack if it is there, whole; None when there is work to do.

    Raises UserError when the destination holds another.
    """
    store = open_store(config.dest)
    there = _read_plan(store)
    if there is None:
        return None
    if there.digest != plan.digest:
        raise destination_taken(config.dest)
    if store.stat(PACK_REPORT_KEY) is None:
        return None
    try:
        index = load_index(config.dest)
    except (UserError, DamageError):
        return None  # changed since: it is put right
    made_of = packed_source(store)
    expected = index.digest if made_of is None else made_of.index_digest
    same = (index.num_samples, index.class_names) == (plan.report.num_samples, plan.class_names)
    if not same or index.digest != expected or [s.name for s in index.shards] != [u.key for u in plan.shards]:
        return None
    delete_records(store, plan)  # a job killed at the very end left them
    return _as_complete(plan.report, index)


def finished_shards(config: PackConfig, plan: PackPlan) -> dict[int, Scan]:
    """Shards of the plan that need not be made: recorded, or in the index that this pack once wrote."""
    store = open_store(config.dest)
    there = {info.key: info for info in store.list("shards/")}
    indexed = _indexed_scans(config, store, there)
    found: dict[int, Scan] = {}
    for unit in plan.shards:
        scan = indexed.get(unit.key) or _recorded_scan(store, plan.digest, unit, there.get(unit.key))
        if scan is not None:
            found[unit.number] = scan
    return found


def delete_records(store: Store, plan: PackPlan) -> None:
    """Delete what is of no use once the index is there."""
    keys = [key for unit in plan.shards for key in (unit.record_key, unit.table_key)]
    there = {info.key for info in store.list("parts/")}
    for key in there.intersection(keys):
        store.delete(key)
    clear_claims(store, CLAIMS)


def packed_source(store: Store) -> PackedSource | None:
    """What the pack at this place was made of; None when that is not recorded, or damaged."""
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
        raise UserError(f"dest: {error}; choose an empty place, or remove what is there") from None


def _indexed_scans(config: PackConfig, store: Store, there: Mapping[str, ObjectInfo]) -> dict[str, Scan]:
    """What the index tells, if it is the one this pack wrote; a shard written anew since is compared by its hash."""
    made_of = packed_source(store)
    try:
        index = load_index(config.dest, check=False)
    except (UserError, DamageError):
        return {}
    if made_of is None or made_of.index_digest != index.digest:
        return {}
    found: dict[str, Scan] = {}
    for number, entry in enumerate(index.shards):
        info = there.get(entry.name)
        if info is None or info.size_bytes != entry.size_bytes:
            continue
        try:
            if info.etag == entry.etag:
                found[entry.name] = (entry, read_table(index, number, store))
                continue
            scanned, table = index_shard(store, entry.name, pixels=True)
        except (DamageError, ObjectMissing):
            continue  # it is made again
        if scanned.sha256 == entry.sha256:
            found[entry.name] = (scanned, table)
    return found


def _recorded_scan(store: Store, plan_digest: str, unit: ShardPlan, found: ObjectInfo | None) -> Scan | None:
    """The shard's entry and table, if its record is of this plan and the object is the one recorded."""
    if found is None:
        return None
    try:
        part = parse_document(ShardRecord, store.read(unit.record_key), unit.record_key, "a record")
        data = store.read(unit.table_key)
    except (ObjectMissing, DamageError):
        return None  # it is made again
    entry = part.entry
    same = (entry.name, entry.size_bytes) == (found.key, found.size_bytes)
    if same and entry.etag != found.etag and sha256_of(store, found) == entry.sha256:
        entry = entry.model_copy(update={"etag": found.etag})  # another job wrote the same bytes
    if (
        not same
        or entry.etag != found.etag
        or part.plan != plan_digest
        or len(data) != entry.num_samples * MEMBER.itemsize
    ):
        return None
    table = np.frombuffer(data, MEMBER)
    return (entry, table) if table_hash(table) == entry.table_sha256 else None
