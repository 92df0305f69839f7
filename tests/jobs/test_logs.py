"""Logs: JSON lines that say where they come from, and no secret in any of them."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from ddpm_pipeline.jobs.progress_bar import Rate, progress_of
from ddpm_pipeline.telemetry import logs
from ddpm_pipeline.telemetry.logs import JsonLines, located, name_process

CANARY = "canary-bird-in-a-coal-mine"


def line(message: str = "hello", **extra: object) -> dict[str, Any]:
    record = logging.makeLogRecord(
        {"msg": message, "levelno": 30, "levelname": "WARNING", "name": "t", **extra}
    )
    return json.loads(JsonLines().format(record))


@pytest.fixture
def facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_process", {})


@pytest.fixture
def json_logging(monkeypatch: pytest.MonkeyPatch, facts: None) -> Iterator[None]:
    monkeypatch.setenv("DDPM_LOG", "json")
    loggers = [logging.getLogger(name) for name in ("", "ddpm_pipeline")]
    before = [(logger, list(logger.handlers), logger.propagate, logger.level) for logger in loggers]
    logs.set_up_logging()
    logs.set_up_logging()  # twice is once
    yield
    for logger, handlers, propagate, level in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.mark.usefixtures("facts")
def test_a_line_says_what_where_and_when() -> None:
    name_process(run="digits", rank=1)
    with located(shard=7):
        inside = line(step=300)
    assert {key: inside[key] for key in ("run", "rank", "step", "shard", "level", "message")} == {
        "run": "digits",
        "rank": 1,
        "step": 300,
        "shard": 7,
        "level": "warning",
        "message": "hello",
    }
    assert inside["time"].endswith("Z")
    assert "shard" not in line()
    assert line()["rank"] == 1


@pytest.mark.parametrize(
    "told",
    [
        {"message": f"cannot open http://joe:{CANARY}@db.example"},
        {"message": "login failed", "password": CANARY},
        {"message": "look", "exc_info": (ValueError, ValueError(f"token={CANARY}"), None)},
    ],
)
def test_secrets_are_masked_in_messages_fields_and_tracebacks(told: dict[str, Any]) -> None:
    assert CANARY not in json.dumps(line(**told))


@pytest.mark.usefixtures("json_logging")
def test_progress_and_records_are_lines_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_of("generate", "images") as report:
        report(5, 10)
        report(10, 10, "complete")
    logging.getLogger("ddpm_pipeline.anything").warning("away")
    lines = [json.loads(text) for text in capsys.readouterr().err.splitlines()]
    assert [(entry.get("done"), entry.get("total")) for entry in lines] == [(5, 10), (10, 10), (None, None)]
    assert lines[-1]["logger"] == "ddpm_pipeline.anything"


def test_a_second_piece_of_work_is_timed_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 1000.0, 1010.0])
    monkeypatch.setattr("ddpm_pipeline.jobs.progress_bar.time.monotonic", lambda: next(clock))
    rate = Rate()
    assert [rate.measure(done, 100) for done in (0, 100, 0, 50)] == [(0, None), (10, 0), (0, None), (5, 10)]


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_process_dies_without_telling_secrets(form: str) -> None:
    program = (
        "import logging; from ddpm_pipeline.telemetry.logs import set_up_logging; set_up_logging();"
        "logging.getLogger('ddpm_pipeline').warning('first %s', 'https://u:' + 'KEY@h'.replace('KEY', C));"
        "raise RuntimeError('secret: ' + C)"
    )
    result = subprocess.run(
        [sys.executable, "-c", f"C = '{CANARY}'\n{program}"],
        env={**os.environ, "DDPM_LOG": form},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert CANARY not in result.stderr.replace(f"C = '{CANARY}'", "")
    assert "first https://" in result.stderr
    assert "RuntimeError" in result.stderr
    if form == "json":
        assert [json.loads(text)["level"] for text in result.stderr.splitlines()] == ["warning", "critical"]
