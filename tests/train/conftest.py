"""The digits, packed once, and a place for checkpoints."""

from pathlib import Path

import pytest

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data.packing.pack_dataset import pack


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The packed digits in a directory."""
    uri = f"file://{tmp_path_factory.mktemp('digits')}/data"
    pack(PackConfig(source="digits", dest=uri, channels=1, shard_size=300), None)
    return uri


@pytest.fixture
def runs(tmp_path: Path) -> str:
    """A place for checkpoints."""
    (tmp_path / "runs").mkdir()
    return f"file://{tmp_path}/runs"
