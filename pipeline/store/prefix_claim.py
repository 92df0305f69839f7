"""Claiming a prefix: of several jobs that find it empty at the same time, one writes its value, and all use that.

Where a service heeds `If-None-Match: *`, the first conditional write wins. Not every one does: JuiceFS's gateway
accepts it and overwrites anyway, and a directory has no such thing. There the jobs run `ddpm_pipeline.store.consensus`
over plain objects. It is also used while ballots of others are there: an earlier version of the program always uses it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Generic, TypeVar

from pydantic import Field

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.json_document import parse_document
from ddpm_pipeline.store import consensus
from ddpm_pipeline.store.conditional_writes import heeds_conditions
from ddpm_pipeline.store.consensus import Ballot
from ddpm_pipeline.store.interface import ObjectChanged, ObjectMissing, Store, StoreUnreachable

V = TypeVar("V")
_Round = Annotated[int, Field(ge=0, lt=2**53)]


class TextBallot(Settings):
    """A ballot whose value is text, as its object stores it; fields as in `Ballot`."""

    round: _Round
    accepted: _Round = 0
    value: Annotated[str, Field(max_length=1 << 20)] | None = None


@dataclass(frozen=True)
class PrefixBallots(Generic[V]):
    """A ballot store at a prefix: one object for each ballot, and the decision wherever `read` finds it."""

    store: Store
    prefix: str
    """Of the ballots' keys."""
    read: Callable[[], V | None]
    """Returns the chosen value, or None while there is none."""
    write: Callable[[V], object]
    """Records the chosen value where none is recorded; see the argument `replaces` of `Store.write`. May raise
    ObjectChanged."""
    encode: Callable[[Ballot[V]], bytes]
    """A ballot as the content of its object."""
    decode: Callable[[bytes, str], Ballot[V]]
    """The ballot in an object's content; the second argument is its address. Raises DamageError."""

    def agree(self, job: str, proposal: V) -> V:
        """The chosen value: `proposal`, or that of another job which was first.

        Every job that returns gets the same, and `read` finds it by then. Raises StoreUnreachable in the unlikely case
        that jobs keep outbidding each other.
        """
        if heeds_conditions(self.store, self.prefix) and not self.other_ballots(job):
            self.decide(proposal)
            return self._recorded()
        try:
            consensus.reach_consensus(self, job, proposal)
            return self._recorded()
        except consensus.NoConsensus:
            raise StoreUnreachable(
                f"{self.store.uri}: other jobs keep claiming this prefix; try again in a minute"
            ) from None

    def write_ballot(self, job: str, number: int, ballot: Ballot[V]) -> None:
        """Write ballot `number` of a job."""
        self.store.write(self._key(job, number), self.encode(ballot))

    def delete_ballot(self, job: str, number: int) -> None:
        """Delete a ballot of a job."""
        self.store.delete(self._key(job, number))

    def other_ballots(self, job: str) -> dict[str, Ballot[V]]:
        """The newest ballot of each other job."""
        newest: dict[str, str] = {}
        for info in self.store.list(self.prefix):  # sorted by key, so a job's newest comes last
            name, _, _ = info.key.removeprefix(self.prefix).partition(".")
            newest[name] = info.key
        found: dict[str, Ballot[V]] = {}
        for name, key in newest.items():
            if name == job:
                continue
            with suppress(ObjectMissing):  # its job has finished, so a value is chosen
                found[name] = self.decode(self.store.read(key), f"{self.store.uri}/{key}")
        return found

    def decision(self) -> V | None:
        """The chosen value, once it is recorded."""
        return self.read()

    def decide(self, value: V) -> None:
        """Record `value` as chosen, unless another job has been faster."""
        with suppress(ObjectChanged):
            self.write(value)

    def _recorded(self) -> V:
        found = self.read()
        if found is None:
            raise StoreUnreachable(f"{self.store.uri}: what was agreed on was deleted just now; try again")
        return found

    def _key(self, job: str, number: int) -> str:
        return f"{self.prefix}{job}.{number:04d}.json"


def agree(
    store: Store, prefix: str, own_text: str, read: Callable[[], str | None], write: Callable[[str], object]
) -> str:
    """The chosen text; see `PrefixBallots.agree`."""
    return PrefixBallots(store, prefix, read, write, _encode, _decode).agree(uuid.uuid4().hex, own_text)


def clear_claims(store: Store, prefix: str) -> None:
    """Delete ballots that jobs which died while claiming left behind. Only once a value is chosen."""
    for info in list(store.list(prefix)):
        store.delete(info.key)


def _encode(ballot: Ballot[str]) -> bytes:
    return (
        TextBallot(round=ballot.round, accepted=ballot.accepted, value=ballot.value)
        .model_dump_json()
        .encode()
    )


def _decode(data: bytes, where: str) -> Ballot[str]:
    stored = parse_document(TextBallot, data, where, "a claim")
    return Ballot(stored.round, stored.accepted, stored.value)
