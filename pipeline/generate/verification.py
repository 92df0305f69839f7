"""Verification: compares a prefix with its spec, records and manifest, down to the pixels of each sample."""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from pydantic_core import from_json

from ddpm_pipeline.data.formats.image_stats import image_stats, is_constant
from ddpm_pipeline.data.formats.images import decode_image
from ddpm_pipeline.data.formats.npy import Pixels
from ddpm_pipeline.data.formats.provenance import has_mark, synthetic_mark
from ddpm_pipeline.data.formats.shards import read_shard
from ddpm_pipeline.errors import DamageError
from ddpm_pipeline.generate.class_labels import labels_of
from ddpm_pipeline.generate.done_records import DoneRecord, RecordAggregate
from ddpm_pipeline.generate.heartbeat import read_heartbeats
from ddpm_pipeline.generate.layout import (
    CLAIM_PREFIX,
    CONTACT_KEY,
    DONE_PREFIX,
    JOBS_PREFIX,
    MANIFEST_KEY,
    REPORT_KEY,
    SHARD_PREFIX,
    SIGNATURE_KEY,
    SPEC_KEY,
    SUMS_KEY,
)
from ddpm_pipeline.generate.manifest import Manifest, make_entries, make_manifest, read_entries, read_manifest
from ddpm_pipeline.generate.plan import Shard
from ddpm_pipeline.generate.prefix_spec import open_generation
from ddpm_pipeline.generate.signed_manifest import check_signature, sha256_of
from ddpm_pipeline.generate.spec import Spec
from ddpm_pipeline.generate.stored_generation import Generation, PrefixListing
from ddpm_pipeline.parallel import ParallelMap, thread_map
from ddpm_pipeline.progress import Progress, no_progress
from ddpm_pipeline.signatures import PublicKey
from ddpm_pipeline.store import ObjectMissing, Store, open_store

MAX_PROBLEMS = 1000
_READERS = 4
_TOP_LEVEL = {SPEC_KEY, MANIFEST_KEY, CONTACT_KEY, REPORT_KEY, SIGNATURE_KEY, SUMS_KEY}


@dataclass(frozen=True)
class Problem:
    """A problem with one object."""

    object: str
    """Key of the object, with the sample if it concerns one."""
    what: str
    """What is wrong with it."""


@dataclass
class VerifyReport:
    """Result of a verification."""

    output: str
    spec: Spec
    complete: bool = False
    """Whether there is a manifest for the spec's count."""
    shards_checked: int = 0
    samples_checked: int = 0
    regenerated: int = 0
    """Samples that were sampled again and compared byte by byte."""
    not_judged: int = 0
    """Samples that could not be compared, or that differ where another kind of device or software made them again:
    neither sound nor damaged."""
    not_judged_because: str | None = None
    """The first reason, with the remedy."""
    duplicates: int = 0
    """Images with the same pixels as an earlier one."""
    num_problems: int = 0
    problems: list[Problem] = field(default_factory=list[Problem])
    """The first problems; `num_problems` counts all."""
    damaged: list[Shard] = field(default_factory=list[Shard])
    """Shards whose content is wrong, even if their size is right."""
    foreign: list[str] = field(default_factory=list[str])
    """Keys that belong to no generation; the first MAX_PROBLEMS of them."""
    signed_by: str | None = None
    """Id of the key that the signature was checked with; None if it was not checked."""
    notes: list[str] = field(default_factory=list[str])
    """Remarks that are no problems."""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the generation is complete and nothing is wrong with it."""
        return self.complete and not self.num_problems

    def add(self, where: str, what: str) -> None:
        """Add a problem."""
        self.num_problems += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(Problem(where, what))

    def add_not_judged(self, count: int, because: str) -> None:
        """Add samples of which nothing can be said here."""
        self.not_judged += count
        self.not_judged_because = self.not_judged_because or because

    def add_foreign(self, key: str, what: str) -> None:
        """Add an object that does not belong to the generation."""
        self.add(key, what)
        if len(self.foreign) < MAX_PROBLEMS:
            self.foreign.append(key)


@dataclass
class ShardFindings:
    """Result of checking one shard. `pixel_hashes` are 64-bit hashes of its images' pixels."""

    unit: Shard
    record: DoneRecord | None = None
    record_sha256: str | None = None
    """Of the stored record."""
    object_sha256: str | None = None
    """Of the stored shard."""
    problems: list[Problem] = field(default_factory=list[Problem])
    samples: int = 0
    pixel_hashes: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))

    def add(self, what: str, sample: str | None = None) -> None:
        self.problems.append(Problem(self.unit.key + (f" sample {sample}" if sample else ""), what))


