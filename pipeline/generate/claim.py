"""Claiming a prefix: of several jobs that find it empty at once, one's spec comes to stand, the same for all.

A conditional write would do it in one request, but not every S3 heeds the condition: JuiceFS's gateway takes
`If-None-Match: *` and overwrites all the same. Plain objects suffice. This is Disk Paxos (Gafni and Lamport 2003)
with the prefix as its one disk: each job writes to keys of its own and reads those of the others, and a job
that dies at any point holds nobody up. It asks of the store what S3 promises: that a finished write is seen by
later reads and listings. A job's newest word is a new object, never an older one replaced: the same gateway can
answer a read that meets a replacement with bytes of both, or with none.
"""

import random
import time
from contextlib import suppress
from typing import Literal

from pipeline.config.base import Settings
from pipeline.config.document import parse_document
from pipeline.generate.heartbeat import new_job_id
from pipeline.generate.spec import CLAIM_PREFIX, SPEC_KEY, Spec, canonical, pretty, read_spec
from pipeline.store import ObjectMissing, Store, StoreUnreachable

_ATTEMPTS = 100
_LONGEST_PAUSE_SECONDS = 2.0


class Claim(Settings):
    """One job's word on whose spec shall stand. Rounds are told apart by their number, then by the job's name."""

    format: Literal[1] = 1
    """Version of the layout of a generation."""
    round: int
    """The last round the job has called; it will not go back behind it."""
    accepted: int = 0
    """The last of its rounds in which it spoke for `spec`; 0 = in none."""
    spec: Spec | None = None
    """What it spoke for then."""


def claim(store: Store, spec: Spec) -> Spec:
    """The spec that stands at the prefix: `spec`, or that of another job which was first.

    Whoever returns, returns the same but for a count raised since, and `spec.json` is there by then.
    StoreUnreachable in the unlikely case that jobs keep talking over each other.
    """
    job, said = new_job_id(), list[str]()
    own, others = Claim(round=0), _others(store, job)
    for attempt in range(_ATTEMPTS):
        called = 1 + max([own.round, *(other.round for other in others.values())])
        own = own.model_copy(update={"round": called})
        for speaks in (False, True):
            if speaks:
                own = own.model_copy(
                    update={"accepted": called, "spec": _choice({**others, job: own}) or spec}
                )
            said.append(f"{CLAIM_PREFIX}{job}.{len(said):04d}.json")
            store.write(said[-1], canonical(own.model_dump(mode="json")))
            others = _others(store, job)
            there = read_spec(store)  # after the listing: a claim goes only when the spec is there
            leads = all((other.round, name) < (called, job) for name, other in others.items())
            if there is None and speaks and leads and own.spec is not None:
                there = own.spec
                store.write(SPEC_KEY, pretty(there.model_dump(mode="json")))
            if there is not None:
                for key in said:  # the newest last: nobody may take an older one for it
                    store.delete(key)
                return there
            if not leads:
                break
        # Timing only: who comes first may depend on it, no bit of a sample does.
        time.sleep(random.uniform(0.01, min(_LONGEST_PAUSE_SECONDS, 0.1 * 2**attempt)))
    raise StoreUnreachable(f"{store.uri}: other jobs keep claiming this prefix; try again in a minute")


def clear_claims(store: Store) -> None:
    """Delete what jobs that died while claiming have left. Only ever while the spec stands."""
    for info in list(store.list(CLAIM_PREFIX)):
        store.delete(info.key)


def _choice(claims: dict[str, Claim]) -> Spec | None:
    """The spec that was spoken for last, or None while none was."""
    _, name = max((one.accepted, name) for name, one in claims.items())
    return claims[name].spec


def _others(store: Store, job: str) -> dict[str, Claim]:
    """The newest word of each other job."""
    newest: dict[str, str] = {}
    for info in store.list(CLAIM_PREFIX):  # in order of their keys, so a job's newest comes last
        name, _, _ = info.key.removeprefix(CLAIM_PREFIX).partition(".")
        newest[name] = info.key
    found: dict[str, Claim] = {}
    for name, key in newest.items():
        if name == job:
            continue
        with suppress(ObjectMissing):  # its job is through, so the spec is there
            found[name] = parse_document(Claim, store.read(key), f"{store.uri}/{key}", "a claim")
    return found
