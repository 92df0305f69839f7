"""What a spool says is delivered to the configured server alone, and no file of this machine leaves or goes with it."""

import base64
import json
import logging
import os
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.jobs.replay import run
from ddpm_pipeline.jobs.runner import DONE, FAILED
from ddpm_pipeline.tracking import Replayed, Spool, replay, replay_all
from ddpm_pipeline.tracking.journal import Journal, write_identity

RUN = "0123456789abcdef0123456789abcdef"
NAME = "0123456789abcdef0123456789abcdef.bin"
SECRET = b"PRIVATE-KEY-OF-VICTIM"


class Server:
    """An MLflow server that has one run, takes everything, and remembers what it was told."""

    def __init__(self) -> None:
        outer = self
        self.told: list[bytes] = []
        self.passwords: set[str] = set()
        self.has_run = True

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                pass

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                outer.told.append(self.path.encode() + b" " + body)
                sent = self.headers.get("Authorization", "")
                if sent.startswith("Basic "):
                    outer.passwords.add(base64.b64decode(sent[6:]).decode())
                info = {
                    "run_id": RUN,
                    "run_uuid": RUN,
                    "experiment_id": "0",
                    "status": "RUNNING",
                    "start_time": 1,
                    "lifecycle_stage": "active",
                    "artifact_uri": f"mlflow-artifacts:/0/{RUN}/artifacts",
                }
                missing = {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": f"Run '{RUN}' not found"}
                found = {"run": {"info": info, "data": {}}} if "runs/get" in self.path else {}
                data = json.dumps(found if outer.has_run else missing).encode()
                self.send_response(200 if outer.has_run else 404)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_PATCH = answer  # noqa: N815 - names of the standard library

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The configured server."""
    server = Server()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "my-real-password")
    yield server
    server.close()


@pytest.fixture
def theirs() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "private_key"
    path.write_bytes(SECRET)
    return path


def planted(tmp_path: Path, uri: str, *records: dict[str, object]) -> Path:
    """A spool with these lines and one point."""
    spool = tmp_path / "spools" / RUN
    write_identity(spool, RUN, uri)
    journal = Journal(spool)
    for record in (*records, {"t": 1, "s": 1, "m": {"train/loss": 0.5}}):
        journal.append(record)
    journal.close()
    return spool


def test_a_spool_s_points_go_to_the_configured_server_whatever_it_names(
    tmp_path: Path, ours: Server, theirs: Server
) -> None:
    spool = planted(tmp_path, theirs.url)
    assert replay_all(spool.parent, 20) == {spool: Replayed()}
    assert theirs.told == []
    assert ours.passwords == {"me:my-real-password"}
    assert any(b"train/loss" in told for told in ours.told)


def test_a_record_that_names_a_file_elsewhere_neither_sends_nor_removes_it(
    tmp_path: Path, ours: Server, victim: Path
) -> None:
    up = os.path.relpath(victim, tmp_path / "spools" / RUN / "files")
    records = [{"t": 1, "p": "x.bin", "f": name} for name in (str(victim), up, "../run.json")]
    spool = planted(tmp_path, ours.url, *records)
    assert replay_all(spool.parent, 20) == {spool: Replayed(damaged=3)}
    assert victim.read_bytes() == SECRET
    assert (spool / "run.json").exists()
    assert not any(SECRET in told for told in ours.told)


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_a_link_among_the_spool_s_files_is_put_aside_with_its_reason(
    tmp_path: Path, ours: Server, victim: Path, link: "type[Path.symlink_to]"
) -> None:
    spool = planted(tmp_path, ours.url, {"t": 1, "p": "x.bin", "f": NAME})
    link(spool / "files" / NAME, victim)
    assert replay_all(spool.parent, 20) == {spool: Replayed(refused=1)}
    assert victim.read_bytes() == SECRET
    assert not any(SECRET in told for told in ours.told)
    assert NAME in json.loads((spool / "refused.jsonl").read_text())["reason"]


def test_a_run_that_the_configured_server_does_not_have_is_told_with_the_way_to_its_own(
    tmp_path: Path, ours: Server, theirs: Server
) -> None:
    spool = planted(tmp_path, theirs.url)
    ours.has_run = False
    with pytest.raises(
        UserError, match=f"rejects run {RUN} .*opened at {theirs.url}: set MLFLOW_TRACKING_URI"
    ):
        replay(spool, 20)
    assert "rejects run" in replay_all(spool.parent, 20)[spool].problem
    assert theirs.told == []


def test_what_was_not_delivered_is_counted_and_fails_the_command(
    tmp_path: Path, ours: Server, victim: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spool = planted(
        tmp_path, ours.url, {"t": 1, "p": "x.bin", "f": "../run.json"}, {"t": 1, "p": "x.bin", "f": NAME}
    )
    (spool / "files" / NAME).symlink_to(victim)
    assert run(spool.parent) == FAILED
    assert (
        f"{spool}: 1 damaged lines skipped, 1 records rejected by MLflow, kept in refused.jsonl\n"
        "1 spools examined\n"
    ) == capsys.readouterr().out
    assert run(spool.parent) == DONE
    ours.has_run = False
    planted(tmp_path, ours.url)
    assert run(spool.parent) == FAILED
    assert "rejects run" in capsys.readouterr().out


def test_without_a_configured_server_nothing_is_sent_anywhere(
    tmp_path: Path, theirs: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI is not set"):
        replay_all(planted(tmp_path, theirs.url).parent, 20)
    assert theirs.told == []


def test_only_points_are_taken_over_from_a_checkpoint(
    tmp_path: Path, ours: Server, victim: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [
        {"t": 1, "s": 1, "m": {"train/loss": 0.25}},
        {"t": 1, "p": "loot/stolen.bin", "f": str(victim)},
        {"t": 1, "s": 1, "i": "samples", "f": NAME},
        ["[" * 1000],
    ]
    spool = Spool(tmp_path / "spool", ours.url, RUN, send_interval_seconds=0.05)
    with caplog.at_level(logging.WARNING):
        spool.restore(b"\n".join(json.dumps(line).encode() for line in lines) + b"\n\xff\xfe\n")
    assert spool.close(20) == 0
    assert "4 lines of the checkpoint are not points" in caplog.text
    assert any(b"0.25" in told for told in ours.told)
    assert victim.read_bytes() == SECRET
    assert not any(SECRET in told or b"loot" in told for told in ours.told)
