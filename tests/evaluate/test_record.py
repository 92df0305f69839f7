"""Feature sums in done-records, which save a second pass over the samples."""

import json
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch

import ddpm_pipeline.features.shard_sums
from ddpm_pipeline.config.evaluation import EvaluateConfig, FeatureNetworkConfig
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.evaluate.document import require_comparable
from ddpm_pipeline.evaluate.measure import evaluate_generation
from ddpm_pipeline.features.exact_sums import Sums, sums_of
from ddpm_pipeline.features.networks import Features
from ddpm_pipeline.features.shard_sums import (
    FeatureRecord,
    FeatureSums,
    add_records,
    network_for_sums,
    parse_record,
)
from ddpm_pipeline.generate import sample_worker
from ddpm_pipeline.generate.done_records import RecordAggregate
from ddpm_pipeline.generate.driver import with_feature_network
from ddpm_pipeline.generate.finalize import ModelFacts, publish_manifest
from ddpm_pipeline.generate.plan import shard, shards
from ddpm_pipeline.generate.sample_worker import SampleWorker, SampleWorkerConfig
from ddpm_pipeline.generate.spec import write_spec
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.parallel import MapWorkers, in_process
from ddpm_pipeline.progress import no_progress
from ddpm_pipeline.store import open_store
from tests.generate.tiny import fill, plan_of, settings, tiny_card, tiny_model, writer_of


def test_the_records_alone_give_the_metrics_of_the_samples(digits: str, tmp_path: Path) -> None:
    config = settings(tiny_model(tmp_path / "model", tiny_card(size=8)), str(tmp_path / "out"), count=95)
    named = network_for_sums(FeatureNetworkConfig(), digits)
    assert named is not None
    writer = writer_of(config.model_copy(update={"features": named}))
    store, spec, records = writer.generation.store, writer.generation.spec, RecordAggregate()
    write_spec(store, spec)
    for unit in shards(spec):
        records.add(unit.number, writer.write(unit).record)
    publish_manifest(Generation(store, spec), records, ModelFacts(None))
    whole = evaluate_generation(EvaluateConfig(reference=digits), config.output, no_progress)
    quick = evaluate_generation(
        EvaluateConfig(reference=digits, records_only=True), config.output, no_progress
    )
    assert quick.terms == whole.terms
    assert quick["frechet"] == pytest.approx(whole["frechet"], rel=1e-5)
    assert quick["class_accuracy"] == whole["class_accuracy"]
    parts = [
        parse_record(Generation(store, spec).read_record(unit).features, "here") for unit in shards(spec)
    ]
    assert add_records(parts) == add_records([add_records(parts[:3]), add_records(parts[:2:-1])])
    key = shard(spec, 1).done_key  # made before the classifier was trained again
    document = json.loads(store.read(key))
    document["features"]["network"] = "0" * 64
    store.write(key, json.dumps(document).encode())
    with pytest.raises(UserError, match="of another network"):
        evaluate_generation(EvaluateConfig(reference=digits, records_only=True), config.output, no_progress)


def test_evaluations_of_a_gpu_and_a_cpu_are_not_compared(digits: str, tmp_path: Path) -> None:
    config = settings(tiny_model(tmp_path / "model", tiny_card(size=8)), str(tmp_path / "out"))
    fill(config)
    on_cpu = evaluate_generation(EvaluateConfig(reference=digits), config.output, no_progress)
    assert "gpu" not in on_cpu.terms.model_dump()
    on_gpu = on_cpu.model_copy(update={"terms": on_cpu.terms.model_copy(update={"gpu": "NVIDIA L4"})})
    with pytest.raises(
        UserError, match=r"gpu is None and NVIDIA L4; evaluate both on the same kind of device"
    ):
        require_comparable(on_cpu, on_gpu)
    other = on_cpu.model_copy(update={"terms": on_cpu.terms.model_copy(update={"gpu": "NVIDIA A10"})})
    with pytest.raises(UserError, match="gpu is NVIDIA L4 and NVIDIA A10"):
        require_comparable(on_gpu, other)
    require_comparable(on_gpu, on_gpu)


