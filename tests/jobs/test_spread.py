"""Packing and indexing on a real Ray cluster: the bytes of one machine, by processes that are not this one."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.errors import DamageError
from ddpm_pipeline.infra.local import LocalStack
from ddpm_pipeline.jobs import dataset
from ddpm_pipeline.jobs import pack as pack_job
from ddpm_pipeline.jobs.ray_map import RayMap, ray_map_for
from ddpm_pipeline.jobs.ray_session import ray_cluster
from ddpm_pipeline.store import open_store
from tests.data.making import folder, small_set


@pytest.fixture(scope="module")
def connection(stack: LocalStack) -> Iterator[None]:
    """One connection to Ray for the module: the commands share it."""
    with ray_cluster():
        yield


@pytest.fixture
def cluster(connection: None) -> RayMap:
    return RayMap()


def quiet(done: int, total: int, note: str = "") -> None:
    """Progress nobody looks at."""


@pytest.mark.parametrize(
    ("address", "units", "local"),
    [(None, 100, False), ("127.0.0.1:1", 9, False), ("ray.example:6379", 100, True)],
)
def test_little_work_and_files_a_far_cluster_cannot_see_stay_here(
    address: str | None, units: int, local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with ray_map_for(units, 10, local) as spread:
        assert spread is None


@pytest.mark.stack
@pytest.mark.timeout(180)
def test_a_cluster_packs_the_same_bytes_as_one_machine(
    connection: None,
    prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = folder(tmp_path / "pictures", {"cat": 12, "dog": 18})
    config = PackConfig(source=str(source), dest=f"{prefix}/far", shard_size=10, held_out=0.2)
    monkeypatch.setattr(pack_job, "ENOUGH_IMAGES", 20)
    assert pack_job.pack_images(config, quiet) == 0
    assert "worker processes" in capsys.readouterr().out
    monkeypatch.delenv("RAY_ADDRESS")
    assert pack_job.pack_images(config.model_copy(update={"dest": f"{prefix}/near"}), quiet) == 0
    assert "worker processes" not in capsys.readouterr().out
    for side in ("", "-held-out"):
        far, near = (load_index(f"{prefix}/{place}{side}") for place in ("far", "near"))
        assert far.digest == near.digest
        shards = [[open_store(each.uri).read(s.name) for s in each.shards] for each in (far, near)]
        assert shards[0] == shards[1]


@pytest.mark.long
@pytest.mark.stack
@pytest.mark.timeout(180)
def test_a_cluster_indexes_as_one_machine_does_and_reads_only_what_is_new(
    connection: None, prefix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = small_set(prefix, (5,) * 12)
    store = open_store(prefix)
    for key in [info.key for info in store.list() if not info.key.endswith(".tar")]:
        store.delete(key)
    monkeypatch.setattr(dataset, "ENOUGH_SHARDS", 10)
    assert dataset.index(prefix, None, False) == 0
    assert "worker processes" in capsys.readouterr().out
    assert load_index(prefix) == here
    assert dataset.index(prefix, None, False) == 0
    told = capsys.readouterr().out
    assert "worker processes" not in told
    assert "known    12 shards" in told
    assert "0 read" in told


@pytest.mark.stack
@pytest.mark.timeout(180)
def test_the_unit_of_a_killed_worker_is_done_again_and_failures_are_told_as_they_were(
    cluster: RayMap, tmp_path: Path
) -> None:
    def dies_once(unit: int) -> int:
        mark = tmp_path / f"{unit}.begun"
        if unit == 3 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return unit * unit

    def fails(unit: int) -> int:
        if unit == 2:
            raise DamageError("shard 2: torn")
        return unit

    assert list(cluster(dies_once, range(8))) == [unit * unit for unit in range(8)]
    assert (tmp_path / "3.begun").exists()
    assert os.getpid() not in {process for _, process in cluster.workers}
    with pytest.raises(DamageError) as caught:
        list(cluster(fails, range(5)))
    assert str(caught.value) == "shard 2: torn"
