"""On the real stack: GPUs that Ray declares and torch cannot use are refused in one line, before work is placed."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import ddpm_pipeline.generate.generation_job
import ddpm_pipeline.train.ray_trainer
from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data.packing.pack_dataset import pack
from ddpm_pipeline.infra.local import LocalStack
from ddpm_pipeline.jobs.doctor_gpus import check_cluster_gpus
from ddpm_pipeline.store import open_store
from tests.commands import ddpm
from tests.generate.tiny import contents, settings, tiny_model
from tests.ray_nodes import Node, add_node, remove_node
from tests.train.tiny import tiny

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]
REFUSED = 2


@pytest.fixture(scope="module")
def node(stack: LocalStack) -> Iterator[Node]:
    """A node that declares two GPUs, on a machine whose torch is a build without CUDA."""
    added = add_node(stack, num_cpus=2, num_gpus=2)
    yield added
    remove_node(stack, added)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def call(command: str, config: Settings, folder: Path) -> int:
    file = folder / "config.json"
    file.write_text(json.dumps({command: config.model_dump(mode="json")}))
    return ddpm(command, f"--config={file}")


@pytest.mark.long
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_training_ends_before_any_worker_is_started(
    node: Node,
    num_workers: int,
    prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    started: list[object] = []
    monkeypatch.setattr(
        ddpm_pipeline.train.ray_trainer, "train_on_cluster", lambda *words: started.append(words)
    )
    data = f"{prefix}/data"
    pack(PackConfig(source="digits", dest=data, channels=1, shard_size=300), None)
    workers = {"num_workers": num_workers, "gpus_per_worker": 1}
    capfd.readouterr()
    assert call("train", tiny(data, f"{prefix}/runs", workers=workers), tmp_path) == REFUSED
    assert started == []
    said = capfd.readouterr()
    (line,) = [line for line in (said.out + said.err).splitlines() if line.strip()]
    assert line.startswith(f"error: train.workers.gpus_per_worker: node {node.address}, GPU 0: torch ")
    assert "is a build without CUDA; install the CUDA build of torch" in line
    assert [entry.key for entry in open_store(f"{prefix}/runs").list("")] == []


@pytest.mark.long
def test_a_generation_ends_before_any_worker_is_started(
    node: Node,
    prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    started: list[object] = []
    monkeypatch.setattr(
        ddpm_pipeline.generate.generation_job, "start_pool", lambda *words: started.append(words)
    )
    config = settings(tiny_model(tmp_path / "model"), f"{prefix}/out", gpus_per_worker=0.5, num_workers=2)
    capfd.readouterr()
    assert call("generate", config, tmp_path) == REFUSED
    assert started == []
    said = capfd.readouterr()
    (line,) = [line for line in (said.out + said.err).splitlines() if line.strip()]
    assert line.startswith(f"error: gpus_per_worker: node {node.address}, GPU 0: torch ")
    assert contents(open_store(f"{prefix}/out")) == {}


def test_training_in_this_process_ends_the_same_way(
    prefix: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = f"{prefix}/data"
    pack(PackConfig(source="digits", dest=data, channels=1, shard_size=300), None)
    file = tmp_path / "config.json"
    config = tiny(data, f"{prefix}/runs", workers={"gpus_per_worker": 1})
    file.write_text(json.dumps({"train": config.model_dump(mode="json")}))
    capfd.readouterr()
    assert ddpm("train", "--local", f"--config={file}") == REFUSED
    said = capfd.readouterr()
    (line,) = [line for line in (said.out + said.err).splitlines() if line.strip()]
    assert line.startswith("error: train.workers.gpus_per_worker: GPU 0 of this machine: torch ")
    assert line.endswith("or set it to 0 to train on the CPU")


@pytest.mark.long
def test_the_doctor_computes_on_the_clusters_gpus(node: Node, stack: LocalStack) -> None:
    (finding,) = check_cluster_gpus()
    assert not finding.ok
    assert finding.found.startswith(f"node {node.address}, GPU 0: torch ")
    assert "CUDA build" in finding.remedy
