"""On each S3 server: a generation whose driver dies between two requests ends with the bytes of an undisturbed one."""

from pathlib import Path

import pytest

from ddpm_pipeline.generate.driver import generate
from ddpm_pipeline.generate.verification import verify
from ddpm_pipeline.signatures import SigningKey
from ddpm_pipeline.store import ObjectInfo, open_store
from ddpm_pipeline.store.s3_store import S3Store
from tests.effort import is_long
from tests.generate.inprocess import Killed, here, without_cluster
from tests.generate.tiny import contents, settings, tiny_model
from tests.s3_servers import SERVERS, open_place


class Dying(S3Store):
    """Its process dies before change number `left`, heartbeats apart."""

    left = 0
    changes = 0

    def _change(self, key: str) -> None:
        if key.startswith("jobs/"):
            return
        self.changes += 1
        if self.changes == self.left:
            raise Killed

    def write(self, key: str, data: bytes, *, replaces: str | None = None) -> ObjectInfo:
        self._change(key)
        return super().write(key, data, replaces=replaces)

    def delete(self, key: str) -> None:
        self._change(key)
        super().delete(key)


def dying(uri: str, left: int) -> Dying:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    store = Dying(bucket, prefix)
    store.left = left
    return store


@pytest.mark.parametrize("server", [*SERVERS, pytest.param("gateway", marks=pytest.mark.stack)])
def test_a_generation_whose_driver_dies_anywhere_ends_in_the_same_bytes(
    server: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, model = open_place(server, request).uri, tiny_model(tmp_path / "model")
    key = SigningKey.create(tmp_path / "signing.pem")
    monkeypatch.setenv("DDPM_SIGNING_KEY_FILE", str(tmp_path / "signing.pem"))
    monkeypatch.setattr(here, "store", None, raising=False)

    def run(name: str, left: int = 0) -> Dying:
        store = dying(f"{base}/{name}", left)
        monkeypatch.setattr(here, "store", store)
        generate(settings(model, store.uri, count=15))
        return store

    def found(name: str) -> dict[str, bytes]:
        objects = contents(open_store(f"{base}/{name}"))
        return {k: v for k, v in objects.items() if k not in ("SHA256SUMS", "manifest.dsse.json")}

    with without_cluster():
        run("first")  # tries whether the server heeds conditions
        num_changes = run("whole").changes
        expected = found("whole")
        places = range(1, num_changes + 1)
        for place in places if is_long() else sorted({1, len(places) // 2, num_changes}):
            with pytest.raises(Killed):
                run(f"killed-{place}", place)
            run(f"killed-{place}")
            assert found(f"killed-{place}") == expected
        assert verify(f"{base}/killed-{place}", key=key.public).ok
