"""A tracking server that can be cut off: the stack's real MLflow behind a switchable relay."""

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from ddpm_pipeline.infra.local import LocalStack
from ddpm_pipeline.tracking import Run, open_run, tracking_client
from tests.relay import Relay

if TYPE_CHECKING:
    from mlflow import MlflowClient


@pytest.fixture(scope="session")
def server(stack: LocalStack) -> str:
    """Address of the real tracking server."""
    return os.environ["MLFLOW_TRACKING_URI"]


@pytest.fixture
def relay(server: str) -> Iterator[Relay]:
    """The real tracking server behind a switch, at `relay.uri`."""
    parts = urlsplit(server)
    assert parts.hostname is not None
    assert parts.port is not None
    made = Relay(parts.hostname, parts.port)
    yield made
    made.close()


@pytest.fixture
def client(server: str) -> "MlflowClient":
    """A client that looks at what is really there."""
    return tracking_client(server)


@pytest.fixture
def new_run(server: str, request: pytest.FixtureRequest) -> Callable[..., Run]:
    """Opens a run of this test; every call with the same key opens the same run."""

    def make(key: str = "one", **changes: object) -> Run:
        settings = {"params": {}, "tags": {}, "config_yaml": "a: 1\n", "uri": server, **changes}
        return open_run("track-tests", key, key=f"{request.node.name}/{key}", **settings)  # type: ignore[arg-type]

    return make
