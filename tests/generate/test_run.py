"""The driver's side of a generation whose shards are all made: what it publishes, and for whom it steps back."""

import threading
import time
from pathlib import Path

import pytest

from ddpm_pipeline.config.generation import GenerateConfig
from ddpm_pipeline.generate.coordinator import ShardProgress
from ddpm_pipeline.generate.generation_job import GenerationJob, GenerationResult
from ddpm_pipeline.generate.job_reporter import JobReporter, stall_reason
from ddpm_pipeline.generate.layout import MANIFEST_KEY
from ddpm_pipeline.generate.manifest import read_manifest
from ddpm_pipeline.generate.spec import Spec, read_spec, write_spec
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.jobs.generate import summary
from ddpm_pipeline.progress import no_progress
from ddpm_pipeline.store import Store, open_store
from tests.generate.tiny import fill, plan_of, settings, tiny_model


@pytest.fixture
def config(tmp_path: Path) -> GenerateConfig:
    """A generation of 40 samples, complete but for its manifest."""
    found = settings(tiny_model(tmp_path / "model"), f"file://{tmp_path}/out", count=40)
    fill(found)
    open_store(found.output).delete(MANIFEST_KEY)
    return found


def end(config: GenerateConfig) -> GenerationResult:
    spec, model = plan_of(config)
    generation, began = Generation(open_store(config.output), spec), time.monotonic()
    reporter = JobReporter(config, generation, no_progress, began)
    return GenerationJob(config, generation, model, reporter, threading.Event(), began).run()


def write_other_count(store: Store, spec: Spec, count: int) -> None:
    """What another job does that requests another count."""
    write_spec(store, spec.model_copy(update={"count": count}))


def test_a_job_whose_count_was_raised_by_another_is_superseded(config: GenerateConfig) -> None:
    store, (spec, _) = open_store(config.output), plan_of(config)
    write_other_count(store, spec, 70)
    result = end(config)
    assert (result.status, result.reason) == (
        "superseded",
        "another job raised the count to 70",
    )
    assert summary(result)[0] == f"superseded: another job raised the count to 70 at {config.output}"
    assert list(store.list("jobs/")) == []
    assert read_manifest(store) is None
    assert read_spec(store) == spec.model_copy(update={"count": 70})


def test_a_spec_of_a_smaller_count_is_replaced_by_the_larger_one(config: GenerateConfig) -> None:
    store, (spec, _) = open_store(config.output), plan_of(config)
    write_other_count(store, spec, 20)
    assert end(config).status == "complete"
    manifest = read_manifest(store)
    assert manifest is not None
    assert manifest.count == 40
    assert read_spec(store) == spec
    assert list(store.list("jobs/")) == []


def test_a_stalled_job_says_what_it_may_be_waiting_for(config: GenerateConfig) -> None:
    generation = Generation(open_store(config.output), plan_of(config)[0])
    now = time.time()
    in_progress = [ShardProgress(3, "host:12", now - 70, 5), ShardProgress(1, "host:11", now - 200, 0)]
    assert stall_reason(generation, 61.0, in_progress) == (
        "no progress for 61 s: worker host:11 has been on shard 000001 for 200 s "
        "(sampling, or waiting for the object store)"
    )
    assert "no shard is in progress" in stall_reason(generation, 61.0, [])
