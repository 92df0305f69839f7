"""The three stores every promise is tried on: a directory, moto's S3, and (slow) the real gateway."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import boto3
import botocore.loaders
import pytest
from moto.server import ThreadedMotoServer

from ddpm_pipeline.store import Store, open_store


@pytest.fixture(scope="session", autouse=True)
def one_loader() -> Iterator[None]:
    """boto reads its description of S3 (2 MB of JSON) once for all tests, and not again for each session."""
    loader = botocore.loaders.create_loader()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("botocore.session.create_loader", lambda _: loader)
        yield


@pytest.fixture(scope="session")
def moto_server() -> Iterator[str]:
    """Address of an S3 in memory."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def moto(moto_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The environment points at moto; the name of a fresh bucket there."""
    for name, value in {
        "AWS_ENDPOINT_URL": moto_server,
        "AWS_ACCESS_KEY_ID": "test-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"b-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return bucket


@pytest.fixture(params=["file", "moto", pytest.param("gateway", marks=pytest.mark.stack)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind."""
    if request.param == "file":
        return open_store((tmp_path / "store").as_uri())
    if request.param == "moto":
        return open_store(f"s3://{request.getfixturevalue('moto')}/some/prefix")
    return open_store(request.getfixturevalue("prefix"))
