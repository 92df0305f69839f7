"""A night on the real stack, killed in the middle and started again."""

import datetime as dt
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import ddpm_pipeline.jobs.evaluate
import ddpm_pipeline.jobs.nightly
from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.config.evaluation import FeaturesConfig
from ddpm_pipeline.data.packing.pack_dataset import pack
from ddpm_pipeline.evaluate.document import load_evaluation
from ddpm_pipeline.features.feature_set import FeatureSet
from ddpm_pipeline.features.train_classifier import train_features
from ddpm_pipeline.generate.verification import verify
from ddpm_pipeline.infra.local import LocalStack
from ddpm_pipeline.jobs.ray_session import ray_cluster
from ddpm_pipeline.jobs.runner import PROGRAM, JobArguments
from ddpm_pipeline.nightly.history import read_latest, read_nights, write_latest
from ddpm_pipeline.store import open_store
from ddpm_pipeline.tracking import find_latest_run, open_run, register, tracking_client
from tests.evaluate.test_history import night
from tests.generate.tiny import settings, tiny_card, tiny_model

pytestmark = [pytest.mark.stack, pytest.mark.long, pytest.mark.timeout(300)]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def connection(stack: LocalStack) -> Iterator[None]:
    """One connection to Ray for the commands of this process."""
    with ray_cluster():
        yield


@pytest.fixture
def preset(connection: None, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    data = f"{prefix}/data"
    pack(PackConfig(source="digits", dest=data, channels=1, shard_size=900), lambda done, total: None)
    train_features(FeaturesConfig(data=data, steps=20, channels=8, min_accuracy=0), lambda *_: None)
    training = open_run("nights-test", "training", key="t", params={}, tags={}, config_yaml="")
    folder = tiny_model(tmp_path / "model", tiny_card(size=8))
    version = register("tiny-nights", folder, training.run_id, {}, "a tiny network")
    model = Path(version.reference)
    generate = settings(model, f"{prefix}/nights", count=400, shard_size=20, num_workers=1)
    file = tmp_path / "nights.yaml"
    sections = {
        "nightly": {"generate": generate.model_dump(mode="json"), "evaluate": {"reference": data}},
        "evaluate": {"reference": data},
    }
    file.write_text(yaml.safe_dump(sections))
    return file


def test_a_killed_night_is_completed_by_the_next_start(preset: Path, prefix: str) -> None:
    nights = f"{prefix}/nights"
    date = dt.datetime.now(dt.UTC).date()
    place = open_store(f"{nights}/date={date}")
    command = [sys.executable, *PROGRAM, "nightly", f"--config={preset}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    night = subprocess.Popen(command, env=environment, start_new_session=True)
    deadline = time.monotonic() + 150
    while not any(place.list("done/")):
        assert night.poll() is None, "the night ended before it could be killed"
        assert time.monotonic() < deadline, "no shard was made"
        time.sleep(0.05)
    os.kill(night.pid, signal.SIGKILL)
    assert night.wait() == -signal.SIGKILL
    assert read_latest(open_store(nights)) is None

    assert ddpm_pipeline.jobs.nightly.run_call(JobArguments(files=(preset,))) == 0
    latest = read_latest(open_store(nights))
    assert latest is not None
    assert (latest.date, latest.count) == (date, 400)
    assert verify(latest.prefix).ok


def test_the_cluster_gives_the_metrics_of_this_process_and_mlflow_gets_them(
    preset: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    date = str(dt.date(2026, 3, 1))
    assert ddpm_pipeline.jobs.nightly.run_call(JobArguments(files=(preset,)), date, date) == 0
    output = f"{prefix}/nights/date={date}"
    in_process = load_evaluation(output)
    assert in_process is not None
    # The workers have left their sums, so the distance is had without reading a sample.
    quick = JobArguments(files=(preset,), overrides=("records_only=true", "track=null"))
    assert ddpm_pipeline.jobs.evaluate.run_call(quick, output) == 0
    from_records = load_evaluation(output)
    assert from_records is not None
    assert from_records["frechet"] == pytest.approx(in_process["frechet"], rel=1e-5)

    # The features of the reference are extracted again, on the cluster, and stored.
    features = open_store(f"{prefix}/data/features")
    (key,) = [info.key for info in features.list("reference-")]
    before = features.read(key)
    features.delete(key)
    capsys.readouterr()
    call = JobArguments(files=(preset,), overrides=("num_workers=2",))
    assert ddpm_pipeline.jobs.evaluate.run_call(call, output, against=output) == 0
    printed = capsys.readouterr().out
    assert (
        FeatureSet.from_bytes(features.read(key), key).vectors.tobytes()
        == FeatureSet.from_bytes(before, key).vectors.tobytes()
    )
    on_cluster = load_evaluation(output)
    assert on_cluster is not None
    assert on_cluster.made_at > in_process.made_at
    assert on_cluster.metrics == in_process.metrics

    run = find_latest_run("evaluation", key_prefix="evaluate/")
    assert run is not None
    assert f"mlflow     logged at {run.url}" in printed
    logged = tracking_client().get_run(run.run_id)
    assert logged.info.status == "FINISHED"
    assert logged.data.metrics["quality/frechet"] == in_process["frechet"]
    assert logged.data.metrics["samples/frechet"] == in_process.terms.count == 400
    assert logged.data.tags["ddpm.reference_digest"] == in_process.terms.reference_digest
    assert logged.data.tags["ddpm.model"] == in_process.model


def test_a_schedule_of_the_stack_catches_up_and_excludes_other_jobs(
    stack: LocalStack, bare_environ: dict[str, str], preset: Path, prefix: str
) -> None:
    nights = open_store(f"{prefix}/nights")
    today = dt.datetime.now(dt.UTC).date()
    write_latest(nights, night(0).model_copy(update={"date": today - dt.timedelta(days=1)}))
    words = [f"--config={preset}", "generate.count=40", "--at", "00:00"]
    scheduled = LocalStack(stack.root, environ=bare_environ, schedule=words)
    try:
        scheduled.up()
        rows = {row.service: row.state for row in LocalStack(stack.root, environ=bare_environ).status()}
        assert rows == dict.fromkeys(("s3", "mlflow", "ray", "schedule"), "running")
        log = stack.root / "logs/schedule.log"
        deadline, kept_out = time.monotonic() + 200, False
        while (latest := read_latest(nights)) is None or latest.date < today:
            if not kept_out and next(iter(nights.list(f"date={today}/")), None) is not None:
                kept_out = True
                assert (
                    ddpm_pipeline.jobs.nightly.run_call(JobArguments(files=(preset,))) == 2
                )  # another job is running
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
    finally:
        LocalStack(stack.root, environ=bare_environ, schedule=()).up()
    assert "schedule" not in {row.service for row in LocalStack(stack.root, environ=bare_environ).status()}
    assert kept_out
    assert [one.date for one in read_nights(nights)][:1] == [today]
