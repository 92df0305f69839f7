"""Which nodes are asked for their GPUs, how long that waits, and what becomes of their answers. Ray is played here."""

import logging
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import NodeDiedError

from ddpm_pipeline.cluster import Workers, ask_nodes, check_every_gpu, gpus, nodes, require_fit_workers
from ddpm_pipeline.config.device_kind import DeviceKind
from ddpm_pipeline.devices.preflight import GpuNeeds, GpuReport
from ddpm_pipeline.errors import UserError


def kind(name: str) -> DeviceKind:
    return DeviceKind(name=name, capability="9.0", torch="2.13.0+cu130", cuda="13.0", cudnn="91900")


FIT = GpuReport(gpu="GPU 0", kind=kind("H100"))
UNFIT = GpuReport(gpu="GPU 0 (V100)", fault="compute capability 7.0", remedy="use other GPUs")
ONE_EACH = Workers(cpus=2, gpus=1, gpus_setting="gpus_per_worker")


def node(
    name: str, gpus: float = 1, cpus: float = 8, model: str = "H100", group: str = "a"
) -> dict[str, Any]:
    resources = {"CPU": cpus, "GPU": gpus, f"accelerator_type:{model}": 1.0}
    labels = {"ray.io/node-group": group, "ray.io/accelerator-type": model}
    return {
        "NodeID": name,
        "NodeManagerAddress": name,
        "Alive": True,
        "Resources": resources,
        "Labels": labels,
    }


