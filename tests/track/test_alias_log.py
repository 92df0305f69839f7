"""An alias moves by one decision at a time, in any order of requests and whoever dies; nothing is undone in silence."""

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ddpm_pipeline.errors import DamageError, JobError
from ddpm_pipeline.store import consensus
from ddpm_pipeline.tracking import LoggedAlias, Move, MoveConflictError, alias_log
from tests.track.one_model import Registry, Stepped
from tests.turns import Died, Turns

JOBS = 3


@pytest.fixture(autouse=True)
def reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client stands where an address would, and nobody pauses."""
    monkeypatch.setattr(alias_log, "tracking_client", lambda uri: uri)
    monkeypatch.setattr(consensus.time, "sleep", lambda seconds: None)


def alias(client: object) -> LoggedAlias:
    return LoggedAlias("digits", "champion", client)  # type: ignore[arg-type]


def race(seed: int, dying: dict[int, int]) -> tuple[list[str], Registry]:
    """Each job promotes another version against champion 1: what came of it, and the registry afterwards."""
    turns, registry = Turns(seed, range(JOBS)), Registry()

    def job(number: int) -> str:
        turns.wait(number)
        try:
            client = Stepped(registry, turns, number, dying.get(number))
            return f"moved to {alias(client).move(1, number + 2, 'promotion').after}"
        except MoveConflictError:
            return "overtaken"
        except Died:
            return "died"
        finally:
            turns.next(ended=number)

    with ThreadPoolExecutor(JOBS) as pool:
        return list(pool.map(job, range(JOBS))), registry


def log(registry: Registry) -> list[tuple[int | None, int | None]]:
    """Each move of the log, from and to which version."""
    found = alias(registry).read().moves
    return [(found[number].before, found[number].after) for number in sorted(found)]


def test_of_promotions_at_once_against_one_champion_one_comes_to_stand() -> None:
    winners: set[str] = set()
    for seed in range(30):
        told, registry = race(seed, {})
        (won,) = {*told} - {"overtaken"}
        assert told.count("overtaken") == JOBS - 1
        assert log(registry) == [(1, registry.aliases["champion"])]
        assert won == f"moved to {registry.aliases['champion']}"
        assert not [key for key in registry.tags if not key.startswith("ddpm.move.")]
        winners.add(won)
    assert len(winners) == JOBS


def test_a_job_that_dies_at_any_request_leaves_an_alias_that_the_next_look_brings_to_its_log() -> None:
    for seed in range(60):
        chance = random.Random(seed)
        dying = {job: chance.randrange(16) for job in chance.sample(range(JOBS), chance.randint(1, JOBS - 1))}
        told, registry = race(seed, dying)
        standing = alias(registry).reconcile()
        assert len(log(registry)) <= 1
        assert standing.version == registry.aliases["champion"] == (log(registry) or [(None, 1)])[0][1]
        moved = [line for line in told if line.startswith("moved")]
        assert len(moved) <= 1
        assert not moved or moved == [f"moved to {standing.version}"]


def test_a_decision_against_a_champion_that_is_no_more_moves_nothing() -> None:
    registry = Registry()
    assert alias(registry).move(1, 2, "promotion").number == 1
    with pytest.raises(
        MoveConflictError, match="means version 2 by now, and this decision was made against version 1"
    ):
        alias(registry).move(1, 3, "promotion")
    assert registry.aliases == {"champion": 2}
    assert log(registry) == [(1, 2)]


def test_a_move_that_another_job_has_just_made_is_the_same_move() -> None:
    registry = Registry()
    first = alias(registry).move(1, 2, "promotion")
    assert alias(registry).move(1, 2, "promotion") == first
    back = alias(registry).move(2, 1, "rollback")
    assert alias(registry).move(2, 1, "rollback") == back
    assert log(registry) == [(1, 2), (2, 1)]
    with pytest.raises(MoveConflictError, match="means version 1 by now"):
        alias(registry).move(2, 1, "promotion")  # decided on other grounds


def test_a_job_held_up_before_it_sets_the_alias_undoes_no_later_decision() -> None:
    registry = Registry()
    late = Stepped(registry, None, 0, None)

    class HeldUp(Registry):
        """Its alias is set long after it was asked for: others decide meanwhile."""

        def set_registered_model_alias(self, name: str, alias_: str, version: str) -> None:
            if late.left is None:
                late.left = 10**6
                assert alias(registry).move(2, 3, "promotion").number == 2
                assert registry.aliases == {"champion": 3}
            registry.set_registered_model_alias(name, alias_, version)

    held_up = HeldUp()
    held_up.tags, held_up.aliases = registry.tags, registry.aliases
    assert alias(held_up).move(1, 2, "promotion").number == 1
    assert registry.aliases == {"champion": 3}
    assert log(registry) == [(1, 2), (2, 3)]


def test_a_reader_is_given_what_was_decided_while_the_alias_stands_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = Registry()
    first = alias(registry)
    first.move(1, 2, "promotion")
    first.move(2, 1, "rollback")
    registry.aliases["champion"] = 2  # by a job that was suspended since it looked, and is killed now
    assert alias(registry).read().current_version == 2  # nobody says so: this was somebody's hand
    registry.tags["ddpm.moving.champion.0123"] = str(time.time())
    assert alias(registry).read().current_version == 1
    assert (registry.aliases["champion"], len(log(registry))) == (2, 2)
    assert alias(registry).reconcile().version == 1


def test_what_was_moved_by_hand_is_recorded_and_not_undone(caplog: pytest.LogCaptureFixture) -> None:
    registry = Registry()
    alias(registry).move(1, 2, "promotion")
    registry.aliases["champion"] = 1
    assert alias(registry).reconcile().version == 1
    assert "was moved by hand from version 2 to 1; recorded as move 2" in caplog.text
    assert log(registry) == [(1, 2), (2, 1)]
    del registry.aliases["champion"]
    assert alias(registry).reconcile().version is None
    assert alias(registry).move(None, 3, "promotion").number == 4
    assert registry.aliases == {"champion": 3}


def test_an_alias_that_something_else_moves_at_the_same_moment_is_told_of() -> None:
    class Fought(Registry):
        def set_registered_model_alias(self, name: str, alias_: str, version: str) -> None:
            self.aliases[alias_] = 9

    with pytest.raises(JobError, match=r"move 1 to version 2 was decided, but it points to version 9"):
        alias(Fought()).move(1, 2, "promotion")


def test_a_job_held_up_for_more_than_a_day_no_longer_sets_the_alias() -> None:
    registry = Registry()
    client = Stepped(registry, None, 0, None)
    job = alias(client)
    old = f"ddpm.moving.champion.{job.job}"

    class Slow(Registry):
        def set_registered_model_tag(self, name: str, key: str, value: str) -> None:
            later = str(time.time() - 2 * alias_log.MARK_SECONDS) if key == old else value
            super().set_registered_model_tag(name, key, later)
            if key.startswith("ddpm.move."):
                alias(self).reconcile()  # another job sets the alias, and sweeps the old mark
                assert old not in self.tags

    slow = Slow()
    job.uri = slow  # type: ignore[assignment]
    with pytest.raises(JobError, match="held up for more than a day"):
        job.move(1, 2, "promotion")
    assert slow.aliases == {"champion": 2}


def test_the_log_keeps_its_newest_moves_and_no_words() -> None:
    registry = Registry()
    registry.tags["ddpm.move-claim.champion.000001.dead.0000"] = '{"round": 1, "accepted": 0, "value": null}'
    for number in range(alias_log._KEPT_MOVES + 5):
        alias(registry).move(1 + number % 2, 2 - number % 2, "promotion")
    kept = alias(registry).read()
    assert sorted(kept.moves)[0] == kept.number() - alias_log._KEPT_MOVES + 1
    assert len(kept.tags) == alias_log._KEPT_MOVES


@pytest.mark.parametrize("text", ["", "[]", '{"number": 0}', '{"number": 99999999999999999999}'])
def test_a_tag_that_is_no_move_is_named(text: str) -> None:
    registry = Registry()
    registry.tags["ddpm.move.champion.000001"] = text
    with pytest.raises(DamageError, match=r"tag ddpm\.move\.champion\.000001: not a move; delete the tag"):
        alias(registry).reconcile()


def test_a_decision_made_before_a_rollback_does_not_undo_it() -> None:
    registry = Registry()
    seen_number = alias(registry).reconcile().number()
    alias(registry).move(1, 2, "promotion", seen_number=seen_number)
    alias(registry).move(2, 1, "rollback")
    with pytest.raises(MoveConflictError, match="was moved away from version 1 and back"):
        alias(registry).move(1, 2, "promotion", seen_number=seen_number)
    assert registry.aliases == {"champion": 1}
    assert log(registry) == [(1, 2), (2, 1)]


def test_a_move_of_another_number_than_its_tag_says_is_refused() -> None:
    registry = Registry()
    alias(registry).move(1, 2, "promotion")
    text = registry.tags["ddpm.move.champion.000001"]
    assert Move.model_validate_json(text).kind == "promotion"
    registry.tags["ddpm.move.champion.000007"] = text
    with pytest.raises(DamageError, match="holds move 1; delete the tag"):
        alias(registry).reconcile()
