"""A Ray cluster that this program did not make: nodes started by `ray start`, in an environment without the program.

Each is told ports and a loopback address of its own, because all of them share this machine; otherwise Ray's defaults
hold, and the nodes know S3's and MLflow's keys, but no address and no setting of ours.
"""

# pyright: reportPrivateUsage=false

import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddpm_pipeline.infra.local import LocalStack, ports, processes, service
from ddpm_pipeline.infra.local.ray import LOOPBACK_SETTINGS, OBJECT_STORE_BYTES, node_port_names, node_ports
from ddpm_pipeline.infra.local.service import Service
from ddpm_pipeline.infra.local.stack_state import State, read_state

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
_START_SECONDS = 120
_STARTS = 3  # as of the stack's own head, and for the same reason


@dataclass(frozen=True)
class PlainNode:
    """A node, with its address."""

    address: str
    identity: processes.ProcessIdentity


@dataclass
class PlainCluster:
    """Nodes beside a stack, whose S3 and MLflow their jobs use if it is up, and which ends them with itself."""

    stack: LocalStack
    folder: Path
    """The nodes' working directory, and where the token is."""
    python: Path
    """The interpreter of nodes, unless one has another."""
    nodes: list[PlainNode] = field(default_factory=list[PlainNode])
    _folders: list[Path] = field(default_factory=list[Path])
    _ports: dict[str, int] = field(default_factory=lambda: ports.choose(["gcs", "dashboard", "client"]))

    def start_head(self, *options: str, variables: Mapping[str, str] | None = None) -> PlainNode:
        """`ray start --head` with these options."""
        where = [f"--port={self._ports['gcs']}", "--dashboard-host=127.0.0.1"]
        where += [f"--dashboard-port={self._ports['dashboard']}"]
        where += [f"--ray-client-server-port={self._ports['client']}"]
        words = ["--head", *where, *options]
        return self._start("127.0.0.1", words, self.python, {**LOOPBACK_SETTINGS, **(variables or {})})

    def add_node(
        self, *options: str, python: Path | None = None, variables: Mapping[str, str] | None = None
    ) -> PlainNode:
        """`ray start --address=HEAD` with these options. UserError where it does not join."""
        address = f"127.0.0.{len(self.nodes) + 1}"
        words = [f"--address=[::ffff:127.0.0.1]:{self._ports['gcs']}", *options]
        # Elsewhere than on the head Ray keeps a loopback address only where it is told that clusters are allowed.
        allowed = dict.fromkeys(LOOPBACK_SETTINGS, "1")
        return self._start(address, words, python or self.python, {**allowed, **(variables or {})})

    def kill(self, node: PlainNode) -> None:
        """End all that runs on a node at one stroke, as a machine that loses its power."""
        processes.kill(node.identity)

    @property
    def token(self) -> Path:
        """The file with the cluster's token."""
        return self.folder / "token"

    @property
    def url(self) -> str:
        """The dashboard's address."""
        return f"http://127.0.0.1:{self._ports['dashboard']}"

    @property
    def gcs_address(self) -> str:
        """Of the control store."""
        return f"127.0.0.1:{self._ports['gcs']}"

    def living(self) -> list[dict[str, Any]]:
        """What the dashboard says of each living node; empty while it does not answer."""
        header = {"Authorization": f"Bearer {self.token.read_text()}"}
        answer = json.loads(service.get(f"{self.url}/nodes?view=summary", header) or b"{}")
        found = [node.get("raylet", {}) for node in answer.get("data", {}).get("summary", [])]
        return [node for node in found if node.get("state") == "ALIVE"]

    def end(self) -> None:
        """End all nodes and remove their folders."""
        for number, node in reversed(list(enumerate(self.nodes))):
            processes.end(node.identity)
            self.stack._forget(self._name(number))
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)

    def log(self, number: int) -> Path:
        """What `ray start` printed for a node, the head being 0."""
        return self.folder / f"{self._name(number)}.log"

    def _name(self, number: int) -> str:
        return f"{self.folder.name}-{number}"

    def _start(self, address: str, words: list[str], python: Path, variables: Mapping[str, str]) -> PlainNode:
        number = len(self.nodes)
        # Short, because Ray's sockets lie in it.
        self._folders.append(Path(tempfile.mkdtemp(prefix="ddpm-node-", dir="/tmp")))
        before = len(self.living()) if number else 0
        node = Service(
            name=self._name(number),
            argv=(
                *("env", f"--chdir={self.folder}"),
                *(str(python), "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
                f"--node-ip-address={address}",
                f"--temp-dir={self._folders[-1]}",
                *node_ports(ports.choose(node_port_names("ray"), taken=self._ports.values())),
                f"--object-store-memory={OBJECT_STORE_BYTES // 4}",
                *words,
            ),
            settings={
                **{name: os.environ[name] for name in KEYS if name in os.environ},
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(self.token),
                "PATH": os.environ.get("PATH", os.defpath),
                "PYTHONPATH": "",
                **variables,
            },
            url=address,
            log=self.log(number),
            ports=(),
            is_ready=lambda: len(self.living()) > before,
            start_seconds=_START_SECONDS,
            starts=_STARTS,
        )
        self.stack._ensure(node, None, None)
        identity = (read_state(self.stack.root) or State()).services[node.name].identity
        self.nodes.append(PlainNode(address, identity))
        return self.nodes[-1]


@contextmanager
def plain_cluster(stack: LocalStack, folder: Path, python: Path) -> Iterator[PlainCluster]:
    """A cluster without nodes yet, which is ended behind the block. `folder` must not exist."""
    folder.mkdir()
    cluster = PlainCluster(stack, folder, python)
    cluster.token.write_text(secrets.token_hex(32))
    cluster.token.chmod(0o600)
    try:
        yield cluster
    finally:
        cluster.end()


def wait_until(condition: Callable[[], bool], seconds: float = 200) -> None:
    """Return once the condition holds; TimeoutError where it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} s; load {os.getloadavg()}")
        time.sleep(0.1)
