"""A job server that goes away, or fails, while it is asked: one line, exit code 1."""

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from ray.job_submission import JobSubmissionClient

from ddpm_pipeline.jobs.ray_jobs import follow, print_jobs, print_log, require_job
from ddpm_pipeline.jobs.runner import FAILED, REFUSED, handle_errors
from ddpm_pipeline.jobs.scripts import start_script
from ddpm_pipeline.jobs.server import JobServer
from ddpm_pipeline.jobs.stop import stop_job

NAME = "generate-1"
WEBSOCKET = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3
ASKED: dict[str, Callable[[JobSubmissionClient], object]] = {
    "jobs": print_jobs,
    "logs": lambda client: print_log(client, NAME),
    "logs -f": lambda client: follow(client, NAME),
    "logs of one": lambda client: require_job(client, NAME),
    "stop": lambda client: stop_job(client, NAME),
    "stop --now": lambda client: client.stop_job(NAME),
    "submit": lambda client: start_script(client, NAME, "", []),
}


class Fading(BaseHTTPRequestHandler):
    """Answers who it is; breaks a job's output off after a line, and tells of the job what `job` says."""

    code: ClassVar[int] = 500
    job: ClassVar[dict[str, object] | None] = None

    def do_GET(self) -> None:
        if self.path == "/api/version":
            self._answer({"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""})
        elif self.path.endswith("/logs/tail") and self.job is not None:
            self._break_off()
        elif self.path == f"/api/jobs/{NAME}" and self.job is not None:
            self._answer(self.job)
        else:
            self.send_error(self.code)

    def _answer(self, content: dict[str, object]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _break_off(self) -> None:
        accept = hashlib.sha1((self.headers["Sec-WebSocket-Key"] + WEBSOCKET).encode()).digest()
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(accept).decode())
        self.end_headers()
        self.wfile.write(b"\x81\x06first\n")  # one text frame; then the connection ends without a farewell
        self.close_connection = True

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Fading) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def client(server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> JobSubmissionClient:
    # Ray reads its token once in a process: what it found here would be the token of every stack that comes later
    monkeypatch.setattr("ray.dashboard.modules.dashboard_sdk.get_auth_headers_if_auth_enabled", lambda _: {})
    return JobServer(f"http://127.0.0.1:{server.server_port}")


def ended(work: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code of a command that does `work`, and what it says of its failure."""

    def job() -> int:
        work()
        return 0

    code = handle_errors(job)
    return code, capsys.readouterr().err


@pytest.mark.parametrize("command", ASKED)
def test_an_answer_of_500_is_told_in_one_line(
    command: str, client: JobSubmissionClient, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = ended(lambda: ASKED[command](client), capsys)
    assert code == FAILED
    assert said.splitlines()[-1].startswith(
        f"failed: {client.get_address()}: the job server fails (Request failed"
    )
    assert len(said.splitlines()) <= 2  # the output that broke off, and why


def test_a_job_that_is_refused_is_what_the_user_can_put_right(
    client: JobSubmissionClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Fading, "code", 400)
    code, said = ended(lambda: ASKED["submit"](client), capsys)
    assert code == REFUSED
    assert said.startswith(
        f"error: {client.get_address()}: does not take job {NAME} (Request failed with status"
    )
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("command", ASKED)
def test_a_server_that_is_gone_is_told_in_one_line(
    command: str,
    server: ThreadingHTTPServer,
    client: JobSubmissionClient,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.shutdown()
    server.server_close()
    code, said = ended(lambda: ASKED[command](client), capsys)
    assert code == FAILED
    assert said.splitlines()[-1] == (
        f"failed: {client.get_address()}: the job server fails (no connection); once the cluster is up, run the same "
        "command again"
    )
    assert len(said.splitlines()) <= 2


@pytest.mark.parametrize(
    ("status", "code", "last"),
    [
        (
            "RUNNING",
            1,
            f"error: job {NAME} is still running, but its output broke off; follow it again: ddpm logs -f {NAME}",
        ),
        ("SUCCEEDED", 0, "the job server fails (WebSocket connection closed unexpectedly"),
        ("FAILED", 3, "the job server fails (WebSocket connection closed unexpectedly"),
    ],
)
def test_output_that_breaks_off_does_not_decide_how_the_job_ended(
    status: str,
    code: int,
    last: str,
    client: JobSubmissionClient,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = {"type": "SUBMISSION", "entrypoint": "", "status": status, "driver_exit_code": code or None}
    monkeypatch.setattr(Fading, "job", job if status != "RUNNING" else job | {"driver_exit_code": None})
    assert follow(client, NAME) == code
    said = capsys.readouterr()
    assert said.out == "first\n"
    assert said.err.startswith(f"note     the output of {NAME} broke off; ")
    assert last in said.err.splitlines()[-1]
