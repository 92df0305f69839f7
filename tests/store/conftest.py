"""The stores every promise is tried on: a directory, moto's S3, SeaweedFS, and (slow) the local stack's gateway."""

from pathlib import Path

import pytest

from ddpm_pipeline.store import Store, open_store
from tests.s3_servers import SERVERS, moto, moto_server, one_loader, open_place, seaweedfs, seaweedfs_server

__all__ = ["moto", "moto_server", "one_loader", "seaweedfs", "seaweedfs_server"]


@pytest.fixture(params=["file", *SERVERS, pytest.param("gateway", marks=pytest.mark.stack)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind."""
    if request.param == "file":
        return open_store((tmp_path / "store").as_uri())
    return open_place(request.param, request)
