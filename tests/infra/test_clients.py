import base64
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.infra.local import (
    check_ray,
    client_environment,
    environment,
    export_environment,
    ports,
    processes,
    sign_in,
)
from ddpm_pipeline.infra.local.credentials import mlflow_users_path
from ddpm_pipeline.infra.local.stack import ALL_PORTS, LocalStack
from ddpm_pipeline.infra.local.stack_state import ServiceRecord, State, StoreKind, write_state
from ddpm_pipeline.infra.tracking.access import read_users


def remembered(root: Path, store: StoreKind = "s3", external: tuple[str, ...] = ()) -> State:
    numbers = {name: 20_000 + number for number, name in enumerate(ALL_PORTS)}
    state = State(store=store, ports=numbers, external=external)
    write_state(root, state)
    return state


def test_all_services_of_the_stack_are_pointed_at(tmp_path: Path) -> None:
    state = remembered(tmp_path)
    variables = environment(tmp_path)
    assert variables["AWS_ENDPOINT_URL"] == f"http://127.0.0.1:{state.ports['s3']}"
    assert variables["MLFLOW_TRACKING_URI"] == f"http://127.0.0.1:{state.ports['mlflow']}"
    assert variables["MLFLOW_TRACKING_USERNAME"] == "ddpm"
    assert len(variables["MLFLOW_TRACKING_PASSWORD"]) == 64
    assert variables["RAY_ADDRESS"] == f"127.0.0.1:{state.ports['ray']}"
    assert variables["RAY_JOB_ADDRESS"] == f"http://127.0.0.1:{state.ports['ray-dashboard']}"
    assert Path(variables["RAY_AUTH_TOKEN_PATH"]).stat().st_size == 64
    assert variables["DDPM_ROOT"] == "s3://ddpm"


def test_on_plain_files_there_is_no_s3(tmp_path: Path) -> None:
    remembered(tmp_path, store="file")
    variables = environment(tmp_path)
    assert not [name for name in variables if name.startswith("AWS_")]
    assert variables["DDPM_ROOT"] == f"file://{tmp_path}/files"


def test_without_a_stack_the_command_that_starts_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no local stack under .*ddpm up"):
        environment(tmp_path)


def test_the_stacks_keys_replace_a_users_profile_and_session(tmp_path: Path) -> None:
    remembered(tmp_path)
    environ = {"AWS_PROFILE": "work", "AWS_SESSION_TOKEN": "t", "AWS_ACCESS_KEY_ID": "AKIA", "HOME": "/h"}
    export_environment(tmp_path, environ)
    assert environ["AWS_ACCESS_KEY_ID"] == client_environment.s3_keys(tmp_path).access_key
    assert {"AWS_PROFILE", "AWS_SESSION_TOKEN"}.isdisjoint(environ)
    assert environ["HOME"] == "/h"


def test_a_users_own_s3_keeps_its_endpoint_keys_and_profile(tmp_path: Path) -> None:
    remembered(tmp_path)
    own = {"AWS_ENDPOINT_URL": "https://s3.example", "AWS_ACCESS_KEY_ID": "AKIA", "AWS_PROFILE": "work"}
    environ = dict(own)
    export_environment(tmp_path, environ)
    assert own.items() <= environ.items()
    assert environ["MLFLOW_TRACKING_URI"].startswith("http://127.0.0.1:")


def test_a_users_own_data_root_stays(tmp_path: Path) -> None:
    remembered(tmp_path)
    environ = {"DDPM_ROOT": "file:///big/disk"}
    export_environment(tmp_path, environ)
    assert environ["DDPM_ROOT"] == "file:///big/disk"


@pytest.mark.parametrize(
    ("named", "external"),
    [
        ({"AWS_ENDPOINT_URL": "https://s3.example"}, ("s3",)),
        ({"DDPM_ROOT": "s3://my-bucket/ddpm"}, ("s3",)),
        ({"MLFLOW_TRACKING_URI": "https://mlflow.example"}, ("mlflow",)),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, ("ray",)),
        ({"AWS_ACCESS_KEY_ID": "AKIA", "MLFLOW_TRACKING_URI": ""}, ()),
    ],
)
def test_a_service_the_user_names_is_not_the_stacks(named: dict[str, str], external: tuple[str, ...]) -> None:
    assert client_environment.external_services(named) == external


