"""MLflow on PostgreSQL, as a team runs it: both servers are killed while a training logs to them."""

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddpm_pipeline.jobs.runner import PROGRAM
from tests.mlflow_servers import PROGRAMS, PostgreSQL, TrackingServer, clients_of, own_server, wait_until
from tests.train.tiny import tiny_settings

STEPS, WINDOW = 2000, 50

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(600),
    pytest.mark.skipif(PROGRAMS is None, reason="needs the Debian package postgresql"),
    pytest.mark.skipif(
        importlib.util.find_spec("psycopg2") is None, reason="needs pip install -r infra/docker/mlflow.lock"
    ),
]


@pytest.fixture
def database() -> Iterator[PostgreSQL]:
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as folder:  # a socket's path is short
        server = PostgreSQL(Path(folder))
        yield server
        server.kill()


@pytest.fixture
def mlflow(database: PostgreSQL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrackingServer]:
    server = own_server(tmp_path, database.uri, {"trainer": "registrar"})
    for name, value in clients_of(server, "trainer").items():
        monkeypatch.setenv(name, value)
    yield server
    server.kill()


def test_every_point_is_there_once_and_the_model_is_registered_though_both_servers_die(
    database: PostgreSQL, mlflow: TrackingServer, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    settings = tiny_settings(
        tmp_path,
        steps=STEPS,
        log_every_steps=WINDOW,
        checkpoint={"every_steps": 500},
        grid={"every_steps": 1000, "count": 4, "sampler": {"kind": "ddim", "num_steps": 2}},
    )
    client = MlflowClient(mlflow.uri)

    def steps() -> list[int]:
        experiment = client.get_experiment_by_name("training")
        runs = [] if experiment is None else client.search_runs([experiment.experiment_id])
        points = client.get_metric_history(runs[0].info.run_id, "train/loss") if runs else []
        return sorted(point.step for point in points)

    training = subprocess.Popen(
        [sys.executable, *PROGRAM, "train", "--config", str(settings), "--local"],
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: len(steps()) > 1, "the training")
    mlflow.kill()
    mlflow.start()
    known = len(steps())
    wait_until(lambda: len(steps()) > known, "the training, after MLflow's death,")
    database.kill()
    database.start()
    said, _ = training.communicate(timeout=300)
    assert training.returncode == 0, said
    assert steps() == list(range(WINDOW, STEPS + 1, WINDOW))[-len(steps()) :]
    assert len(steps()) >= STEPS // WINDOW - 1  # the first window is not shown
    versions = client.search_model_versions("name = 'tiny'")
    assert [version.version for version in versions] == ["1"]
    assert client.get_model_version_by_alias("tiny", "champion").version == "1"
