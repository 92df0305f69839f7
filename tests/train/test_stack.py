"""Training on the real stack: Ray Train, S3, MLflow; killed where it hurts, it ends in the same weights."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from infra.local import LocalStack
from pipeline.config.data import PackConfig
from pipeline.config.train import TrainConfig
from pipeline.data import pack
from pipeline.store import open_store
from pipeline.track import find_run, resolve, tracking_client
from pipeline.train.checkpoint import finished_steps, latest_checkpoint
from pipeline.train.prepare import Plan, prepare
from tests.train.tiny import tiny

pytestmark = [pytest.mark.stack, pytest.mark.timeout(240)]

STEPS = 480


@pytest.fixture(scope="module")
def data(stack: LocalStack) -> str:
    uri = "s3://ddpm/tests/train-digits"
    pack(PackConfig(source="digits", dest=uri, channels=1, shard_size=300), None)
    return uri


def config_of(data: str, prefix: str, name: str) -> TrainConfig:
    return tiny(
        data,
        f"{prefix}/{name}",
        name=name,
        steps=STEPS,
        log_every_steps=20,
        checkpoint={"every_steps": 40},
        grid={"every_steps": 240, "count": 10, "sampler": {"kind": "ddim", "num_steps": 2}},
        workers={"num_workers": 2},
        track={"experiment": f"tests-{name}", "send_interval_seconds": 0.2},
    )


class Job:
    """`python -m jobs.train` as a process of its own."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        settings = folder / "settings.yaml"
        settings.write_text(yaml.safe_dump({"train": config.model_dump(mode="json")}))
        self.log = folder / "log"
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs.train", "--config", str(settings)], stdout=out, stderr=out
            )

    def wait_for_step(self, plan: Plan, step: int) -> None:
        """Until a checkpoint of at least this step is there."""
        deadline = time.monotonic() + 120
        while not any(done >= step for done in finished_steps(plan.store)):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def end(self, code: int = 0) -> str:
        assert self.process.wait(timeout=200) == code, self.log.read_text()
        return self.log.read_text()

    def worker(self, rank: int) -> psutil.Process:
        """The process that holds this rank now, as Ray names it in the job's output."""
        pids = re.findall(rf"pid=(\d+)\) world_rank={rank},", self.log.read_text())
        return psutil.Process(int(pids[-1]))


def ema_of(plan: Plan) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(plan.store)
    assert checkpoint is not None
    assert checkpoint.record.step == STEPS
    return {name: value for name, value in checkpoint.tensors.items() if name.startswith("ema/")}


def series_of(plan: Plan) -> dict[str, list[tuple[int, float]]]:
    """The run's training metrics, as the server has them."""
    config = plan.config
    run = find_run(config.track.experiment, f"train/{config.name}-{plan.identity}-{config.steps}")
    assert run is not None
    assert run.status == "FINISHED"
    client = tracking_client()
    names = [name for name in client.get_run(run.run_id).data.metrics if name.startswith("train/")]
    assert "train/loss" in names
    return {
        name: sorted((point.step, point.value) for point in client.get_metric_history(run.run_id, name))
        for name in names
    }


def test_a_training_that_is_killed_ends_in_the_same_weights_and_the_same_charts(
    data: str, prefix: str, tmp_path: Path
) -> None:
    quiet = config_of(data, prefix, "undisturbed")
    plan = prepare(quiet)
    beside = Job(quiet, tmp_path / "a")

    config = config_of(data, prefix, "killed")
    killed = prepare(config)
    assert killed.identity == plan.identity
    job = Job(config, tmp_path / "b")
    job.wait_for_step(killed, 80)
    job.worker(1).kill()  # Ray replaces the group, which goes on from the last checkpoint
    job.wait_for_step(killed, 240)
    job.process.kill()  # the driver: its workers die with it
    job.process.wait()
    again = Job(config, tmp_path / "b")
    again.wait_for_step(killed, 320)
    again.process.send_signal(signal.SIGTERM)
    assert "saving, then ending" in again.end(143)
    assert "goes on from step" in Job(config, tmp_path / "b").end()

    assert "model    undisturbed/1" in beside.end()
    expected, found = ema_of(plan), ema_of(killed)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    points, expected_points = series_of(killed), series_of(plan)
    assert points.keys() == expected_points.keys()
    for name, series in expected_points.items():
        # a point cut in two by the stop is summed in another order: equal to the last digits of a float64
        assert [step for step, _ in points[name]] == [step for step, _ in series], name
        assert [value for _, value in points[name]] == pytest.approx(
            [value for _, value in series], rel=1e-12
        )

    done = Job(config, tmp_path / "b").end()
    assert "already trained: killed has all 480 steps; nothing to do" in done
    assert resolve("killed@champion").version == resolve("killed@challenger").version == 1


def test_a_lost_cluster_or_store_is_refused_in_one_line(data: str, prefix: str, tmp_path: Path) -> None:
    config = config_of(data, prefix, "refused")
    for variables, said in [
        ({"RAY_JOB_ADDRESS": "http://127.0.0.1:9"}, "Ray"),
        ({"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, "MLflow at http://127.0.0.1:9: no answer"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "key"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "127.0.0.1:9"),
    ]:
        settings = tmp_path / "settings.yaml"
        settings.write_text(yaml.safe_dump({"train": config.model_dump(mode="json")}))
        done = subprocess.run(
            [sys.executable, "-m", "jobs.train", "--config", str(settings)],
            env=os.environ | variables,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 2, done.stderr
        assert lines[-1].startswith("error: "), done.stderr
        assert said in lines[-1]
        assert "Traceback" not in done.stderr
    assert list(open_store(config.runs).list()) == []
