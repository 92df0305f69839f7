"""Is a generation that has a manifest still complete? Compares the manifest with listings and, of all but huge
generations, with done-records. Reads no image: `ddpm_pipeline.generate.verification` decodes them all.
"""

import re
from dataclasses import dataclass, field

from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.generate.layout import CONTACT_KEY, MANIFEST_KEY, REPORT_KEY
from ddpm_pipeline.generate.manifest import Manifest, ManifestShard, read_entries, read_manifest
from ddpm_pipeline.generate.stored_generation import Generation, PrefixListing
from ddpm_pipeline.store import ObjectMissing, Store

MAX_RECORDS_READ = 2_000
"""Up to this many shards, every done-record is read; of larger generations only listings are compared."""
MAX_FAULTS = 20
_HEAD_BYTES = 512


@dataclass
class Completeness:
    """Result of comparing a generation with its manifest."""

    manifest: Manifest | None = None
    """The manifest, if there is one of the requested generation and count."""
    faults: list[str] = field(default_factory=list[str])
    """What contradicts the manifest, `KEY: what`; the first `MAX_FAULTS` of them."""
    num_faults: int = 0
    listing: PrefixListing | None = None
    """The listing, if there is such a manifest."""

    @property
    def complete(self) -> bool:
        """Whether there is a manifest and nothing contradicts it."""
        return self.manifest is not None and not self.num_faults

    def add(self, key: str, what: str) -> None:
        """Add a fault."""
        self.num_faults += 1
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(f"{key}: {what}")


def require_complete(generation: Generation) -> Manifest:
    """The manifest of a complete generation. UserError, with what to do, for one that is not or no longer complete."""
    found, uri, count = check_complete(generation), generation.uri, generation.spec.count
    if found.faults:
        raise UserError(
            f"{uri}: is no longer complete ({found.faults[0]}); ddpm verify {uri} says what to do"
        )
    if found.manifest is None:
        raise UserError(
            f"{uri}: is not complete; the same ddpm generate command (count={count}) makes what is missing"
        )
    return found.manifest


def check_complete(generation: Generation) -> Completeness:
    """Compare the manifest of a generation with its objects. A missing manifest is no fault: it is unfinished.

    Names and sizes of all objects are compared, and done-records are read (see MAX_RECORDS_READ). A manifest of a
    smaller count of the same generation is no fault either: it is about to be replaced.
    """
    found, spec, uri = Completeness(), generation.spec, generation.uri
    try:
        manifest = read_manifest(generation.store)
        if manifest is None:
            return found
        if manifest.spec_digest != spec.digest or manifest.spec.digest != spec.digest:
            found.add(MANIFEST_KEY, "is that of another generation (its spec_digest differs)")
            return found
        if manifest.count != spec.count:
            return found
        found.manifest = manifest
        found.listing = listing = generation.listing()
        entries = _check_entries(generation, listing, found)
        _check_report(generation, found)
    except (DamageError, ObjectMissing) as error:
        found.add(MANIFEST_KEY, str(error).removeprefix(f"{uri}/{MANIFEST_KEY}: "))
        return found
    if generation.num_shards <= MAX_RECORDS_READ:
        _check_records(generation, listing, entries, found)
    return found


def _check_entries(
    generation: Generation, listing: PrefixListing, found: Completeness
) -> list[ManifestShard]:
    """Compare the manifest's entries with plan and listing; return them if records will be compared as well."""
    total = generation.num_shards
    entries: list[ManifestShard] = []
    number = -1
    for number, entry in enumerate(read_entries(generation.store)):
        if number >= total:
            break
        unit = generation.shard(number)
        if (entry.key, entry.first_index, entry.count) != (unit.key, unit.first, unit.count):
            found.add(MANIFEST_KEY, f"its entry {number} is {entry.key}, the plan says {unit.key}")
        elif listing.sizes[number] < 0:
            found.add(unit.key, "is missing")
        elif listing.sizes[number] != entry.bytes:
            found.add(unit.key, f"has {listing.sizes[number]} bytes, the manifest says {entry.bytes}")
        if not listing.recorded[number]:
            found.add(unit.done_key, "is missing")
        if total <= MAX_RECORDS_READ:
            entries.append(entry)
    if number + 1 != total:
        found.add(MANIFEST_KEY, f"does not list the {total} shards of the plan")
    return entries


def _check_report(generation: Generation, found: Completeness) -> None:
    if generation.store.stat(CONTACT_KEY) is None:
        found.add(CONTACT_KEY, "is missing")
    try:
        count = _report_count(generation.store)
    except ObjectMissing:
        found.add(REPORT_KEY, "is missing")
        return
    if count is not None and count != generation.spec.count:
        found.add(REPORT_KEY, f"is that of {count:,} samples")


def _report_count(store: Store) -> int | None:
    """The count in the title of the stored report; None if it has none. Raises ObjectMissing."""
    with store.open(REPORT_KEY) as file:
        title = re.search(rb"<title>([0-9,]{1,20}) samples of ", file.read(_HEAD_BYTES))
    return None if title is None else int(title[1].replace(b",", b""))


def _check_records(
    generation: Generation, listing: PrefixListing, entries: list[ManifestShard], found: Completeness
) -> None:
    recorded = [number for number in range(len(entries)) if listing.recorded[number]]
    for number, record in generation.read_records(recorded):
        key = generation.shard(number).done_key
        if isinstance(record, str):
            found.add(key, record.removeprefix(f"{generation.uri}/{key}: "))
        elif (record.bytes, record.sha256) != (entries[number].bytes, entries[number].sha256):
            found.add(key, "describes other bytes than the manifest's entry")
