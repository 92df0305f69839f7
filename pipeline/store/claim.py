"""Agreeing on one value at a prefix: of several jobs that find none there at once, one's value comes to stand.

A conditional write would do it in one request, but not every S3 heeds the condition: JuiceFS's gateway takes
`If-None-Match: *` and overwrites all the same. So the jobs agree by plain objects; see `pipeline.consensus`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated

from pydantic import Field

from pipeline import consensus
from pipeline.config.base import Settings
from pipeline.config.document import parse_document
from pipeline.consensus import Word
from pipeline.store.base import ObjectMissing, Store, StoreUnreachable

_Round = Annotated[int, Field(ge=0, lt=2**53)]


class Claim(Settings):
    """One job's word on which value shall stand. Rounds are told apart by their number, then by the job's name."""

    round: _Round
    """The last round the job has called; it will not go back behind it."""
    accepted: _Round = 0
    """The last of its rounds in which it spoke for `value`; 0 = in none."""
    value: Annotated[str, Field(max_length=1 << 20)] | None = None
    """What it spoke for then."""


def agree(
    store: Store, prefix: str, own_value: str, read: Callable[[], str | None], write: Callable[[str], None]
) -> str:
    """The value that stands: `own_value`, or that of another job which was first.

    `read` looks whether one stands already, `write` makes one stand. Whoever returns, returns the same, and `read`
    finds it by then. Raises StoreUnreachable in the unlikely case that jobs keep talking over each other.
    """
    try:
        return consensus.agree(_Claims(store, prefix, read, write), uuid.uuid4().hex, own_value)
    except consensus.NoConsensus:
        raise StoreUnreachable(
            f"{store.uri}: other jobs keep claiming this prefix; try again in a minute"
        ) from None


def clear_claims(store: Store, prefix: str) -> None:
    """Delete what jobs that died while claiming have left. Only ever while the value stands."""
    for info in list(store.list(prefix)):
        store.delete(info.key)


class _Claims:
    """The board of the jobs at a prefix: an object for each word, and the answer wherever `read` finds it."""

    def __init__(
        self, store: Store, prefix: str, read: Callable[[], str | None], write: Callable[[str], None]
    ) -> None:
        self._store, self._prefix, self._read, self._write = store, prefix, read, write

    def say(self, job: str, number: int, word: Word[str]) -> None:
        claim = Claim(round=word.round, accepted=word.accepted, value=word.value)
        self._store.write(self._key(job, number), claim.model_dump_json().encode())

    def take_back(self, job: str, number: int) -> None:
        self._store.delete(self._key(job, number))

    def others(self, job: str) -> dict[str, Word[str]]:
        newest: dict[str, str] = {}
        for info in self._store.list(self._prefix):  # in order of their keys, so a job's newest comes last
            name, _, _ = info.key.removeprefix(self._prefix).partition(".")
            newest[name] = info.key
        found: dict[str, Word[str]] = {}
        for name, key in newest.items():
            if name == job:
                continue
            with suppress(ObjectMissing):  # its job is through, so the value stands
                said = parse_document(Claim, self._store.read(key), f"{self._store.uri}/{key}", "a claim")
                found[name] = Word(said.round, said.accepted, said.value)
        return found

    def standing(self) -> str | None:
        return self._read()

    def settle(self, value: str) -> None:
        self._write(value)

    def _key(self, job: str, number: int) -> str:
        return f"{self._prefix}{job}.{number:04d}.json"
