"""The real stack. With --long also one on a root of its own, whose head and nodes are killed."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.infra.local import LocalStack, check_ray, environment, processes
from ddpm_pipeline.infra.local.ray import temp_dir
from ddpm_pipeline.infra.local.stack_state import State, read_state, write_state
from ddpm_pipeline.store import open_store
from tests.driving import ended_after, guarded
from tests.effort import is_long
from tests.ray_nodes import add_node, remove_node
from tests.traces import require_end

SERVICES = ("s3", "mlflow", "ray")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, bare_environ: dict[str, str]) -> Iterator[LocalStack]:
    local = LocalStack(tmp_path_factory.mktemp("own"), "s3", num_cpus=1, environ=bare_environ)
    with ended_after(local):
        yield local


@pytest.fixture
def own(kept: LocalStack) -> LocalStack:
    """The module's stack, running whatever the test before has left."""
    kept.up()
    return kept


@pytest.fixture
def healed(request: pytest.FixtureRequest) -> Iterator[LocalStack]:
    """The stack of all tests, with all its services before and after; with --long the module's own."""
    local: LocalStack = request.getfixturevalue("kept" if is_long() else "stack")
    local.up()
    yield local
    local.up()


@pytest.fixture
def pointed(
    healed: LocalStack, bare_environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """This process's environment, pointed at that stack."""
    variables = environment(healed.root)
    for name in set(os.environ) - set(bare_environ):
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return {**bare_environ, **variables}


def remembered(local: LocalStack) -> State:
    state = read_state(local.root)
    assert state is not None
    return state


def members(local: LocalStack) -> dict[str, list[psutil.Process]]:
    return {name: processes.family(record.identity) for name, record in remembered(local).services.items()}


def on_the_cluster(environ: dict[str, str], code: str) -> str:
    """The `answer` that `code` sets as a driver of the cluster, in a process of its own."""
    # Ray prints to a driver's output too, a lost node's death at any moment: the answer has a line of its own.
    mark = "the answer is: "
    program = f"import ray; ray.init(log_to_driver=False)\n{code}\nprint('\\n{mark}' + answer, flush=True)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, check=True, capture_output=True, text=True, timeout=60
    )
    (answer,) = [line.removeprefix(mark) for line in done.stdout.splitlines() if line.startswith(mark)]
    return answer


@pytest.mark.stack
def test_up_again_keeps_every_process(healed: LocalStack) -> None:
    before = remembered(healed)
    healed.up()
    assert remembered(healed) == before
    assert [(row.service, row.state) for row in healed.status()] == [(name, "running") for name in SERVICES]


@pytest.mark.stack
def test_nothing_listens_beyond_loopback(healed: LocalStack) -> None:
    listening: dict[str, str] = {}
    for process in (one for family in members(healed).values() for one in family):
        with suppress(psutil.NoSuchProcess):  # a worker of Ray that ended meanwhile
            for connection in process.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN:
                    listening[f"{connection.laddr.ip}:{connection.laddr.port}"] = process.name()
    assert len(listening) > 5
    strangers = {
        at: who for at, who in listening.items() if not at.startswith(("127.", "::1:", "::ffff:127."))
    }
    assert strangers == {}


@pytest.mark.stack
@pytest.mark.long
def test_killed_services_come_back_with_their_data_on_their_ports(
    healed: LocalStack, pointed: dict[str, str]
) -> None:
    from mlflow import MlflowClient

    # a head comes back on its port in the tests of recovery, too
    killed = SERVICES if is_long() else ("s3", "mlflow")
    open_store("s3://ddpm/kept").write("object", b"still here")
    client = MlflowClient(pointed["MLFLOW_TRACKING_URI"])
    run = client.create_run(client.create_experiment("kept"))
    client.log_text(run.info.run_id, "and this", "note.txt")
    before = remembered(healed)
    for name in killed:
        psutil.Process(before.services[name].identity.pid).kill()
    while any(processes.is_alive(before.services[name].identity) for name in killed):
        time.sleep(0.01)
    healed.up()
    after = remembered(healed)
    assert after.ports == before.ports
    for name in killed:
        assert after.services[name].identity.pid != before.services[name].identity.pid
    assert open_store("s3://ddpm/kept").read("object") == b"still here"
    assert [one.info.run_id for one in client.search_runs([run.info.experiment_id])] == [run.info.run_id]
    assert (
        open_store("s3://mlflow/artifacts").read(
            f"{run.info.experiment_id}/{run.info.run_id}/artifacts/note.txt"
        )
        == b"and this"
    )


