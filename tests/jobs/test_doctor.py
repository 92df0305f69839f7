"""`ddpm doctor`: on the real stack all is well, and every fault is told with what to do about it."""

import json
import os
import shutil
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from ddpm_pipeline.config.device_kind import DeviceKind
from ddpm_pipeline.devices import preflight
from ddpm_pipeline.devices.preflight import GpuReport
from ddpm_pipeline.infra.local import LocalStack
from ddpm_pipeline.infra.local.ports import choose
from ddpm_pipeline.jobs import doctor_checks, doctor_gpus
from ddpm_pipeline.jobs.doctor import doctor
from ddpm_pipeline.jobs.doctor_findings import Finding

TOKEN = "the-right-token"


class FakeCluster(BaseHTTPRequestHandler):
    """As much of a Ray dashboard as the checks ask, with settings that no real one of ours has."""

    ray_version: ClassVar[str] = "0.0.1"
    token: ClassVar[str | None] = TOKEN
    nodes: ClassVar[tuple[str, ...]] = ("ALIVE",)
    clock_offset_seconds: ClassVar[float] = 0.0

    def do_GET(self) -> None:
        asked = self.headers.get("Authorization")
        allowed = self.token is None or asked == f"Bearer {self.token}" or self.path == "/api/gcs_healthz"
        summary = [{"raylet": {"state": state}} for state in self.nodes]
        body = {"ray_version": self.ray_version, "data": {"summary": summary}}
        self.send_response_only(200 if allowed else 401)
        self.send_header("Date", formatdate(time.time() + self.clock_offset_seconds, usegmt=True))
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: the tests read what the checks say."""


@pytest.fixture
def cluster() -> Iterator[tuple[type[FakeCluster], dict[str, str]]]:
    """A dashboard of its own for a test to put out of order, and the variables that name it."""

    class Own(FakeCluster):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield (
        Own,
        {"RAY_JOB_ADDRESS": f"http://127.0.0.1:{server.server_port}", "RAY_AUTH_TOKEN": TOKEN},
    )
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def closed_url() -> str:
    return f"http://127.0.0.1:{choose(['nobody'])['nobody']}"


def test_a_package_that_differs_from_the_lock_is_named_with_both_versions(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    mine = metadata.version("pyyaml")
    lock.write_text(
        f"# head\npyyaml=={mine} \\\n    --hash=sha256:00\nnumpy==0.0.1\nno-such-package==1.0\n"
        "elsewhere==1; sys_platform == 'beos'\n"
    )
    finding = doctor_checks.check_packages([lock])
    assert not finding.ok
    assert finding.found == (
        f"numpy is {metadata.version('numpy')}, pinned is 0.0.1; no-such-package 1.0 is missing"
    )
    assert finding.remedy.startswith("make install")


def test_many_differences_are_counted_not_listed(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text("".join(f"no-such-package-{n}==1\n" for n in range(10)))
    assert doctor_checks.check_packages([lock]).found.endswith("no-such-package-2 1 is missing and 7 more")


def test_in_a_wheels_environment_a_difference_from_the_lock_is_a_remark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text("numpy==0.0.1\n")
    monkeypatch.setattr(doctor_checks, "checkout", lambda: None)
    finding = doctor_checks.check_packages([lock])
    assert finding.ok
    assert finding.found.endswith(f"numpy is {metadata.version('numpy')}, pinned is 0.0.1")
    assert f"pip install --no-deps -r {lock}" in finding.remedy
    assert "make" not in finding.remedy


@pytest.mark.parametrize(
    ("place", "remedy"), [(None, "pip install --upgrade"), (Path("/src"), "make install")]
)
def test_a_package_that_the_program_cannot_use_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, place: Path | None, remedy: str
) -> None:
    needs = ["numpy>=9999", "no-such-package", "elsewhere; sys_platform == 'beos'", "extra; extra == 'hf'"]
    monkeypatch.setattr(doctor_checks, "declared_requirements", lambda: needs)
    monkeypatch.setattr(doctor_checks, "checkout", lambda: place)
    finding = doctor_checks.check_packages()
    assert not finding.ok
    assert finding.found == (
        f"numpy is {metadata.version('numpy')}, needed is >=9999; no-such-package is missing"
    )
    assert finding.remedy.startswith(remedy)


def test_a_build_label_is_no_difference(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text(f"torch=={torch.__version__.partition('+')[0]}\n")
    assert doctor_checks.check_packages([lock]).ok


def test_absent_keys_are_a_problem_for_s3_and_none_for_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    absent = doctor_checks.check_credentials({"DDPM_ROOT": "s3://b"})
    assert not absent.ok
    assert "AWS_ACCESS_KEY_ID" in absent.remedy
    assert doctor_checks.check_credentials({"DDPM_ROOT": "file:///data"}).ok
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "nobody" in doctor_checks.check_credentials({"DDPM_ROOT": "s3://b"}).found


def test_keys_are_found_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "CANARYKEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-secret")
    finding = doctor_checks.check_credentials({"DDPM_ROOT": "s3://b"})
    assert finding.ok
    assert "anary" not in repr(finding).lower()


def test_a_data_root_in_files_is_tried_by_writing_to_it(tmp_path: Path) -> None:
    environ = {"DDPM_ROOT": tmp_path.as_uri()}
    assert doctor_checks.check_bucket(environ, write=True).found.endswith(
        "listed, written, read and deleted from; empty prefixes are claimed by consensus of the jobs"
    )
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    (tmp_path / "a-file").touch()
    assert not doctor_checks.check_bucket({"DDPM_ROOT": f"{tmp_path.as_uri()}/a-file"}).ok
    assert "DDPM_ROOT" in doctor_checks.check_bucket({}).remedy


@pytest.mark.parametrize(
    ("server", "location", "ok", "found"),
    [
        ("http://m", "mlflow-artifacts:/1", True, "through the server"),
        ("http://m", "", True, "no experiment yet"),
        ("http://127.0.0.1:5000", "/srv/mlruns/1", True, "clients store them themselves, at /srv/mlruns/1"),
        ("http://m", "/srv/mlruns/1", False, "/srv/mlruns/1 is a folder of each client's own machine"),
        ("http://m", "file:///srv/1", False, "file:///srv/1 is a folder of each client's own machine"),
    ],
)
def test_artifacts_that_would_stay_on_a_clients_own_machine_are_reported(
    server: str, location: str, ok: bool, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_checks, "artifact_location", lambda url, seconds: location)
    finding = doctor_checks.check_mlflow_artifacts({"MLFLOW_TRACKING_URI": server})
    assert (finding.ok, finding.found) == (ok, found)


def test_an_mlflow_that_does_not_answer_is_a_problem(closed_url: str) -> None:
    finding = doctor_checks.check_mlflow({"MLFLOW_TRACKING_URI": closed_url})
    assert not finding.ok
    assert closed_url in finding.found
    assert finding.remedy


def test_another_mlflow_version_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks, "require_server", lambda url, _, wait_seconds: url)
    monkeypatch.setattr(doctor_checks, "server_version", lambda url, _: "1.2.3")
    finding = doctor_checks.check_mlflow({"MLFLOW_TRACKING_URI": "http://m"})
    assert not finding.ok
    assert finding.found == f"http://m runs 1.2.3, here is {metadata.version('mlflow')}"


def test_an_mlflow_that_asks_for_no_password_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[bytes | None] = [b"{}", None]
    monkeypatch.setattr(doctor_checks, "get", lambda _: answers.pop(0))
    environ = {"MLFLOW_TRACKING_URI": "http://m"}
    assert doctor_checks.check_mlflow_password(environ).found == "http://m does not require a password"
    assert doctor_checks.check_mlflow_password(environ).ok
    assert doctor_checks.check_mlflow_password({}).ok


def test_another_ray_version_is_a_problem(cluster: tuple[type[FakeCluster], dict[str, str]]) -> None:
    _, environ = cluster
    finding = doctor_checks.check_ray_cluster(environ)
    assert not finding.ok
    assert "runs 0.0.1" in finding.found
    assert metadata.version("ray") in finding.remedy


def test_a_cluster_without_living_nodes_is_a_problem(
    cluster: tuple[type[FakeCluster], dict[str, str]],
) -> None:
    own, environ = cluster
    own.ray_version, own.nodes = metadata.version("ray"), ("DEAD",)
    assert doctor_checks.check_ray_cluster(environ).found.endswith("no node is alive")
    own.nodes = ("DEAD", "ALIVE", "ALIVE")
    assert doctor_checks.check_ray_cluster(environ).found.endswith("2 nodes alive")
    assert (
        doctor_checks.check_ray_cluster(environ).remedy == ""
    )  # the local stack gives a stopped job time to save


def test_a_cluster_that_asks_for_no_token_is_a_problem(
    cluster: tuple[type[FakeCluster], dict[str, str]],
) -> None:
    own, environ = cluster
    assert doctor_checks.check_ray_token(environ).ok
    own.token = None
    finding = doctor_checks.check_ray_token(environ)
    assert not finding.ok
    assert "RAY_AUTH_MODE=token" in finding.remedy


def test_a_token_file_that_others_can_read_is_a_problem(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o644)
    finding = doctor_checks.check_ray_token({"RAY_AUTH_TOKEN_PATH": str(file)})
    assert not finding.ok
    assert finding.remedy == f"chmod 600 {file}"
    file.chmod(0o600)
    assert doctor_checks.check_ray_token({"RAY_AUTH_TOKEN_PATH": str(file)}).ok


@pytest.mark.parametrize(("offset_seconds", "word"), [(3600.0, "behind"), (-3600.0, "ahead of")])
def test_a_clock_that_is_off_is_a_problem_also_where_the_service_refuses_us(
    cluster: tuple[type[FakeCluster], dict[str, str]], offset_seconds: float, word: str
) -> None:
    own, environ = cluster
    assert doctor_checks.check_clock(environ).ok
    own.clock_offset_seconds = offset_seconds
    finding = doctor_checks.check_clock(environ)
    assert not finding.ok
    assert word in finding.found
    assert "timedatectl" in finding.remedy


def test_a_clock_is_not_compared_where_nobody_answers(closed_url: str) -> None:
    assert doctor_checks.check_clock({"AWS_ENDPOINT_URL": closed_url}).found.endswith("not compared")


def test_a_full_disk_and_little_shared_memory_are_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    sizes = {"full": usage(100 * 2**30, 97 * 2**30, 3 * 2**30), "small": usage(2**26, 0, 2**26)}
    sizes["roomy"] = usage(100 * 2**30, 2**30, 99 * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: sizes[Path(path).name])
    for name in sizes:
        (tmp_path / name).mkdir()
    assert not doctor_checks.check_disk(tmp_path / "full").ok
    assert not doctor_checks.check_disk(tmp_path / "small").ok
    assert doctor_checks.check_disk(tmp_path / "roomy").ok
    assert "--shm-size" in doctor_checks.check_shm(tmp_path / "small").remedy
    assert doctor_checks.check_shm(tmp_path / "roomy").ok
    assert doctor_checks.check_shm(tmp_path / "absent").ok


def test_a_gpu_that_torch_cannot_use_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fault = GpuReport(gpu="GPU 0", fault="too old", remedy="renew it")
    monkeypatch.setattr(preflight, "check_gpus", lambda needs: [fault, fault])
    assert doctor_gpus.check_gpus(tmp_path).ok
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    finding = doctor_gpus.check_gpus(tmp_path)
    assert (finding.ok, finding.found, finding.remedy) == (
        False,
        "1 in /dev, GPU 0: too old (and 1 more)",
        "renew it",
    )


def test_gpus_that_compute_are_counted_by_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = DeviceKind(name="H100", capability="9.0", torch="2.13.0+cu130", cuda="13.0", cudnn="91900")
    monkeypatch.setattr(preflight, "check_gpus", lambda needs: 2 * [GpuReport(gpu="GPU 0", kind=kind)])
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidia1").touch()
    assert doctor_gpus.check_gpus(tmp_path).found == f"2 in /dev: 2 x {kind}"


def test_the_clusters_gpus_are_not_checked_from_outside_it() -> None:
    assert doctor_gpus.check_cluster_gpus({}) == []
    (finding,) = doctor_gpus.check_cluster_gpus({"RAY_JOB_ADDRESS": "http://ray.example:8265"})
    assert finding.ok
    assert "RAY_ADDRESS=HOST:PORT" in finding.remedy


def test_the_report_ends_with_the_number_of_problems_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # no local stack here
    fine = Finding("disk", True, "room")
    broken = Finding("clock", False, "9 s off", "set it")
    monkeypatch.setattr(
        "ddpm_pipeline.jobs.doctor.all_checks", lambda _: iter([lambda: fine, lambda: [broken]])
    )
    assert doctor() == 1
    out = capsys.readouterr().out.splitlines()
    assert [line.split() for line in out] == [
        ["ok", "disk", "room"],
        ["PROBLEM", "clock", "9", "s", "off"],
        ["do", "set", "it"],
        ["1", "problem"],
    ]
    assert doctor(as_json=True) == 1
    assert [row["ok"] for row in json.loads(capsys.readouterr().out)] == [True, False]


@pytest.mark.stack
def test_on_the_running_stack_everything_a_job_needs_is_there(stack: LocalStack) -> None:
    service_checks = [
        doctor_checks.check_credentials(),
        doctor_checks.check_bucket(write=True),
        doctor_checks.check_mlflow(),
        doctor_checks.check_ray_cluster(),
        doctor_checks.check_ray_token(),
        doctor_checks.check_clock(),
    ]
    assert [finding for finding in service_checks if not finding.ok] == []
    assert "not compared" not in service_checks[-1].found


@pytest.mark.stack
def test_wrong_keys_and_a_missing_bucket_are_refused_by_the_real_store(
    stack: LocalStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = doctor_checks.check_bucket({"DDPM_ROOT": "s3://no-such-bucket"})
    assert not absent.ok
    assert "no-such-bucket" in absent.found
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-wrong-secret")
    wrong = doctor_checks.check_bucket()
    assert not wrong.ok
    assert "AWS_SECRET_ACCESS_KEY" in wrong.remedy
    assert "canary" not in repr(wrong)


@pytest.mark.stack
@pytest.mark.timeout(120)  # Ray's own client would try for minutes
def test_a_wrong_token_is_refused_by_the_real_cluster_at_once(stack: LocalStack) -> None:
    finding = doctor_checks.check_ray_cluster({**os.environ, "RAY_AUTH_TOKEN": "canary-wrong"})
    assert not finding.ok
    assert "RAY_AUTH_TOKEN" in finding.remedy
    assert "canary" not in repr(finding)