def verify(
    uri: str,
    progress: Progress = no_progress,
    key: PublicKey | None = None,
    signed_for: str | None = None,
    shard_map: ParallelMap | None = None,
) -> VerifyReport:
    """Count, hash and decode everything under an output prefix. UserError where there is no generation.

    With `key`, what it has not signed is a problem; see `check_signature` for `signed_for`. `shard_map` checks shards;
    by default threads do.
    """
    began = time.monotonic()
    generation = open_generation(uri)
    report = VerifyReport(uri, generation.spec)
    signed = None if key is None else check_signature(generation, key, signed_for)
    for place, what in () if signed is None else signed.problems:
        report.add(place, what)
    report.signed_by = None if key is None else key.key_id
    sums = None if signed is None or not signed.sums else dict(signed.sums)
    manifest = _read_manifest(generation, report)
    listing = generation.listing()
    check_listing(generation, listing, report)
    aggregate = RecordAggregate()
    pixel_hashes: list[npt.NDArray[np.uint64]] = []
    done = listing.done()
    check = ShardCheck(uri, generation.spec)
    for findings in (shard_map or thread_map(_READERS))(check, map(generation.shard, done)):
        _compare_signed(findings, sums)
        for problem in findings.problems:
            report.add(problem.object, problem.what)
        if findings.problems:
            report.damaged.append(findings.unit)
        report.shards_checked += 1
        report.samples_checked += findings.samples
        pixel_hashes.append(findings.pixel_hashes)
        if findings.record is not None:
            aggregate.add(findings.unit.number, findings.record)
        progress(report.shards_checked, len(done))
    report.duplicates = _count_duplicates(pixel_hashes)
    if report.duplicates:
        report.add(SHARD_PREFIX, f"{report.duplicates} images have the same pixels as another one")
    if manifest is not None:
        _check_manifest(generation, manifest, aggregate, report)
    if sums is not None:
        _check_signed_rest(generation.store, sums, report)
    report.seconds = time.monotonic() - began
    return report


def _compare_signed(findings: ShardFindings, sums: dict[str, str] | None) -> None:
    """Add objects that are not those that were signed; takes what was compared out of `sums`."""
    if sums is None:
        return
    unit = findings.unit
    for key, found in ((unit.key, findings.object_sha256), (unit.done_key, findings.record_sha256)):
        if sums.pop(key, None) != found and found is not None:
            findings.problems.append(Problem(key, "is not the one that was signed"))


def _check_signed_rest(store: Store, sums: dict[str, str], report: VerifyReport) -> None:
    """Compare the signed objects that are no shards: contact sheet and report. What is missing was signed, too."""
    for key, sha256 in sums.items():
        try:
            if sha256_of(store, key) != sha256:
                report.add(key, "is not the one that was signed")
        except ObjectMissing:
            report.add(key, "is missing, though it was signed")


def discard_damaged(report: VerifyReport) -> int:
    """Delete the records of damaged shards, so that the same generate command makes them again; returns how many.

    Objects and manifest stay: after that command, keys and hashes agree with the manifest again.
    """
    store = open_store(report.output)
    for unit in report.damaged:
        store.delete(unit.done_key)
    return len(report.damaged)


def _read_manifest(generation: Generation, report: VerifyReport) -> Manifest | None:
    spec = generation.spec
    try:
        manifest = read_manifest(generation.store)
    except DamageError as error:
        report.add(MANIFEST_KEY, str(error))
        return None
    if manifest is None:
        report.notes.append(f"no {MANIFEST_KEY}: the generation is not complete")
        return None
    if manifest.spec_digest != spec.digest:
        report.add(MANIFEST_KEY, f"spec_digest is {manifest.spec_digest}, {SPEC_KEY} has {spec.digest}")
        return None
    if report.signed_by is not None and manifest.spec != spec and manifest.count == spec.count:
        report.add(SPEC_KEY, f"is not the spec of {MANIFEST_KEY}, which is signed")
    report.complete = manifest.count == spec.count
    if not report.complete:
        report.notes.append(
            f"the manifest is that of {manifest.count} samples; {spec.count} have been requested since"
        )
        return None
    return manifest


def check_listing(generation: Generation, listing: PrefixListing, report: VerifyReport) -> None:
    """Report objects that are missing, left over or foreign, by listings alone."""
    missing = listing.missing()
    if report.complete:
        for number in missing:
            unit = generation.shard(number)
            absent = unit.done_key if not listing.recorded[number] else unit.key
            report.add(absent, "missing, though the manifest says the generation is complete")
    elif missing:
        report.notes.append(f"{len(missing)} of {generation.num_shards} shards are not done yet")
    for key in listing.unexpected:
        report.add_foreign(key, "belongs to no shard of this generation")
    for key in _foreign_keys(generation.store):
        report.add_foreign(key, "is not part of a generation")
    leftover = listing.superseded if report.complete and not read_heartbeats(generation.store) else []
    for key in leftover:
        report.add(key, "is left over from a smaller count; the same ddpm generate command deletes it")


def _foreign_keys(store: Store) -> Iterator[str]:
    """Keys outside the layout. Skips the folders instead of listing them again."""
    folders = (CLAIM_PREFIX, DONE_PREFIX, JOBS_PREFIX, SHARD_PREFIX)
    after = ""
    while True:
        for info in store.list("", start_after=after):
            inside = next((folder for folder in folders if info.key.startswith(folder)), None)
            if inside is not None:
                after = inside[:-1] + "0"  # the character after '/'
                break
            if info.key not in _TOP_LEVEL:
                yield info.key
        else:
            return


