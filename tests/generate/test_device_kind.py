"""Bits are promised for a kind of device: the spec names it, and another kind refuses."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

import pipeline.generate.device_check as device_check
import pipeline.generate.engine as engine_module
from pipeline.config.device_kind import DeviceKind
from pipeline.config.generation import GenerateConfig, SampleConfig
from pipeline.errors import UserError
from pipeline.generate.device_check import UnfitDevice, require_kind
from pipeline.generate.engine import set_up_torch
from pipeline.generate.model_source import find_model
from pipeline.generate.spec import Spec, differences, make_spec, pretty, read_spec, write_spec
from pipeline.store import open_store
from tests.generate.tiny import plan_of, settings, tiny_model

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
    "error", [AssertionError("Torch not compiled with CUDA enabled"), RuntimeError("old\ndriver")]
)
def test_a_gpu_that_torch_cannot_use_is_one_line(
    error: Exception, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unusable(device: torch.device) -> None:
        raise error

    monkeypatch.setattr(device_check, "read_device_kind", unusable)
    with pytest.raises(UnfitDevice, match=r"the GPU cannot be used \((Torch|old driver).*gpus_per_worker=0"):
        require_kind(gpu_spec(model))


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
