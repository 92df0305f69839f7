"""The night's launcher against an API server of the test's own, and the head's drain against the real job server."""

import json
import os
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.infra.kuberay import drain, night
from ddpm_pipeline.infra.local import LocalStack
from ddpm_pipeline.infra.local.ports import choose
from tests.manifests.objects import named, rules_of, validate

DUE = datetime(2026, 1, 31, 1, 0, tzinfo=UTC)
JOB_NAME = f"ddpm-nightly-{int(DUE.timestamp()) // 60}"


class FakeApi(BaseHTTPRequestHandler):
    """RayJobs as the API server keeps them: read by name, created once."""

    jobs: ClassVar[dict[str, Any]] = {}

    def do_GET(self) -> None:
        self._answer(self.jobs.get(self.path.rpartition("/")[2]))

    def do_POST(self) -> None:
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = job["metadata"]["name"]
        if name in self.jobs:
            self._send(409, {"message": "already exists"})
        else:
            self.jobs[name] = job
            self._answer(job)

    def _answer(self, job: Any) -> None:
        if self.headers["Authorization"] != "Bearer right":
            self._send(403, {"message": "rayjobs is forbidden"})
        elif job is None:
            self._send(404, {"message": "not found"})
        else:
            self._send(200, job)

    def _send(self, code: int, body: Any) -> None:
        self.send_response_only(code)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def api() -> Iterator[tuple[night.Api, dict[str, Any]]]:
    class Own(FakeApi):
        jobs: ClassVar[dict[str, Any]] = {"ddpm-nightly": named("base", "RayJob", "ddpm-nightly")}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield night.Api(f"http://127.0.0.1:{server.server_port}/rayjobs", "right"), Own.jobs
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_night_gets_a_dated_valid_copy_that_is_not_suspended(
    api: tuple[night.Api, dict[str, Any]],
) -> None:
    client, jobs = api
    assert night.launch(client, "ddpm-nightly", "ddpm-nightly", {"JOB_NAME": JOB_NAME}) == (
        "created ddpm-nightly-20260131"
    )
    made = jobs["ddpm-nightly-20260131"]
    validate(made)
    assert made["spec"]["suspend"] is False
    pattern = jobs["ddpm-nightly"]
    assert pattern["spec"]["suspend"] is True
    ending = {"suspend", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "deletionStrategy"}
    work, same = ({k: v for k, v in job["spec"].items() if k not in ending} for job in (made, pattern))
    assert work == same
    assert "shutdownAfterJobFinishes" not in made["spec"]  # KubeRay refuses it beside rules
    assert rules_of(made) == {
        ("DeleteCluster", "SUCCEEDED"): 0,
        ("DeleteCluster", "Failed"): 600,
        ("DeleteSelf", "SUCCEEDED"): 604_800,
        ("DeleteSelf", "Failed"): 604_800,
    }


def test_a_second_start_on_the_same_night_changes_nothing(api: tuple[night.Api, dict[str, Any]]) -> None:
    client, jobs = api
    environ = {"JOB_NAME": JOB_NAME}
    night.launch(client, "ddpm-nightly", "ddpm-nightly", environ)
    before = json.dumps(jobs)
    assert "nothing to do" in night.launch(client, "ddpm-nightly", "ddpm-nightly", environ)
    assert json.dumps(jobs) == before


def test_the_date_is_the_scheduled_one_in_the_zone_of_the_schedule(
    api: tuple[night.Api, dict[str, Any]],
) -> None:
    client, jobs = api
    late = {"JOB_NAME": JOB_NAME, "NIGHT_TIME_ZONE": "America/Los_Angeles"}  # still the evening before there
    night.launch(client, "ddpm-nightly", "ddpm-nightly", late)
    assert "ddpm-nightly-20260130" in jobs


@pytest.mark.parametrize("name", ["by-hand", "by-hand-12345678", ""])
def test_a_job_made_by_hand_is_due_now(name: str) -> None:
    now = datetime.now(UTC)
    assert night.scheduled_time(name, now) == now
    assert night.scheduled_time(JOB_NAME, now) == DUE


