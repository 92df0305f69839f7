"""Agreeing on one value at a prefix: of several jobs that find none there at once, one's value comes to stand.

A conditional write would do it in one request, but not every S3 heeds the condition: JuiceFS's gateway takes
`If-None-Match: *` and overwrites all the same. So the jobs agree by plain objects; see `pipeline.store.consensus`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Generic, TypeVar

from pydantic import Field

from pipeline.config.base import Settings
from pipeline.config.json_document import parse_document
from pipeline.store import consensus
from pipeline.store.consensus import Ballot
from pipeline.store.interface import ObjectMissing, Store, StoreUnreachable

V = TypeVar("V")
_Round = Annotated[int, Field(ge=0, lt=2**53)]


class TextBallot(Settings):
    """One job's word on which text shall stand. Rounds are told apart by their number, then by the job's name."""

    round: _Round
    """The last round the job has called; it will not go back behind it."""
    accepted: _Round = 0
    """The last of its rounds in which it spoke for `value`; 0 = in none."""
    value: Annotated[str, Field(max_length=1 << 20)] | None = None
    """What it spoke for then."""


@dataclass(frozen=True)
class PrefixBallots(Generic[V]):
    """The board of the jobs at a prefix: an object for each word, and the answer wherever `read` finds it."""

    store: Store
    prefix: str
    """Of the words' keys."""
    read: Callable[[], V | None]
    """Looks whether a value stands already."""
    write: Callable[[V], object]
    """Makes one stand."""
    encode: Callable[[Ballot[V]], bytes]
    """A word as the content of its object."""
    decode: Callable[[bytes, str], Ballot[V]]
    """The word in an object's content; the second argument says where it was. Raises DamageError."""

    def agree(self, job: str, proposal: V) -> V:
        """The value that stands: `proposal`, or that of another job which was first.

        Whoever returns, returns the same, and `read` finds it by then. Raises StoreUnreachable in the unlikely case
        that jobs keep talking over each other.
        """
        try:
            return consensus.reach_consensus(self, job, proposal)
        except consensus.NoConsensus:
            raise StoreUnreachable(
                f"{self.store.uri}: other jobs keep claiming this prefix; try again in a minute"
            ) from None

    def write_ballot(self, job: str, number: int, word: Ballot[V]) -> None:
        """Leave word `number` of a job."""
        self.store.write(self._key(job, number), self.encode(word))

    def delete_ballot(self, job: str, number: int) -> None:
        """Remove a word of a job."""
        self.store.delete(self._key(job, number))

    def other_ballots(self, job: str) -> dict[str, Ballot[V]]:
        """The newest word of each other job."""
        newest: dict[str, str] = {}
        for info in self.store.list(self.prefix):  # in order of their keys, so a job's newest comes last
            name, _, _ = info.key.removeprefix(self.prefix).partition(".")
            newest[name] = info.key
        found: dict[str, Ballot[V]] = {}
        for name, key in newest.items():
            if name == job:
                continue
            with suppress(ObjectMissing):  # its job is through, so the value stands
                found[name] = self.decode(self.store.read(key), f"{self.store.uri}/{key}")
        return found

    def decision(self) -> V | None:
        """The answer, once there is one."""
        return self.read()

    def decide(self, value: V) -> None:
        """Make `value` the answer."""
        self.write(value)

    def _key(self, job: str, number: int) -> str:
        return f"{self.prefix}{job}.{number:04d}.json"


def agree(
    store: Store, prefix: str, own_text: str, read: Callable[[], str | None], write: Callable[[str], object]
) -> str:
    """The text that stands, as `Claims.agree`."""
    return PrefixBallots(store, prefix, read, write, _encode, _decode).agree(uuid.uuid4().hex, own_text)


def clear_claims(store: Store, prefix: str) -> None:
    """Delete what jobs that died while claiming have left. Only ever while the value stands."""
    for info in list(store.list(prefix)):
        store.delete(info.key)


def _encode(word: Ballot[str]) -> bytes:
    return TextBallot(round=word.round, accepted=word.accepted, value=word.value).model_dump_json().encode()


def _decode(data: bytes, where: str) -> Ballot[str]:
    said = parse_document(TextBallot, data, where, "a claim")
    return Ballot(said.round, said.accepted, said.value)