@pytest.mark.stack
def test_a_job_finds_every_service_and_our_code(pointed: dict[str, str]) -> None:
    code = (
        "@ray.remote\n"
        "def found():\n"
        "    import os, jobs, pipeline\n"
        "    return [os.environ[n] for n in ('AWS_ENDPOINT_URL', 'MLFLOW_TRACKING_URI', 'DDPM_ROOT')]\n"
        "answer = ' '.join(ray.get(found.remote()))"
    )
    wanted = [pointed[name] for name in ("AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI", "DDPM_ROOT")]
    assert on_the_cluster(pointed, code).split() == wanted


def node_of_a_task(environ: dict[str, str]) -> str:
    """Address of the node that runs a task of two CPUs."""
    code = (
        "@ray.remote(num_cpus=2)\n"
        "def where():\n"
        "    return ray.util.get_node_ip_address()\n"
        "answer = ray.get(where.remote())"
    )
    return on_the_cluster(environ, code)


@pytest.mark.stack
@pytest.mark.long
def test_an_added_node_works_and_stays_when_the_stack_is_asked_for_again(
    own: LocalStack, pointed: dict[str, str]
) -> None:
    node = add_node(own, num_cpus=2)
    assert node_of_a_task(pointed) == node.address
    head = remembered(own).services["ray"]
    own.up()
    assert processes.is_alive(node.identity)
    remove_node(own, node, suddenly=True)
    assert processes.family(node.identity) == []
    assert remembered(own).services["ray"] == head


@pytest.mark.stack
@pytest.mark.long
def test_a_lost_node_is_replaced_at_its_address(own: LocalStack, pointed: dict[str, str]) -> None:
    node = add_node(own, num_cpus=2)
    remove_node(own, node, suddenly=True)
    # The head still lists the lost one; the next, at the same address, is there once it has itself come up.
    following = add_node(own, num_cpus=2)
    assert node_of_a_task(pointed) == following.address == node.address
    remove_node(own, following)


@pytest.mark.stack
def test_a_wrong_token_is_refused_at_once(pointed: dict[str, str]) -> None:
    check_ray(pointed)
    for wrong in ({"RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_TOKEN_PATH": ""}):
        with pytest.raises(UserError, match="refuses this token"):
            check_ray({**pointed, **wrong})


@pytest.mark.stack
@pytest.mark.long
def test_down_ends_all_of_its_own_and_nobody_else_and_a_taken_port_is_replaced(own: LocalStack) -> None:
    """Of the stack of all tests `tests/conftest.py` sees to the end of every process."""
    bystander = subprocess.Popen([sys.executable, "-m", "http.server", "0", "--bind", "127.0.0.1"])
    try:
        before = remembered(own)
        assert len([process for family in members(own).values() for process in family]) > 8
        require_end(own)
        assert bystander.poll() is None
        assert [row.state for row in own.status()] == ["stopped"] * 3
        assert own.down() == []
        with socket.create_server(("127.0.0.1", before.ports["s3"])):
            own.up()
        after = remembered(own)
        changed = {name for name in after.ports if after.ports[name] != before.ports[name]}
        assert changed == {"s3"}
        assert [row.state for row in own.status()] == ["running"] * 3
    finally:
        bystander.kill()
        bystander.wait()


def test_a_stack_whose_keeper_was_killed_is_removed(tmp_path: Path, bare_environ: dict[str, str]) -> None:
    from ddpm_pipeline.infra.local.stack_state import ServiceRecord

    local = LocalStack(tmp_path / "kept", environ=bare_environ)
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    served = processes.spawn(sleep, os.environ, local.root / "logs" / "s3.log", mark=tmp_path.name)
    write_state(local.root, State(services={"s3": ServiceRecord(identity=served, fingerprint="")}))
    keeper = subprocess.Popen(sleep)
    guard = guarded(local, keeper.pid)
    time.sleep(1)
    assert processes.is_alive(served)
    keeper.kill()
    keeper.wait()
    assert guard.wait(timeout=20) == 0
    assert not processes.is_alive(served)
    assert not local.root.exists()
    assert not temp_dir(local.root).exists()
