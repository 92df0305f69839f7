"""One training's weights are one version, however many register them at once."""

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Made
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

from ddpm_pipeline.tracking import register, registry

RUN = "0123456789abcdef0123456789abcdef"


class Registry:
    """MLflow's registry as `register` uses it: numbers are given out one at a time, and nothing else is atomic."""

    def __init__(self) -> None:
        self.versions: dict[int, Any] = {}
        self.given = 0
        self.before_create: Callable[[], object] = lambda: None
        self._lock = threading.Lock()

    def search_model_versions(self, *_: object, **__: object) -> Any:
        class Page(list[Any]):
            token = None

        # newest first, as the real one may: the order decides nothing
        return Page(self.versions[number] for number in sorted(self.versions, reverse=True))

    def create_registered_model(self, name: str) -> None:
        pass

    def get_registered_model(self, name: str) -> Any:
        return Made(aliases={})

    def create_model_version(
        self, name: str, source: str, run_id: str, tags: dict[str, str], *_: object, **__: object
    ) -> Any:
        self.before_create()
        with self._lock:
            self.given += 1
            made = Made(
                name=name,
                version=str(self.given),
                source=source,
                run_id=run_id,
                tags=tags,
                description="",
                model_id=None,
            )
            self.versions[self.given] = made
        return made

    def delete_model_version(self, name: str, version: str) -> None:
        del self.versions[int(version)]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Registry:
    made = Registry()
    monkeypatch.setattr(registry, "tracking_client", lambda uri: made)
    monkeypatch.setattr(registry, "log_model", lambda *_, **__: "m-1")
    return made


@pytest.fixture
def export(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "model.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("at_once", [2, 8])
def test_of_registrations_at_once_all_return_the_lowest_version_and_it_is_the_only_one(
    server: Registry, export: Path, at_once: int
) -> None:
    together = threading.Barrier(at_once)
    server.before_create = together.wait  # each has looked, and found none
    got: list[int] = []
    crowd = [
        threading.Thread(
            target=lambda: got.append(register("unet", export, RUN, {"identity": "abc"}).version)
        )
        for _ in range(at_once)
    ]
    for one in crowd:
        one.start()
    for one in crowd:
        one.join()
    assert got == [1] * at_once
    assert list(server.versions) == [1]


def test_a_user_who_may_not_delete_the_higher_version_gets_the_lower_one_all_the_same(
    server: Registry, export: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(name: str, version: str) -> None:
        raise MlflowException("not yours", PERMISSION_DENIED)

    def another_comes_first() -> None:
        server.before_create = lambda: None
        register("unet", export, RUN, {"identity": "abc"})

    monkeypatch.setattr(server, "delete_model_version", refuse)
    server.before_create = another_comes_first
    assert register("unet", export, RUN, {"identity": "abc"}).version == 1
    assert list(server.versions) == [1, 2]
    assert "unet/2: registered at the same time as 1; stays, since this user may not delete it" in caplog.text


def test_two_runs_of_one_training_share_a_version(server: Registry, export: Path) -> None:
    first = register("unet", export, RUN, {"identity": "abc"})
    assert register("unet", export, "another-run", {"identity": "abc"}) == first
    assert server.given == 1


def test_other_weights_other_trainings_and_models_without_one_are_versions_of_their_own(
    server: Registry, export: Path
) -> None:
    register("unet", export, RUN, {"identity": "abc"})
    assert register("unet", export, "another-run", {"identity": "other"}).version == 2
    assert register("unet", export, "a-third-run", {}).version == 3
    (export / "model.safetensors").write_bytes(b"other weights")
    assert register("unet", export, RUN, {"identity": "abc"}).version == 4
    assert len(server.versions) == 4


def test_of_duplicates_that_a_killed_registration_left_everybody_gets_the_lowest(
    server: Registry, export: Path
) -> None:
    first = register("unet", export, RUN, {"identity": "abc"})
    twin = server.versions[1]
    server.versions[2] = Made(**{**vars(twin), "version": "2"})
    server.given = 2
    assert [register("unet", export, RUN, {"identity": "abc"}) for _ in range(2)] == [first, first]
