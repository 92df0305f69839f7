"""Generations on the real stack: S3, Ray and MLflow, undisturbed, extended, refused and by several at once."""

import io
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
from PIL import Image

import ddpm_pipeline.generate.driver
from ddpm_pipeline.config.generation import GenerateConfig, GuardConfig
from ddpm_pipeline.config.model_card import TrainingData
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.generate.driver import generate
from ddpm_pipeline.generate.generation_job import GenerationJob, GenerationResult
from ddpm_pipeline.generate.generation_status import generation_status
from ddpm_pipeline.generate.manifest import read_manifest
from ddpm_pipeline.generate.plan import shards
from ddpm_pipeline.generate.sample_worker import Outcome
from ddpm_pipeline.generate.stored_generation import Generation
from ddpm_pipeline.generate.verification import verify
from ddpm_pipeline.infra.local import LocalStack
from ddpm_pipeline.jobs.generate import summary
from ddpm_pipeline.jobs.ray_session import ray_cluster
from ddpm_pipeline.store import open_store
from ddpm_pipeline.tracking import find_run, register, set_alias, tracking_client
from ddpm_pipeline.tracking.run import open_run
from tests.commands import ddpm
from tests.effort import is_long
from tests.generate.tiny import contents, fill, plan_of, settings, tiny_card, tiny_model

