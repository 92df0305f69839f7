"""An unusable tracking server is named in one line, without a second try."""

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ddpm_pipeline import retry
from ddpm_pipeline.errors import Outage, UserError
from ddpm_pipeline.tracking.connect import (
    TrackingError,
    brief,
    long_transfers,
    require_server,
    retry_request,
    server_version,
    tracking_uri,
)


class _Answers(BaseHTTPRequestHandler):
    health, search, kind, seen = 200, 200, "application/json", ""
    seconds = 0.0

    def do_GET(self) -> None:
        type(self).seen = self.headers.get("Authorization", "")
        if self.seconds:
            threading.Event().wait(self.seconds)  # `time.sleep` may be a test's
        self.send_response(self.health if self.path == "/health" else self.search)
        self.send_header("Content-Type", self.kind)
        self.end_headers()
        self.wfile.write(b"{}" if self.search == 200 else b"no entry")

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def answers() -> Iterator[type[_Answers]]:
    """A server whose answers a test chooses; `address` is where it listens."""
    handler = type("Handler", (_Answers,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses, in seconds, that the program makes before it tries again; none takes any time."""
    made: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", made.append)
    return made


def _refusal(uri: str | None) -> str:
    with pytest.raises(UserError) as refused:
        require_server(uri, timeout_seconds=1.0)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_an_unset_address_says_which_variable_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert "MLFLOW_TRACKING_URI is not set" in _refusal(None)


@pytest.mark.parametrize(
    "uri",
    ["mlruns", "file:///tmp/x", "sqlite:///a.db", "http://", "http://[::1", "http://a:b", "http://a:99999"],
)
def test_an_address_that_is_no_server_is_refused(uri: str) -> None:
    assert "not an http(s) address" in _refusal(uri)


def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    line = _refusal("http://someone:correct-horse@127.0.0.1:5000")
    assert "MLFLOW_TRACKING_PASSWORD" in line
    assert "correct-horse" not in line


def test_a_server_that_is_down_is_named_at_once(pauses: list[float]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert f"127.0.0.1:{port}: no answer (connection refused)" in _refusal(f"http://127.0.0.1:{port}")
    assert pauses == []


def test_a_server_that_hangs_is_named_after_the_time_that_it_is_given() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        line = _refusal(f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert line.endswith("no answer within 1 s, it is slow or hangs; look at the server's log")


def test_a_server_that_is_slow_is_given_more_time_and_not_called_down(
    answers: type[_Answers], pauses: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    answers.seconds = 0.4
    assert require_server(answers.address, timeout_seconds=0.1, wait_seconds=30.0) == answers.address
    assert "no answer within 0.1 s, it is slow or hangs" in caplog.text
    assert "is the server up?" not in caplog.text
    assert len(pauses) == 1


def test_wrong_credentials_and_a_refused_host_are_told_apart_from_an_outage(answers: type[_Answers]) -> None:
    answers.search = 401
    assert "MLFLOW_TRACKING_USERNAME" in _refusal(answers.address)
    answers.health = 403
    assert "--allowed-hosts" in _refusal(answers.address)


def test_an_unwell_server_is_an_outage(answers: type[_Answers]) -> None:
    answers.health = 503
    with pytest.raises(Outage, match="503"):
        require_server(answers.address)


def test_a_server_that_is_away_at_the_start_is_waited_for(
    answers: type[_Answers], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers.health = 503

    def pause(seconds: float) -> None:
        answers.health = 200

    monkeypatch.setattr(retry.time, "sleep", pause)
    monkeypatch.setenv("DDPM_START_WAIT_SECONDS", "30")
    assert require_server(answers.address) == answers.address


def test_the_proxy_in_between_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://me:pw-of-mine@127.0.0.1:9")
    monkeypatch.delenv("http_proxy", raising=False)
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.delenv("no_proxy", raising=False)
    line = _refusal("http://mlflow.example")
    assert re.search(
        "mlflow.example: no answer through the proxy http://.*127.0.0.1:9, which NO_PROXY can", line
    )
    assert "pw-of-mine" not in line


def test_certificates_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", "/no/such.pem")
    line = _refusal("https://127.0.0.1:9")
    assert re.search("/no/such.pem; correct MLFLOW_TRACKING_SERVER_CERT_PATH", line)


def test_the_version_is_asked_for_with_the_password(
    answers: type[_Answers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pw")
    assert server_version(answers.address) == "{}"
    assert answers.seen == "Basic bWU6cHc="
    answers.search = 401
    assert server_version(answers.address) == ""


def test_another_program_on_that_port_is_refused(answers: type[_Answers]) -> None:
    answers.kind = "text/html"
    assert "no MLflow server" in _refusal(answers.address)


def test_credentials_come_from_mlflows_own_variables(
    answers: type[_Answers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pw")
    assert require_server(answers.address + "/") == answers.address
    assert answers.seen == "Basic bWU6cHc="
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "abc")
    require_server(answers.address)
    assert answers.seen == "Bearer abc"


def test_the_address_in_the_call_comes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1/")
    assert tracking_uri() == "http://127.0.0.1:1"
    assert tracking_uri("http://127.0.0.1:2/") == "http://127.0.0.1:2"


def test_patience_outlasts_an_outage_and_has_an_end() -> None:
    tries: list[int] = []

    def second_time_lucky() -> str:
        tries.append(1)
        if len(tries) < 2:
            raise ConnectionError("away")
        return "here"

    def always_away() -> str:
        raise ConnectionError("away")

    assert retry_request("a call", second_time_lucky, 10.0) == "here"
    with pytest.raises(TrackingError, match="a call: MLflow stayed away"):
        retry_request("a call", always_away, 0.1)


def test_patience_is_not_for_mistakes(pauses: list[float]) -> None:
    def mistaken() -> str:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        retry_request("a call", mistaken, 60.0)
    assert pauses == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            "API request to http://m/a failed with exception ('Connection aborted.', RemoteDisconnected("
            "'Remote end closed connection without response'))",
            "remote end closed connection",
        ),
        (
            "API request to endpoint /api/2.0/mlflow/runs/create failed with error code 403 != 200. "
            "Response body: 'Permission denied'",
            "403 Permission denied for /api/2.0/mlflow/runs/create",
        ),
        ("x" * 200, "x" * 160),
    ],
)
def test_what_mlflows_client_says_is_told_in_few_words(error: str, reason: str) -> None:
    assert brief(Exception(error)) == reason


def test_importing_the_package_does_not_import_mlflow() -> None:
    program = (
        "import sys, ddpm_pipeline.tracking; sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_refused_credentials_are_not_waited_for(answers: type[_Answers], pauses: list[float]) -> None:
    from ddpm_pipeline.tracking import versions

    answers.search = 401
    refusal = r"the model registry: MLflow refuses it \(.*\); set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    with pytest.raises(UserError, match=refusal):
        versions("m", uri=answers.address)
    assert pauses == []


def test_a_right_that_is_missing_is_the_administrators_to_give(
    answers: type[_Answers], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddpm_pipeline.tracking import versions

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "anna")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pw-of-anna")
    answers.search = 403
    with pytest.raises(
        UserError, match=r"MLflow refuses it to user 'anna' \(.*\); ask the server's admin"
    ) as told:
        versions("m", uri=answers.address)
    assert "pw-of-anna" not in str(told.value)


def test_a_long_transfer_leaves_the_time_limit_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    with long_transfers(600):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "600"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "7"