def test_where_gpus_measure_depends_on_what_made_the_generation(digits: str, tmp_path: Path) -> None:
    config = settings(tiny_model(tmp_path / "model", tiny_card(size=8)), str(tmp_path / "out"))
    fill(config)
    asked: list[bool] = []

    def open_workers(used_gpus: bool) -> AbstractContextManager[MapWorkers]:
        asked.append(used_gpus)
        return in_process(used_gpus)

    evaluate_generation(EvaluateConfig(reference=digits), config.output, no_progress, open_workers)
    assert asked == [False]


def test_sums_of_a_gpus_worker_do_not_depend_on_its_number_of_cores(
    digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tiny_model(tmp_path / "model", tiny_card(size=8)), str(tmp_path / "out"))
    spec, model = plan_of(config)
    on_gpu = spec.model_copy(update={"device": "cuda", "cpu_threads": None})
    for name in (
        "set_up_torch",
        "limit_memory",
        "build_model",
        "Engine",
        "ShardWriter",
        "_encoders",
        "_gpu_meter",
        "_gpu_share",
    ):
        monkeypatch.setattr(sample_worker, name, lambda *_, **__: None)
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    network = network_for_sums(FeatureNetworkConfig(), digits)
    worker = object.__new__(SampleWorker)
    for one in (on_gpu, spec.model_copy(update={"cpu_threads": 3})):
        worker.config = SampleWorkerConfig(one, model.card, config.output, config.guards, 1, network)
        worker._load(model.weights)
    assert threads == [1, 3]


def test_a_generation_without_sums_names_the_setting_that_adds_them(digits: str, tmp_path: Path) -> None:
    config = settings(tiny_model(tmp_path / "model", tiny_card(size=8)), str(tmp_path / "out"))
    spec = fill(config)
    assert Generation(open_store(config.output), spec).read_record(shard(spec, 0)).features is None
    with pytest.raises(UserError, match="has no feature sums"):
        evaluate_generation(EvaluateConfig(reference=digits, records_only=True), config.output, no_progress)


def test_damaged_sums_and_vectors_too_long_are_refused() -> None:
    class Long:
        identity = label = "long"

        def __call__(self, images: torch.Tensor) -> Features:
            return Features(torch.zeros(len(images), 300), None)

    with pytest.raises(UserError, match="too long"):
        FeatureSums(Long()).batch(np.zeros((2, 4, 4, 1), np.uint8), None)
    with pytest.raises(DamageError, match="not feature sums"):
        parse_record({"network": 3}, "here")
    with pytest.raises(ValueError, match="not be empty"):
        add_records([])


def test_records_are_added_up_one_at_a_time() -> None:
    alive: weakref.WeakSet[FeatureRecord] = weakref.WeakSet()
    most = 0

    def records() -> Iterator[FeatureRecord]:
        nonlocal most
        for number in range(20):
            vectors = np.full((1, 3), number, np.float32)
            made = FeatureRecord(network="n", sums=sums_of(vectors).to_text(), right=number)
            alive.add(made)
            most = max(most, len(alive))
            yield made
            del made

    total = add_records(records())
    assert (total.right, Sums.from_text(total.sums).count) == (190, 20)
    assert most <= 3
    with pytest.raises(ValueError, match="one feature network"):
        add_records([total, total.model_copy(update={"network": "other"})])


def test_only_sums_that_fit_in_a_record_are_requested(digits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ddpm_pipeline.features.shard_sums, "MAX_FEATURES", 63)
    assert network_for_sums(FeatureNetworkConfig(), digits) is None


def test_a_missing_network_is_refused_or_skipped_as_set(digits: str, tmp_path: Path) -> None:
    existing = FeatureNetworkConfig(uri=f"{digits}/features/classifier.json")
    config = settings(tiny_model(tmp_path / "model"), str(tmp_path / "out"), features=existing)
    lacking = config.model_copy(update={"features": FeatureNetworkConfig(uri=f"{tmp_path}/classifier.json")})
    assert with_feature_network(config, None) == config
    assert (
        with_feature_network(config.model_copy(update={"features_missing": "skip"}), None).features
        == existing
    )
    assert (
        with_feature_network(lacking.model_copy(update={"features_missing": "skip"}), None).features is None
    )
    with pytest.raises(UserError, match="ddpm features train"):
        with_feature_network(lacking, None)
