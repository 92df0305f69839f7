"""Artifacts that clients of the stack's real MLflow store in S3 themselves: in a service that has keys of its own."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import boto3
import numpy as np
import pytest
from mlflow.store.artifact import s3_artifact_repo

from ddpm_pipeline.errors import Outage, UserError
from ddpm_pipeline.jobs import doctor_checks
from ddpm_pipeline.tracking import Run, Spool, download, find_run, open_run, register, replay
from ddpm_pipeline.tracking.direct_artifacts import ENDPOINT_VARIABLE, try_direct_artifacts
from tests import s3_servers
from tests.effort import long
from tests.relay import Relay
from tests.s3_servers import one_loader, seaweedfs, seaweedfs_server
from tests.track.exported_model import exported

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["one_loader", "seaweedfs", "seaweedfs_server"]
pytestmark = pytest.mark.stack
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@pytest.fixture
def forget_keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Called, it makes MLflow take a new client of S3, with the keys of boto's session: one lives for five minutes."""
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # boto's own pauses would only take time
    forget = s3_artifact_repo._cached_get_s3_client.cache_clear  # pyright: ignore[reportPrivateUsage]
    boto3.setup_default_session()
    forget()
    yield forget
    boto3.setup_default_session()
    forget()


@pytest.fixture
def experiment(client: "MlflowClient", seaweedfs: str, forget_keys: Callable[[], None]) -> str:
    """A new experiment whose artifacts are in SeaweedFS, to which the environment points."""
    name = f"direct-{uuid.uuid4().hex[:12]}"
    client.create_experiment(name, artifact_location=f"s3://{seaweedfs}/mlflow/{name}")
    return name


@pytest.fixture
def open_one(server: str, experiment: str) -> Callable[[], Run]:
    """Opens the one run of the experiment."""
    return lambda: open_run(
        experiment, "one", key="one", params={}, tags={}, config_yaml="a: 1\n", uri=server
    )


def stored(bucket: str) -> list[str]:
    """The last parts of the names of all objects in the bucket."""
    listed = boto3.client("s3").list_objects_v2(Bucket=bucket).get("Contents", [])
    return sorted(entry.get("Key", "").rsplit("/", 1)[1] for entry in listed)


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", *long(ENDPOINT_VARIABLE).values])
def test_settings_images_and_models_are_stored_in_s3_and_come_back(
    variable: str,
    server: str,
    seaweedfs: str,
    seaweedfs_server: str,
    open_one: Callable[[], Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ENDPOINT_URL")
        patch.setenv(variable, seaweedfs_server)
        run, source = open_one(), exported(tmp_path / "export")
        spool = Spool(tmp_path / "spool", server, run.run_id)
        spool.image("samples", 3, np.zeros((4, 4), np.uint8))
        assert spool.close() == 0
        name = f"m-{uuid.uuid4().hex[:12]}"
        version = register(name, source, run.run_id, {}, uri=server)
        folder = download(version, tmp_path / "download", uri=server)
    assert (folder / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    names = stored(seaweedfs)
    assert {"config.yaml", "MLmodel", "model.safetensors"} < set(names)
    assert sum(name.startswith("samples+step+3+") for name in names) == 2  # the image and its preview


@pytest.mark.parametrize(
    ("secret", "fault"),
    [(None, "no S3 keys found; set AWS_ACCESS_KEY_ID"), ("wrong", r"refuses the keys \(.*\); check AWS_")],
)
def test_a_client_without_keys_is_refused_before_work_starts(
    secret: str | None,
    fault: str,
    server: str,
    client: "MlflowClient",
    experiment: str,
    open_one: Callable[[], Run],
    forget_keys: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    boto3.setup_default_session()  # the fixture that made the bucket has read the keys into it
    for name in KEYS:
        monkeypatch.delenv(name)
        if secret is not None:
            monkeypatch.setenv(name, secret)
    with pytest.raises(
        UserError, match=rf"^MLflow's artifacts at s3://.*/{experiment}/.*: .*{fault}"
    ) as told:
        open_one()
    assert ENDPOINT_VARIABLE in str(told.value)
    left = find_run(experiment, "one", uri=server)
    assert left is not None
    assert left.status == "FAILED"
    finding = doctor_checks.check_mlflow_artifacts({"MLFLOW_TRACKING_URI": server})
    assert (finding.ok, finding.found.startswith("MLflow's artifacts at s3://")) == (False, True)
    assert finding.remedy.startswith(("set AWS_ACCESS_KEY_ID", "check AWS_ACCESS_KEY_ID"))
    for name, value in s3_servers.KEYS.items():
        monkeypatch.setenv(name, value)
    forget_keys()
    assert open_one().run_id == left.run_id


def test_images_wait_in_the_spool_while_s3_is_away(
    server: str,
    client: "MlflowClient",
    seaweedfs: str,
    seaweedfs_server: str,
    open_one: Callable[[], Run],
    forget_keys: Callable[[], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    parts = urlsplit(seaweedfs_server)
    assert parts.hostname is not None
    assert parts.port is not None
    run, relay = open_one(), Relay(parts.hostname, parts.port)
    relay.switch("refuse")
    monkeypatch.setenv("AWS_ENDPOINT_URL", relay.uri)
    forget_keys()
    spool = Spool(tmp_path / "spool", server, run.run_id, send_interval_seconds=0.05)
    spool.image("samples", 3, np.zeros((4, 4), np.uint8))
    spool.metrics(4, {"loss": 1.0})
    assert spool.close(0.2) == 2
    assert "does not answer" in caplog.text
    relay.switch("open")
    assert replay(tmp_path / "spool", uri=server).complete
    assert [point.step for point in client.get_metric_history(run.run_id, "loss")] == [4]
    assert sum(name.startswith("samples+step+3+") for name in stored(seaweedfs)) == 2
    relay.close()


def test_doctor_stores_a_small_object_and_deletes_it(server: str, seaweedfs: str, experiment: str) -> None:
    finding = doctor_checks.check_mlflow_artifacts({"MLFLOW_TRACKING_URI": server}, write=True)
    assert (finding.ok, finding.found) == (
        True,
        f"clients store them themselves, at s3://{seaweedfs}/mlflow/{experiment}",
    )
    assert stored(seaweedfs) == []


def test_a_bucket_that_is_not_there_and_an_s3_that_does_not_answer_are_told_apart(
    seaweedfs: str, forget_keys: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="there is no bucket 'no-such-bucket'"):
        try_direct_artifacts("s3://no-such-bucket/mlflow")
    monkeypatch.setenv(ENDPOINT_VARIABLE, "http://127.0.0.1:9")
    with pytest.raises(Outage, match=r"http://127\.0\.0\.1:9 does not answer"):
        try_direct_artifacts(f"s3://{seaweedfs}/mlflow")
