"""More Ray nodes on this machine, each on a loopback address of its own: what a test can lose like a machine."""

# pyright: reportPrivateUsage=false

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ddpm_pipeline.errors import UserError
from ddpm_pipeline.infra.local import LocalStack, environment, ports, processes, ray, service
from ddpm_pipeline.infra.local.service import Service
from ddpm_pipeline.infra.local.stack_state import State, locked, read_state

_PREFIX = "ray-node-"


@dataclass(frozen=True)
class Node:
    """An added Ray node."""

    name: str
    address: str
    """Its own loopback address, by which Ray lists it."""
    identity: processes.ProcessIdentity


def add_node(stack: LocalStack, num_cpus: int = 1, num_gpus: int = 0) -> Node:
    """Add one more Ray node to the running cluster, as another machine would be; `stack.down` ends it too.

    `num_gpus`: what it declares, whether the machine has them or not.
    """
    with locked(stack.root):
        state, head = _head(stack)
        number = next(n for n in range(1, 250) if f"{_PREFIX}{n}" not in state.services)
        name, address = f"{_PREFIX}{number}", f"127.0.0.{number + 1}"
        chosen = ports.choose(ray.node_port_names(name), taken=state.ports.values())
        node = _node_service(stack.root, name, address, {**state.ports, **chosen}, num_cpus, num_gpus, head)
        stack._ensure(node, None, None)
        identity = (read_state(stack.root) or state).services[name].identity
        return Node(name, address, identity)


def remove_node(stack: LocalStack, node: Node, *, suddenly: bool = False) -> None:
    """End a node; `suddenly` kills everything on it at once, as a lost machine."""
    with locked(stack.root):
        (processes.kill if suddenly else processes.end)(node.identity)
        stack._forget(node.name)


def give_notice(stack: LocalStack, node: Node, seconds: int) -> None:
    """Give a node notice, as a cloud does to a spot machine: Ray is told that it will be taken away in `seconds`.

    It stays until then, or until nothing runs there any more; `remove_node` takes it away.
    """
    state, head = _head(stack)
    (node_id,) = _nodes_at(node.address, head)
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
    command += [f"--address=127.0.0.1:{state.ports['ray']}", f"--node-id={node_id}"]
    command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot machine"]
    command += [f"--deadline-remaining-seconds={seconds}"]
    subprocess.run(command, env=os.environ | environment(stack.root), check=True)


def _head(stack: LocalStack) -> tuple[State, Service]:
    """What runs under the stack's root, and its Ray head."""
    state = read_state(stack.root)
    heads = [one for one in stack._services(state) if one.name == "ray"] if state else []
    if state is None or not heads or "ray" not in state.services:
        raise UserError(f"no Ray head of this stack runs under {stack.root}: start it first")
    return state, heads[0]


def _node_service(
    root: Path,
    name: str,
    address: str,
    numbers: Mapping[str, int],
    num_cpus: int,
    num_gpus: int,
    head: Service,
) -> Service:
    """One more node of the cluster that `head` leads, on its own loopback `address` (127.0.0.2 and up; Linux)."""
    # The head takes a moment to notice that a node has gone: one that was lost at this address is not the new one.
    before = _nodes_at(address, head)
    return Service(
        name=name,
        argv=(
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
            f"--address=[::ffff:127.0.0.1]:{numbers['ray']}",
            f"--node-ip-address={address}",
            f"--num-cpus={num_cpus}",
            f"--num-gpus={num_gpus}",
            *ray.node_ports(numbers, prefix=name),
            f"--object-store-memory={ray.OBJECT_STORE_BYTES // 4}",
        ),
        # A node joins only where clusters are allowed; it is told loopback addresses in
        # forms that Ray does not replace by the outward one.
        settings={**head.settings, **dict.fromkeys(ray.LOOPBACK_SETTINGS, "1")},
        url=f"{address}:{numbers[f'{name}-node-manager']}",
        log=root / "logs" / f"{name}.log",
        ports=(),
        is_ready=lambda: bool(_nodes_at(address, head) - before),
        start_seconds=head.start_seconds,
        starts=head.starts,
        unset=head.unset,
    )


def _nodes_at(address: str, head: Service) -> set[str]:
    """Ids of the nodes that the head lists as alive at this address; none when it does not answer."""
    token = Path(head.settings["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
    answer = service.get(f"{head.url}/nodes?view=summary", {"Authorization": f"Bearer {token}"})
    nodes = json.loads(answer or b"{}").get("data", {}).get("summary", [])
    raylets = [node.get("raylet", {}) for node in nodes if node.get("ip") == address]
    return {raylet["nodeId"] for raylet in raylets if raylet.get("state") == "ALIVE"}
