"""Retries: pauses grow, are bounded, and end; jobs bridge outages of a service, and nothing else."""

import pytest

from ddpm_pipeline import retry
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.jobs.runner import FAILED, REFUSED, handle_errors
from ddpm_pipeline.retry import Retries, RetryPolicy, call_with_retries
from ddpm_pipeline.store import StoreUnreachable, retry_during_outage


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.pauses: list[float] = []
        monkeypatch.setattr(retry.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(retry.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.pauses.append(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Failing:
    """An action that fails some times before it succeeds."""

    def __init__(self, failures: int, error: Exception | None = None) -> None:
        self.left, self.error, self.calls = failures, error or StoreUnreachable("away"), 0

    def __call__(self) -> str:
        self.calls += 1
        if self.left:
            self.left -= 1
            raise self.error
        return "answer"


def test_pauses_double_up_to_the_longest_with_equal_jitter(clock: Clock) -> None:
    policy = RetryPolicy(attempts=6, first_pause_seconds=1.0, longest_pause_seconds=5.0)
    assert call_with_retries(Failing(5), lambda error: True, policy) == "answer"
    for pause, whole in zip(clock.pauses, [1, 2, 4, 5, 5], strict=True):
        assert whole / 2 <= pause <= whole


def test_the_last_failure_is_raised_when_the_attempts_are_used_up(clock: Clock) -> None:
    action = Failing(10)
    with pytest.raises(StoreUnreachable, match="away"):
        call_with_retries(action, lambda error: True, RetryPolicy(attempts=3))
    assert action.calls == 3
    assert len(clock.pauses) == 2


def test_a_success_starts_the_count_and_the_time_anew(clock: Clock) -> None:
    retries = Retries(RetryPolicy(3, 1.0, 1.0, total_seconds=10.0))
    for _ in range(20):
        assert retries.pause(OSError())
        assert retries.failing_seconds > 0
        retries.reset()
        assert retries.failing_seconds == 0


def test_each_retry_is_reported_with_the_time_that_is_left(clock: Clock) -> None:
    heard: list[tuple[str, float]] = []
    policy = RetryPolicy(None, 1.0, 1.0, total_seconds=60.0)
    call_with_retries(
        Failing(2), lambda error: True, policy, lambda error, left: heard.append((str(error), left))
    )
    assert heard == [("away", 60.0), ("away", pytest.approx(60.0 - clock.pauses[0]))]


def test_pauses_of_an_outage_that_lasts_for_days_stay_bounded() -> None:
    # 2.0 ** 1024 overflows a float: at 15 s a pause, after four hours
    assert RetryPolicy(longest_pause_seconds=15.0).pause_seconds(100_000) <= 15.0


def test_an_outage_is_waited_for(clock: Clock) -> None:
    assert retry_during_outage(Failing(2)) == "answer"
    assert len(clock.pauses) == 2


def test_a_store_that_stays_away_is_reported_after_the_time_given(clock: Clock) -> None:
    action = Failing(10_000)
    with pytest.raises(StoreUnreachable, match="away"):
        retry_during_outage(action, seconds=60)
    assert 57 <= sum(clock.pauses) <= 60
    with pytest.raises(StoreUnreachable, match="away"):
        retry_during_outage(action)
    assert 297 + 57 <= sum(clock.pauses) <= 360


def test_where_no_time_is_given_there_is_one_attempt(clock: Clock) -> None:
    action = Failing(1)
    with pytest.raises(StoreUnreachable):
        retry_during_outage(action, seconds=0)
    assert (action.calls, clock.pauses) == (1, [])


def test_other_errors_are_not_waited_for(clock: Clock) -> None:
    action = Failing(1, OSError("disk full"))
    with pytest.raises(OSError, match="disk full"):
        retry_during_outage(action)
    assert (action.calls, clock.pauses) == (1, [])


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
