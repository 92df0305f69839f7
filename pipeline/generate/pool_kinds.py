"""The kinds of a pool's GPUs: which one a generation is made on, and which nodes have it."""

import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.config.device_kind import DeviceKind
from pipeline.errors import UserError
from pipeline.generate.device_check import UnfitDevice, other_kind, usable_kind
from pipeline.generate.stored_generation import Generation

NODE_LABEL = "ray.io/node-id"
TYPE_LABEL = "ray.io/accelerator-type"
ANSWER_SECONDS = 30.0
"""How long nodes are waited for once one has answered; later ones are busy, and their workers check themselves."""
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class PoolGpu:
    """The GPUs of one node, as one of them described itself to a task."""

    node: str
    """Ray's id of the node."""
    kind: DeviceKind | None
    """None if torch cannot use it."""
    fault: str | None = None
    """Why torch cannot use it."""
    count: float = 1.0
    """GPUs of the node."""
    type_label: str | None = None
    """Ray's name for the type of GPU, such as `A100`: it tells fewer kinds apart than `kind`."""


def ask_pool(gpus_per_worker: float, stop: threading.Event) -> list[PoolGpu]:
    """The GPUs of the nodes that have room for a worker: a task on each looks.

    Waits until one has answered, also for a node that the cluster has yet to add; empty once `stop` is set.
    """
    nodes = {
        str(node["NodeID"]): node
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("GPU", 0) >= gpus_per_worker
    }
    share = min(1.0, gpus_per_worker)
    pending: list[Any] = [_look_at(share, node) for node in nodes] or [_look_at(share, None)]
    found: list[PoolGpu] = []
    seconds_left = ANSWER_SECONDS
    while pending and not stop.is_set() and seconds_left > 0:
        done, pending = ray.wait(pending, timeout=_POLL_SECONDS)
        found += [gpu for reference in done if (gpu := _answer(reference)) is not None]
        seconds_left -= _POLL_SECONDS if found and not done else 0
    for reference in pending:
        ray.cancel(reference)
    return [_with_node(gpu, nodes.get(gpu.node)) for gpu in found]


def _look_at(share: float, node: str | None) -> Any:
    place = "DEFAULT" if node is None else NodeAffinitySchedulingStrategy(node, soft=False)
    task: Any = ray.remote(_look)
    return task.options(num_cpus=0, num_gpus=share, max_retries=0, scheduling_strategy=place).remote()


def _look() -> PoolGpu:
    node = ray.get_runtime_context().get_node_id()
    try:
        return PoolGpu(node, usable_kind(torch.device("cuda")))
    except UnfitDevice as error:
        return PoolGpu(node, None, str(error))


def _answer(reference: Any) -> PoolGpu | None:
    """None if the node was lost meanwhile."""
    try:
        return ray.get(reference)
    except RayError:
        return None


def _with_node(gpu: PoolGpu, node: dict[str, Any] | None) -> PoolGpu:
    if node is None:  # added since
        return gpu
    label = (node.get("Labels") or {}).get(TYPE_LABEL)
    return replace(gpu, count=node["Resources"]["GPU"], type_label=label)


def most_common_kind(gpus: Sequence[PoolGpu]) -> DeviceKind:
    """The kind of most GPUs; of equally many, the first by name. UserError if torch can use none."""
    counts: defaultdict[DeviceKind, float] = defaultdict(float)
    for gpu in gpus:
        if gpu.kind is not None:
            counts[gpu.kind] += gpu.count
    if not counts:
        fault = next((gpu.fault for gpu in gpus if gpu.fault), "the node that was asked has gone; try again")
        raise UserError(f"gpus_per_worker: {fault}")
    return min(counts, key=lambda kind: (-counts[kind], str(kind)))


def require_some(kind: DeviceKind, gpus: Sequence[PoolGpu]) -> None:
    """UserError, naming both kinds, if no GPU of the pool is of this one."""
    if not any(gpu.kind == kind for gpu in gpus):
        raise UserError(other_kind(kind, most_common_kind(gpus)))


def selector_of(kind: DeviceKind | None, gpus: Sequence[PoolGpu]) -> dict[str, str]:
    """Ray's label selector for the nodes whose GPUs are of this kind, and for nodes that have yet to be asked.

    Nodes that are known to be of another kind are left out by their id, and other types of GPU by their label.
    """
    if kind is None:
        return {}
    selector: dict[str, str] = {}
    unfit = sorted(gpu.node for gpu in gpus if gpu.kind != kind)
    if unfit:
        selector[NODE_LABEL] = f"!in({', '.join(unfit)})"
    labels = {gpu.type_label for gpu in gpus if gpu.kind == kind}
    if labels and None not in labels:
        selector[TYPE_LABEL] = f"in({', '.join(sorted(label for label in labels if label))})"
    return selector


def with_kind(generation: Generation, kind: DeviceKind | None) -> Generation:
    """The same generation on that kind of GPU; on a CPU, `generation`."""
    if generation.spec.device == "cpu" or kind is None:
        return generation
    return Generation(generation.store, generation.spec.model_copy(update={"device_kind": kind}))
