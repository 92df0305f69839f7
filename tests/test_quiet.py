"""A job that is not heard of says so: not at once, and not for ever more often."""

import pytest

from pipeline.telemetry.stall import STALL_SECONDS, StallDetector


def test_silence_is_told_after_a_minute_then_after_two_four_and_anew_after_news(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    quiet = StallDetector()
    told: list[float] = []
    for second in range(1000):
        now = float(second)
        if second == 500:
            quiet.progress()
        told += [second] if quiet.due() is not None else []
    waits = [int(STALL_SECONDS) * times for times in (1, 2, 4, 8)]
    assert told == waits + [500 + wait for wait in waits]
