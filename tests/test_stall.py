"""A stalled job is reported: not at once, and less and less often."""

import pytest

from ddpm_pipeline.telemetry.stall import STALL_SECONDS, StallDetector


def test_a_stall_is_due_after_one_minute_then_two_and_four_and_anew_after_progress(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    detector = StallDetector()
    due: list[float] = []
    for second in range(1000):
        now = float(second)
        if second == 500:
            detector.progress()
        due += [second] if detector.due() is not None else []
    waits = [int(STALL_SECONDS) * times for times in (1, 2, 4, 8)]
    assert due == waits + [500 + wait for wait in waits]
