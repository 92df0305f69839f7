"""What is asked of the registry is asked again when it was away for a moment."""

from pathlib import Path
from typing import Any

import mlflow.artifacts
import pytest

from ddpm_pipeline.tracking import ModelVersion, download, registry, set_version_tags
from ddpm_pipeline.tracking.registry import CARD, WEIGHTS, file_sha256

URI = "http://127.0.0.1:1"


class _Restarting:
    """A client whose first call of each kind meets a server that restarts."""

    def __init__(self) -> None:
        self.met: set[str] = set()
        self.tags: dict[str, str] = {}

    def _meet(self, what: str) -> None:
        if what not in self.met:
            self.met.add(what)
            raise ConnectionError(what)

    def set_model_version_tag(self, name: str, version: str, key: str, value: str) -> None:
        self._meet("tag")
        self.tags[f"{name}/{version}/{key}"] = value

    def get_model_version_download_uri(self, name: str, version: str) -> str:
        self._meet("address")
        return f"models/{name}/{version}"


@pytest.fixture
def restarting(monkeypatch: pytest.MonkeyPatch) -> _Restarting:
    client = _Restarting()
    monkeypatch.setattr(registry, "tracking_client", lambda uri=None: client)
    return client


def version(sha256: str = "") -> ModelVersion:
    return ModelVersion("digits", 3, sha256, "source", "run")


def test_a_decision_is_written_once_the_registry_is_back(restarting: _Restarting) -> None:
    set_version_tags(version(), {"ddpm.gate": "promoted", "a": "b"}, URI)
    assert restarting.tags == {"digits/3/ddpm.gate": "promoted", "digits/3/a": "b"}


def test_a_model_is_downloaded_once_the_registry_is_back(
    restarting: _Restarting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = tmp_path / "stored"
    stored.mkdir()

    def fetched(*, artifact_uri: str, dst_path: str, **_: Any) -> str:
        file = stored / Path(artifact_uri).name
        file.write_bytes(file.name.encode())
        return str(file)

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", fetched)
    (tmp_path / "weights").write_bytes(WEIGHTS.encode())
    folder = download(version(file_sha256(tmp_path / "weights")), tmp_path / "model", URI)
    assert sorted(path.name for path in folder.iterdir()) == sorted([WEIGHTS, CARD])
    assert restarting.met == {"address"}
