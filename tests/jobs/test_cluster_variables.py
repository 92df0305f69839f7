"""What a job on a cluster is told of the services: all that this machine knows, and no password."""

from pathlib import Path

import pytest

from ddpm_pipeline.jobs.ray_session import shared_variables

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
