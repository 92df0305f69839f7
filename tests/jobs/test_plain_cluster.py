"""A cluster that nobody made for this program: jobs are sent to nodes that `ray start` started and that lack it."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddpm_pipeline.infra.local import LocalStack
from ddpm_pipeline.jobs.ray_session import PATCH_VARIABLE
from ddpm_pipeline.store import open_store
from tests.built_wheel import build_wheel
from tests.driving import ray_workers_of
from tests.environments import Installed, install, make_environment
from tests.plain_cluster import PlainCluster, PlainNode, plain_cluster, wait_until

pytestmark = [pytest.mark.stack, pytest.mark.long, pytest.mark.timeout(1200)]

SETTINGS = """
base: demo
train:
  name: plain
  steps: 30
  optimizer: {warmup_steps: 5}
  log_every_steps: 10
  checkpoint: {every_steps: 10}
  grid: {every_steps: 30, count: 4}
  workers: {num_workers: 1, node_labels: {region: eu}}
generate:
  model: plain@champion
  output: "{root}/samples/plain"
  count: 400
  shard_size: 20
  batch_size: 20
  cpus_per_worker: 2
  num_workers: 2
"""
LABEL = "--labels=region=eu"


@pytest.fixture
def cluster(stack: LocalStack, tmp_path: Path) -> Iterator[PlainCluster]:
    """A head with one CPU, and two larger nodes of which one has a resource and a label of its own."""
    make_environment(tmp_path / "nodes")
    python = tmp_path / "nodes/bin/python"
    with plain_cluster(stack, tmp_path / "plain", python) as found:
        found.start_head("--num-cpus=1")
        found.add_node("--num-cpus=2", '--resources={"scratch": 1}', LABEL)
        found.add_node("--num-cpus=3")
        yield found


@pytest.fixture
def other_python() -> str:
    """A Python that differs from this one in the last number of its version only."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for folder in (*os.get_exec_path(), "/usr/bin", "/usr/local/bin"):
        found = Path(folder) / name
        if found.exists() and version_of(found) != platform.python_version() and has_venv(found):
            return str(found)
    pytest.skip(f"needs a {name} other than {platform.python_version()}")


@pytest.fixture
def mixed_cluster(stack: LocalStack, tmp_path: Path, other_python: str) -> Iterator[PlainCluster]:
    """A head with one CPU, and a larger node with another last number of Python's version."""
    make_environment(tmp_path / "nodes")
    make_environment(tmp_path / "others", other_python)
    with plain_cluster(stack, tmp_path / "mixed", tmp_path / "nodes/bin/python") as found:
        found.start_head("--num-cpus=1", variables={PATCH_VARIABLE: "minor"})
        other = tmp_path / "others/bin/python"
        found.add_node("--num-cpus=2", LABEL, python=other, variables={PATCH_VARIABLE: "minor"})
        yield found


def laptop_of(cluster: PlainCluster, prefix: str, tmp_path: Path, bare_environ: dict[str, str]) -> Installed:
    """A machine with the wheel and a file of settings, which knows where the cluster and the services are."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "work.yaml").write_text(SETTINGS)
    make_environment(tmp_path / "laptop")
    install(build_wheel(tmp_path), tmp_path / "laptop")
    services = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "MLFLOW_"))}
    own = {"DDPM_ROOT": prefix, "RAY_JOB_ADDRESS": cluster.url, "RAY_AUTH_TOKEN_PATH": str(cluster.token)}
    return Installed(tmp_path / "laptop", folder, {**bare_environ, **services, **own})


def test_nodes_without_the_program_train_and_generate_and_one_that_is_lost_costs_only_time(
    cluster: PlainCluster, prefix: str, tmp_path: Path, bare_environ: dict[str, str]
) -> None:
    laptop = laptop_of(cluster, prefix, tmp_path, bare_environ)
    assert not has_the_program(cluster.python)
    head, lost, _ = cluster.nodes
    assert [node["labels"].get("region") for node in cluster.living()].count("eu") == 1
    assert "3 nodes alive" in laptop.ddpm("doctor")
    assert "packed: 1797 images" in laptop.ddpm("submit", "pack", "demo")
    name = laptop.ddpm("submit", "train", "--config", "work.yaml", "--detach").split()[1]
    wait_until(lambda: any(trainers(node) for node in cluster.nodes))
    assert [trainers(node) for node in cluster.nodes] == [0, 1, 0]
    assert "plain/1" in laptop.ddpm("logs", "-f", name)

    name = laptop.ddpm("submit", "generate", "--config", "work.yaml", "--detach").split()[1]
    store = open_store(f"{prefix}/samples/plain")
    wait_until(lambda: sum(1 for _ in store.list("done/")) >= 2)
    assert [len(ray_workers_of(node.identity, "MapWorker")) for node in cluster.nodes] == [0, 1, 1]
    assert len(ray_workers_of(head.identity, "::Coordinator")) == 1
    cluster.kill(lost)
    assert "complete: 400 images" in laptop.ddpm("logs", "-f", name)
    wait_until(lambda: len(cluster.living()) == 2)
    said = laptop.ddpm("verify", f"{prefix}/samples/plain", "--regenerate", "2")
    assert "sound and complete" in said
    assert [path.name for path in laptop.folder.iterdir()] == ["work.yaml"]


def test_a_node_with_another_last_number_of_pythons_version_trains_and_generates(
    mixed_cluster: PlainCluster, prefix: str, tmp_path: Path, bare_environ: dict[str, str]
) -> None:
    laptop = laptop_of(mixed_cluster, prefix, tmp_path, bare_environ)
    laptop.ddpm("submit", "pack", "demo")
    assert "plain/1" in laptop.ddpm("submit", "train", "--config", "work.yaml")
    few = ("count=40", "num_workers=1")
    assert "complete: 40 images" in laptop.ddpm("submit", "generate", "--config", "work.yaml", *few)
    assert "sound and complete" in laptop.ddpm("verify", f"{prefix}/samples/plain", "--regenerate", "2")


def version_of(python: Path) -> str:
    words = [str(python), "-c", "import platform; print(platform.python_version())"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


def has_venv(python: Path) -> bool:
    return (
        subprocess.run([str(python), "-c", "import venv"], capture_output=True, check=False).returncode == 0
    )


def trainers(node: PlainNode) -> int:
    """Workers of a training on a node."""
    return len(ray_workers_of(node.identity, "RayTrainWorker"))


def has_the_program(python: Path) -> bool:
    words = [str(python), "-c", "import ddpm_pipeline"]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return (
        subprocess.run(words, cwd=python.parent, env=environ, capture_output=True, check=False).returncode
        == 0
    )