@dataclass(frozen=True)
class ShardCheck:
    """Checks shards of a generation, in whichever process it is called."""

    output: str
    spec: Spec

    def __call__(self, unit: Shard) -> ShardFindings:
        """Compare one shard with its record and the plan, sample by sample."""
        return check_shard(Generation(open_store(self.output), self.spec), unit)


def check_shard(generation: Generation, unit: Shard) -> ShardFindings:
    """Compare one shard with its record and the plan, sample by sample."""
    findings = ShardFindings(unit)
    try:
        document = generation.store.read(unit.done_key)
        findings.record_sha256 = hashlib.sha256(document).hexdigest()
        record = generation.parse_record(unit, document)
        data = generation.store.read(unit.key)
    except (DamageError, ObjectMissing) as error:
        findings.add(str(error))
        return findings
    findings.record = record
    if len(data) != record.bytes:
        findings.add(f"has {len(data)} bytes, its record says {record.bytes}")
    findings.object_sha256 = sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != record.sha256:
        findings.add(f"sha256 is {sha256}, its record says {record.sha256}")
    images = _check_samples(generation.spec, data, findings)
    if len(images) == unit.count and image_stats(np.stack(images)) != record.tally:
        findings.add("the statistics of its images are not those of its record")
    return findings


def _check_samples(spec: Spec, data: bytes, findings: ShardFindings) -> list[Pixels]:
    unit, images = findings.unit, list[Pixels]()
    labels = labels_of(spec, unit.samples)
    digest = spec.digest
    keys: list[str] = []
    try:
        for key, files in read_shard(data, label=unit.key):
            place = len(keys)
            keys.append(key)
            expected = {
                "index": unit.first + place,
                "seed": spec.seed,
                "class": labels[place] if labels is not None and place < unit.count else None,
                "spec": digest,
            }
            mark = synthetic_mark(digest, unit.first + place) if spec.provenance is not None else None
            image = _check_sample(spec, key, files, expected, mark, findings)
            if image is not None:
                images.append(image)
    except DamageError as error:
        findings.add(str(error))
    planned = [f"{index:012d}" for index in unit.samples]
    if keys != planned:
        findings.add(_difference(keys, planned))
    findings.samples = len(keys)
    hashes = [hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in images]
    findings.pixel_hashes = np.frombuffer(b"".join(hashes), dtype=np.uint64)
    return images


def _check_sample(
    spec: Spec,
    key: str,
    files: dict[str, bytes],
    expected: dict[str, int | str | None],
    mark: bytes | None,
    findings: ShardFindings,
) -> Pixels | None:
    if set(files) != {spec.image_format, "json"}:
        findings.add(f"holds {sorted(files)}, not {spec.image_format} and json", key)
        return None
    try:
        found = from_json(files["json"])  # unlike the json module, it refuses endless nesting
    except ValueError as error:
        found = f"no JSON ({error})"
    if found != expected:
        findings.add(f"its json says {found}, the plan says {expected}", key)
    if mark is not None and spec.image_format != "npy" and not has_mark(files[spec.image_format], mark):
        findings.add("has not the mark of a synthetic image of this generation", key)
    try:
        image = decode_image(files[spec.image_format], spec.image_shape)
    except DamageError as error:
        findings.add(str(error), key)
        return None
    if is_constant(image[None])[0]:
        findings.add("has one value per channel", key)
    return image


def _difference(keys: list[str], planned: list[str]) -> str:
    missing = sorted(set(planned) - set(keys))
    extra = sorted(set(keys) - set(planned))
    parts = [f"{len(keys)} samples where the plan has {len(planned)}"] if len(keys) != len(planned) else []
    parts += [f"missing {', '.join(missing[:5])}"] * bool(missing)
    parts += [f"not in the plan: {', '.join(extra[:5])}"] * bool(extra)
    return "; ".join(parts) or "the samples are out of order"


def _count_duplicates(pixel_hashes: list[npt.NDArray[np.uint64]]) -> int:
    if not pixel_hashes:
        return 0
    hashes = np.concatenate(pixel_hashes)
    return int(hashes.size - np.unique(hashes).size)


def _check_manifest(
    generation: Generation, manifest: Manifest, aggregate: RecordAggregate, report: VerifyReport
) -> None:
    spec = generation.spec
    if aggregate.num_shards != generation.num_shards:
        return  # each missing shard is reported already
    try:
        expected = make_manifest(spec, aggregate, manifest.class_names)
        for ours, theirs in zip(make_entries(spec, aggregate), read_entries(generation.store), strict=True):
            if ours != theirs:
                report.add(MANIFEST_KEY, f"its entry of {ours.key} differs from the done-record")
    except (DamageError, ValueError) as error:
        report.add(MANIFEST_KEY, str(error))
        return
    if expected.statistics != manifest.statistics:
        report.add(MANIFEST_KEY, "its statistics differ from those of the done-records")
