"""Whether a store heeds conditions is tried once, and claims work in either case."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ddpm_pipeline.store import ABSENT, ObjectChanged, ObjectInfo, ObjectMissing, Store, open_store
from ddpm_pipeline.store import conditional_writes as module
from ddpm_pipeline.store.conditional_writes import heeds_conditions
from ddpm_pipeline.store.prefix_claim import agree
from tests.s3_servers import SERVERS, open_place

HEEDS = {"moto": True, "seaweedfs": True, "gateway": False}


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_known", {})


def claim(store: Store, text: str) -> str:
    """The text that a job proposing `text` is told."""

    def read() -> str | None:
        try:
            return store.read("owner").decode()
        except ObjectMissing:
            return None

    return agree(
        store, "claims/", text, read, lambda text: store.write("owner", text.encode(), replaces=ABSENT)
    )


@pytest.mark.parametrize("server", [*SERVERS, pytest.param("gateway", marks=pytest.mark.stack)])
def test_each_server_is_known_for_what_it_does(server: str, request: pytest.FixtureRequest) -> None:
    store = open_place(server, request)
    assert heeds_conditions(store, "claims/") is HEEDS[server]
    assert list(store.list()) == []


@pytest.mark.parametrize("server", [*SERVERS, pytest.param("gateway", marks=pytest.mark.stack)])
def test_of_jobs_that_claim_at_once_one_wins(server: str, request: pytest.FixtureRequest) -> None:
    store, start = open_place(server, request), threading.Barrier(4)

    def job(number: int) -> str:
        start.wait(30)
        return claim(store, f"job {number}")

    with ThreadPoolExecutor(4) as pool:
        told = set(pool.map(job, range(4)))
    assert told == {store.read("owner").decode()}
    assert [info.key for info in store.list()] == ["owner"]


def test_a_directory_is_not_tried(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}")
    assert not heeds_conditions(store, "claims/")
    assert list(tmp_path.iterdir()) == []


class Service(Store):
    """A service in memory: it heeds conditions, ignores them, or looks first and writes later."""

    def __init__(self, kind: str) -> None:
        self.uri, self.kind, self.writes = f"s3://{kind}", kind, 0
        self.objects: dict[str, bytes] = {}
        self._lock, self._all_looked = threading.Lock(), threading.Barrier(module.WRITERS)

    @property
    def service(self) -> str | None:
        return self.uri

    def write(self, key: str, data: bytes, *, replaces: str | None = None) -> ObjectInfo:
        with self._lock:
            self.writes += 1
            taken = replaces == ABSENT and key in self.objects and self.kind != "ignores"
            if not taken and self.kind != "looks first":
                self.objects[key] = data
        if taken:
            raise ObjectChanged(key)
        if self.kind == "looks first" and replaces == ABSENT:
            self._all_looked.wait(30)
        self.objects[key] = data
        return ObjectInfo(key, len(data), "tag")

    def read(self, key: str) -> bytes:
        try:
            return self.objects[key]
        except KeyError:
            raise ObjectMissing(key) from None

    def list(self, prefix: str = "", start_after: str = "") -> Iterator[ObjectInfo]:
        keys = sorted(key for key in self.objects if key.startswith(prefix) and key > start_after)
        return iter([ObjectInfo(key, len(self.objects[key]), "tag") for key in keys])

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    def _unused(self, *args: object, **more: object) -> None:
        raise AssertionError("not part of a claim")

    read_range = open = stat = upload = download = _probe = create_container = server_time = _unused  # type: ignore[assignment]


@pytest.mark.parametrize(("kind", "heeds"), [("heeds", True), ("ignores", False), ("looks first", False)])
def test_a_service_that_looks_first_and_writes_later_does_not_heed_conditions(kind: str, heeds: bool) -> None:
    store = Service(kind)
    assert heeds_conditions(store, "claims/") is heeds
    assert store.objects == {}
    tried = store.writes
    assert heeds_conditions(store, "claims/") is heeds
    assert store.writes == tried


def test_a_claim_on_a_service_that_heeds_conditions_is_one_write() -> None:
    store = Service("heeds")
    heeds_conditions(store, "claims/")
    before = store.writes
    assert [claim(store, "first"), claim(store, "second")] == ["first", "first"]
    assert store.writes == before + 2
    assert store.objects == {"owner": b"first"}


def test_where_a_job_of_an_earlier_version_is_claiming_its_protocol_is_used() -> None:
    store = Service("heeds")
    heeds_conditions(store, "claims/")
    ballot = {"round": 4, "accepted": 4, "value": "theirs"}
    store.write("claims/theirs.0001.json", json.dumps(ballot).encode())
    assert claim(store, "ours") == "theirs"
