"""Verification: is a prefix what its spec, records and manifest say, down to each sample's pixels?"""

import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import numpy.typing as npt
from pydantic_core import from_json

from pipeline.data.formats.image_stats import image_stats, is_constant
from pipeline.data.formats.images import decode_image
from pipeline.data.formats.npy import Pixels
from pipeline.data.formats.shards import read_shard
from pipeline.errors import DamageError, UserError
from pipeline.generate.class_labels import labels_of
from pipeline.generate.done_records import DoneRecord, read_record
from pipeline.generate.heartbeat import read_heartbeats
from pipeline.generate.layout import (
    CLAIM_PREFIX,
    CONTACT_KEY,
    DONE_PREFIX,
    JOBS_PREFIX,
    MANIFEST_KEY,
    REPORT_KEY,
    SHARD_PREFIX,
    SPEC_KEY,
)
from pipeline.generate.listing import PrefixListing, RecordAggregate, list_prefix
from pipeline.generate.manifest import Manifest, make_entries, make_manifest, read_entries, read_manifest
from pipeline.generate.plan import Shard, num_shards, shard
from pipeline.generate.proven_count import proven_spec
from pipeline.generate.spec import Spec
from pipeline.store import ObjectMissing, Store, open_store

MAX_PROBLEMS = 1000
_READERS = 4
_TOP_LEVEL = {SPEC_KEY, MANIFEST_KEY, CONTACT_KEY, REPORT_KEY}


@dataclass(frozen=True)
class Problem:
    """Something wrong with one object."""

    object: str
    """Key of the object, with the sample where there is one."""
    what: str
    """What is wrong with it."""


@dataclass
class VerifyReport:
    """What verification found."""

    output: str
    spec: Spec
    complete: bool = False
    """Whether there is a manifest for the spec's count."""
    shards_checked: int = 0
    samples_checked: int = 0
    regenerated: int = 0
    """Samples made again and compared byte by byte."""
    duplicates: int = 0
    """Images that equal an earlier one, pixel by pixel."""
    num_problems: int = 0
    problems: list[Problem] = field(default_factory=list[Problem])
    """The first problems; `num_problems` counts all."""
    damaged: list[Shard] = field(default_factory=list[Shard])
    """Shards whose bytes are not what they should be, though their sizes may be."""
    foreign: list[str] = field(default_factory=list[str])
    """Keys that belong to no generation; the first of them."""
    notes: list[str] = field(default_factory=list[str])
    """What is worth knowing and not wrong."""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the generation is complete and nothing is wrong with it."""
        return self.complete and not self.num_problems

    def add(self, where: str, what: str) -> None:
        """Note a problem."""
        self.num_problems += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(Problem(where, what))

    def add_foreign(self, key: str, what: str) -> None:
        """Note an object that is not the generation's."""
        self.add(key, what)
        if len(self.foreign) < MAX_PROBLEMS:
            self.foreign.append(key)


@dataclass
class _ShardFindings:
    """What one shard's check came to. `prints` are 64-bit fingerprints of its images' pixels."""

    unit: Shard
    record: DoneRecord | None = None
    problems: list[Problem] = field(default_factory=list[Problem])
    samples: int = 0
    prints: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))

    def add(self, what: str, sample: str | None = None) -> None:
        self.problems.append(Problem(self.unit.key + (f" sample {sample}" if sample else ""), what))


def verify(uri: str, progress: Callable[[int, int], None] = lambda done, total: None) -> VerifyReport:
    """Recount, rehash and decode everything under an output prefix. UserError where there is no generation."""
    began = time.monotonic()
    store = open_store(uri)
    store.require_container()
    spec = proven_spec(store)
    if spec is None:
        raise UserError(f"{uri}: no {SPEC_KEY} there, so no generation; check the prefix")
    report = VerifyReport(uri, spec)
    manifest = _manifest(store, spec, report)
    found = list_prefix(store, spec)
    check_listing(store, spec, found, report)
    harvest = RecordAggregate()
    prints: list[npt.NDArray[np.uint64]] = []
    done = [n for n in range(num_shards(spec)) if found.is_done(n)]
    for findings in _check_shards(store, spec, done):
        for problem in findings.problems:
            report.add(problem.object, problem.what)
        if findings.problems:
            report.damaged.append(findings.unit)
        report.shards_checked += 1
        report.samples_checked += findings.samples
        prints.append(findings.prints)
        if findings.record is not None:
            harvest.add(findings.unit.number, findings.record)
        progress(report.shards_checked, len(done))
    report.duplicates = _duplicates(prints)
    if report.duplicates:
        report.add(SHARD_PREFIX, f"{report.duplicates} images equal another one, pixel by pixel")
    if manifest is not None:
        _check_manifest(store, manifest, harvest, report)
    report.seconds = time.monotonic() - began
    return report


def discard_damaged(report: VerifyReport) -> int:
    """Delete the records of damaged shards, so that the same generate command makes these again; returns how many.

    The objects stay until then, and the manifest with them: their keys and hashes are what they should be again.
    """
    store = open_store(report.output)
    for unit in report.damaged:
        store.delete(unit.done_key)
    return len(report.damaged)


def _manifest(store: Store, spec: Spec, report: VerifyReport) -> Manifest | None:
    try:
        manifest = read_manifest(store)
    except DamageError as error:
        report.add(MANIFEST_KEY, str(error))
        return None
    if manifest is None:
        report.notes.append(f"no {MANIFEST_KEY}: the generation is not complete")
        return None
    if manifest.spec_digest != spec.digest:
        report.add(MANIFEST_KEY, f"spec_digest is {manifest.spec_digest}, {SPEC_KEY} has {spec.digest}")
        return None
    report.complete = manifest.count == spec.count
    if not report.complete:
        report.notes.append(
            f"the manifest is that of {manifest.count} samples; {spec.count} are asked for by now"
        )
        return None
    return manifest


