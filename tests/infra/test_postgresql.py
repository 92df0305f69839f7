"""MLflow on PostgreSQL, as a team runs it: both servers are killed while a training logs to them."""

import importlib.util
import json
import os
import pwd
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ddpm_pipeline.config.data import PackConfig
from ddpm_pipeline.data.packing.pack_dataset import pack
from ddpm_pipeline.infra.tracking.access import user_line
from ddpm_pipeline.infra.tracking.app import USERS_VARIABLE
from ddpm_pipeline.jobs.runner import PROGRAM
from tests.train.tiny import tiny

PROGRAMS = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
PASSWORD = "a long password of a test"
STEPS, WINDOW = 2000, 50

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(600),
    pytest.mark.skipif(PROGRAMS is None, reason="needs the Debian package postgresql"),
    pytest.mark.skipif(
        importlib.util.find_spec("psycopg2") is None, reason="needs pip install -r infra/docker/mlflow.lock"
    ),
]


class PostgreSQL:
    """A server on a socket in a folder of its own; as root it runs as `postgres`, since it refuses to be root."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._data = folder, folder / "data"
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user is not None:
            os.chown(folder, pwd.getpwnam(self._user).pw_uid, -1)
        self._run("initdb", "--auth=trust", "--username=mlflow", f"--pgdata={self._data}")
        self.start()
        self._run("createdb", f"--host={folder}", "--username=mlflow", "mlflow")

    @property
    def uri(self) -> str:
        return f"postgresql+psycopg2://mlflow@/mlflow?host={self._folder}"

    def start(self) -> None:
        command = [self._program("postgres"), "-D", str(self._data), "-k", str(self._folder)]
        command += ["-c", "listen_addresses="]
        self._server = subprocess.Popen(command, user=self._user, cwd="/", stderr=subprocess.DEVNULL)
        ready = [self._program("pg_isready"), "--quiet", f"--host={self._folder}"]
        wait_until(lambda: subprocess.run(ready, check=False).returncode == 0, "PostgreSQL")

    def kill(self) -> None:
        """As a power cut: without a word to its processes."""
        children = Path(f"/proc/{self._server.pid}/task/{self._server.pid}/children").read_text().split()
        for pid in (self._server.pid, *map(int, children)):
            os.kill(pid, signal.SIGKILL)
        self._server.wait()

    def _run(self, program: str, *options: str) -> None:
        subprocess.run(
            [self._program(program), *options],
            user=self._user,
            cwd="/",
            check=True,
            stdout=subprocess.DEVNULL,
        )

    def _program(self, name: str) -> str:
        assert PROGRAMS is not None
        return str(PROGRAMS / name)


class TrackingServer:
    """MLflow as infra/docker starts it, with passwords, on a fixed port."""

    def __init__(self, folder: Path, database: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port: int = free.getsockname()[1]
        self._folder, self._database = folder, database
        users = folder / "users"
        users.write_text(user_line("ddpm", "admin", PASSWORD))
        users.chmod(0o600)
        self._environ = os.environ | {
            USERS_VARIABLE: str(users),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        self.start()

    @property
    def clients(self) -> dict[str, str]:
        return {
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{self._port}",
            "MLFLOW_TRACKING_USERNAME": "ddpm",
            "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        }

    def start(self) -> None:
        command = [sys.executable, "-m", "ddpm_pipeline.infra.tracking", "--host", "127.0.0.1"]
        command += ["--port", str(self._port), "--workers", "1", "--backend-store-uri", self._database]
        command += ["--artifacts-destination", f"file://{self._folder}/artifacts"]
        log = (self._folder / "mlflow.log").open("a")
        self._server = subprocess.Popen(
            command, env=self._environ, stdout=log, stderr=log, start_new_session=True
        )
        wait_until(self._answers, "MLflow")

    def kill(self) -> None:
        os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.clients['MLFLOW_TRACKING_URI']}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline, f"{what} does not answer"
        time.sleep(0.2)


@pytest.fixture
def database() -> Iterator[PostgreSQL]:
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as folder:  # a socket's path is short
        server = PostgreSQL(Path(folder))
        yield server
        server.kill()


@pytest.fixture
def mlflow(database: PostgreSQL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrackingServer]:
    server = TrackingServer(tmp_path, database.uri)
    for name, value in server.clients.items():
        monkeypatch.setenv(name, value)
    yield server
    server.kill()


def settings(folder: Path) -> Path:
    """Of a training on the digits, which are packed here."""
    data, runs = f"file://{folder}/data", folder / "runs"
    pack(PackConfig(source="digits", dest=data, channels=1, shard_size=600), None)
    runs.mkdir()
    training = tiny(
        data,
        runs.as_uri(),
        steps=STEPS,
        log_every_steps=WINDOW,
        checkpoint={"every_steps": 500},
        grid={"every_steps": 1000, "count": 4, "sampler": {"kind": "ddim", "num_steps": 2}},
    )
    path = folder / "tiny.json"
    path.write_text(json.dumps({"train": training.model_dump(mode="json", exclude_unset=True)}))
    return path


def test_every_point_is_there_once_and_the_model_is_registered_though_both_servers_die(
    database: PostgreSQL, mlflow: TrackingServer, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    given = ["--config", str(settings(tmp_path))]
    client = MlflowClient(mlflow.clients["MLFLOW_TRACKING_URI"])

    def steps() -> list[int]:
        experiment = client.get_experiment_by_name("training")
        runs = [] if experiment is None else client.search_runs([experiment.experiment_id])
        points = client.get_metric_history(runs[0].info.run_id, "train/loss") if runs else []
        return sorted(point.step for point in points)

    training = subprocess.Popen(
        [sys.executable, *PROGRAM, "train", *given, "--local"], stdout=subprocess.PIPE, text=True
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
