"""Moves of an alias such as champion: each is decided in a log, which the alias then follows.

MLflow moves an alias unconditionally, so two jobs that read it, work for long and then move it would undo each other.
Here a move is decided first: moves are numbered, and of the jobs that want the next number one wins
(`ddpm_pipeline.store.consensus`), against the version that is current in the log. The log is stored as tags of the
registered model, one per move. The alias is set afterwards and read again; any job that finds it behind the log moves
it forward.

A job sets a mark (`ddpm.moving.…`) before it decides and removes it once the alias agrees with the log. An alias that
differs from the log while there is a mark was left by a killed or suspended job; without a mark something else moved
it, by hand for example, which is recorded in the log as a move.
"""

import logging
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from pydantic import Field

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.json_document import parse_document
from ddpm_pipeline.errors import DamageError, JobError, UserError
from ddpm_pipeline.store.consensus import Ballot, NoConsensus, reach_consensus
from ddpm_pipeline.telemetry.redaction import redact
from ddpm_pipeline.tracking.connect import retry_request, tracking_client

if TYPE_CHECKING:
    from mlflow import MlflowClient

_log = logging.getLogger(__name__)
T = TypeVar("T")

_MAX_ATTEMPTS = 20
_KEPT_MOVES = 100
MARK_SECONDS = 86400.0
"""Age from which a mark is a dead job's. A job that is suspended for longer stops instead of setting the alias."""


class MoveConflictError(JobError):
    """Another decision was made since the caller read the alias; nothing was moved."""


class Move(Settings):
    """One move of an alias."""

    format: Literal[1] = 1
    """Version of this document's layout."""
    number: int = Field(ge=1, lt=10**6)
    """Its number in the log."""
    before: int | None = Field(ge=1, lt=2**31)
    """The current version before; None = none."""
    after: int | None = Field(ge=1, lt=2**31)
    """The current version afterwards; None = the alias was removed by hand."""
    kind: Literal["first", "promotion", "rollback", "by hand"]
    """What moved it."""
    job: str = Field(pattern=r"^[0-9a-f]{1,32}$")
    """Names the job that decided."""
    at: float = Field(ge=0, lt=1e11)
    """Seconds since 1970 (UTC) by that job's clock."""


@dataclass(frozen=True)
class AliasHistory:
    """An alias and its log, as read at one time."""

    version: int | None
    """The version that the alias points to."""
    moves: Mapping[int, Move]
    """The log, by number."""
    tags: Mapping[str, str]
    """All tags of the registered model."""
    marks: Mapping[str, float]
    """Marks of jobs that are about to set the alias, with their times."""

    @property
    def last(self) -> Move | None:
        """The newest move."""
        return self.moves[max(self.moves)] if self.moves else None

    def number(self) -> int:
        """Of the newest move; 0 for an empty log."""
        return max(self.moves, default=0)

    @property
    def is_behind_log(self) -> bool:
        """Whether a killed or suspended job left the alias behind the log."""
        known = {version for move in self.moves.values() for version in (move.before, move.after)}
        behind = self.last is not None and self.version != self.last.after
        return behind and bool(self.marks) and self.version in known

    @property
    def current_version(self) -> int | None:
        """The version that the alias points to once all decided moves are applied."""
        return self.last.after if self.last is not None and self.is_behind_log else self.version


