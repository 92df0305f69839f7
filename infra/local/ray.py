"""The Ray head: control store, scheduler, dashboard and job server in one family of processes.

The cluster asks for its token even on loopback, where any user of the machine could otherwise run code as ours.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ddpm_pipeline.errors import Outage, UserError
from ddpm_pipeline.infra.local import service
from ddpm_pipeline.infra.local.service import Service
from ddpm_pipeline.private_files import private_folder

_NODE_PORTS = ("object-manager", "node-manager", "agent-http", "agent-grpc", "runtime-env", "metrics")
PORTS = ("ray", "ray-dashboard", "ray-client", *(f"ray-{end}" for end in _NODE_PORTS))
OBJECT_STORE_BYTES = 512 * 2**20
# Given 127.0.0.1, Ray on Linux looks up the machine's outward address instead and listens on it (and its control
# store on every address). This switch, meant for other systems, means "one machine": all of Ray stays on
# loopback. Clients need it too, to find their own node.
LOOPBACK_SETTINGS = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
_STARTS = 3  # on a busy machine head and nodes may miss a time limit of Ray's own (30 s, which cannot be set)
_LONGEST_TEMP_DIR = 30  # socket paths end at 107 bytes, and Ray adds 70 to its folder


def ray_service(
    root: Path, ports: dict[str, int], num_cpus: int, token: Path, clients: Mapping[str, str]
) -> Service:
    """The head on 127.0.0.1 with `num_cpus` logical CPUs; by `clients` (variables) jobs find the services."""
    address = "127.0.0.1"
    url = f"http://{address}:{ports['ray-dashboard']}"
    argv = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
    ]
    argv += [f"--node-ip-address={address}", f"--dashboard-host={address}", f"--temp-dir={temp_dir(root)}"]
    argv += [f"--port={ports['ray']}", f"--dashboard-port={ports['ray-dashboard']}"]
    argv += node_ports(ports)
    argv += [f"--ray-client-server-port={ports['ray-client']}"]  # cannot be turned off
    argv += [f"--num-cpus={num_cpus}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
    return Service(
        name="ray",
        argv=tuple(argv),
        settings={**clients, **cluster_settings(token)},
        url=url,
        log=root / "logs" / "ray.log",
        ports=PORTS,
        is_ready=lambda: _is_head_up(url, token),
        start_seconds=180,
        starts=_STARTS,
        prepare=lambda: _prepare(root),
        # The head must not act as a client of the cluster that it is about to start.
        unset=("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_NAMESPACE"),
    )


def node_port_names(prefix: str) -> list[str]:
    """Names of the ports that `node_ports` asks for."""
    return [f"{prefix}-{end}" for end in _NODE_PORTS]


def node_ports(ports: Mapping[str, int], prefix: str = "ray") -> list[str]:
    """Options that put a node's own listeners on chosen ports; its workers take what is free."""
    return [
        f"--object-manager-port={ports[f'{prefix}-object-manager']}",
        f"--node-manager-port={ports[f'{prefix}-node-manager']}",
        f"--dashboard-agent-listen-port={ports[f'{prefix}-agent-http']}",
        f"--dashboard-agent-grpc-port={ports[f'{prefix}-agent-grpc']}",
        f"--runtime-env-agent-port={ports[f'{prefix}-runtime-env']}",
        f"--metrics-export-port={ports[f'{prefix}-metrics']}",
        "--min-worker-port=0",
        "--max-worker-port=0",
    ]


def cluster_settings(token: Path) -> dict[str, str]:
    """Environment variables that every process of the cluster needs."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        # A job that is stopped saves first; Ray's default would kill it after 3 s.
        "RAY_JOB_STOP_WAIT_TIME_S": "30",
        **LOOPBACK_SETTINGS,
        # Jobs may bring variables of their own; such a job uses no worker that was started before it came.
        "RAY_prestart_worker_first_driver": "0",
        # So that metrics of a job of a few seconds are seen; by default a process reports them every 10 s.
        "RAY_metrics_report_interval_ms": "2000",
        # A killed node refuses connections and is noticed after 5 periods (15 s by default). The time-out
        # stays long: on a busy machine a node that answers late is not a dead one.
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "10000",
        "RAY_health_check_failure_threshold": "5",
    }


def temp_dir(root: Path) -> Path:
    """Ray's folder for sockets and logs: short, because socket paths must be, and of this root only.

    Ray opens its folder to everybody (mode 777), so its parent is private to this user.
    """
    base = tempfile.gettempdir()
    name = f"ddpm-{hashlib.sha256(str(root).encode()).hexdigest()[:10]}/ray"
    return Path(base if len(base) <= _LONGEST_TEMP_DIR - len(name) - 1 else "/tmp") / name


def remove_temp_dir(root: Path) -> None:
    """Remove Ray's folder; the cluster must be down."""
    shutil.rmtree(temp_dir(root).parent, ignore_errors=True)


def check_cluster(url: str, token: str | None) -> None:
    """Refuse an unreachable dashboard or a wrong token at once; Ray's own client would retry for minutes.

    Raises Outage or UserError in one line.
    """
    headers = _headers(token) if token else {}
    if service.get(f"{url}/api/version", headers) is not None:
        return
    silent = not service.listens(url)
    if silent or (service.get(f"{url}/api/gcs_healthz") is None and service.get(url) is None):
        raise Outage(
            f"Ray's dashboard at {url} does not answer: start the stack (ddpm up) or correct RAY_JOB_ADDRESS"
        )
    raise UserError(
        f"Ray at {url} refuses this token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to its file"
    )


def _is_head_up(url: str, token: Path) -> bool:
    answers = service.get(f"{url}/api/jobs/", _headers(token.read_text())) is not None
    return answers and bool(_nodes_at("127.0.0.1", url, token))


def _nodes_at(address: str, url: str, token: Path) -> set[str]:
    """Ids of the nodes that the head at `url` lists as alive at this address; none when it does not answer."""
    answer = service.get(f"{url}/nodes?view=summary", _headers(token.read_text()))
    try:
        nodes = json.loads(answer or b"{}").get("data", {}).get("summary", [])
    except ValueError:  # another server has the port
        return set()
    raylets = [node.get("raylet", {}) for node in nodes if node.get("ip") == address]
    return {raylet["nodeId"] for raylet in raylets if raylet.get("state") == "ALIVE"}


def _headers(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token.strip()}"}


def _prepare(root: Path) -> None:
    folder = temp_dir(root)
    private_folder(folder.parent)
    # Each start leaves a folder with logs and sockets; the last one may still be wanted for its logs.
    for session in sorted(folder.glob("session_2*"))[:-1]:
        shutil.rmtree(session, ignore_errors=True)
