"""`ddpm status` shows jobs, nights, disk and versions, and says why where it knows nothing."""

import json
from http.server import BaseHTTPRequestHandler
from importlib import metadata
from pathlib import Path

import pytest

from ddpm_pipeline.jobs import overview
from ddpm_pipeline.jobs.overview import disk_of, jobs_of_cluster, nights_of_root, overview_lines, versions
from ddpm_pipeline.store import open_store
from tests.evaluate.test_history import night
from tests.loopback_server import running

JOBS = [
    {"type": "SUBMISSION", "submission_id": "train-1", "status": "RUNNING"},
    {"type": "SUBMISSION", "submission_id": "train-0", "status": "SUCCEEDED"},
    {"type": "DRIVER", "submission_id": None, "status": "RUNNING"},
]


class Dashboard(BaseHTTPRequestHandler):
    """A cluster's list of jobs."""

    def do_GET(self) -> None:
        self.send_response(200 if self.headers["Authorization"] == "Bearer let-me-in" else 401)
        self.end_headers()
        self.wfile.write(json.dumps(JOBS).encode())

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""


def test_jobs_are_counted_and_those_that_run_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(Dashboard) as address:
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN_PATH"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("RAY_JOB_ADDRESS", address)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "let-me-in")
        assert jobs_of_cluster() == {"statuses": {"RUNNING": 1, "SUCCEEDED": 1}, "running": ["train-1"]}
        monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
        assert jobs_of_cluster() == {"problem": "the cluster does not answer"}
    monkeypatch.delenv("RAY_JOB_ADDRESS")
    assert jobs_of_cluster() == {"problem": "no cluster is named"}


def test_the_newest_night_of_each_name_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_ROOT", f"file://{tmp_path}")
    assert nights_of_root() == {"nights": []}
    for name in ("digits", "digits-fast"):
        newest = night(1)
        open_store(f"file://{tmp_path}/nightly/{name}").write(
            "latest.json", newest.model_dump_json().encode()
        )
        open_store(f"file://{tmp_path}/nightly/{name}").write("index.html", b"")
    open_store(f"file://{tmp_path}").write("nightly/unfinished/date=2026-03-02/spec.json", b"{}")
    found = nights_of_root()["nights"]
    assert [(one["name"], one["count"]) for one in found] == [("digits-fast", 100), ("digits", 100)]
    monkeypatch.setenv("DDPM_ROOT", "s3://")
    assert "no bucket in it" in nights_of_root()["problem"]


def test_disk_use_is_counted_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "logs").mkdir()
    for number in range(3):
        (tmp_path / f"logs/{number}").write_bytes(b"x" * 1000)
    found = disk_of(tmp_path)
    assert (found["used_bytes"], found["at_least"], found["free_bytes"] > 0) == (3000, False, True)
    monkeypatch.setattr(overview, "MAX_FILES", 2)
    assert (disk_of(tmp_path)["used_bytes"], disk_of(tmp_path)["at_least"]) == (2000, True)
    assert disk_of(tmp_path / "none")["used_bytes"] == 0


def test_every_part_has_a_line() -> None:
    assert versions()["ray"] == metadata.version("ray")
    a_night = {"name": "digits", "date": "2026-03-02", "count": 1000, "model": "digits/3", "drift": []}
    lines = overview_lines(
        {
            "jobs": {"statuses": {"RUNNING": 1, "SUCCEEDED": 2}, "running": ["train-1"]},
            "nights": {"nights": [a_night]},
            "disk": {"used_bytes": 3 << 30, "at_least": False, "free_bytes": 5 << 30},
            "versions": {"ddpm": "1", "ray": "2"},
        }
    )
    assert lines == [
        "jobs     1 running, 2 succeeded (train-1)",
        "nights   digits 2026-03-02, 1,000 samples of digits/3, no drift",
        "disk     3.0 GiB used by the local stack, 5.0 GiB free",
        "versions ddpm 1, ray 2",
    ]
