"""How two groups of processes take turns at the machine, and what is written of each turn."""

import json
import threading
import time
from pathlib import Path

import pytest

from benchmarks.launchers import NAMES, WINDOW_STEPS, WINDOWS, Relay, Timed


def test_two_groups_never_work_at_once_and_every_window_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.launchers.PATIENCE_SECONDS", 30.0)
    working = threading.Semaphore(1)
    clashes: list[str] = []

    def group(name: str) -> None:
        driver = Timed(Relay(tmp_path, name), None, WINDOW_STEPS * WINDOWS)
        driver.report(0, "")
        for window in range(1, WINDOWS + 1):
            if working.acquire(blocking=False):
                time.sleep(0.002)
                working.release()
            else:
                clashes.append(name)
            driver.report(window * WINDOW_STEPS, "")

    threads = [threading.Thread(target=group, args=(name,)) for name in NAMES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert not clashes
    for name in NAMES:
        lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [WINDOW_STEPS * (i + 1) for i in range(WINDOWS)]
