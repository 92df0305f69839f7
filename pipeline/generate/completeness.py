"""Is a generation that has a manifest still complete? Told from the manifest, the listings, and the records of a
generation that is not vast; no image is read. `pipeline.generate.verification` reads and decodes everything.
"""

import re
from dataclasses import dataclass, field

from pipeline.errors import DamageError
from pipeline.generate.layout import CONTACT_KEY, MANIFEST_KEY, REPORT_KEY
from pipeline.generate.listing import PrefixListing, list_prefix, read_records
from pipeline.generate.manifest import Manifest, ManifestShard, read_entries, read_manifest
from pipeline.generate.plan import num_shards, shard
from pipeline.generate.spec import Spec
from pipeline.store import ObjectMissing, Store

RECORDS_READ = 2_000
"""Up to so many shards, every done-record is read; of larger generations only listings are compared."""
MAX_FAULTS = 20
_HEAD_BYTES = 512


@dataclass
class Completeness:
    """What a look at a generation came to."""

    manifest: Manifest | None = None
    """The manifest, where it is one of the generation and count that were asked about."""
    faults: list[str] = field(default_factory=list[str])
    """What contradicts the manifest, `KEY: what`; the first of them."""
    num_faults: int = 0
    listed: PrefixListing | None = None
    """The listings, where there is such a manifest."""

    @property
    def complete(self) -> bool:
        """Whether there is a manifest and nothing contradicts it."""
        return self.manifest is not None and not self.num_faults

    def add(self, key: str, what: str) -> None:
        """Note a fault."""
        self.num_faults += 1
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(f"{key}: {what}")


def check_complete(store: Store, spec: Spec) -> Completeness:
    """Compare manifest and objects of `spec` at a prefix. A prefix without manifest has no fault; it is unfinished.

    Names and sizes of all objects are compared, done-records read (see RECORDS_READ). A manifest of a smaller count of
    the same generation is no fault either: its successor is still to come.
    """
    found = Completeness()
    try:
        manifest = read_manifest(store)
        if manifest is None:
            return found
        if manifest.spec_digest != spec.digest or manifest.spec.digest != spec.digest:
            found.add(MANIFEST_KEY, "is that of another generation (its spec_digest differs)")
            return found
        if manifest.count != spec.count:
            return found
        found.manifest = manifest
        found.listed = listed = list_prefix(store, spec)
        entries = _check_entries(store, spec, listed, found)
        _check_pictures(store, spec, found)
    except (DamageError, ObjectMissing) as error:
        found.add(MANIFEST_KEY, str(error).removeprefix(f"{store.uri}/{MANIFEST_KEY}: "))
        return found
    if num_shards(spec) <= RECORDS_READ:
        _check_records(store, spec, listed, entries, found)
    return found


def _check_entries(
    store: Store, spec: Spec, listed: PrefixListing, found: Completeness
) -> list[ManifestShard]:
    """Compare the manifest's entries with plan and listing; returns them where records will be compared as well."""
    keep = num_shards(spec) <= RECORDS_READ
    kept: list[ManifestShard] = []
    number = -1
    for number, entry in enumerate(read_entries(store)):
        if number >= num_shards(spec):
            break
        unit = shard(spec, number)
        if (entry.key, entry.first_index, entry.count) != (unit.key, unit.first, unit.count):
            found.add(MANIFEST_KEY, f"its entry {number} is {entry.key}, the plan says {unit.key}")
        elif listed.sizes[number] < 0:
            found.add(unit.key, "is missing")
        elif listed.sizes[number] != entry.bytes:
            found.add(unit.key, f"has {listed.sizes[number]} bytes, the manifest says {entry.bytes}")
        if not listed.recorded[number]:
            found.add(unit.done_key, "is missing")
        if keep:
            kept.append(entry)
    if number + 1 != num_shards(spec):
        found.add(MANIFEST_KEY, f"does not list the {num_shards(spec)} shards of the plan")
    return kept


def _check_pictures(store: Store, spec: Spec, found: Completeness) -> None:
    if store.stat(CONTACT_KEY) is None:
        found.add(CONTACT_KEY, "is missing")
    try:
        told = _report_count(store)
    except ObjectMissing:
        found.add(REPORT_KEY, "is missing")
        return
    if told is not None and told != spec.count:
        found.add(REPORT_KEY, f"is that of {told:,} samples")


def _report_count(store: Store) -> int | None:
    """The count in the title of the stored report; None if it has none. Raises ObjectMissing."""
    with store.open(REPORT_KEY) as file:
        found = re.search(rb"<title>([0-9,]{1,20}) samples of ", file.read(_HEAD_BYTES))
    return None if found is None else int(found[1].replace(b",", b""))


def _check_records(
    store: Store, spec: Spec, listed: PrefixListing, entries: list[ManifestShard], found: Completeness
) -> None:
    present = [number for number in range(len(entries)) if listed.recorded[number]]
    for number, record in read_records(store, spec, present):
        key = shard(spec, number).done_key
        if isinstance(record, str):
            found.add(key, record.removeprefix(f"{store.uri}/{key}: "))
        elif (record.bytes, record.sha256) != (entries[number].bytes, entries[number].sha256):
            found.add(key, "is of other bytes than the manifest's entry")
