"""A manifest is believed only as far as the prefix bears it out."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ddpm_pipeline.generate.completeness import check_complete
from ddpm_pipeline.generate.generation_status import generation_status
from ddpm_pipeline.generate.spec import read_spec
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.jobs.status import generation_status as status_command
from ddpm_pipeline.store import Store, open_store
from tests.generate.tiny import fill, settings, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def uri(model: Path, tmp_path: Path) -> str:
    """A complete generation of 23 samples in three shards."""
    found = f"file://{tmp_path}/out"
    fill(settings(model, found, count=23))
    return found


def delete(key: str) -> Callable[[Store], object]:
    return lambda store: store.delete(key)


def tear(key: str) -> Callable[[Store], object]:
    return lambda store: store.write(key, store.read(key)[: len(store.read(key)) // 2])


def edit(key: str, change: Callable[[dict[str, object]], object]) -> Callable[[Store], object]:
    def do(store: Store) -> None:
        document = json.loads(store.read(key))
        change(document)
        store.write(key, (json.dumps(document, indent=2) + "\n").encode())

    return do


def edit_line(old: bytes, new: bytes) -> Callable[[Store], object]:
    """Change the manifest in one place."""
    return lambda store: store.write("manifest.json", store.read("manifest.json").replace(old, new, 1))


FAULTS: dict[str, tuple[Callable[[Store], object], str]] = {
    "shard gone": (delete("shards/000001.tar"), "shards/000001.tar: is missing"),
    "tail gone": (delete("shards/000002-0003.tar"), "shards/000002-0003.tar: is missing"),
    "record gone": (delete("done/000001.json"), "done/000001.json: is missing"),
    "shard torn": (tear("shards/000001.tar"), "shards/000001.tar: has "),
    "record torn": (tear("done/000001.json"), "done/000001.json: "),
    "record of other bytes": (
        edit("done/000001.json", lambda d: d.update(sha256="0" * 64)),
        "done/000001.json: describes other bytes",
    ),
    "manifest torn": (tear("manifest.json"), "manifest.json: "),
    "manifest empty": (lambda store: store.write("manifest.json", b""), "manifest.json: "),
    "manifest of another digest": (
        lambda store: store.write(
            "manifest.json",
            re.sub(rb'("spec_digest": )"\w+"', rb'\1"' + b"0" * 64 + b'"', store.read("manifest.json")),
        ),
        "manifest.json: is that of another generation",
    ),
    "manifest of another seed": (
        edit_line(b'"seed": 0', b'"seed": 1'),
        "manifest.json: is that of another generation",
    ),
    "manifest of another plan": (
        edit_line(b'"key":"shards/000001.tar"', b'"key":"shards/000009.tar"'),
        "manifest.json: its entry 1 is shards/000009.tar",
    ),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_contradicts_the_manifest_is_named_by_the_look_and_by_the_status(
    kind: str, uri: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    harm, what = FAULTS[kind]
    store = open_store(uri)
    spec = read_spec(store)
    assert spec is not None
    assert check_complete(Generation(store, spec)).complete
    assert status_command(uri, as_json=False) == 0
    harm(store)
    found = check_complete(Generation(store, spec))
    assert not found.complete
    assert any(what in fault for fault in found.faults), found.faults
    assert generation_status(uri).state == "damaged"
    capsys.readouterr()
    assert status_command(uri, as_json=False) == 1
    said = capsys.readouterr().out
    assert what in said
    assert "next     the same `ddpm generate` command" in said


def test_a_manifest_of_a_smaller_count_and_none_at_all_are_no_faults(uri: str) -> None:
    store = open_store(uri)
    spec = read_spec(store)
    assert spec is not None
    larger = check_complete(Generation(store, spec.model_copy(update={"count": 40})))
    assert (larger.complete, larger.faults) == (False, [])
    store.delete("manifest.json")
    none = check_complete(Generation(store, spec))
    assert (none.complete, none.faults) == (False, [])
