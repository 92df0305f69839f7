"""What a job on a cluster is told of the services: all that this machine knows, and no password."""

# pyright: reportPrivateUsage=false

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_pipeline.infra.local import processes
from ddpm_pipeline.infra.local.client_environment import cluster_variables
from ddpm_pipeline.infra.local.ray import LOOPBACK_SETTINGS
from ddpm_pipeline.infra.local.stack_state import ServiceRecord, State, write_state
from ddpm_pipeline.jobs.ray_session import SUBMITTED, _environment, shared_variables
from ddpm_pipeline.tracking.connect import CLIENT_DEFAULTS

GIVEN = {
    "AWS_CA_BUNDLE": "/etc/ca.pem",
    "MLFLOW_TRACKING_SERVER_CERT_PATH": "/etc/ca.pem",
    "MLFLOW_TRACKING_INSECURE_TLS": "true",
    "HTTPS_PROXY": "http://proxy.example:3128",
    "no_proxy": "localhost",
    "GLOO_SOCKET_IFNAME": "eth1",
    "MLFLOW_S3_ENDPOINT_URL": "http://artifacts.example",
    "NCCL_SOCKET_IFNAME": "eth1",
    "DDPM_CLUSTER_GROWS": "1",
    "DDPM_START_WAIT_SECONDS": "5",
}


@pytest.fixture(autouse=True)
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An AWS config of the test's own."""
    for name in (
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_PROFILE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    return tmp_path / "config"


def test_the_endpoint_of_the_aws_config_and_every_address_travel(
    profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile.write_text("[default]\nendpoint_url = http://store.example\nregion = eu-west-7\n")
    for name, value in GIVEN.items():
        monkeypatch.setenv(name, value)
    told = shared_variables()
    assert {name: told.get(name) for name in GIVEN} == GIVEN
    assert (told["AWS_ENDPOINT_URL_S3"], told["AWS_REGION"]) == ("http://store.example", "eu-west-7")
    assert not {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD"} & set(told)


def test_an_address_with_a_password_stays_here_and_that_is_said(
    profile: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:pw-of-mine@store.example")
    monkeypatch.setenv("HTTP_PROXY", "http://me:pw-of-mine@proxy.example")
    assert "pw-of-mine" not in repr(shared_variables())
    assert "HTTP_PROXY holds a password" in caplog.text
    assert "AWS_ENDPOINT_URL holds a password" in caplog.text


def test_aws_settings_that_cannot_be_used_keep_no_job_from_travelling(
    profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "absent")
    monkeypatch.setenv("DDPM_ROOT", "file:///data")
    assert shared_variables()["DDPM_ROOT"] == "file:///data"


def test_where_nothing_names_an_s3_service_boto3_is_not_loaded(tmp_path: Path) -> None:
    code = "import sys, ddpm_pipeline.jobs.ray_session as r; r.shared_variables(); sys.exit('boto3' in sys.modules)"
    environment = {"PYTHONPATH": str(Path.cwd()), "HOME": str(tmp_path), "PATH": ""}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_workers_of_the_local_stack_are_given_what_its_ray_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(SUBMITTED, raising=False)
    monkeypatch.setenv("DDPM_ROOT", "file:///data")
    for name, value in LOOPBACK_SETTINGS.items():
        monkeypatch.setenv(name, value)
    program = [sys.executable, "-c", "import time; time.sleep(60)"]
    ray = processes.spawn(program, os.environ, tmp_path / "log", mark=f"mark-{tmp_path.name}")
    try:
        (tmp_path / ".local").mkdir(mode=0o700)
        record = ServiceRecord(identity=ray, fingerprint="")
        write_state(tmp_path / ".local", State(ports={"ray": 7}, services={"ray": record}))
        assert cluster_variables(Path(".local"), "127.0.0.1:7")["DDPM_ROOT"] == "file:///data"
        assert cluster_variables(Path(".local"), "127.0.0.1:8") == {}
        for name, value in CLIENT_DEFAULTS.items():  # which workers set, too
            monkeypatch.setenv(name, value)
        with _environment("127.0.0.1:7") as given:
            assert given is None
        with _environment("127.0.0.1:8") as given:
            assert given is not None
            assert given["env_vars"]["DDPM_ROOT"] == "file:///data"
        monkeypatch.setenv("DDPM_START_WAIT_SECONDS", "5")
        with _environment("127.0.0.1:7") as given:
            assert given == {"env_vars": {"DDPM_START_WAIT_SECONDS": "5"}}
    finally:
        processes.end(ray)
    assert cluster_variables(Path(".local"), "127.0.0.1:7") == {}