def test_an_absent_pattern_and_a_refused_account_are_told_in_one_line(
    api: tuple[night.Api, dict[str, Any]],
) -> None:
    client, _ = api
    with pytest.raises(UserError, match=r"answers 404; not found"):
        night.launch(client, "absent", "x", {"JOB_NAME": JOB_NAME})
    with pytest.raises(UserError, match=r"answers 403; rayjobs is forbidden"):
        night.launch(night.Api(client.url, "wrong"), "ddpm-nightly", "x", {"JOB_NAME": JOB_NAME})
    nobody = f"http://127.0.0.1:{choose(['nobody'])['nobody']}"
    with pytest.raises(UserError, match="does not answer"):
        night.launch(night.Api(nobody, "right"), "ddpm-nightly", "x", {})


def test_outside_of_a_cluster_the_launcher_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="KUBERNETES_SERVICE_HOST"):
        night.Api.of_pod({}, tmp_path)


def test_without_a_job_server_a_head_says_so_and_a_worker_ends_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = {"RAY_JOB_ADDRESS": f"http://127.0.0.1:{choose(['nobody'])['nobody']}"}
    pauses: list[float] = []
    monkeypatch.setattr(drain.time, "sleep", pauses.append)
    assert drain.main(["head", "30"], nobody) == 1
    assert "does not answer" in capsys.readouterr().err
    assert drain.main(["worker", "30"], nobody) == 0
    assert sum(pauses) < 10
    assert drain.main(["everybody"], nobody) == 2


class BusyJobServer(BaseHTTPRequestHandler):
    """Two jobs, the first of which cannot be stopped; every other list of them is an error."""

    lists: ClassVar[int] = 0
    running: ClassVar[set[str]] = set()

    def do_GET(self) -> None:
        cls = type(self)
        cls.lists += 1
        jobs = [{"submission_id": name, "status": "RUNNING"} for name in sorted(cls.running)]
        self._send(500 if cls.lists % 2 else 200, jobs)

    def do_POST(self) -> None:
        name = self.path.split("/")[-2]
        if name == "b":
            type(self).running.discard(name)
        self._send(200 if name == "b" else 500, {})

    def _send(self, code: int, body: Any) -> None:
        self.send_response_only(code)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


def test_a_busy_job_server_and_a_job_that_will_not_stop_keep_no_other_from_saving() -> None:
    BusyJobServer.lists, BusyJobServer.running = 0, {"a", "b"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), BusyJobServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert drain.drain(f"http://127.0.0.1:{server.server_port}", "", 2.0, poll_seconds=0.05) == ["a"]
    finally:
        server.shutdown()
        server.server_close()


SAVING = """
import signal, time
def save(*_):
    time.sleep(1)
    print("saved", flush=True)
    raise SystemExit(143)
signal.signal(signal.SIGTERM, save)
print("working", flush=True)
time.sleep(600)
"""


@pytest.mark.long
@pytest.mark.stack
def test_draining_lets_every_running_job_save(stack: LocalStack, tmp_path: Path) -> None:
    from ray.job_submission import JobSubmissionClient

    script = tmp_path / "saving.py"
    script.write_text(SAVING)
    url = os.environ["RAY_JOB_ADDRESS"]
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
    client = JobSubmissionClient(url)
    name = client.submit_job(entrypoint=f"python -u {script}", entrypoint_num_cpus=0)
    deadline = time.monotonic() + 60
    while "working" not in client.get_job_logs(name) and time.monotonic() < deadline:
        time.sleep(0.2)
    environ = {"RAY_JOB_ADDRESS": url, "RAY_AUTH_TOKEN": token}
    assert drain.main(["worker", "1"], environ) == 1  # only waits
    assert client.get_job_status(name) == "RUNNING"
    assert drain.main(["head", "30"], environ) == 0
    assert drain.main(["worker", "1"], environ) == 0
    assert "saved" in client.get_job_logs(name)
    assert client.get_job_status(name) == "STOPPED"
