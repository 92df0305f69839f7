"""The signature of a generation: who vouches for its manifest, and so for every object.

`SHA256SUMS` lists shards, done-records, contact sheet and report, as `sha256sum -c` of coreutils reads them. The
signature names it and the manifest by hash, and says for which prefix, spec and count. Both are written before the
manifest: a generation that is complete is signed, and one whose job was killed in between has no manifest, so that the
same command publishes and signs it again.
"""

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ddpm_pipeline.config.json_document import parse_document
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.generate.done_records import DoneRecord, RecordAggregate
from ddpm_pipeline.generate.layout import (
    CONTACT_KEY,
    MANIFEST_KEY,
    REPORT_KEY,
    SHARD_PREFIX,
    SIGNATURE_KEY,
    SUMS_KEY,
)
from ddpm_pipeline.generate.plan import Shard
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.signatures import PublicKey, SigningKey, Statement, open_envelope
from ddpm_pipeline.store import ObjectMissing, Store

PREDICATE_TYPE = "urn:ddpm-pipeline:generation:1"
_READERS = 16
_RECORDS_AT_ONCE = 1000
_BLOCK_BYTES = 1 << 20
_MAX_SUMS_LINE = 400


def write_signature(
    generation: Generation,
    manifest_sha256: str,
    aggregate: RecordAggregate,
    documents: Mapping[str, bytes],
    signer: SigningKey,
) -> None:
    """Sign what is about to be published: the manifest with this hash, all shards and records, and `documents` by key.

    Reads every done-record once more. DamageError for a record that is not the one the manifest was made of; UserError
    for a shard that differs from one that this key has signed before.
    """
    signed = _signed_before(generation, signer.public)
    sums = hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix="ddpm-sums-") as scratch:
        path = Path(scratch) / SUMS_KEY
        with path.open("wb") as file:
            for key, sha256 in _sums(generation, aggregate, documents):
                if key.startswith(SHARD_PREFIX) and signed.get(key, sha256) != sha256:
                    raise UserError(
                        f"{generation.uri}/{key}: is not the one that this key signed before; nothing is signed. If it "
                        f"was rightly made again, delete {SIGNATURE_KEY} and run the same command"
                    )
                line = f"{sha256}  {key}\n".encode()
                sums.update(line)
                file.write(line)
        generation.store.upload(SUMS_KEY, path)
    statement = Statement.about(
        {MANIFEST_KEY: manifest_sha256, SUMS_KEY: sums.hexdigest()},
        PREDICATE_TYPE,
        {"output": generation.uri, "spec": generation.spec.digest, "count": generation.spec.count},
    )
    generation.store.write(SIGNATURE_KEY, signer.sign(statement))


def _sums(
    generation: Generation, aggregate: RecordAggregate, documents: Mapping[str, bytes]
) -> Iterator[tuple[str, str]]:
    """Key and sha256 of each object, documents first."""
    for key, data in documents.items():
        yield key, hashlib.sha256(data).hexdigest()

    def record_sha256(unit: Shard) -> str:
        data = generation.store.read(unit.done_key)
        where = f"{generation.uri}/{unit.done_key}"
        record = parse_document(DoneRecord, data, where, "a done-record")
        if (record.bytes, record.sha256) != aggregate.row(unit.number):
            raise DamageError(
                f"{where}: was replaced while the generation was signed; run the same command again"
            )
        return hashlib.sha256(data).hexdigest()

    with ThreadPoolExecutor(_READERS) as pool:
        remaining = generation.shards()
        while units := list(islice(remaining, _RECORDS_AT_ONCE)):
            for unit, sha256 in zip(units, pool.map(record_sha256, units), strict=True):
                yield unit.key, aggregate.row(unit.number)[1]
                yield unit.done_key, sha256


def _signed_before(generation: Generation, key: PublicKey) -> dict[str, str]:
    """The hashes that `key` has signed for this generation, of whatever count; none without a sound signature."""
    with suppress(DamageError, ObjectMissing):
        statement = read_signature(generation.store, key)
        if statement.predicate.get("spec") == generation.spec.digest:
            return read_sums(generation.store, statement)
    return {}


def read_signature(store: Store, key: PublicKey) -> Statement:
    """What `key` has signed at a prefix. ObjectMissing; DamageError for anything else."""
    where = f"{store.uri}/{SIGNATURE_KEY}"
    statement = open_envelope(store.read(SIGNATURE_KEY), key, where)
    if statement.predicateType != PREDICATE_TYPE:
        raise DamageError(f"{where}: signs something else than a generation ({statement.predicateType})")
    return statement