def test_the_stacks_own_variables_in_the_shell_are_not_taken_for_the_users(tmp_path: Path) -> None:
    remembered(tmp_path)
    variables = environment(tmp_path)
    shell = {**variables, "HOME": "/h"}
    assert client_environment.users_own(shell, variables) == {"HOME": "/h"}
    rows = LocalStack(tmp_path, environ=shell).status()
    assert [(row.service, row.state) for row in rows] == [(s, "stopped") for s in ("s3", "mlflow", "ray")]


def test_services_of_the_users_own_are_shown_as_such(tmp_path: Path) -> None:
    remembered(tmp_path, external=("s3", "mlflow"))
    own = {"AWS_ENDPOINT_URL": "https://s3.example", "MLFLOW_TRACKING_URI": "https://mlflow.example"}
    rows = LocalStack(tmp_path, environ=own).status()
    assert {row.service: (row.state, row.url) for row in rows if row.state == "external"} == {
        "s3": ("external", "https://s3.example"),
        "mlflow": ("external", "https://mlflow.example"),
    }


def test_up_starts_nothing_where_every_service_is_the_users_own(tmp_path: Path) -> None:
    own = {
        "AWS_ENDPOINT_URL": "https://s3.example",
        "MLFLOW_TRACKING_URI": "https://mlflow.example",
        "RAY_ADDRESS": "10.0.0.1:6379",
    }
    stack = LocalStack(tmp_path, environ=own)
    stack.up()
    assert {(row.service, row.state) for row in stack.status()} == {
        (s, "external") for s in ("s3", "mlflow", "ray")
    }
    assert environment(tmp_path) == {"DDPM_ROOT": "s3://ddpm"}
    assert stack.down() == []


def test_on_plain_files_only_mlflow_and_ray_run(tmp_path: Path) -> None:
    remembered(tmp_path, store="file")
    rows = LocalStack(tmp_path, environ={"AWS_ENDPOINT_URL": "https://s3.example"}).status()
    assert [row.service for row in rows] == ["mlflow", "ray"]


def test_an_unreachable_cluster_is_told_at_once() -> None:
    with pytest.raises(UserError, match=r"Ray's dashboard at http://127\.0\.0\.1:9 does not answer"):
        check_ray({"RAY_JOB_ADDRESS": "http://127.0.0.1:9"})


def test_a_token_file_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="RAY_AUTH_TOKEN_PATH=/no/such cannot be read: No such file"):
        check_ray({"RAY_JOB_ADDRESS": "http://127.0.0.1:9", "RAY_AUTH_TOKEN_PATH": "/no/such"})


def test_a_stack_from_before_mlflow_had_passwords_gets_one_that_only_its_owner_can_read(
    tmp_path: Path,
) -> None:
    remembered(tmp_path)
    (tmp_path / "secrets").mkdir(mode=0o700)
    password = environment(tmp_path)["MLFLOW_TRACKING_PASSWORD"]
    users = read_users(mlflow_users_path(tmp_path))
    encoded = base64.b64encode(f"ddpm:{password}".encode()).decode()
    assert users.role_of(f"Basic {encoded}") == "admin"
    assert password not in mlflow_users_path(tmp_path).read_text()
    for file in (tmp_path / "secrets").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert environment(tmp_path)["MLFLOW_TRACKING_PASSWORD"] == password


def test_a_users_own_mlflow_is_not_sent_the_stacks_password(tmp_path: Path) -> None:
    remembered(tmp_path)
    environ = {"MLFLOW_TRACKING_URI": "https://mlflow.example", "MLFLOW_TRACKING_TOKEN": "mine"}
    export_environment(tmp_path, environ)
    assert environ["MLFLOW_TRACKING_TOKEN"] == "mine"
    assert "MLFLOW_TRACKING_PASSWORD" not in environ


