"""What a generation asks of Ray: whole and fractional GPUs, a pool between two sizes, room before work."""

import logging
from pathlib import Path
from typing import Any

import pytest

import ddpm_pipeline.generate.ray_pool
from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.generate.ray_pool import WorkerPool, require_pool_resources
from ddpm_pipeline.jobs.ray_session import require_resources
from tests.generate.tiny import settings


def config(**more: object) -> GenerateConfig:
    return settings(Path("unused"), "file:///unused", **more)


class FakeData:
    """Replaces `ray.data`: records its arguments and has no rows."""

    arguments: dict[str, Any]
    DataContext = ddpm_pipeline.generate.ray_pool.ray.data.DataContext
    ActorPoolStrategy = ddpm_pipeline.generate.ray_pool.ray.data.ActorPoolStrategy

    def from_items(self, items: list[Any], override_num_blocks: int) -> "FakeData":
        assert len(items) == override_num_blocks
        return self

    def map_batches(self, worker: type, **arguments: Any) -> "FakeData":
        self.arguments = arguments
        return self

    def iter_batches(self, **_: Any) -> list[Any]:
        return []


def arguments_for_ray(
    config: GenerateConfig, num_shards: int, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    fake = FakeData()
    monkeypatch.setattr(ddpm_pipeline.generate.ray_pool.ray, "data", fake)
    pool: Any = WorkerPool
    pool = WorkerPool(pool, None, None)
    assert list(ddpm_pipeline.generate.ray_pool._wave(config, pool, list(range(num_shards)))) == []
    return fake.arguments


def test_half_a_gpu_puts_two_workers_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = arguments_for_ray(config(gpus_per_worker=0.5, cpus_per_worker=2), 8, monkeypatch)
    assert (arguments["num_gpus"], arguments["num_cpus"], arguments["batch_size"]) == (0.5, 2, 1)


@pytest.mark.parametrize(
    ("pool", "num_shards", "sizes"),
    [
        ({"num_workers": 2, "max_workers": 7}, 100, (2, 7)),
        ({"num_workers": 3}, 100, (3, 3)),
        ({"num_workers": 2, "max_workers": 7}, 4, (2, 4)),
        ({"num_workers": 4, "max_workers": 4}, 1, (1, 1)),
    ],
)
def test_the_pool_keeps_between_its_sizes_and_never_exceeds_the_shards(
    pool: dict[str, object], num_shards: int, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = arguments_for_ray(config(**pool), num_shards, monkeypatch)["compute"]
    assert (found.min_size, found.max_size) == sizes


def test_a_share_of_a_gpu_needs_a_node_that_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes: list[dict[str, Any]] = [{"Alive": True, "Resources": {"CPU": 4.0}}]
    monkeypatch.setattr(ddpm_pipeline.generate.ray_pool.ray, "nodes", lambda: nodes)
    require_pool_resources(config())
    with pytest.raises(
        UserError, match=r"gpus_per_worker: a worker needs 0\.5, but the largest node .* has 0"
    ):
        require_pool_resources(config(gpus_per_worker=0.5))
    nodes.append({"Alive": False, "Resources": {"CPU": 4.0, "GPU": 8.0}})
    with pytest.raises(UserError, match="gpus_per_worker"):
        require_pool_resources(config(gpus_per_worker=0.5))
    nodes.append({"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}})
    require_pool_resources(config(gpus_per_worker=0.5))


def test_only_nodes_with_the_labels_are_large_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 4.0}, "Labels": {}},
        {"Alive": True, "Resources": {"CPU": 1.0}, "Labels": {"region": "eu", "disk": "fast"}},
    ]
    monkeypatch.setattr(ddpm_pipeline.generate.ray_pool.ray, "nodes", lambda: nodes)
    labels = {"region": "eu"}
    require_pool_resources(config(node_labels=labels))
    with pytest.raises(UserError, match="of the part of the cluster that is labelled region=eu has 1; lower"):
        require_pool_resources(config(node_labels=labels, cpus_per_worker=2))
    require_resources(1, 1, 0, "train.workers", labels)
    with pytest.raises(
        UserError, match="need 2 CPUs, the part of the cluster that is labelled region=eu has 1;"
    ):
        require_resources(2, 1, 0, "train.workers", labels)
    require_resources(5, 1, 0, "train.workers")


def test_a_cluster_that_grows_is_trusted_to_get_a_large_node_and_the_job_says_that_it_waits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nodes: list[dict[str, Any]] = [{"Alive": True, "Resources": {"CPU": 0.0}}]
    monkeypatch.setattr(ddpm_pipeline.generate.ray_pool.ray, "nodes", lambda: nodes)
    monkeypatch.setenv("DDPM_CLUSTER_GROWS", "1")
    require_pool_resources(config(gpus_per_worker=0.5))
    said = "a worker needs {}, but the largest node of the cluster has 0 now; waiting until a larger one is added"
    assert [record.getMessage() for record in caplog.records] == [
        f"cpus_per_worker: {said.format(1)}",
        f"gpus_per_worker: {said.format(0.5)}",
    ]
    monkeypatch.setenv("DDPM_CLUSTER_GROWS", "")
    with pytest.raises(UserError, match="or set DDPM_CLUSTER_GROWS=1"):
        require_pool_resources(config())


def test_rays_remark_on_cpus_beside_a_gpu_is_dropped_and_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from ray.data._internal.execution.operators import map_operator

    arguments_for_ray(config(gpus_per_worker=1), 1, monkeypatch)
    with caplog.at_level(logging.WARNING):
        map_operator._canonicalize_ray_remote_args({"num_cpus": 1, "num_gpus": 1})
        map_operator.logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
