"""Bits are promised for a kind of device: the spec names it, and another kind refuses."""

# pyright: reportUnknownLambdaType=false, reportPrivateUsage=false

import dataclasses
import json
import logging
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from ray._private.label_utils import validate_label_selector

import ddpm_pipeline.generate.device_check as device_check
import ddpm_pipeline.generate.engine as engine_module
import ddpm_pipeline.generate.pool_kinds as pool_kinds
import ddpm_pipeline.generate.sample_worker as sample_worker
from ddpm_pipeline.cluster import NodeReport
from ddpm_pipeline.config.device_kind import DeviceKind
from ddpm_pipeline.config.generation import GenerateConfig, SampleConfig
from ddpm_pipeline.devices.preflight import GpuReport
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.generate.coordinator import ShardAssignment
from ddpm_pipeline.generate.device_check import UnfitDevice, require_kind
from ddpm_pipeline.generate.driver import generate
from ddpm_pipeline.generate.engine import set_up_torch
from ddpm_pipeline.generate.model_source import find_model
from ddpm_pipeline.generate.pool_kinds import most_common_kind, require_some, selector_of
from ddpm_pipeline.generate.regenerate_on_gpu import compare_on_gpu
from ddpm_pipeline.generate.sample_worker import Outcome, SampleWorker, SampleWorkerConfig
from ddpm_pipeline.generate.spec import Spec, differences, make_spec, pretty, read_spec, write_spec
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.store import open_store
from tests.generate.tiny import plan_of, settings, tiny_model, writer_of

H100 = DeviceKind(
    name="NVIDIA H100 80GB HBM3", capability="9.0", torch="2.13.0+cu130", cuda="13.0", cudnn="91900"
)
A100 = H100.model_copy(update={"name": "NVIDIA A100-SXM4-40GB", "capability": "8.0"})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model")


def gpu_spec(model: Path, kind: DeviceKind | None = H100, **more: object) -> Spec:
    config = settings(model, "file:///unused", gpus_per_worker=1, **more)
    return make_spec(config, find_model(str(model)).card, device="cuda", device_kind=kind)


def test_two_kinds_of_gpu_are_two_generations_and_the_kind_is_named(model: Path) -> None:
    ours, theirs = gpu_spec(model), gpu_spec(model, A100)
    assert ours.digest != theirs.digest
    assert differences(ours, theirs) == [
        'device_kind.capability: "9.0" stored, "8.0" requested',
        'device_kind.name: "NVIDIA H100 80GB HBM3" stored, "NVIDIA A100-SXM4-40GB" requested',
    ]
    newer = gpu_spec(model, H100.model_copy(update={"cudnn": "92000"}))
    assert newer.digest != ours.digest


def test_the_precision_of_products_is_part_of_the_identity(model: Path) -> None:
    assert gpu_spec(model).digest != gpu_spec(model, matmul="tf32").digest


