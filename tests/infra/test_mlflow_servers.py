"""MLflow servers of others: artifacts that clients store themselves, users with permissions, answers that come late."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ddpm_pipeline.jobs.runner import PROGRAM
from ddpm_pipeline.tracking import LoggedAlias, tracking_client
from tests.mlflow_servers import (
    PASSWORD,
    TrackingServer,
    basic_auth_server,
    clients_of,
    direct_server,
    own_server,
)
from tests.relay import Relay
from tests.s3_servers import KEYS, one_loader, seaweedfs, seaweedfs_server
from tests.train.tiny import tiny_settings

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.server.auth.client import AuthServiceClient

__all__ = ["one_loader", "seaweedfs", "seaweedfs_server"]
pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
DDIM = {"kind": "ddim", "num_steps": 2}
SAMPLE = ("sample", "count=4", "sampler.kind=ddim", "sampler.num_steps=2")
NOT_SAID_OF_A_SLOW_SERVER = ("delivery to MLflow failed", "stayed away", "is the server up", "Traceback")
Serve = Callable[[TrackingServer], TrackingServer]


def ddpm(variables: dict[str, str], *words: str) -> tuple[int, str]:
    """Exit code and output of `ddpm WORDS` as a process with these variables of services, and no others."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MLFLOW_"))}
    environ = {**others, "AWS_EC2_METADATA_DISABLED": "true", **variables}
    done = subprocess.run(
        [sys.executable, *PROGRAM, *words],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Ends the servers that it is given after the test."""
    started: list[TrackingServer] = []

    def keep(server: TrackingServer) -> TrackingServer:
        started.append(server)
        return server

    yield keep
    for server in started:
        server.kill()


def sqlite(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


def loss_steps(client: "MlflowClient", experiment: str = "training") -> list[int]:
    """Steps of the points of train/loss of the experiment's only run, in order."""
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    (run,) = client.search_runs([found.experiment_id])
    return sorted(point.step for point in client.get_metric_history(run.info.run_id, "train/loss"))


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL"])
def test_a_client_with_keys_trains_and_samples_where_artifacts_are_stored_by_clients(
    variable: str, serve: Serve, seaweedfs: str, seaweedfs_server: str, tmp_path: Path
) -> None:
    server = serve(direct_server(tmp_path, sqlite(tmp_path), f"s3://{seaweedfs}/mlflow"))
    clients = {**clients_of(server), variable: seaweedfs_server, **KEYS}
    settings = tiny_settings(tmp_path, grid={"every_steps": 12, "count": 4, "sampler": DDIM})
    code, said = ddpm(clients_of(server), "train", f"--config={settings}", "--local")
    assert (code, said.count("\n")) == (2, 1), said
    assert f"MLflow's artifacts at s3://{seaweedfs}/mlflow/" in said
    assert "no S3 keys found; set AWS_ACCESS_KEY_ID" in said
    assert list((tmp_path / "runs").iterdir()) == []

    code, said = ddpm(clients, "train", f"--config={settings}", "--local")
    assert code == 0, said
    client = tracking_client(server.uri)
    assert loss_steps(client) == [8, 12, 16, 20, 24]
    stored = client.get_model_version_download_uri("tiny", "1")
    assert stored.startswith(f"s3://{seaweedfs}/mlflow/"), stored
    output = f"output={tmp_path}/samples"
    with_other_cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    code, said = ddpm(clients_of(server) | with_other_cache, *SAMPLE, "model=tiny@champion", output)
    assert (code, said.count("\n")) == (2, 1), said
    code, said = ddpm(clients | with_other_cache, *SAMPLE, "model=tiny@champion", output)
    assert code == 0, said
    assert len(list((tmp_path / "samples").glob("0*.png"))) == 4


@pytest.fixture(params=["READ", "NO_PERMISSIONS"])
def permissions(
    request: pytest.FixtureRequest, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> TrackingServer:
    """MLflow's own login, with the users admin, who owns an experiment `theirs`, anna and bert."""
    if importlib.util.find_spec("flask_wtf") is None:
        pytest.skip("needs pip install 'mlflow[auth]'")
    server = serve(basic_auth_server(tmp_path, sqlite(tmp_path), request.param))
    with monkeypatch.context() as patch:
        for name, value in clients_of(server, "admin").items():
            patch.setenv(name, value)
        for name in ("anna", "bert"):
            auth_client(server).create_user(name, PASSWORD)
        tracking_client(server.uri).create_experiment("theirs")
    return server


def auth_client(server: TrackingServer) -> "AuthServiceClient":
    """A client of MLflow's users and permissions, as the user whom the environment names."""
    from mlflow.server.auth.client import AuthServiceClient

    return AuthServiceClient(server.uri)


def test_a_user_trains_promotes_and_samples_where_they_may_and_is_refused_elsewhere_before_work_starts(
    permissions: TrackingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    anna, bert = clients_of(permissions, "anna"), clients_of(permissions, "bert")
    settings = f"--config={tiny_settings(tmp_path)}"
    train = ("train", settings, "--local")
    code, said = ddpm(anna, *train, "track.experiment=theirs")
    assert (code, said.count("\n")) == (2, 1), said
    assert "in experiment 'theirs': MLflow refuses it to user 'anna' (403 Permission denied for /api/" in said
    assert "; ask the server's administrator for the right" in said
    assert PASSWORD not in said
    assert list((tmp_path / "runs").iterdir()) == []

    for seed in (0, 1):
        code, said = ddpm(anna, *train, "track.experiment=of-anna", f"seed={seed}")
        assert code == 0, said
    for name, value in anna.items():
        monkeypatch.setenv(name, value)
    LoggedAlias("tiny", "champion").move(1, 2, "promotion")
    output = f"output={tmp_path}/samples"
    code, said = ddpm(anna, *SAMPLE, "model=tiny@champion", output)
    assert code == 0, said
    code, said = ddpm(anna, "rollback", "tiny")
    assert code == 0, said
    assert tracking_client().get_model_version_by_alias("tiny", "champion").version == "1"

    known = list((tmp_path / "runs").iterdir())
    code, said = ddpm(bert, *train, "track.experiment=of-bert", "seed=2")
    assert (code, said.count("\n")) == (2, 1), said
    assert "registering versions of model 'tiny': MLflow refuses it to user 'bert' (403" in said
    assert list((tmp_path / "runs").iterdir()) == known

    users = auth_client(permissions)
    (theirs,) = [found for found in tracking_client().search_experiments() if found.name == "of-anna"]
    users.grant_user_permission("bert", "registered_model", "tiny", "EDIT")
    users.grant_user_permission("bert", "experiment", theirs.experiment_id, "EDIT")
    code, said = ddpm(bert, *train, "track.experiment=of-anna", "seed=2")
    assert code == 0, said
    assert tracking_client().get_model_version_by_alias("tiny", "challenger").version == "3"


@pytest.mark.parametrize("seconds", [1.0, 5.0])
def test_a_server_whose_answers_take_seconds_gets_every_point_once_and_one_model(
    seconds: float, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # To the server the connection is idle while the relay holds an answer, and it would close it after 5 s.
    patient = ["--uvicorn-opts", "--timeout-keep-alive 120"]
    server = serve(own_server(tmp_path, sqlite(tmp_path), {"anna": "registrar"}, patient))
    relay = Relay("127.0.0.1", server.port)
    relay.slow_seconds = seconds
    relay.switch("slow")
    clients = clients_of(server, "anna") | {"MLFLOW_TRACKING_URI": relay.uri, "DDPM_START_WAIT_SECONDS": "60"}
    settings = tiny_settings(
        tmp_path, grid={"every_steps": 12, "count": 4, "sampler": DDIM}, track={"experiment": "slow"}
    )
    training = subprocess.Popen(
        [sys.executable, *PROGRAM, "train", f"--config={settings}", "--local"],
        env=os.environ | clients,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said, after = "", len(relay.requests)
    assert training.stdout is not None
    for line in training.stdout:
        said += line
        if line.startswith("train 24/24 steps"):
            after = len(relay.requests)
    assert training.wait() == 0, said
    assert any(line.endswith("/runs/log-batch") for line in relay.requests[after:]), (
        "the last steps are told later"
    )
    relay.close()
    for words in NOT_SAID_OF_A_SLOW_SERVER:
        assert words not in said
    code, told = ddpm(clients_of(server, "anna"), "replay")
    assert code == 0, told
    for name, value in clients_of(server, "anna").items():
        monkeypatch.setenv(name, value)
    client = tracking_client()
    assert loss_steps(client, "slow") == [8, 12, 16, 20, 24]
    assert [version.version for version in client.search_model_versions("name = 'tiny'")] == ["1"]
