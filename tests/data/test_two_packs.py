"""Two packs into one place at once: of one plan they share the work's result, of two plans one stands."""

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data.index import load_index, read_table
from ddpm_pipeline.data.packing.inspect_dataset import inspect
from ddpm_pipeline.data.packing.pack_dataset import pack
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.store import FileStore, ObjectInfo, Store, open_store
from tests.data.making import encoded, random_image


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Forty images of noise, so that shards of different plans differ."""
    place = tmp_path_factory.mktemp("noise")
    for number in range(40):
        (place / f"{number:02d}.png").write_bytes(encoded(random_image(number)))
    return str(place)


def config(source: str, dest: str, seed: int = 0) -> PackConfig:
    return PackConfig(source=source, dest=dest, shard_size=5, seed=seed, num_threads=1)


def together(jobs: list[Callable[[], object]]) -> list[object]:
    """What each job returned, or the UserError it ended in."""

    def run(job: Callable[[], object]) -> object:
        try:
            return job()
        except UserError as error:
            return error

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(run, jobs))


def meet_before_the_first_plan(monkeypatch: pytest.MonkeyPatch, jobs: int) -> None:
    """All jobs have looked at the empty place before any of them writes."""
    import sys

    module = sys.modules["ddpm_pipeline.data.packing.pack_dataset"]
    barrier, begin = threading.Barrier(jobs), module.begin_pack

    def begin_pack(store: Store, plan: object) -> object:
        barrier.wait(30)
        return begin(store, plan)

    monkeypatch.setattr(module, "begin_pack", begin_pack)


def test_two_packs_of_one_plan_both_end_well_and_leave_what_one_leaves(
    uri: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = pack(config(source, f"{uri}-alone")).index_digest
    meet_before_the_first_plan(monkeypatch, 2)
    first, second = together([lambda: pack(config(source, uri))] * 2)
    monkeypatch.undo()
    assert not isinstance(first, UserError)
    assert not isinstance(second, UserError)
    assert load_index(uri).digest == alone
    assert inspect(uri).damage == ()
    assert pack(config(source, uri)).already_complete
    assert not list(open_store(uri).list("parts/"))
    assert not list(open_store(uri).list("claims/"))


def test_of_two_packs_of_different_plans_one_stands_and_the_other_is_refused(
    uri: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [pack(config(source, f"{uri}-alone-{seed}", seed)).index_digest for seed in (0, 1)]
    meet_before_the_first_plan(monkeypatch, 2)
    told = together([lambda: pack(config(source, uri)), lambda: pack(config(source, uri, seed=1))])
    monkeypatch.undo()
    refused = [number for number, result in enumerate(told) if isinstance(result, UserError)]
    assert len(refused) == 1
    assert "contains a pack of other images or settings" in str(told[refused[0]])
    assert load_index(uri).digest == alone[1 - refused[0]]
    assert inspect(uri).damage == ()


def test_a_pack_that_sleeps_while_another_finishes_changes_nothing(
    uri: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is frozen at one of its shards, and all its records are gone when it wakes."""
    frozen, go_on = threading.Event(), threading.Event()
    upload = FileStore.upload

    def slow(self: FileStore, key: str, path: Path) -> ObjectInfo:
        if key.endswith("000003.tar") and not frozen.is_set():
            frozen.set()
            assert go_on.wait(30)
        return upload(self, key, path)

    monkeypatch.setattr(FileStore, "upload", slow)
    with ThreadPoolExecutor(1) as pool:
        sleeper = pool.submit(pack, config(source, uri))
        assert frozen.wait(30)
        digest = pack(config(source, uri)).index_digest
        go_on.set()
        assert sleeper.result().index_digest == digest
    assert load_index(uri).digest == digest
    assert inspect(uri).damage == ()
    assert not list(open_store(uri).list("parts/"))


def test_a_shard_written_again_with_the_same_bytes_is_mended_by_the_same_command(
    uri: str, source: str
) -> None:
    digest = pack(config(source, uri)).index_digest
    store = open_store(uri)
    store.write("shards/000002.tar", store.read("shards/000002.tar"))
    with pytest.raises(UserError, match=r"000002\.tar was replaced"):
        load_index(uri)
    assert not pack(config(source, uri)).already_complete
    assert load_index(uri).digest == digest


@pytest.mark.parametrize(
    "harm",
    [
        lambda store: store.delete("shards/000001.tar"),
        lambda store: store.write("shards/000001.tar", store.read("shards/000002.tar")),
        lambda store: store.write("index.json", b"{}"),
        lambda store: store.delete("index.json"),
        lambda store: store.delete("pack-source.json"),
        lambda store: [store.delete(info.key) for info in list(store.list("index-"))],
    ],
    ids=[
        "shard gone",
        "shard replaced",
        "index emptied",
        "index gone",
        "source gone",
        "tables gone",
    ],
)
def test_whatever_is_lost_of_a_pack_comes_back_by_the_same_command(
    uri: str, source: str, harm: Callable[[Store], object]
) -> None:
    digest = pack(config(source, uri)).index_digest
    harm(open_store(uri))
    pack(config(source, uri))
    index = load_index(uri)
    assert index.digest == digest
    assert sum(len(read_table(index, shard)) for shard in range(len(index.shards))) == 40
    assert inspect(uri).damage == ()


def test_the_second_pack_of_an_unchanged_source_reads_no_image(
    uri: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(source, mine)
    first = pack(config(str(mine), uri))

    def read(*_: object) -> bytes:
        raise AssertionError("an image was read")

    with monkeypatch.context() as patch:
        patch.setattr("ddpm_pipeline.data.packing.sources.FilesSource.read", read)
        again = pack(config(str(mine), uri))
    assert again.already_complete
    assert (again.index_digest, again.num_samples, again.image) == (first.index_digest, 40, first.image)
    (mine / "00.png").write_bytes(encoded(np.zeros((8, 8, 3), np.uint8)))
    with pytest.raises(UserError, match="contains a pack of other images"):
        pack(config(str(mine), uri))


def test_a_taken_place_is_refused_before_any_image_is_read(
    uri: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(config(source, uri))
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    shutil.copy(Path(source) / "00.png", fewer)
    open_store(f"{uri}-other").write("x.tar", b"")

    def read(*_: object) -> bytes:
        raise AssertionError("an image was read")

    monkeypatch.setattr("ddpm_pipeline.data.packing.sources.FilesSource.read", read)
    with pytest.raises(UserError, match="contains a pack of other images or settings"):
        pack(config(source, uri, seed=3))
    with pytest.raises(UserError, match="contains a pack of other images or settings"):
        pack(config(str(fewer), uri))
    with pytest.raises(UserError, match=r"contains other data \(x\.tar\)"):
        pack(config(source, f"{uri}-other"))
