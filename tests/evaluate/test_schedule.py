"""The scheduler: time of day, one process at a time, and its end."""

import datetime as dt
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.jobs.nightly_schedule import Runner, daily, missed
from ddpm_pipeline.nightly.history import write_latest
from ddpm_pipeline.store import open_store
from tests.evaluate.test_history import night

DAY_9 = dt.datetime(2026, 3, 9, tzinfo=dt.UTC)


def test_the_time_of_day_is_utc_and_comes_every_day() -> None:
    after = dt.datetime(2026, 3, 1, 2, 30, tzinfo=dt.UTC)
    first = daily("02:15").get_next_fire_time(None, after)
    assert first == dt.datetime(2026, 3, 2, 2, 15, tzinfo=dt.UTC)
    assert daily("02:15").get_next_fire_time(first, first + dt.timedelta(seconds=1)) - first == dt.timedelta(
        1
    )


@pytest.mark.parametrize("at", ["24:00", "2", "02:60", "noon", ""])
def test_an_invalid_time_is_refused(at: str) -> None:
    with pytest.raises(UserError, match="HH:MM"):
        daily(at)


def test_a_night_is_missed_once_its_hour_has_passed(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "nights"))
    two = daily("02:00")
    assert not missed(store, two, DAY_9 + dt.timedelta(days=30))  # the first night comes at its hour
    write_latest(store, night(-1))  # that of the ninth
    for after_midnight, late in (
        (dt.timedelta(0), False),
        (dt.timedelta(hours=1.9), False),
        (dt.timedelta(hours=2), True),
    ):
        assert missed(store, two, DAY_9 + dt.timedelta(days=1) + after_midnight) is late
    assert not missed(store, two, DAY_9 + dt.timedelta(hours=20))
    assert missed(store, two, DAY_9 + dt.timedelta(days=4))


def test_a_night_runs_to_its_end_and_returns_its_code(capfd: pytest.CaptureFixture[str]) -> None:
    assert Runner([sys.executable, "-c", "print('made'); raise SystemExit(3)"])() == 3
    assert "ended with 3" in capfd.readouterr().out


def test_a_night_that_starts_while_the_schedule_ends_is_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner([sys.executable, "-c", "import time; time.sleep(60)"])
    begin = subprocess.Popen

    def begin_late(command: list[str]) -> subprocess.Popen[bytes]:
        runner.end()  # from the signal's thread, at the worst moment
        return begin(command)

    monkeypatch.setattr(subprocess, "Popen", begin_late)
    assert runner() == -15


def test_ending_the_schedule_ends_the_night_and_starts_no_other() -> None:
    runner = Runner([sys.executable, "-c", "import time; time.sleep(60)"])
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(runner()))
    thread.start()
    while runner._process is None:
        time.sleep(0.01)
    runner.end()
    thread.join(10)
    assert codes == [-15]
    assert runner() == 0