pytestmark = [pytest.mark.stack, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", autouse=True)
def connection(stack: LocalStack) -> Iterator[None]:
    """One connection to Ray for the module: the commands share it."""
    with ray_cluster():
        yield


def run(config: GenerateConfig) -> GenerationResult:
    return generate(config, cluster=nullcontext)


def words(config: GenerateConfig, folder: Path) -> list[str]:
    """A command line that asks for `config`."""
    file = folder / "config.yaml"
    file.write_text(json.dumps({"generate": config.model_dump(mode="json")}))
    return [f"--config={file}"]


def test_the_command_fills_a_prefix_and_then_has_nothing_to_do(
    model: Path,
    prefix: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    config = settings(model, prefix, count=47)
    assert ddpm("generate", *words(config, tmp_path)) == 0
    assert "complete: 47 images in 5 shards" in capsys.readouterr().out
    assert verify(prefix).ok
    before = contents(open_store(prefix))
    assert ddpm("generate", *words(config, tmp_path)) == 0
    assert "already complete" in capsys.readouterr().out
    assert contents(open_store(prefix)) == before
    # Another request at the same prefix is refused before anything is written.
    assert ddpm("generate", *words(config, tmp_path), "seed=5") == 2
    assert "seed: 0 stored, 5 requested" in capsys.readouterr().err
    assert contents(open_store(prefix)) == before


@pytest.mark.long
def test_a_cluster_verifies_what_this_machine_verifies(
    model: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(settings(model, prefix, count=47))
    assert ddpm("verify", prefix, "--num-workers=2") == 0
    assert "47 of 47 samples in 5 shards" in capsys.readouterr().out
    open_store(prefix).write("shards/000002.tar", b"no tar")
    assert ddpm("verify", prefix, "--num-workers=2") == 1
    assert "shards/000002.tar" in capsys.readouterr().out


@pytest.mark.long
def test_one_and_three_workers_and_none_make_the_same_bytes(model: Path, prefix: str) -> None:
    fill(settings(model, f"{prefix}/none", count=47))
    expected = contents(open_store(f"{prefix}/none"))
    for workers in (1, 3) if is_long() else (3,):
        config = settings(model, f"{prefix}/{workers}", count=47, num_workers=workers)
        result = generate(config, cluster=nullcontext)
        assert (result.status, result.images_made, result.shards_made) == ("complete", 47, 5)
        assert contents(open_store(f"{prefix}/{workers}")) == expected


@pytest.mark.long
def test_a_raised_count_extends_to_the_bytes_of_one_that_was_large_at_once(model: Path, prefix: str) -> None:
    fill(settings(model, f"{prefix}/once", count=41))
    small, large = settings(model, f"{prefix}/grown", count=23), settings(model, f"{prefix}/grown", count=41)
    assert generate(small, cluster=nullcontext).images_made == 23
    grown = generate(large, cluster=nullcontext)
    assert (grown.status, grown.shards_made) == ("complete", 3)
    assert contents(open_store(f"{prefix}/grown")) == contents(open_store(f"{prefix}/once"))
    assert run(large).status == "already complete"


@pytest.mark.long
def test_a_lost_object_is_noticed_at_the_end_and_made_again(model: Path, prefix: str) -> None:
    config = settings(model, prefix, count=47)
    fill(config)
    store = open_store(prefix)
    sound = contents(store)
    for key in ("manifest.json", "shards/000002.tar"):
        store.delete(key)
    result = run(config)
    assert (result.status, result.shards_made) == ("complete", 1)
    assert contents(store) == sound


@pytest.mark.long
def test_a_second_job_joins_the_first_and_says_so(
    model: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(settings(model, f"{prefix}/alone"))
    config = settings(model, f"{prefix}/both", num_workers=1)
    store = open_store(config.output)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(generate, config, cluster=nullcontext)
        while next(iter(store.list("jobs/")), None) is None:
            assert not first.done(), first.result()
            time.sleep(0.01)
        second = generate(config, cluster=nullcontext)
        assert first.result().status == second.status == "complete"
    assert len(second.concurrent_jobs) == 1
    assert "shared   with the job of " in "\n".join(summary(second))
    assert contents(store) == contents(open_store(f"{prefix}/alone"))


@pytest.mark.long
def test_of_two_generations_that_find_a_prefix_empty_one_has_it(
    model: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have looked before either wrote; the one that comes second at the claim is refused by name."""
    monkeypatch.setattr(ddpm_pipeline.generate.driver, "check_prefix", lambda generation: None)
    configs = [settings(model, f"{prefix}/out", seed=seed, num_workers=1) for seed in (3, 4)]
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(generate, config, cluster=nullcontext) for config in configs]
        errors = [job.exception() for job in jobs]
    won = errors.index(None)
    assert jobs[won].result().status == "complete"
    assert isinstance(errors[1 - won], UserError)
    assert f"seed: {3 + won} stored, {4 - won} requested" in str(errors[1 - won])
    assert verify(f"{prefix}/out").ok


@pytest.mark.long
def test_a_pool_grows_while_shards_wait(model: Path, prefix: str) -> None:
    slow = {"sampler": {"kind": "ddim", "num_steps": 50}, "count": 1800, "num_workers": 1, "max_workers": 3}
    config = settings(model, prefix, **slow)
    assert run(config).status == "complete"
    spec, store = plan_of(config)[0], open_store(config.output)
    assert 2 <= len({Generation(store, spec).read_record(unit).times.worker for unit in shards(spec)}) <= 3


def test_a_failed_shard_is_tried_again_by_another_worker(
    model: Path, stack: LocalStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(model, f"file://{tmp_path}/out", num_workers=1)
    tried: list[Outcome] = []
    take = GenerationJob._take

    def watched(job: GenerationJob, outcome: Outcome) -> None:
        tried.append(outcome)
        if outcome.status == "failed":
            (tmp_path / "out/shards/000003.tar").rmdir()
        take(job, outcome)

    monkeypatch.setattr(GenerationJob, "_take", watched)
    hindered = threading.Thread(target=_hinder, args=(tmp_path / "out",))
    hindered.start()
    result = run(config)
    hindered.join()
    assert (result.status, result.failed) == ("complete", {})
    failed, done = [outcome for outcome in tried if outcome.shard == 3]
    assert (failed.status, done.status) == ("failed", "done")
    assert failed.worker != done.worker
    assert done.record is not None
    assert done.record.times.attempt == 2


@pytest.mark.long
def test_a_shard_that_keeps_failing_is_reported_while_the_rest_completes(
    model: Path, stack: LocalStack, tmp_path: Path
) -> None:
    config = settings(model, f"file://{tmp_path}/out", max_attempts=2)
    store = open_store(config.output)
    hindered = threading.Thread(target=_hinder, args=(tmp_path / "out",))
    hindered.start()
    result = run(config)
    hindered.join()
    assert result.status == "failed"
    assert list(result.failed) == ["shards/000003.tar"]
    assert "a folder stands in its place" in result.failed["shards/000003.tar"]
    assert read_manifest(store) is None
    status = generation_status(config.output)
    assert (status.state, status.images_done) == ("not complete", 40)
    assert list(status.failed) == ["000003"]
    (tmp_path / "out/shards/000003.tar").rmdir()
    assert run(config).status == "complete"
    assert verify(config.output).ok


def _hinder(out: Path) -> None:
    """Put a directory in the way of shard 3 as soon as the job has claimed the prefix."""
    while not (out / "spec.json").exists():
        time.sleep(0.01)
    (out / "shards/000003.tar").mkdir(parents=True)


@pytest.mark.long
def test_a_bad_model_is_stopped_before_it_fills_the_bucket(tmp_path: Path, prefix: str) -> None:
    data = TrainingData(channel_mean=(5.0,), channel_std=(10.0,))
    model = tiny_model(tmp_path / "model", tiny_card(data=data))
    result = run(
        settings(model, prefix, count=400, guards=GuardConfig(min_images=10, max_saturated_fraction=1))
    )
    assert result.status == "stopped by a guard"
    assert result.reason is not None
    assert "channel 0 has mean" in result.reason
    assert list(open_store(prefix).list("shards/")) == []


def test_a_worker_that_fits_no_node_is_refused(
    model: Path,
    prefix: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ddpm("generate", *words(settings(model, prefix, cpus_per_worker=64), tmp_path)) == 2
    assert "cpus_per_worker: a worker needs 64" in capsys.readouterr().err
    assert list(open_store(prefix).list()) == []


@pytest.mark.long
def test_a_generation_of_a_registered_model_is_tracked_and_linked(
    stack: LocalStack, model: Path, prefix: str
) -> None:
    training = open_run("generate-test", "training", key="t", params={}, tags={}, config_yaml="")
    version = register("tiny", model, training.run_id, {}, "a tiny network")
    set_alias("tiny", "champion", version.version)
    config = settings(
        Path("tiny@champion"),
        prefix,
        track={"experiment": "generate-test"},
        cost={"per_device_hour": 3600},
    )
    result = run(config)
    assert result.status == "complete"
    manifest = read_manifest(open_store(prefix))
    assert manifest is not None
    assert (manifest.spec.model.name, manifest.spec.model.version) == ("tiny", version.version)
    found = find_run("generate-test", f"generate/{result.spec_digest[:16]}/{prefix}")
    assert found is not None
    assert (found.status, found.url) == ("FINISHED", result.run_url)
    client = tracking_client()
    seen = client.get_run(found.run_id)
    assert seen.data.metrics["progress/images"] == 50
    seconds = 1000 * manifest.times.device_seconds / 50
    assert {name: value for name, value in seen.data.metrics.items() if name.startswith("cost/")} == {
        "cost/evaluations_per_image": 3,
        "cost/images_per_device_second": pytest.approx(1000 / seconds),
        "cost/device_seconds_per_1000_images": pytest.approx(seconds),
        "cost/money_per_1000_images": pytest.approx(seconds),
    }
    assert seen.data.tags["ddpm.training_run"] == training.run_id
    names = {item.path for item in client.list_artifacts(found.run_id)}
    assert {"contact-sheet.png", "report.html", "summary.json", "config"} <= names

    # A larger count goes on in the same run, which says RUNNING until it is complete again.
    states: list[str] = []

    def look(done: int, total: int, note: str = "") -> None:
        states.append(client.get_run(found.run_id).info.status)

    more = config.model_copy(update={"count": 60})
    extended = generate(more, look, cluster=nullcontext)
    assert (extended.status, extended.run_url) == ("complete", result.run_url)
    assert set(states) == {"RUNNING"}
    again = client.get_run(found.run_id)
    assert (again.info.status, again.data.metrics["progress/images"]) == ("FINISHED", 60)


def test_the_contact_sheet_and_the_report_lie_beside_the_manifest(model: Path, prefix: str) -> None:
    fill(settings(model, prefix, count=47))
    store = open_store(prefix)
    with Image.open(io.BytesIO(store.read("contact-sheet.png"))) as sheet:
        assert sheet.height > 3 * 64
    page = store.read("report.html").decode()
    assert page.count("data:image/png;base64,") == 1 + 3
    assert "nought" in page
    assert "<script" not in page