@pytest.fixture
def squatter() -> Iterator[int]:
    """A port on which a program listens that no stack has started."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("service", "port"), [("mlflow", "mlflow"), ("ray", "ray"), ("ray", "ray-dashboard")]
)
def test_no_secret_goes_to_a_program_that_took_a_services_port(
    tmp_path: Path, squatter: int, service: str, port: str
) -> None:
    state = remembered(tmp_path)
    write_state(tmp_path, state.model_copy(update={"ports": {**state.ports, port: squatter}}))
    environ: dict[str, str] = {}
    with pytest.raises(UserError, match=f"port {squatter} of the local stack's {service} is held by another"):
        export_environment(tmp_path, environ)
    assert environ == {}
    own = {"MLFLOW_TRACKING_URI": "https://mlflow.example", "RAY_ADDRESS": "10.0.0.1:6379"}
    export_environment(tmp_path, own)
    assert not {"MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN_PATH"} & set(own)


def test_the_port_of_a_service_that_the_stack_started_is_its_own(tmp_path: Path) -> None:
    listen = "import socket; s = socket.create_server(('127.0.0.1', 0))"
    code = f"{listen}; print(s.getsockname()[1], flush=True); s.accept()"
    log = tmp_path / "log"
    identity = processes.spawn([sys.executable, "-c", code], os.environ, log, mark="of-the-test")
    try:
        while not log.read_text().endswith("\n"):
            assert processes.is_alive(identity), log.read_text()
            time.sleep(0.01)
        state = remembered(tmp_path)
        state = state.model_copy(
            update={
                "ports": {**state.ports, "mlflow": int(log.read_text())},
                "services": {"mlflow": ServiceRecord(identity=identity, fingerprint="")},
            }
        )
        write_state(tmp_path, state)
        environ: dict[str, str] = {}
        export_environment(tmp_path, environ)
        assert environ["MLFLOW_TRACKING_URI"].endswith(f":{int(log.read_text())}")
    finally:
        processes.end(identity)


def test_a_killed_service_keeps_its_port_though_an_orphan_without_the_mark_holds_it_for_a_while(
    tmp_path: Path,
) -> None:
    (port,) = ports.choose(["mlflow"]).values()
    hold = f"import socket, time; s = socket.create_server(('127.0.0.1', {port})); time.sleep(2)"
    code = (
        "import subprocess, sys, time; "
        f'subprocess.Popen([sys.executable, "-c", "{hold}"], env={{}}); time.sleep(60)'
    )
    identity = processes.spawn([sys.executable, "-c", code], os.environ, tmp_path / "log", mark="of-the-test")
    while ports.is_free(port):
        assert processes.is_alive(identity), (tmp_path / "log").read_text()
        time.sleep(0.01)
    psutil.Process(identity.pid).kill()
    while processes.is_alive(identity):
        time.sleep(0.01)
    assert not ports.is_free(port)
    state = remembered(tmp_path, store="file")
    update = {
        "ports": {**state.ports, "mlflow": port},
        "services": {"mlflow": ServiceRecord(identity=identity, fingerprint="")},
    }
    write_state(tmp_path, state.model_copy(update=update))
    plan = LocalStack(tmp_path, environ={})._plan()
    assert (plan.ports["mlflow"], plan.services) == (port, {})


def test_sign_in_names_the_command_that_prints_what_each_web_page_asks_for(tmp_path: Path) -> None:
    assert sign_in(tmp_path) == []
    remembered(tmp_path)
    told = sign_in(tmp_path)
    for line, variable in zip(told, ("MLFLOW_TRACKING_URI", "RAY_JOB_ADDRESS"), strict=True):
        assert environment(tmp_path)[variable] in line
        command = line.rpartition(": ")[2]
        secret = subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout
        assert len(secret) == 64
        assert secret not in "".join(told)
    assert "user ddpm" in told[0]
    remembered(tmp_path, external=("mlflow", "ray"))
    assert sign_in(tmp_path) == []
