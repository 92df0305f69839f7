"""Agreeing on one value at a prefix: of several jobs that find none there at once, one's value comes to stand.

A conditional write would do it in one request, but not every S3 heeds the condition: JuiceFS's gateway takes
`If-None-Match: *` and overwrites all the same. Plain objects suffice. This is Disk Paxos (Gafni and Lamport 2003)
with the prefix as its one disk: each job writes to keys of its own and reads those of the others, and a job
that dies at any point holds nobody up. It asks of the store what S3 promises: that a finished write is seen by
later reads and listings. A job's newest word is a new object, never an older one replaced.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated

from pydantic import Field

from pipeline.config.base import Settings
from pipeline.config.document import parse_document
from pipeline.store.base import ObjectMissing, Store, StoreUnreachable

_ATTEMPTS = 100
_LONGEST_PAUSE_SECONDS = 2.0
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
    job, said = uuid.uuid4().hex, list[str]()
    own, others = Claim(round=0), _others(store, prefix, job)
    for attempt in range(_ATTEMPTS):
        called = 1 + max([own.round, *(other.round for other in others.values())])
        own = own.model_copy(update={"round": called})
        for speaks in (False, True):
            if speaks:
                value = _choice({**others, job: own}) or own_value
                own = own.model_copy(update={"accepted": called, "value": value})
            said.append(f"{prefix}{job}.{len(said):04d}.json")
            store.write(said[-1], own.model_dump_json().encode())
            others = _others(store, prefix, job)
            there = read()  # after the listing: a claim goes only when the value stands
            leads = all((other.round, name) < (called, job) for name, other in others.items())
            if there is None and speaks and leads and own.value is not None:
                there = own.value
                write(there)
            if there is not None:
                for key in said:  # the newest last: nobody may take an older one for it
                    store.delete(key)
                return there
            if not leads:
                break
        # Timing only: who comes first may depend on it, no bit of a result does.
        time.sleep(random.uniform(0.01, min(_LONGEST_PAUSE_SECONDS, 0.1 * 2**attempt)))
    raise StoreUnreachable(f"{store.uri}: other jobs keep claiming this prefix; try again in a minute")


def clear_claims(store: Store, prefix: str) -> None:
    """Delete what jobs that died while claiming have left. Only ever while the value stands."""
    for info in list(store.list(prefix)):
        store.delete(info.key)


def _choice(claims: dict[str, Claim]) -> str | None:
    """The value that was spoken for last, or None while none was."""
    _, name = max((one.accepted, name) for name, one in claims.items())
    return claims[name].value


def _others(store: Store, prefix: str, job: str) -> dict[str, Claim]:
    """The newest word of each other job."""
    newest: dict[str, str] = {}
    for info in store.list(prefix):  # in order of their keys, so a job's newest comes last
        name, _, _ = info.key.removeprefix(prefix).partition(".")
        newest[name] = info.key
    found: dict[str, Claim] = {}
    for name, key in newest.items():
        if name == job:
            continue
        with suppress(ObjectMissing):  # its job is through, so the value stands
            found[name] = parse_document(Claim, store.read(key), f"{store.uri}/{key}", "a claim")
    return found