def test_a_gpu_spec_says_in_its_document_how_it_was_computed(model: Path, tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/out")
    spec = gpu_spec(model, matmul="tf32")
    write_spec(store, spec)
    document = json.loads(store.read("spec.json"))
    assert (document["matmul"], document["device_kind"]["name"]) == ("tf32", H100.name)
    assert read_spec(store) == spec


def test_a_spec_of_the_cpu_has_the_document_and_digest_that_it_had_before_kinds(model: Path) -> None:
    stored = Path(__file__).parent.parent / "compatibility/v0.1.0/samples/spec.json"
    spec = read_spec(open_store(f"file://{stored.parent}"))
    assert spec is not None
    manifest = json.loads((stored.parent / "manifest.json").read_bytes())
    assert spec.digest == manifest["spec_digest"]
    document = pretty(spec.model_dump(mode="json"))
    assert b"matmul" not in document
    assert b"device_kind" not in document
    assert set(json.loads(document)) == set(json.loads(stored.read_bytes()))


def test_settings_without_effect_are_refused(model: Path) -> None:
    with pytest.raises(ValidationError, match="matmul has no effect on a CPU"):
        settings(model, "file:///unused", matmul="tf32")
    with pytest.raises(ValidationError, match="matmul has no effect with dtype bfloat16"):
        settings(model, "file:///unused", matmul="tf32", gpus_per_worker=1, dtype="bfloat16")
    with pytest.raises(ValidationError, match="matmul has no effect with dtype float16"):
        SampleConfig(model="m", matmul="tf32", dtype="float16")
    spec, found = plan_of(settings(model, "file:///unused"))
    tf32 = GenerateConfig(model=str(model), output="file:///x", count=1, gpus_per_worker=1, matmul="tf32")
    with pytest.raises(UserError, match="matmul: has no effect on a CPU; leave it out, or use a GPU"):
        make_spec(tf32, found.card)
    with pytest.raises(ValidationError, match="device_kind has no effect on a CPU"):
        Spec.model_validate(spec.model_dump() | {"device_kind": H100})


def test_a_worker_of_another_kind_refuses_in_one_line_that_names_both(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_check, "read_device_kind", lambda device: A100)
    with pytest.raises(UnfitDevice) as refusal:
        require_kind(gpu_spec(model))
    line = str(refusal.value)
    assert str(H100) in line
    assert str(A100) in line
    assert line.endswith("use GPUs and software of that kind, or another output prefix")
    require_kind(gpu_spec(model, A100))
    require_kind(gpu_spec(model, None))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            AssertionError("Torch not compiled with CUDA enabled"),
            "the GPU cannot be used (Torch not compiled with CUDA enabled); install the CUDA build of torch",
        ),
        (
            RuntimeError("No CUDA GPUs are available\nFor debugging, read on"),
            "the GPU cannot be used (No CUDA GPUs are available); compare nvidia-smi's list with CUDA_VISIBLE_DEVICES",
        ),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_one_line(
    error: Exception, line: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unusable(device: torch.device) -> None:
        raise error

    monkeypatch.setattr(device_check, "read_device_kind", unusable)
    with pytest.raises(UnfitDevice) as refusal:
        require_kind(gpu_spec(model))
    assert str(refusal.value).startswith(line)
    assert "\n" not in str(refusal.value)


def test_a_process_computes_as_the_spec_says_before_its_kind_is_looked_at(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    monkeypatch.setattr(
        engine_module,
        "set_up_arithmetic",
        lambda matmul, *, deterministic: calls.append((matmul, deterministic)),
    )
    monkeypatch.setattr(engine_module, "require_kind", lambda spec: calls.append(spec.device_kind))
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor, "deterministic", False)
    set_up_torch(gpu_spec(model, matmul="tf32"))
    assert calls == [("tf32", True), H100]
    assert not inductor.deterministic
    set_up_torch(gpu_spec(model, compile=True))
    assert inductor.deterministic


UNFIT = "gpus_per_worker: node address-of-c, GPU 0: old driver; install a newer one"


def node(name: str, kind: DeviceKind | None, count: float = 1, label: str | None = None) -> NodeReport:
    """What a node answered; without a kind, that torch cannot use its GPU."""
    report = GpuReport(gpu="GPU 0", kind=kind)
    if kind is None:
        report = GpuReport(gpu="GPU 0", fault="old driver", remedy="install a newer one")
    return NodeReport(f"address-of-{name}", name, report, count, label)


def answer(monkeypatch: pytest.MonkeyPatch, *nodes: NodeReport) -> None:
    """The nodes of the cluster, from now on."""
    monkeypatch.setattr(pool_kinds, "ask_nodes", lambda workers, stop, **_: list(nodes))


def test_a_generation_begins_on_the_kind_of_most_gpus() -> None:
    def most(*pool: NodeReport) -> DeviceKind:
        return most_common_kind(pool, "gpus_per_worker")

    assert most(node("a", A100), node("b", H100), node("c", A100)) == A100
    assert most(node("a", A100, 2), node("b", H100, 8), node("c", None, 16)) == H100
    assert most(node("b", H100), node("a", A100)) == A100  # equally many: the first by name
    with pytest.raises(UserError, match=f"^{re.escape(UNFIT)}$"):
        most(node("c", None))
    with pytest.raises(UserError, match="gpus_per_worker: the nodes that were asked for a GPU are gone"):
        most()


def test_a_pool_without_the_generations_kind_is_refused_before_work() -> None:
    require_some(H100, [node("a", A100), node("b", H100), node("c", None)], "gpus_per_worker")
    require_some(None, [node("a", A100), node("c", None)], "gpus_per_worker")
    with pytest.raises(UserError) as refusal:
        require_some(H100, [node("a", A100), node("c", None)], "gpus_per_worker")
    assert str(H100) in str(refusal.value)
    assert str(A100) in str(refusal.value)
    for kind in (H100, None):
        with pytest.raises(UserError, match=f"^{re.escape(UNFIT)}$"):
            require_some(kind, [node("c", None)], "gpus_per_worker")


def test_workers_are_placed_on_nodes_of_the_kind_and_on_nodes_not_asked_yet() -> None:
    pool = [node("a", H100, label="H100"), node("b", A100, label="A100"), node("c", None)]
    assert selector_of(H100, pool) == {"ray.io/node-id": "!in(b, c)", "ray.io/accelerator-type": "in(H100)"}
    assert selector_of(H100, [node("a", H100)]) == {}
    assert selector_of(H100, [node("a", H100), node("d", H100)], {"d": "another kind"}) == {
        "ray.io/node-id": "!in(d)"
    }
    assert selector_of(None, pool) == {"ray.io/node-id": "!in(c)"}
    assert selector_of(None, []) == {}
    assert validate_label_selector(selector_of(H100, pool)) is None


class UnfitWorkers:
    """Replaces the workers of a job: the first round's are partly on a node of another kind."""

    def __init__(self) -> None:
        self.selectors: list[dict[str, str]] = []
        self.rounds: list[list[int]] = []


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> UnfitWorkers:
    """A pool of an H100 and of a node that says so too, but whose workers find an A100."""
    import ddpm_pipeline.generate.driver as driver
    import ddpm_pipeline.generate.generation_job as generation_job

    found = UnfitWorkers()

    def start(config: SampleWorkerConfig, weights: bytes, selector: dict[str, str]) -> Any:
        return FakePool(config, selector)

    @dataclasses.dataclass(frozen=True)
    class FakePool:
        config: SampleWorkerConfig
        selector: dict[str, str]

        def in_progress(self) -> list[Any]:
            return []

        def leave(self, shards: frozenset[int]) -> None:
            assert not shards

        def drain(self, seconds: float) -> None:
            """Nothing is in progress."""

    class Stream:
        def __init__(
            self, config: GenerateConfig, pool: FakePool, numbers: list[int], remaining: object
        ) -> None:
            found.selectors.append(pool.selector)
            found.rounds.append(numbers)
            self._outcomes: list[Outcome] | None = []
            cpu = settings(Path(config.model), config.output, count=config.count)
            writer = writer_of(cpu)
            writer.engine.spec = pool.config.spec.model_copy(update={"device": "cpu"})
            writer.generation = Generation(writer.generation.store, pool.config.spec)
            writer._digest = pool.config.spec.digest
            for number in numbers:
                if number % 2 and "other" not in pool.selector.get("ray.io/node-id", ""):
                    self._outcomes.append(
                        Outcome(
                            shard=number, status="unfit", error="another kind", worker="w:1", node="other"
                        )
                    )
                    continue
                stored = writer.write(writer.generation.shard(number))
                self._outcomes.append(Outcome.done(number, stored, "w:0"))

        def poll(self, seconds: float) -> list[Outcome] | None:
            outcomes, self._outcomes = self._outcomes, None
            return outcomes

        def close(self) -> None:
            """Nothing is open."""

    monkeypatch.setattr(driver, "require_pool_resources", lambda config: None)
    answer(monkeypatch, node("one", H100), node("other", H100))
    monkeypatch.setattr(generation_job, "start_pool", start)
    monkeypatch.setattr(generation_job, "OutcomeStream", Stream)
    return found


def test_shards_that_an_unfit_worker_gives_back_are_made_elsewhere_and_count_as_no_attempt(
    two_nodes: UnfitWorkers, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    labels = {"region": "eu"}
    config = settings(model, f"file://{tmp_path}/out", gpus_per_worker=1, max_attempts=1, node_labels=labels)
    result = generate(config)
    assert (result.status, result.failed) == ("complete", {})
    assert two_nodes.selectors == [labels, {**labels, "ray.io/node-id": "!in(other)"}]
    assert two_nodes.rounds == [[0, 1, 2, 3, 4], [1, 3]]
    spec = read_spec(open_store(config.output))
    assert spec is not None
    assert spec.device_kind == H100
    assert generate(config).status == "already complete"


def test_a_job_that_finds_a_generation_of_another_kind_uses_that_kind_or_refuses(
    two_nodes: UnfitWorkers, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    config = settings(model, f"file://{tmp_path}/out", gpus_per_worker=1, count=20)
    assert generate(config).status == "complete"
    larger = config.model_copy(update={"count": 30})
    stored = read_spec(open_store(config.output))
    answer(monkeypatch, node("x", A100, 8), node("c", None))
    with pytest.raises(UserError, match=f"the generation is of {re.escape(str(H100))}, and this is .*A100"):
        generate(larger)
    answer(monkeypatch, node("c", None))
    with pytest.raises(UserError, match=f"^{re.escape(UNFIT)}$"):
        generate(larger)
    assert read_spec(open_store(config.output)) == stored  # a refused job raises no count
    answer(monkeypatch, node("x", A100, 8), node("one", H100))
    two_nodes.selectors.clear()
    assert generate(larger).status == "complete"
    assert "x" in two_nodes.selectors[0]["ray.io/node-id"]


def test_a_job_without_any_fit_node_ends_with_the_line_that_names_both_kinds(
    two_nodes: UnfitWorkers, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    answer(monkeypatch, node("other", H100))
    result = generate(settings(model, f"file://{tmp_path}/out", gpus_per_worker=1))
    assert (result.status, result.reason) == ("failed", "another kind (on w:1)")
    assert len(two_nodes.rounds) == 1


def test_an_unfit_node_is_left_out_of_a_pool_that_has_fit_ones(
    two_nodes: UnfitWorkers,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "out").mkdir()
    answer(monkeypatch, node("c", None, 8), node("one", H100, 2), node("other", A100, label="A100"))
    config = settings(model, f"file://{tmp_path}/out", gpus_per_worker=1)
    with caplog.at_level(logging.WARNING):
        assert generate(config).status == "complete"
    assert two_nodes.selectors == [{"ray.io/node-id": "!in(c, other)"}]
    assert f"{UNFIT}; no work is placed there" in caplog.text
    assert "node address-of-other: its GPU is NVIDIA A100" in caplog.text


def test_a_pool_without_a_fit_node_begins_no_generation(
    two_nodes: UnfitWorkers, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    answer(monkeypatch, node("c", None, 8))
    config = settings(model, f"file://{tmp_path}/out", gpus_per_worker=1)
    with pytest.raises(UserError, match=f"^{re.escape(UNFIT)}$"):
        generate(config)
    assert list((tmp_path / "out").iterdir()) == []
    assert two_nodes.rounds == []


def test_where_the_cluster_grows_a_generation_waits_for_a_node_of_its_kind(
    two_nodes: UnfitWorkers, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    config = settings(model, f"file://{tmp_path}/out", gpus_per_worker=1, count=20)
    assert generate(config).status == "complete"
    monkeypatch.setenv("DDPM_CLUSTER_GROWS", "1")
    answer(
        monkeypatch, node("c", None), node("x", A100), node("other", H100.model_copy(update={"cuda": "12"}))
    )
    two_nodes.selectors.clear()
    assert generate(config.model_copy(update={"count": 30})).status == "complete"
    assert two_nodes.selectors == [{"ray.io/node-id": "!in(c, other, x)"}]


def test_every_node_is_asked_once_about_the_stored_kind(
    two_nodes: UnfitWorkers, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    asked: list[Any] = []

    def ask(workers: Any, stop: threading.Event, **how: Any) -> list[NodeReport]:
        asked.append((workers, how))
        return [node("one", H100), node("other", A100)]

    monkeypatch.setattr(pool_kinds, "ask_nodes", ask)
    monkeypatch.setattr(pool_kinds, "require_fit_workers", lambda *_: pytest.fail("asked twice"))
    config = settings(model, f"file://{tmp_path}/out", gpus_per_worker=0.5, compile=True, count=20)
    generate(config)
    generate(config.model_copy(update={"count": 30}))
    kind = read_spec(open_store(config.output))
    assert kind is not None
    assert [how for _, how in asked] == [
        {"every_node": True, "kind": None},
        {"every_node": True, "kind": kind.device_kind},
    ]
    assert {(workers.gpus, workers.compile) for workers, _ in asked} == {(0.5, True)}


def test_samples_are_made_again_only_where_a_gpu_is_fit_and_of_their_kind(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation: Any = SimpleNamespace(spec=gpu_spec(model))
    card = find_model(str(model)).card
    answer(monkeypatch, node("a", A100), node("c", None))
    with pytest.raises(UnfitDevice, match=f"the generation is of {re.escape(str(H100))}"):
        next(compare_on_gpu(generation, card, b"", []))
    answer(monkeypatch, node("c", None))
    with pytest.raises(UnfitDevice, match="--regenerate: node address-of-c, GPU 0: old driver"):
        next(compare_on_gpu(generation, card, b"", []))


def worker_with(writer: Any, unfit: str | None = None) -> SampleWorker:
    worker: Any = object.__new__(SampleWorker)
    worker.name, worker._failures, worker._unfit, worker._load_error = "host:1", 0, unfit, None
    worker._writer, worker.coordinator, worker._metrics = writer, None, None
    return worker


def test_an_unfit_worker_gives_every_shard_back_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_worker.time, "sleep", lambda seconds: pytest.fail("slept"))
    monkeypatch.setattr(
        sample_worker.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "other")
    )
    outcome = worker_with(None, unfit="another kind")._attempt(3)
    assert (outcome.status, outcome.shard, outcome.error, outcome.node) == (
        "unfit",
        3,
        "another kind",
        "other",
    )


def test_a_lost_cuda_context_ends_the_process_and_fails_no_shard(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended(BaseException):
        pass

    def end(code: int) -> None:
        raise Ended

    def write(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    class Report:
        def __init__(self, *_: object) -> None:
            self.images = self.should_stop = None

        def begin(self, worker: str) -> ShardAssignment:
            return ShardAssignment(1)

        def end(self) -> None:
            """Nobody listens."""

    spec, _ = plan_of(settings(model, "file:///unused"))
    monkeypatch.setattr(sample_worker.os, "_exit", end)
    monkeypatch.setattr(sample_worker.logging, "shutdown", lambda: None)
    monkeypatch.setattr(sample_worker, "_ProgressReport", Report)
    worker: Any = worker_with(SimpleNamespace(write=write))
    worker.config = SimpleNamespace(spec=spec, max_attempts=3)
    with pytest.raises(Ended):
        worker._try_shard(0)