class LoggedAlias:
    """An alias of a registered model and the log of its moves."""

    def __init__(self, name: str, alias: str = "champion", uri: str | None = None) -> None:
        self.name, self.alias, self.uri = name, alias, uri
        self.job = uuid.uuid4().hex
        self._move_prefix = f"ddpm.move.{alias}."
        self.ballot_prefix = f"ddpm.move-claim.{alias}."
        self._mark_prefix = f"ddpm.moving.{alias}."

    def __str__(self) -> str:
        return f"{self.name}@{self.alias}"

    def read(self) -> AliasHistory:
        """Read alias and log. DamageError for an invalid tag."""
        model = self.call(lambda client: client.get_registered_model(self.name))
        tags = dict(model.tags)
        found = dict(model.aliases).get(self.alias)
        moves = [self._parse(key, text) for key, text in tags.items() if key.startswith(self._move_prefix)]
        marks = {key: _seconds(text) for key, text in tags.items() if key.startswith(self._mark_prefix)}
        return AliasHistory(
            None if found is None else int(found), {move.number: move for move in moves}, tags, marks
        )

    def reconcile(self) -> AliasHistory:
        """Make alias and log agree: move an alias forward that is behind, record one that was moved by hand.

        Either is logged as a warning. JobError when others keep moving it.
        """
        before: AliasHistory | None = None
        for _ in range(_MAX_ATTEMPTS):
            seen = self.read()
            last = seen.last
            if last is None or seen.version == last.after:
                self._clean_up(seen)
                return seen
            if seen.is_behind_log and last.after is not None:
                _log.warning(
                    "%s pointed to version %s, behind move %d of the log; set to version %d",
                    self, seen.version, last.number, last.after,
                )  # fmt: skip
                self._set(last.after)
            elif seen == before:  # tags and aliases may be read at different moments, but not twice in a row
                _log.warning(
                    "%s was moved by hand from version %s to %s; recorded as move %d",
                    self, last.after, seen.version, last.number + 1,
                )  # fmt: skip
                self._decide(self._next(seen, last.after, seen.version, "by hand"))
            before = seen
        raise JobError(f"{self}: others keep moving it; look at the registry, then run this again")

    def move(
        self,
        before: int | None,
        after: int,
        kind: Literal["first", "promotion", "rollback"],
        *,
        seen_number: int | None = None,
    ) -> Move:
        """Move the alias from version `before`, to which it must still point, to `after`; returns the move.

        `seen_number`: number of the newest move when the caller read the alias. With it, an alias that was moved away
        and back in between (2 promoted, rolled back to 1) counts as moved.

        If another job has just made the same move, that one is returned. MoveConflictError, with nothing moved, when
        another decision came first. JobError when the alias, after it was set, does not agree with the log.
        """
        seen = self.reconcile()
        requested = (before, after, kind)
        if seen.version != before or seen_number not in (None, seen.number()):
            if seen.last is not None and (seen.last.before, seen.last.after, seen.last.kind) == requested:
                return seen.last
            raise self._conflict(before, seen.version)
        wanted = self._next(seen, before, after, kind)
        mark = f"{self._mark_prefix}{self.job}"
        self.tag(mark, str(time.time()))
        decided = self._decide(wanted)
        if (decided.before, decided.after, decided.kind) != requested:
            self.untag(mark)
            self.reconcile()
            raise self._conflict(before, decided.after)
        self._apply(decided, mark)  # also if a killed job decided the same move
        return decided

    def _apply(self, move: Move, mark: str) -> None:
        """Set the alias as the log says, which may have advanced by now; check that it stays; remove the mark."""
        set_for, version = 0, move.before
        for _ in range(_MAX_ATTEMPTS):
            seen = self.read()
            last, version = seen.last or move, seen.version
            if mark not in seen.marks:
                raise JobError(
                    f"{self}: this job was held up for more than a day and no longer sets it; run it again"
                )
            if seen.version == last.after or last.after is None:
                self.untag(mark)
                self._clean_up(seen)
                if last.number > move.number:
                    _log.warning("%s was moved on to version %s by a later decision", self, last.after)
                return
            if set_for == last.number and len(seen.marks) == 1:
                break
            self._set(last.after)
            set_for = last.number
        raise JobError(
            f"{self}: move {move.number} to version {move.after} was decided, but it points to version "
            f"{version}: something else moved it; look at the registry, then run this again"
        )

    def _decide(self, wanted: Move) -> Move:
        """The move that is chosen for the number of `wanted`."""
        try:
            return reach_consensus(_MoveBallots(self, wanted.number), self.job, wanted)
        except NoConsensus:
            raise JobError(f"{self}: others keep deciding about it; run this again in a minute") from None

    def _next(
        self,
        seen: AliasHistory,
        before: int | None,
        after: int | None,
        kind: Literal["first", "promotion", "rollback", "by hand"],
    ) -> Move:
        number = seen.number() + 1
        return Move(number=number, before=before, after=after, kind=kind, job=self.job, at=time.time())

    def _conflict(self, before: int | None, now: int | None) -> MoveConflictError:
        if now == before:
            found = f"was moved away from {_version(before)} and back since this decision was begun"
        else:
            found = f"means {_version(now)} by now, and this decision was made against {_version(before)}"
        return MoveConflictError(f"{self}: {found}; nothing was moved, run it again")

    def _clean_up(self, seen: AliasHistory) -> None:
        """Delete marks and ballots of dead jobs, and the oldest moves. Only ballots on numbers that are decided."""
        newest = seen.number()
        for key, made_at in seen.marks.items():
            if time.time() - made_at > MARK_SECONDS:
                self.untag(key)
        for key in seen.tags:
            if key.startswith(self.ballot_prefix) and _number(key.removeprefix(self.ballot_prefix)) <= newest:
                self.untag(key)
        for number in seen.moves:
            if number <= newest - _KEPT_MOVES:
                self.untag(self.move_key(number))

    def move_key(self, number: int) -> str:
        """The tag of a move."""
        return f"{self._move_prefix}{number:06d}"

    def _parse(self, key: str, text: str) -> Move:
        where = f"model {self.name!r}: tag {key}"
        move = parse_document(Move, text.encode(), where, "a move; delete the tag")
        if key != self.move_key(move.number):
            raise DamageError(f"{where}: holds move {move.number}; delete the tag")
        return move

    def _set(self, version: int) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.call(lambda client: client.set_registered_model_alias(self.name, self.alias, str(version)))
        except MlflowException as error:
            raise UserError(
                f"{self}: cannot be set to version {version} ({redact(str(error))[:200]}); was it deleted?"
            ) from None

    def tag(self, key: str, text: str) -> None:
        """Set a tag of the registered model."""
        self.call(lambda client: client.set_registered_model_tag(self.name, key, text))

    def untag(self, key: str) -> None:
        """Delete a tag of the registered model."""
        self.call(lambda client: client.delete_registered_model_tag(self.name, key))

    def call(self, action: "Callable[[MlflowClient], T]") -> T:
        """Call the registry with retries; every call here is idempotent."""
        return retry_request("the model registry", lambda: action(tracking_client(self.uri)))


