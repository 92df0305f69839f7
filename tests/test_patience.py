"""Work that is done waits for a store that is away, within bounds."""

import pytest

from jobs.runner import FAILED, REFUSED, handle_errors
from pipeline import retry
from pipeline.errors import UserError
from pipeline.store import StoreUnreachable, retry_during_outage


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "PAUSE_SECONDS", 0.01)


def test_an_outage_is_waited_for() -> None:
    answers = [StoreUnreachable("away"), StoreUnreachable("away"), None]

    def ask() -> str:
        answer = answers.pop(0)
        if answer is not None:
            raise answer
        return "there"

    assert retry_during_outage(ask) == "there"


def test_a_store_that_stays_away_is_reported_after_the_time_given() -> None:
    calls: list[int] = []

    def ask() -> None:
        calls.append(1)
        raise StoreUnreachable("away")

    with pytest.raises(StoreUnreachable, match="away"):
        retry_during_outage(ask, seconds=0.1)
    assert 2 <= len(calls) <= 11


def test_other_errors_are_not_waited_for() -> None:
    calls: list[int] = []

    def ask() -> None:
        calls.append(1)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        retry_during_outage(ask)
    assert len(calls) == 1


@pytest.mark.parametrize(("told", "seconds"), [(None, 60.0), ("0", 0.0), ("2.5", 2.5)])
def test_how_long_a_start_waits_is_settable(
    monkeypatch: pytest.MonkeyPatch, told: str | None, seconds: float
) -> None:
    monkeypatch.delenv("DDPM_START_WAIT_SECONDS")
    if told is not None:
        monkeypatch.setenv("DDPM_START_WAIT_SECONDS", told)
    assert retry.start_seconds() == seconds


@pytest.mark.parametrize("told", ["", "soon", "-1", "nan", "inf"])
def test_a_time_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    monkeypatch.setenv("DDPM_START_WAIT_SECONDS", told)
    with pytest.raises(UserError, match=r"DDPM_START_WAIT_SECONDS=.*: not a number of seconds"):
        retry.start_seconds()


def test_what_an_outage_ends_is_tried_again_by_a_supervisor_and_what_a_user_must_change_is_not() -> None:
    def away() -> int:
        raise StoreUnreachable("s3://bucket: away; try again later")

    def wrong() -> int:
        raise UserError("s3://bucket: wrong; correct it")

    assert (handle_errors(away), handle_errors(wrong)) == (FAILED, REFUSED)
