"""Work that is done waits for a store that is away, within bounds."""

import pytest

from pipeline.store import StoreUnreachable, patience, patiently


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PAUSE_SECONDS", 0.01)


def test_an_outage_is_waited_for() -> None:
    answers = [StoreUnreachable("away"), StoreUnreachable("away"), None]

    def ask() -> str:
        answer = answers.pop(0)
        if answer is not None:
            raise answer
        return "there"

    assert patiently(ask) == "there"


def test_a_store_that_stays_away_is_reported_after_the_time_given() -> None:
    calls: list[int] = []

    def ask() -> None:
        calls.append(1)
        raise StoreUnreachable("away")

    with pytest.raises(StoreUnreachable, match="away"):
        patiently(ask, seconds=0.1)
    assert 2 <= len(calls) <= 11


def test_other_errors_are_not_waited_for() -> None:
    calls: list[int] = []

    def ask() -> None:
        calls.append(1)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        patiently(ask)
    assert len(calls) == 1