class _StoredBallot(Settings):
    """A job's ballot on one number of the log, as its tag stores it."""

    round: int = Field(ge=0, lt=2**31)
    accepted: int = Field(ge=0, lt=2**31)
    value: Move | None


class _MoveBallots:
    """A ballot store for the move of one number: tags of the registered model."""

    def __init__(self, alias: LoggedAlias, number: int) -> None:
        self._alias, self._number = alias, number
        self._prefix = f"{alias.ballot_prefix}{number:06d}."

    def write_ballot(self, job: str, number: int, ballot: Ballot[Move]) -> None:
        stored = _StoredBallot(round=ballot.round, accepted=ballot.accepted, value=ballot.value)
        self._alias.tag(f"{self._prefix}{job}.{number:04d}", stored.model_dump_json())

    def delete_ballot(self, job: str, number: int) -> None:
        self._alias.untag(f"{self._prefix}{job}.{number:04d}")

    def other_ballots(self, job: str) -> dict[str, Ballot[Move]]:
        found: dict[str, Ballot[Move]] = {}
        for key, text in sorted(self._alias.read().tags.items()):  # a job's newest comes last
            name = key.removeprefix(self._prefix).partition(".")[0]
            if key.startswith(self._prefix) and name != job:
                where = f"model {self._alias.name!r}: tag {key}"
                stored = parse_document(_StoredBallot, text.encode(), where, "a ballot; delete the tag")
                found[name] = Ballot(stored.round, stored.accepted, stored.value)
        return found

    def decision(self) -> Move | None:
        seen = self._alias.read()
        if seen.number() > self._number and self._number not in seen.moves:
            raise MoveConflictError(
                f"{self._alias}: was moved many times meanwhile; nothing was moved, run it again"
            )
        return seen.moves.get(self._number)

    def decide(self, value: Move) -> None:
        self._alias.tag(self._alias.move_key(self._number), value.model_dump_json())


def _seconds(text: str) -> float:
    """The time of a mark; 0 for an invalid one, which counts as old."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def _number(rest: str) -> int:
    """The number in a ballot's tag, after its prefix; 0 for a tag that is no ballot."""
    head = rest.partition(".")[0]
    return int(head) if head.isascii() and head.isdecimal() and len(head) <= 6 else 0


def _version(version: int | None) -> str:
    return "no version" if version is None else f"version {version}"