def check_listing(store: Store, spec: Spec, found: PrefixListing, report: VerifyReport) -> None:
    """Report what is missing, left over or foreign at the prefix, by its lists alone."""
    missing = found.missing()
    if report.complete:
        for number in missing:
            unit = shard(spec, number)
            absent = unit.done_key if not found.recorded[number] else unit.key
            report.add(absent, "missing, though the manifest says the generation is complete")
    elif missing:
        report.notes.append(f"{len(missing)} of {num_shards(spec)} shards are still to be made")
    for key in found.strange:
        report.add_foreign(key, "belongs to no shard of this generation")
    for key in _strangers(store):
        report.add_foreign(key, "is no part of a generation")
    leftover = found.superseded if report.complete and not read_heartbeats(store) else []
    for key in leftover:
        report.add(key, "is left over from a smaller count; run the generation again to sweep it up")


def _strangers(store: Store) -> Iterator[str]:
    """Keys outside the layout. Steps over the folders instead of listing them once more."""
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


def _check_shards(store: Store, spec: Spec, numbers: list[int]) -> Iterator[_ShardFindings]:
    """Findings in order, a few shards in memory at a time."""
    left = iter(numbers)
    with ThreadPoolExecutor(_READERS) as pool:
        window: list[Future[_ShardFindings]] = []
        for number in islice(left, 2 * _READERS):
            window.append(pool.submit(check_shard, store, spec, shard(spec, number)))
        while window:
            yield window.pop(0).result()
            for number in islice(left, 1):
                window.append(pool.submit(check_shard, store, spec, shard(spec, number)))


def check_shard(store: Store, spec: Spec, unit: Shard) -> _ShardFindings:
    """Compare one shard with its record and the plan, sample by sample."""
    findings = _ShardFindings(unit)
    try:
        record = read_record(store, spec, unit)
        data = store.read(unit.key)
    except (DamageError, ObjectMissing) as error:
        findings.add(str(error))
        return findings
    findings.record = record
    if len(data) != record.bytes:
        findings.add(f"has {len(data)} bytes, its record says {record.bytes}")
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != record.sha256:
        findings.add(f"sha256 is {sha256}, its record says {record.sha256}")
    images = _check_samples(spec, data, findings)
    if len(images) == unit.count and image_stats(np.stack(images)) != record.tally:
        findings.add("the sums over its images are not those of its record")
    return findings


def _check_samples(spec: Spec, data: bytes, findings: _ShardFindings) -> list[Pixels]:
    unit, images = findings.unit, list[Pixels]()
    labels = labels_of(spec, unit.samples)
    digest = spec.digest
    keys: list[str] = []
    try:
        for key, files in read_shard(data, label=unit.key):
            place = len(keys)
            keys.append(key)
            facts = {
                "index": unit.first + place,
                "seed": spec.seed,
                "class": labels[place] if labels is not None and place < unit.count else None,
                "spec": digest,
            }
            image = _check_sample(spec, key, files, facts, findings)
            if image is not None:
                images.append(image)
    except DamageError as error:
        findings.add(str(error))
    expected = [f"{unit.first + place:012d}" for place in range(unit.count)]
    if keys != expected:
        findings.add(_difference(keys, expected))
    findings.samples = len(keys)
    hashes = [hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in images]
    findings.prints = np.frombuffer(b"".join(hashes), dtype=np.uint64)
    return images


def _check_sample(
    spec: Spec,
    key: str,
    files: dict[str, bytes],
    facts: dict[str, int | str | None],
    findings: _ShardFindings,
) -> Pixels | None:
    if set(files) != {spec.image_format, "json"}:
        findings.add(f"holds {sorted(files)}, not {spec.image_format} and json", key)
        return None
    try:
        told = from_json(files["json"])  # which, unlike json, refuses nesting without end
    except ValueError as error:
        told = f"no JSON ({error})"
    if told != facts:
        findings.add(f"its json says {told}, the plan says {facts}", key)
    try:
        image = decode_image(files[spec.image_format], (spec.size, spec.size, spec.channels))
    except DamageError as error:
        findings.add(str(error), key)
        return None
    if is_constant(image[None])[0]:
        findings.add("is of one flat colour", key)
    return image


def _difference(keys: list[str], expected: list[str]) -> str:
    missing = sorted(set(expected) - set(keys))
    extra = sorted(set(keys) - set(expected))
    parts = [f"{len(keys)} samples where the plan has {len(expected)}"] if len(keys) != len(expected) else []
    parts += [f"missing {', '.join(missing[:5])}"] * bool(missing)
    parts += [f"not in the plan: {', '.join(extra[:5])}"] * bool(extra)
    return "; ".join(parts) or "the samples are out of order"


def _duplicates(prints: list[npt.NDArray[np.uint64]]) -> int:
    if not prints:
        return 0
    everything = np.concatenate(prints)
    return int(everything.size - np.unique(everything).size)


def _check_manifest(store: Store, manifest: Manifest, harvest: RecordAggregate, report: VerifyReport) -> None:
    spec = report.spec
    if harvest.num_shards != num_shards(spec):
        return  # each missing shard is named already
    try:
        expected = make_manifest(spec, harvest, manifest.class_names)
        for ours, theirs in zip(make_entries(spec, harvest), read_entries(store), strict=True):
            if ours != theirs:
                report.add(MANIFEST_KEY, f"its entry of {ours.key} is not that of the done-record")
    except (DamageError, ValueError) as error:
        report.add(MANIFEST_KEY, str(error))
        return
    if expected.statistics != manifest.statistics:
        report.add(MANIFEST_KEY, "its statistics are not those of the done-records")
