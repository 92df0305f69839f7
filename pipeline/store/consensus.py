"""Consensus: of several jobs that each propose a value, one's comes to stand, the same for all.

This is Disk Paxos (Gafni and Lamport 2003) with one shared board, such as a prefix of an object store or the tags of
a registered model, as its one disk: each job writes words of its own and reads those of the others, and a job that
dies at any point holds nobody up. It asks of the board that a finished write is seen by later reads, and no
conditional write, which not every S3 heeds and MLflow does not have. A job's newest word is a new one, never an older
one replaced: a gateway can answer a read that meets a replacement with bytes of both, and a write whose answer was
lost may still arrive.
"""

import random
import time
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

V = TypeVar("V")

_ATTEMPTS = 100
_LONGEST_PAUSE_SECONDS = 2.0


@dataclass(frozen=True)
class Ballot(Generic[V]):
    """One job's word. Rounds are told apart by their number, then by the job's name."""

    round: int
    """The last round the job has called; it will not go back behind it."""
    accepted: int = 0
    """The last of its rounds in which it spoke for `value`; 0 = in none."""
    value: V | None = None
    """What it spoke for then."""


class BallotStore(Protocol[V]):
    """Where jobs leave their words about one question, and where its answer comes to stand."""

    def write_ballot(self, job: str, number: int, word: Ballot[V]) -> None:
        """Leave word `number` of a job, all of whose words stay until they are taken back."""
        ...

    def delete_ballot(self, job: str, number: int) -> None:
        """Remove a word of a job."""
        ...

    def other_ballots(self, job: str) -> dict[str, Ballot[V]]:
        """The newest word of each other job."""
        ...

    def decision(self) -> V | None:
        """The answer, once there is one; words may be taken back from then on."""
        ...

    def decide(self, value: V) -> None:
        """Make `value` the answer. Jobs that call this, call it with the same value."""
        ...


class NoConsensus(Exception):  # noqa: N818 - the fact is the name
    """Jobs kept talking over each other until the attempts were used up."""


def reach_consensus(board: BallotStore[V], job: str, proposal: V) -> V:
    """The value that stands: `proposal`, or that of another job. Whoever returns, returns the same.

    NoConsensus in the unlikely case that jobs keep talking over each other.
    """
    said = 0
    own, others = Ballot[V](round=0), board.other_ballots(job)
    for attempt in range(_ATTEMPTS):
        called = 1 + max([own.round, *(other.round for other in others.values())])
        own = replace(own, round=called)
        for speaks in (False, True):
            if speaks:
                spoken_for = _spoken_for({**others, job: own})
                own = replace(own, accepted=called, value=proposal if spoken_for is None else spoken_for)
            board.write_ballot(job, said, own)
            said += 1
            others = board.other_ballots(job)
            stands = board.decision()  # after the words: one is taken back only when the answer is there
            leads = all((other.round, name) < (called, job) for name, other in others.items())
            if stands is None and speaks and leads and own.value is not None:
                stands = own.value
                board.decide(stands)
            if stands is not None:
                for number in range(said):  # the newest last: nobody may take an older one for it
                    board.delete_ballot(job, number)
                return stands
            if not leads:
                break
        # Timing only: who comes first may depend on it, what is agreed on is the same for all.
        time.sleep(random.uniform(0.01, min(_LONGEST_PAUSE_SECONDS, 0.1 * 2**attempt)))
    raise NoConsensus


def _spoken_for(words: dict[str, Ballot[V]]) -> V | None:
    """The value that was spoken for last, or None while none was."""
    _, name = max((one.accepted, name) for name, one in words.items())
    return words[name].value
