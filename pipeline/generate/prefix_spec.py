"""The spec of a prefix: claimed by one job, its count only ever raised.

Jobs that find a prefix empty at the same time agree on one spec, by a conditional write or by plain objects under
`claims/`; see `ddpm_pipeline.store.prefix_claim`. Its count is the largest that anything at the prefix proves, whatever
`spec.json` says at the moment: not every store has a conditional write, so a driver that was suspended between reading
and writing may replace a newer `spec.json` or `manifest.json` with an older one. Done-records cannot be lost that way.
Each has a
key of its own, which names the count it belongs to, and only a job of a larger count deletes it. So the largest count
among the records never decreases, and whoever writes reads it again afterwards.
"""

import heapq
from contextlib import suppress
from typing import Literal

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.bounds import Number
from ddpm_pipeline.config.json_document import parse_document
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.generate.heartbeat import new_job_id
from ddpm_pipeline.generate.layout import CLAIM_PREFIX, DONE_PREFIX, SPEC_KEY
from ddpm_pipeline.generate.manifest import read_manifest
from ddpm_pipeline.generate.plan import end_of
from ddpm_pipeline.generate.spec import Spec, canonical, read_spec, require_extension, write_spec
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.store import ABSENT, ObjectMissing, Store, open_store
from ddpm_pipeline.store.consensus import Ballot
from ddpm_pipeline.store.prefix_claim import PrefixBallots

_CANDIDATES = 16


class SpecBallot(Settings):
    """A job's ballot on the spec of a prefix, as stored; the fields are those of `Ballot`."""

    format: Literal[1] = 1
    """Version of the layout of a generation."""
    round: Number
    """The last round the job has started or promised; it takes part in no earlier one."""
    accepted: Number = 0
    """The last round in which the job accepted `spec`; 0 = in none."""
    spec: Spec | None = None
    """The accepted spec."""


def open_generation(uri: str) -> Generation:
    """The generation at the prefix `uri`, with the largest count on record. UserError where there is none."""
    store = open_store(uri)
    store.require_container()
    found = find_generation(store)
    if found is None:
        raise UserError(f"{uri}: no {SPEC_KEY} found, so this is no generation; check the prefix")
    return found


def find_generation(store: Store) -> Generation | None:
    """The generation at a prefix, with the largest count on record; None without `spec.json`."""
    spec = read_spec(store)
    return None if spec is None else newest(Generation(store, spec))


def check_prefix(requested: Generation) -> Generation | None:
    """The generation at the prefix, if `requested` is the same or extends it; None at an empty prefix.

    UserError when the prefix holds another generation (the differing fields are named), more samples than requested,
    or objects of no generation. Reads and writes no sample.
    """
    store = requested.store
    existing = find_generation(store)
    if existing is None:
        other = next((info for info in store.list() if not info.key.startswith(CLAIM_PREFIX)), None)
        if other is None:
            return None
        # Another job may have claimed the prefix between the two requests, so read the spec again.
        existing = find_generation(store)
        if existing is None:
            raise UserError(
                f"{store.uri}: holds {other.key} but no {SPEC_KEY}, so it is no generation; "
                "choose an empty output prefix"
            )
    require_extension(store.uri, existing.spec, requested.spec)
    return existing


def claim_prefix(requested: Generation) -> Generation:
    """The generation that owns the prefix from now on: `requested`, or that of another job which was first.

    All jobs get the same answer, but for a count raised since, and `spec.json` exists on return. StoreUnreachable in
    the unlikely case that jobs keep interrupting each other's rounds.
    """
    store = requested.store
    claims = PrefixBallots(
        store,
        CLAIM_PREFIX,
        lambda: read_spec(store),
        lambda spec: write_spec(store, spec, replaces=ABSENT),
        _encode_ballot,
        _decode_ballot,
    )
    return Generation(store, claims.agree(new_job_id(), requested.spec))


def raise_count(requested: Generation) -> Generation:
    """Write the count of `requested`, or the larger one on record, into `spec.json`; return the generation it now says.

    UserError when the prefix holds another generation.
    """
    store, spec = requested.store, requested.spec
    while True:
        existing = read_spec(store)
        if existing is not None:
            larger = requested.with_count(max(spec.count, existing.count))
            require_extension(store.uri, existing, larger.spec)
        found = newest(
            requested if existing is None or existing.count < spec.count else Generation(store, existing)
        )
        if existing == found.spec:
            return found
        write_spec(store, found.spec)


def newest(generation: Generation) -> Generation:
    """The generation with its count raised to the largest that its manifest or done-records prove."""
    with suppress(DamageError):  # a damaged manifest proves nothing
        manifest = read_manifest(generation.store)
        if (
            manifest is not None
            and manifest.spec.digest == generation.spec.digest
            and manifest.count > generation.spec.count
        ):
            generation = generation.with_count(manifest.count)
    return generation.with_count(_recorded_count(generation))


def _recorded_count(generation: Generation) -> int:
    """The largest count, from `spec.count` on, that a valid done-record of this generation names.

    A larger count has a record with the number of this count's last shard, or the one after: two short listings tell
    whether all records must be listed.
    """
    last = generation.num_shards - 1
    if not any(_larger_counts(generation, f"{DONE_PREFIX}{number:06d}") for number in (last, last + 1)):
        return generation.spec.count
    for count in heapq.nlargest(_CANDIDATES, _larger_counts(generation, DONE_PREFIX)):
        larger = generation.with_count(count)
        with suppress(DamageError, ObjectMissing):
            larger.read_record(larger.shard(larger.num_shards - 1))
            return count
    return generation.spec.count


def _larger_counts(generation: Generation, prefix: str) -> set[int]:
    """Counts above `spec.count` that the keys of done-records name."""
    spec = generation.spec
    names = (
        info.key.removeprefix(DONE_PREFIX).removesuffix(".json") for info in generation.store.list(prefix)
    )
    return {count for name in names if (count := end_of(spec, name) or 0) > spec.count}


def _encode_ballot(ballot: Ballot[Spec]) -> bytes:
    document = SpecBallot(round=ballot.round, accepted=ballot.accepted, spec=ballot.value)
    return canonical(document.model_dump(mode="json"))


def _decode_ballot(data: bytes, where: str) -> Ballot[Spec]:
    document = parse_document(SpecBallot, data, where, "a claim")
    return Ballot(document.round, document.accepted, document.spec)