class FakeRay:
    """A cluster whose nodes answer, stay busy or are lost, and time that passes while one waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *entries: dict[str, Any]) -> None:
        self._nodes = list(entries)
        self.answers: dict[str, list[GpuReport] | Exception | None] = {}
        """None: busy for ever."""
        self.asked: list[tuple[str, float, GpuNeeds]] = []
        self.cancelled: list[str] = []
        self.seconds = 0.0
        monkeypatch.setattr(gpus, "ray", self)
        monkeypatch.setattr(nodes, "ray", self)
        monkeypatch.setattr(gpus, "time", SimpleNamespace(monotonic=lambda: self.seconds))
        monkeypatch.setattr(gpus, "on_node", lambda name: SimpleNamespace(name=name))

    def nodes(self) -> list[dict[str, Any]]:
        return self._nodes

    def remote(self, work: Any) -> Any:
        def options(
            num_gpus: float, scheduling_strategy: Any = None, label_selector: Any = None, **_: Any
        ) -> Any:
            name = getattr(scheduling_strategy, "name", "anywhere")
            name += "".join(f" {label}={value}" for label, value in (label_selector or {}).items())

            def start(needs: GpuNeeds) -> str:
                self.asked.append((name, num_gpus, needs))
                return name

            return SimpleNamespace(remote=start)

        return SimpleNamespace(options=options)

    def wait(self, references: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        done = [name for name in references if self.answers.get(name, [FIT]) is not None][:num_returns]
        if len(done) < num_returns:
            self.seconds += timeout
        return done, [name for name in references if name not in done]

    def get(self, reference: str) -> tuple[str, str, list[GpuReport]]:
        found = self.answers.get(reference, [FIT])
        if isinstance(found, Exception):
            raise found
        return reference, f"address-of-{reference}", found or []

    def cancel(self, reference: str) -> None:
        self.cancelled.append(reference)


def names(ray: FakeRay) -> list[str]:
    return [name for name, _, _ in ray.asked]


def test_one_node_of_each_kind_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(
        monkeypatch,
        node("a"),
        node("b"),
        node("other-model", model="L4"),
        node("other-group", group="b"),
        node("no-gpu", gpus=0),
        node("few-cpus", cpus=1, group="c"),
        {**node("gone", group="d"), "Alive": False},
    )
    ray.answers["other-model"] = [GpuReport(gpu="GPU 0", kind=kind("A L4"))]
    workers = Workers(cpus=2, gpus=0.5, gpus_setting="gpus_per_worker", nccl=True, compile=True)
    found = require_fit_workers(workers, threading.Event())
    assert names(ray) == ["a", "other-model", "other-group"]
    assert ray.asked[0] == ("a", 0.5, GpuNeeds(nccl=True, compiler=True))
    assert [one.name for one in found] == ["A L4", "H100"]


def test_work_on_the_cpu_asks_for_a_compiler_only_if_it_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(monkeypatch, node("a", gpus=0))
    assert require_fit_workers(Workers(2, 0, "gpus_per_worker"), threading.Event()) == []
    assert ray.asked == []
    ray.answers["a"] = [GpuReport(gpu="CPU", fault="there is no C++ compiler", remedy="install g++")]
    with pytest.raises(UserError, match="compile: node address-of-a, CPU: there is no C"):
        require_fit_workers(Workers(2, 0, "gpus_per_worker", compile=True), threading.Event())


def test_one_unfit_kind_ends_the_job_without_waiting_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(monkeypatch, node("busy", group="b"), node("old", model="V100"))
    ray.answers = {"busy": None, "old": [UNFIT]}
    with pytest.raises(UserError) as refusal:
        require_fit_workers(ONE_EACH, threading.Event())
    assert str(refusal.value) == (
        "gpus_per_worker: node address-of-old, GPU 0 (V100): compute capability 7.0; use other GPUs"
    )
    assert ray.cancelled == ["busy"]


def test_a_cluster_without_such_a_node_is_waited_for_as_the_work_would(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DDPM_CLUSTER_GROWS", "1")
    ray = FakeRay(monkeypatch, node("head", gpus=0))
    ray.answers["anywhere"] = None
    with caplog.at_level(logging.WARNING):
        assert require_fit_workers(ONE_EACH, threading.Event(), patience_seconds=900) == []
    assert ray.seconds > 900
    assert "waiting for a node, to check it before work is placed there" in caplog.text
    assert "no free GPU to check" in caplog.text
    ray.answers["anywhere"] = [FIT]
    assert require_fit_workers(ONE_EACH, threading.Event()) == [FIT.kind]


def test_only_nodes_with_the_labels_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Workers(2, 1, "gpus_per_worker", labels={"ray.io/node-group": "b"})
    ray = FakeRay(monkeypatch, node("a", model="V100"), node("b", group="b"))
    ray.answers["a"] = [UNFIT]
    assert require_fit_workers(here, threading.Event()) == [FIT.kind]
    assert names(ray) == ["b"]
    ray = FakeRay(monkeypatch, node("a"))
    assert require_fit_workers(here, threading.Event()) == [FIT.kind]
    assert names(ray) == ["anywhere ray.io/node-group=b"]


def test_a_request_to_stop_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(monkeypatch, node("a"))
    ray.answers["a"] = None
    stop = threading.Event()
    stop.set()
    assert require_fit_workers(ONE_EACH, stop) == []
    assert ray.cancelled == ["a"]


def test_a_kind_of_node_that_stays_busy_does_not_keep_the_others_from_working(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ray = FakeRay(monkeypatch, node("a"), node("busy", group="b"))
    ray.answers["busy"] = None
    with caplog.at_level(logging.WARNING):
        assert require_fit_workers(ONE_EACH, threading.Event()) == [FIT.kind]
    assert "no free GPU to check on busy" in caplog.text


def test_a_node_that_is_lost_meanwhile_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ray = FakeRay(monkeypatch, node("a"), node("lost", group="b"))
    ray.answers["lost"] = NodeDiedError("lost")
    assert require_fit_workers(ONE_EACH, threading.Event()) == [FIT.kind]
    assert "lost was lost while it was checked (NodeDiedError)" in caplog.text


def test_the_doctor_asks_every_gpu_of_every_node(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(monkeypatch, node("a", gpus=2), node("b", gpus=4), node("head", gpus=0))
    ray.answers = {"a": [FIT, UNFIT], "b": None}
    reports, busy = check_every_gpu(wait_seconds=5)
    assert [(found.node_id, found.report) for found in reports] == [("a", FIT), ("a", UNFIT)]
    assert busy == ray.cancelled == ["b"]
    assert ray.asked == [("a", 2, GpuNeeds(every=True)), ("b", 4, GpuNeeds(every=True))]


def test_every_node_can_be_asked_and_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(monkeypatch, node("a", gpus=4), node("b"), node("old", model="V100"))
    ray.answers = {"old": [UNFIT]}
    found = ask_nodes(ONE_EACH, threading.Event(), every_node=True)
    assert [(one.node_id, one.gpus, one.type_label, one.report.fault is None) for one in found] == [
        ("a", 4, "H100", True),
        ("b", 1, "H100", True),
        ("old", 1, "V100", False),
    ]


@pytest.mark.parametrize(("grows", "waited"), [("", 3600), ("1", 60)])
def test_only_a_fit_answer_ends_the_wait_for_busy_nodes(
    monkeypatch: pytest.MonkeyPatch, grows: str, waited: float
) -> None:
    monkeypatch.setenv("DDPM_CLUSTER_GROWS", grows)
    ray = FakeRay(monkeypatch, node("old", model="V100"), node("other", model="L4"), node("busy"))
    ray.answers = {"old": [UNFIT], "other": [GpuReport(gpu="GPU 0", kind=kind("L4"))], "busy": None}
    found = ask_nodes(ONE_EACH, threading.Event(), 3600, every_node=True, kind=FIT.kind)
    assert [one.node_id for one in found] == ["old", "other"]
    assert waited < ray.seconds < waited + 60
    assert ray.cancelled == ["busy"]
    found = ask_nodes(ONE_EACH, threading.Event(), 3600, every_node=True)
    assert [one.is_fit(None) for one in found] == [False, True]
    assert ray.seconds < waited + 200  # a fit GPU of any kind will do for a new generation


@pytest.mark.parametrize("every_node", [False, True])
def test_where_all_nodes_are_busy_a_cluster_that_grows_is_asked_for_another(
    monkeypatch: pytest.MonkeyPatch, every_node: bool
) -> None:
    ray = FakeRay(monkeypatch, node("a"), node("b", group="b"))
    ray.answers = {"a": None, "b": None}
    assert ask_nodes(ONE_EACH, threading.Event(), 900, every_node=every_node) == []
    assert names(ray) == ["a", "b"]
    monkeypatch.setenv("DDPM_CLUSTER_GROWS", "1")
    ray.asked.clear()
    (found,) = ask_nodes(ONE_EACH, threading.Event(), every_node=every_node)
    assert found.node_id == "anywhere"
    assert names(ray) == ["a", "b", "anywhere"]


def test_a_node_that_is_lost_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(monkeypatch, node("lost"), node("busy", group="b"))
    ray.answers = {"lost": NodeDiedError("lost"), "busy": None}
    assert ask_nodes(ONE_EACH, threading.Event(), patience_seconds=900) == []
    assert ray.seconds > 900


def test_a_gpu_is_fit_for_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeRay(monkeypatch, node("a"))
    (found,) = ask_nodes(ONE_EACH, threading.Event(), every_node=True)
    assert [found.is_fit(wanted) for wanted in (None, FIT.kind, kind("L4"))] == [True, True, False]


def test_a_node_that_was_added_meanwhile_is_described_too(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(monkeypatch, {**node("anywhere", gpus=8), "Alive": False})
    monkeypatch.setattr(ray, "remote", joins(ray))
    (found,) = ask_nodes(ONE_EACH, threading.Event())
    assert (found.gpus, found.type_label) == (8, "H100")


def joins(ray: FakeRay) -> Any:
    """Work whose wait makes the cluster add its node."""
    remote = ray.remote

    def start(work: Any) -> Any:
        ray.nodes()[0]["Alive"] = True
        return remote(work)

    return start
