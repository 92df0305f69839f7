"""Consensus by Disk Paxos: of several jobs that each propose a value, one value is chosen, the same for all.

Gafni and Lamport 2003, with a single disk: a prefix of an object store, or the tags of a registered model. Each job
writes ballots of its own and reads those of the others; a job that dies at any point blocks nobody. It requires that
later reads see a finished write. It does not need conditional writes, which some S3 gateways ignore and MLflow does not
have. Ballots are never overwritten, each is a new object: a gateway can answer a read that overlaps an overwrite with
bytes of both, and a write whose response was lost may still arrive.
"""

import time
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from ddpm_pipeline.retry import RetryPolicy

V = TypeVar("V")

_MAX_ROUNDS = 100
_PAUSES = RetryPolicy(first_pause_seconds=0.1, longest_pause_seconds=2.0)


@dataclass(frozen=True)
class Ballot(Generic[V]):
    """One job's state in the protocol. Ballots are ordered by round, then by the job's name."""

    round: int
    """Highest round that the job has started ("mbal")."""
    accepted: int = 0
    """Highest round in which it accepted `value` ("bal"); 0 = none."""
    value: V | None = None
    """The value it accepted then ("inp")."""


class BallotStore(Protocol[V]):
    """Where jobs write their ballots on one question, and where the chosen value is recorded."""

    def write_ballot(self, job: str, number: int, ballot: Ballot[V]) -> None:
        """Write ballot `number` of a job; all of them stay until they are deleted."""
        ...

    def delete_ballot(self, job: str, number: int) -> None:
        """Delete a ballot of a job."""
        ...

    def other_ballots(self, job: str) -> dict[str, Ballot[V]]:
        """The newest ballot of each other job."""
        ...

    def decision(self) -> V | None:
        """The chosen value, once it is recorded; ballots may be deleted from then on."""
        ...

    def decide(self, value: V) -> None:
        """Record `value` as chosen. All jobs that call this pass the same value."""
        ...


class NoConsensus(Exception):  # noqa: N818 - the fact is the name
    """Jobs kept outbidding each other until the rounds were used up."""


def reach_consensus(store: BallotStore[V], job: str, proposal: V) -> V:
    """The chosen value: `proposal`, or that of another job. Every job that returns gets the same.

    Raises NoConsensus in the unlikely case that jobs keep outbidding each other.
    """
    written = 0
    own, others = Ballot[V](round=0), store.other_ballots(job)
    for attempt in range(1, _MAX_ROUNDS + 1):
        number = 1 + max([own.round, *(other.round for other in others.values())])
        own = replace(own, round=number)
        for phase in (1, 2):
            if phase == 2:
                accepted = _last_accepted({**others, job: own})
                own = replace(own, accepted=number, value=proposal if accepted is None else accepted)
            store.write_ballot(job, written, own)
            written += 1
            others = store.other_ballots(job)
            chosen = store.decision()  # read after the ballots: they are deleted only once it is recorded
            leads = all((other.round, name) < (number, job) for name, other in others.items())
            if chosen is None and phase == 2 and leads and own.value is not None:
                chosen = own.value
                store.decide(chosen)
            if chosen is not None:
                for old in range(written):  # the newest last, so that nobody reads an older one as the newest
                    store.delete_ballot(job, old)
                return chosen
            if not leads:
                break
        # Timing only: which job wins may depend on it, that all agree does not.
        time.sleep(_PAUSES.pause_seconds(attempt))
    raise NoConsensus


def _last_accepted(ballots: dict[str, Ballot[V]]) -> V | None:
    """The value accepted in the highest round, or None where none was."""
    _, name = max((ballot.accepted, name) for name, ballot in ballots.items())
    return ballots[name].value
