"""The nodes of a Ray cluster on which a job may place its workers."""

from collections.abc import Mapping
from typing import Any

import ray


def living_nodes(labels: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Ray's entries of the nodes that live and have these labels."""
    wanted = (labels or {}).items()
    return [node for node in ray.nodes() if node["Alive"] and wanted <= (node.get("Labels") or {}).items()]


def has_room(node: Mapping[str, Any], cpus: float, gpus: float) -> bool:
    """Whether the node, were it idle, had room for a worker that takes so much."""
    resources = node["Resources"]
    return resources.get("CPU", 0) >= cpus and resources.get("GPU", 0) >= gpus


def described(labels: Mapping[str, str] | None) -> str:
    """The nodes with these labels, for messages; "the cluster" without labels."""
    named = ", ".join(f"{name}={value}" for name, value in sorted((labels or {}).items()))
    return f"the part of the cluster that is labelled {named}" if named else "the cluster"
