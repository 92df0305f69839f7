"""The record of how long jobs under attack took to go on."""

import time
from pathlib import Path

import pytest

from tests import chronicle
from tests.chronicle import Chronicle


def test_it_tells_what_a_strike_cost_and_of_a_slow_recovery_what_the_job_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chronicle, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(chronicle, "SLOW_SECONDS", 0.0)
    log, step = tmp_path / "log", [40]
    log.write_text("")
    watching = Chronicle(lambda: step[0], log)
    with watching.strike("kill"):
        log.write_text("no news for 60 s\nTraceback\n")
    time.sleep(0.5)
    step[0] = 80
    time.sleep(0.5)
    first, said, ended = watching.end()
    assert "step   40: kill" in first
    assert "went on after" in first
    assert said.endswith("no news for 60 s")
    assert ended.startswith("ended")
