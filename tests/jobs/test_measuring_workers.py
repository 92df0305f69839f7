"""Where models are judged: on GPUs if the settings or the judged job say so and there are some, else on CPUs."""

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray

import ddpm_pipeline.cluster
from ddpm_pipeline.config.device_kind import DeviceKind
from ddpm_pipeline.config.evaluation import EvaluateConfig
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.infra.local import LocalStack
from ddpm_pipeline.jobs import ray_map
from ddpm_pipeline.jobs.ray_map import RayMap, measuring_workers
from ddpm_pipeline.jobs.ray_session import ray_cluster
from ddpm_pipeline.jobs.runner import JobArguments, preset_uses_gpus
from ddpm_pipeline.parallel import serial_map
from tests.ray_nodes import Node, add_node, remove_node


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> "Place":
    return Place(monkeypatch)


class Place:
    """A machine with or without a GPU, and perhaps a cluster."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.delenv("DDPM_CLUSTER_GROWS", raising=False)
        monkeypatch.setattr(ray_map, "measuring_gpu", lambda: "NVIDIA L4")
        self.gpu_here(False)

    def gpu_here(self, there: bool) -> None:
        self._patch.setattr(ray_map, "_gpu_here", lambda: there)

    def cluster(self, *gpus: str, **resources: float) -> None:
        """RAY_ADDRESS names a cluster with these resources; `gpus`: the models of GPU that its nodes report."""
        kinds = [DeviceKind(name=name, capability="8.9", torch="2", cuda="13", cudnn="9") for name in gpus]

        @contextmanager
        def joined() -> Generator[None]:
            yield

        self._patch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        self._patch.setattr(ray_map, "ray_cluster", joined)
        self._patch.setattr(ray, "cluster_resources", lambda: resources)
        self._patch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": resources}])
        self._patch.setattr(ddpm_pipeline.cluster, "require_fit_workers", lambda workers, stop: kinds)


def opened(used_gpus: bool, **settings: object) -> tuple[str, str | None]:
    """Kind of map, and the GPU."""
    config = EvaluateConfig.model_validate({"reference": "r"} | settings)
    with measuring_workers(config, "evaluate", used_gpus) as workers:
        if workers.map is serial_map:
            return "here", workers.gpu
        assert isinstance(workers.map, RayMap)
        return f"ray {workers.map._max_tasks} x {workers.map._gpus_per_task:g} GPU", workers.gpu


def test_without_any_gpu_everything_stays_on_the_cpu(place: Place) -> None:
    assert opened(used_gpus=False) == ("here", None)
    assert opened(used_gpus=True) == ("here", None)
    place.cluster(CPU=4)
    assert opened(used_gpus=True) == ("here", None)
    assert opened(used_gpus=True, num_workers=2) == ("ray 2 x 0 GPU", None)


def test_a_gpu_here_is_used_for_jobs_that_used_gpus_and_where_it_is_asked_for(place: Place) -> None:
    place.gpu_here(True)
    assert opened(used_gpus=True) == ("here", "NVIDIA L4")
    assert opened(used_gpus=False) == ("here", None)
    assert opened(used_gpus=False, gpus_per_task=1) == ("here", "NVIDIA L4")
    assert opened(used_gpus=True, gpus_per_task=0) == ("here", None)


def test_gpus_of_the_cluster_are_used_as_tasks(place: Place) -> None:
    place.cluster("NVIDIA L4", CPU=8, GPU=2)
    assert opened(used_gpus=True) == ("ray None x 1 GPU", "NVIDIA L4")
    assert opened(used_gpus=True, num_workers=4, gpus_per_task=0.5) == ("ray 4 x 0.5 GPU", "NVIDIA L4")
    assert opened(used_gpus=False, num_workers=4) == ("ray 4 x 0 GPU", None)


def test_a_cluster_that_grows_is_trusted_to_add_a_gpu(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.cluster("NVIDIA L4", CPU=1)
    monkeypatch.setenv("DDPM_CLUSTER_GROWS", "1")
    assert opened(used_gpus=True) == ("ray None x 1 GPU", "NVIDIA L4")


def test_gpus_that_are_asked_for_and_missing_are_refused(place: Place) -> None:
    with pytest.raises(UserError, match=r"evaluate\.gpus_per_task: 1, but torch can use no GPU"):
        opened(used_gpus=False, gpus_per_task=1)
    place.cluster(CPU=8, GPU=1)
    with pytest.raises(UserError, match="2 workers need 2 GPUs, the cluster has 1"):
        opened(used_gpus=False, gpus_per_task=1, num_workers=2)


def test_two_models_of_gpu_are_refused_before_anything_is_measured(place: Place) -> None:
    place.cluster("NVIDIA L4", "NVIDIA A10", CPU=8, GPU=2)
    with pytest.raises(UserError, match="the cluster has NVIDIA A10 and NVIDIA L4"):
        opened(used_gpus=True)


def test_a_presets_generation_says_whether_its_models_are_judged_on_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDPM_ROOT", f"file://{tmp_path}")
    assert preset_uses_gpus(JobArguments.of(["ddpm-cifar10"]))
    assert not preset_uses_gpus(JobArguments.of(["digits"]))
    assert not preset_uses_gpus(JobArguments())


@pytest.fixture
def node(stack: LocalStack) -> Iterator[Node]:
    """A node that declares two GPUs, on a machine whose torch is a build without CUDA."""
    added = add_node(stack, num_cpus=2, num_gpus=2)
    yield added
    remove_node(stack, added)


@pytest.mark.long
@pytest.mark.stack
@pytest.mark.timeout(600)
def test_ray_gives_each_task_its_gpu_and_one_that_torch_cannot_use_is_told_before_work(node: Node) -> None:
    with ray_cluster():
        for share in (1, 0.5):
            gpu_map = RayMap(None, share)
            given = list(gpu_map(lambda _: os.environ.get("CUDA_VISIBLE_DEVICES", ""), range(6)))
            assert set(given) <= {"0", "1"}
            assert len(gpu_map.workers) < 6, "a process is used for several tasks"
    with pytest.raises(UserError, match=r"^evaluate\.gpus_per_task: node .*, GPU 0: torch .* without CUDA"):
        opened(used_gpus=True)
