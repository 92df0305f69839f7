"""Claiming a prefix: of several jobs that find it empty at once, one's spec comes to stand, the same for all.

They agree by plain objects under `claims/`, with `spec.json` as the answer; see `pipeline.store.prefix_claim`.
"""

from typing import Literal

from pipeline.config.base import Settings
from pipeline.config.bounds import Number
from pipeline.config.json_document import parse_document
from pipeline.generate.heartbeat import new_job_id
from pipeline.generate.layout import CLAIM_PREFIX, SPEC_KEY
from pipeline.generate.spec import Spec, canonical, pretty, read_spec
from pipeline.store import Store
from pipeline.store.consensus import Ballot
from pipeline.store.prefix_claim import PrefixBallots


class SpecBallot(Settings):
    """One job's word on whose spec shall stand; the fields are those of `Word`."""

    format: Literal[1] = 1
    """Version of the layout of a generation."""
    round: Number
    """The last round the job has called; it will not go back behind it."""
    accepted: Number = 0
    """The last of its rounds in which it spoke for `spec`; 0 = in none."""
    spec: Spec | None = None
    """What it spoke for then."""


def claim_prefix(store: Store, spec: Spec) -> Spec:
    """The spec that stands at the prefix: `spec`, or that of another job which was first.

    Whoever returns, returns the same but for a count raised since, and `spec.json` is there by then.
    StoreUnreachable in the unlikely case that jobs keep talking over each other.
    """

    def write(stands: Spec) -> None:
        store.write(SPEC_KEY, pretty(stands.model_dump(mode="json")))

    claims = PrefixBallots(store, CLAIM_PREFIX, lambda: read_spec(store), write, _encode, _decode)
    return claims.agree(new_job_id(), spec)


def _encode(word: Ballot[Spec]) -> bytes:
    said = SpecBallot(round=word.round, accepted=word.accepted, spec=word.value)
    return canonical(said.model_dump(mode="json"))


def _decode(data: bytes, where: str) -> Ballot[Spec]:
    said = parse_document(SpecBallot, data, where, "a claim")
    return Ballot(said.round, said.accepted, said.spec)
