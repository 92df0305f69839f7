"""Of ranks that wait for each other, the one that the others wait for is named."""

import threading
from collections.abc import Iterator

import pytest
from pydantic import ValidationError

from ddpm_pipeline.config.training import WorkerConfig
from ddpm_pipeline.train import rank_watch
from ddpm_pipeline.train.rank_watch import Heard, RankMark, RankMarker, awaited_ranks

NOW = 1000.0


def group(*ranks: tuple[int, bool, float]) -> dict[int, Heard]:
    """What was heard: finished step, whether it waits for data, seconds ago."""
    return {
        rank: Heard(RankMark(rank, f"n{rank}", step, awaits), NOW - ago)
        for rank, (step, awaits, ago) in enumerate(ranks)
    }


@pytest.mark.parametrize(
    ("heard", "line"),
    [
        (group((7, False, 1), (7, False, 1), (7, False, 1)), None),
        (group((7, True, 1), (7, True, 1)), None),
        (group(), None),
        (group((7, False, 99), (7, False, 99)), None),
        (
            group((7, False, 1), (7, False, 75), (7, False, 1)),
            "nothing was heard of rank 1 (node n1) for 75 s: frozen, gone or cut off",
        ),
        (
            group((7, False, 1), (7, True, 1), (7, False, 1)),
            "the others wait for rank 1 (node n1), waiting for data after step 7",
        ),
        (
            group((8, True, 1), (8, False, 1), (7, False, 1)),
            "the others wait for rank 2 (node n2), computing after step 7",
        ),
        (
            group((8, False, 1), *[(7, False, 1)] * 6),
            "the others wait for rank 1 (node n1), rank 2 (node n2), rank 3 (node n3), rank 4 (node n4) and 2 more, "
            "computing after step 7",
        ),
    ],
)
def test_the_rank_that_is_set_apart_is_named(heard: dict[int, Heard], line: str | None) -> None:
    assert awaited_ranks(heard, len(heard), NOW) == line


def test_a_rank_that_never_began_is_named() -> None:
    heard = group((7, False, 1), (7, False, 1))
    assert awaited_ranks(heard, 3, NOW) == "nothing was heard of rank 2, which should have begun"
    assert awaited_ranks({}, 3, NOW) is None


def test_a_rank_tells_its_step_and_that_it_waits_for_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_watch, "MARK_SECONDS", 0.001)
    told: list[RankMark] = []
    arrived, comes = threading.Condition(), threading.Event()

    def send(mark: RankMark) -> None:
        with arrived:
            told.append(mark)
            arrived.notify_all()

    def tells(step: int, awaits_data: bool) -> None:
        with arrived:
            assert arrived.wait_for(lambda: told[-1:] == [RankMark(3, "n", step, awaits_data)], 30)

    def slow() -> Iterator[str]:
        yield "first"
        assert comes.wait(30)
        yield "second"

    with RankMarker(RankMark(3, "n", 4), send) as marker:
        batches = marker.of_data(slow())
        assert next(batches) == "first"
        tells(4, False)
        marker.finished(5)
        tells(5, False)
        waiting = threading.Thread(target=lambda: next(batches))
        waiting.start()
        tells(5, True)
        comes.set()
        waiting.join(30)
        tells(5, False)
        assert list(batches) == []
    assert not marker._thread.is_alive()


def test_a_wait_of_seconds_is_refused() -> None:
    assert WorkerConfig(collective_seconds=600).collective_seconds == 600
    with pytest.raises(ValidationError, match="collective_seconds"):
        WorkerConfig(collective_seconds=5)
