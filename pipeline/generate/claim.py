"""Claiming a prefix: of several jobs that find it empty at once, one's spec comes to stand, the same for all.

A conditional write would do it in one request, but not every S3 heeds the condition: JuiceFS's gateway takes
`If-None-Match: *` and overwrites all the same. So the jobs agree by plain objects; see `pipeline.consensus`.
"""

from contextlib import suppress
from typing import Literal

from pipeline.config.base import Settings
from pipeline.config.bounds import Number
from pipeline.config.document import parse_document
from pipeline.consensus import NoConsensus, Word, agree
from pipeline.generate.heartbeat import new_job_id
from pipeline.generate.spec import CLAIM_PREFIX, SPEC_KEY, Spec, canonical, pretty, read_spec
from pipeline.store import ObjectMissing, Store, StoreUnreachable


class Claim(Settings):
    """One job's word on whose spec shall stand; the fields are those of `Word`."""

    format: Literal[1] = 1
    """Version of the layout of a generation."""
    round: Number
    """The last round the job has called; it will not go back behind it."""
    accepted: Number = 0
    """The last of its rounds in which it spoke for `spec`; 0 = in none."""
    spec: Spec | None = None
    """What it spoke for then."""


def claim(store: Store, spec: Spec) -> Spec:
    """The spec that stands at the prefix: `spec`, or that of another job which was first.

    Whoever returns, returns the same but for a count raised since, and `spec.json` is there by then.
    StoreUnreachable in the unlikely case that jobs keep talking over each other.
    """
    try:
        return agree(_Claims(store), new_job_id(), spec)
    except NoConsensus:
        raise StoreUnreachable(
            f"{store.uri}: other jobs keep claiming this prefix; try again in a minute"
        ) from None


def clear_claims(store: Store) -> None:
    """Delete what jobs that died while claiming have left. Only ever while the spec stands."""
    for info in list(store.list(CLAIM_PREFIX)):
        store.delete(info.key)


class _Claims:
    """The board of the jobs at a prefix: objects under `claims/`, and `spec.json` as the answer."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def say(self, job: str, number: int, word: Word[Spec]) -> None:
        claim = Claim(round=word.round, accepted=word.accepted, spec=word.value)
        self._store.write(_key(job, number), canonical(claim.model_dump(mode="json")))

    def take_back(self, job: str, number: int) -> None:
        self._store.delete(_key(job, number))

    def others(self, job: str) -> dict[str, Word[Spec]]:
        newest: dict[str, str] = {}
        for info in self._store.list(CLAIM_PREFIX):  # in order of their keys, so a job's newest comes last
            name, _, _ = info.key.removeprefix(CLAIM_PREFIX).partition(".")
            newest[name] = info.key
        found: dict[str, Word[Spec]] = {}
        for name, key in newest.items():
            if name == job:
                continue
            with suppress(ObjectMissing):  # its job is through, so the spec is there
                said = parse_document(Claim, self._store.read(key), f"{self._store.uri}/{key}", "a claim")
                found[name] = Word(said.round, said.accepted, said.spec)
        return found

    def standing(self) -> Spec | None:
        return read_spec(self._store)

    def settle(self, value: Spec) -> None:
        self._store.write(SPEC_KEY, pretty(value.model_dump(mode="json")))


def _key(job: str, number: int) -> str:
    return f"{CLAIM_PREFIX}{job}.{number:04d}.json"
