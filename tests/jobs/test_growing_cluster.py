"""A cluster whose only node has no CPU for jobs, and which Ray's autoscaler gives nodes while work waits for them.

The nodes are processes of this machine, by Ray's own provider for tests of its autoscaler.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data.packing.pack_dataset import pack
from ddpm_pipeline.infra.local import LocalStack
from tests.driving import Driver
from tests.environments import make_environment
from tests.generate.tiny import settings, tiny_model
from tests.plain_cluster import PlainCluster, plain_cluster, wait_until
from tests.train.tiny import tiny

pytestmark = [pytest.mark.stack, pytest.mark.long, pytest.mark.timeout(1200)]
GROWS = {"DDPM_CLUSTER_GROWS": "1"}


def autoscaling(gcs_address: str) -> dict[str, object]:
    """A file for `--autoscaling-config`: up to two nodes with two CPUs each, which go when they are idle."""
    empty_lists = (
        "initialization_commands",
        "setup_commands",
        "head_setup_commands",
        "worker_setup_commands",
    )
    empty_lists += ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files")
    return {
        "cluster_name": "growing",
        "max_workers": 2,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.2,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": gcs_address,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": 2, "object_store_memory": 128 * 2**20},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 2,
            },
        },
        **{name: [] for name in (*empty_lists, "rsync_exclude", "rsync_filter")},
        "file_mounts_sync_continuously": False,
    }


@pytest.fixture
def cluster(stack: LocalStack, tmp_path: Path) -> Iterator[PlainCluster]:
    """A head without CPUs."""
    make_environment(tmp_path / "nodes")
    with plain_cluster(stack, tmp_path / "growing", tmp_path / "nodes/bin/python") as found:
        file = tmp_path / "autoscaling.json"
        file.write_text(json.dumps(autoscaling(found.gcs_address)))
        options = ("--num-cpus=0", f"--autoscaling-config={file}")
        found.start_head(*options, variables={"RAY_FAKE_CLUSTER": "1"})
        yield found


def test_a_generation_waits_for_the_first_node_says_so_and_completes(
    cluster: PlainCluster, prefix: str, tmp_path: Path
) -> None:
    generation = settings(tiny_model(tmp_path / "model"), f"{prefix}/samples", cpus_per_worker=2)
    where = {"RAY_JOB_ADDRESS": cluster.url, "RAY_API_SERVER_ADDRESS": cluster.url}
    where |= {"RAY_AUTH_TOKEN_PATH": str(cluster.token)}

    refused = Driver("generate", generation, tmp_path, where, command=("submit", "generate"))
    assert refused.process.wait(200) == 2, refused.said
    assert "the largest node of the cluster has 0; lower it, add a node, or set DDPM_CLUSTER" in refused.said

    made = Driver("generate", generation, tmp_path, where | GROWS, command=("submit", "generate"))
    assert made.process.wait(300) == 0, made.said
    assert "has 0 now; waiting until a larger one is added" in made.said
    assert "complete: 50 images" in made.said

    wait_until(lambda: len(cluster.living()) == 1)


def test_a_training_waits_for_the_first_node_says_so_and_completes(
    cluster: PlainCluster, prefix: str, tmp_path: Path
) -> None:
    pack(PackConfig(source="digits", dest=f"{prefix}/data", channels=1), None)
    workers = {"num_workers": 1, "cpus_per_worker": 2}
    training = tiny(f"{prefix}/data", f"{prefix}/runs", name="grown", workers=workers)
    where = {"RAY_JOB_ADDRESS": cluster.url, "RAY_API_SERVER_ADDRESS": cluster.url}
    where |= {"RAY_AUTH_TOKEN_PATH": str(cluster.token)}
    made = Driver("train", training, tmp_path, where | GROWS, command=("submit", "train"))
    assert made.process.wait(400) == 0, made.said
    assert "1 workers need 2 CPUs, the cluster has 0 now; waiting until it has added nodes" in made.said
    assert "24/24 steps (100%)" in made.said