def read_sums(store: Store, statement: Statement) -> dict[str, str]:
    """The signed hashes by key. ObjectMissing; DamageError where `SHA256SUMS` is not the one that was signed."""
    where = f"{store.uri}/{SUMS_KEY}"
    if sha256_of(store, SUMS_KEY) != statement.digests.get(SUMS_KEY):
        raise DamageError(f"{where}: is not the one that was signed")
    found: dict[str, str] = {}
    with store.open(SUMS_KEY) as file:
        for line in iter(lambda: file.readline(_MAX_SUMS_LINE), b""):
            sha256, _, key = line.decode().rstrip("\n").partition("  ")
            found[key] = sha256
    return found


def sha256_of(store: Store, key: str) -> str:
    """Hex digest of an object of any size. ObjectMissing."""
    digest = hashlib.sha256()
    with store.open(key) as file:
        for block in iter(lambda: file.read(_BLOCK_BYTES), b""):
            digest.update(block)
    return digest.hexdigest()


def is_signed(store: Store, key: PublicKey) -> bool:
    """Whether the stored manifest and hashes are those that `key` has signed. Reads no shard and no record."""
    try:
        statement = read_signature(store, key)
        read_sums(store, statement)
        return sha256_of(store, MANIFEST_KEY) == statement.digests.get(MANIFEST_KEY)
    except (DamageError, ObjectMissing):
        return False


def sign_stored(generation: Generation, signer: SigningKey) -> None:
    """Sign a generation as it is stored; the caller has verified it. DamageError for records without their objects."""
    store, aggregate = generation.store, RecordAggregate()
    for number, what in generation.add_records(generation.listing(), aggregate):
        raise DamageError(f"{generation.uri}/{generation.shard(number).key}: {what}")
    documents = {key: store.read(key) for key in (REPORT_KEY, CONTACT_KEY)}
    write_signature(generation, sha256_of(store, MANIFEST_KEY), aggregate, documents, signer)


@dataclass(frozen=True)
class SignedHashes:
    """What a verification compares objects with, and the problems of the signature itself by key."""

    sums: dict[str, str]
    problems: tuple[tuple[str, str], ...]


def check_signature(generation: Generation, key: PublicKey, signed_for: str | None = None) -> SignedHashes:
    """The signed hashes of a generation. `signed_for`: the prefix it was signed at, if this is a copy of it.

    Problems are at most one for each object: signature, manifest, SHA256SUMS, spec.
    """
    store, spec = generation.store, generation.spec
    try:
        statement = read_signature(store, key)
    except ObjectMissing:
        return SignedHashes({}, ((SIGNATURE_KEY, "is missing: the generation is not signed"),))
    except DamageError as error:
        return SignedHashes({}, ((SIGNATURE_KEY, _without(store, SIGNATURE_KEY, error)),))
    problems: list[tuple[str, str]] = []
    stated = statement.predicate
    output, digest, count = stated.get("output"), stated.get("spec"), stated.get("count")
    place = signed_for or generation.uri
    if output != place:
        what = f"was signed for {output}, not for {place}; of a copy, name the original by --signed-for"
        problems.append((SIGNATURE_KEY, what))
    elif digest != spec.digest:
        problems.append((SIGNATURE_KEY, f"was signed for the spec {digest}, not for {spec.digest}"))
    elif count != spec.count:
        what = f"{count} samples were signed, but there is proof of {spec.count}"
        problems.append((MANIFEST_KEY, f"{what}: an older one was put back, or a job is raising the count"))
    sums: dict[str, str] = {}
    try:
        if sha256_of(store, MANIFEST_KEY) != statement.digests.get(MANIFEST_KEY):
            problems.append((MANIFEST_KEY, "is not the one that was signed"))
    except ObjectMissing:
        problems.append((MANIFEST_KEY, "is missing, though it was signed"))
    try:
        sums = read_sums(store, statement)
    except ObjectMissing:
        problems.append((SUMS_KEY, "is missing, though it was signed"))
    except DamageError as error:
        problems.append((SUMS_KEY, _without(store, SUMS_KEY, error)))
    return SignedHashes(sums, tuple(problems))


def _without(store: Store, key: str, error: DamageError) -> str:
    """The error's message without the name of its object."""
    return str(error).removeprefix(f"{store.uri}/{key}: ")
