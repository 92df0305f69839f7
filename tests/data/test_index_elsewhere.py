"""An index that lies elsewhere than its shards, which may be read-only or another's."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddpm_pipeline.data.formats.shards import write_shard
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.data.packing.build_index import plan_index
from ddpm_pipeline.data.packing.inspect_dataset import inspect
from ddpm_pipeline.data.reading.download_dataset import download_dataset
from ddpm_pipeline.data.reading.sequential import read_sequential
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.jobs import dataset
from ddpm_pipeline.store import FileStore, file_path, open_store
from tests.data.making import batches, by_position, sample, small_set

COUNTS = (13, 7, 20)


@pytest.fixture
def shards(tmp_path: Path) -> Iterator[str]:
    """A folder of shards that nobody may write to, without an index."""
    folder = tmp_path / "others #1"
    small_set(folder.as_uri(), COUNTS)
    for path in [*folder.glob("*.json"), *folder.glob("*.npy")]:
        path.unlink()
    folder.chmod(0o555)
    yield folder.as_uri()
    folder.chmod(0o755)


@pytest.fixture
def dest(tmp_path: Path) -> str:
    """An empty place for an index."""
    return (tmp_path / "indexes").as_uri()


def names(uri: str) -> list[str]:
    return [info.key for info in open_store(uri).list()]


def test_a_read_only_folder_is_indexed_elsewhere_and_read_as_any_other_set(
    shards: str, dest: str, tmp_path: Path
) -> None:
    before = names(shards)
    assert dataset.index(shards, None, True, dest=dest) == 0
    assert names(shards) == before
    index, beside = load_index(dest), small_set((tmp_path / "beside").as_uri(), COUNTS)
    assert index.digest == beside.digest
    assert (index.uri, index.shards_uri) == (dest, shards)
    for settings in ({}, {"memory_bytes": 0, "num_workers": 1}, {"cache_dir": str(tmp_path / "cache")}):
        assert by_position(batches(index, 0, 9, **settings)) == by_position(batches(beside, 0, 9))
    whole, other = list(read_sequential(index)), list(read_sequential(beside))
    assert [(s.key, s.label, s.pixels.tobytes()) for s in whole] == [
        (s.key, s.label, s.pixels.tobytes()) for s in other
    ]
    found = inspect(dest)
    assert (found.index_digest, found.num_samples, found.damage) == (index.digest, sum(COUNTS), ())


def test_paths_relative_to_the_working_folder_are_kept_in_full(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan_index("others #1/{000..001}.tar", dest="here").build()
    monkeypatch.chdir("/")
    index = load_index(str(tmp_path / "here"))
    assert index.shards_uri == f"{shards}/{{000..001}}.tar"
    assert len(list(read_sequential(index))) == sum(COUNTS[:2])


def test_new_shards_are_noticed_and_the_same_place_is_indexed_again(shards: str, dest: str) -> None:
    plan_index(shards, dest=dest).build()
    folder = file_path(shards)
    folder.chmod(0o755)
    open_store(shards).write("003.tar", write_shard(map(sample, range(40, 45))))
    with pytest.raises(UserError, match=f"003.tar is not in the index .*; run ddpm index {dest}$"):
        load_index(dest)
    again = plan_index(dest)
    assert again.to_scan == ["003.tar"]
    again.build()
    assert load_index(dest).num_samples == sum(COUNTS) + 5
    os.utime(folder / "000.tar")
    with pytest.raises(UserError, match=r"000\.tar was replaced"):
        load_index(dest)


def test_a_download_brings_shards_and_index_together(shards: str, dest: str, tmp_path: Path) -> None:
    plan_index(shards, dest=dest).build()
    index, _ = download_dataset(dest, str(tmp_path / "copy"), False, lambda done, total: None)
    copy = load_index((tmp_path / "copy").as_uri())
    assert (copy.digest, copy.shards_uri) == (index.digest, None)
    assert len(list(read_sequential(copy))) == sum(COUNTS)


def test_a_place_that_holds_anything_else_is_refused(shards: str, dest: str, tmp_path: Path) -> None:
    plan_index(shards, dest=dest).build()
    other = (tmp_path / "other").as_uri()
    small_set(other, (3,))
    with pytest.raises(UserError, match="contains shards; choose"):
        plan_index(shards, dest=other)
    with pytest.raises(UserError, match=r"contains the index of .*others"):
        plan_index(other, dest=dest)
    with pytest.raises(UserError, match="is a pattern"):
        plan_index(shards, dest=f"{dest}/*.tar")
    with pytest.raises(UserError, match="is in a bucket and the shards are local"):
        plan_index(shards, dest="s3://bucket/set")
    assert plan_index(other, dest=other).build() == load_index(other)


def test_an_index_in_a_bucket_cannot_make_readers_open_files(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(uri)
    document = json.loads(store.read(small_set(uri).name))
    store.write("index.json", json.dumps({**document, "shards_uri": "file:///etc"}).encode())
    bucket = FileStore(Path(uri.removeprefix("file://")))
    bucket.uri = "s3://bucket/set"
    monkeypatch.setattr(
        "ddpm_pipeline.data.index.open_store",
        lambda place: bucket if place.startswith("s3:") else open_store(place),
    )
    with pytest.raises(UserError, match=r"names local shards \(file:///etc\)"):
        load_index("s3://bucket/set")


@pytest.mark.parametrize("place", ["s3://", "gs://b/x", "file://", "*.tar"])
def test_an_index_of_a_senseless_place_is_one_line(uri: str, place: str) -> None:
    store = open_store(uri)
    document = json.loads(store.read(small_set(uri).name))
    store.write("index.json", json.dumps({**document, "shards_uri": place}).encode())
    with pytest.raises((UserError, DamageError), match=r"index\.json"):
        load_index(uri)
