"""The check of a cluster's nodes for the plug-ins of a job, before work is placed there."""

from collections.abc import Mapping
from typing import Any

import ray
from pydantic import BaseModel
from ray.exceptions import RayError

from ddpm_pipeline.cluster.nodes import has_room, living_nodes
from ddpm_pipeline.cluster.placement import on_node
from ddpm_pipeline.config.plugins import identities, require_plugins
from ddpm_pipeline.errors import UserError

_ANSWER_SECONDS = 60.0


def require_plugins_on_nodes(
    cpus: float, gpus: float, labels: Mapping[str, str], *documents: BaseModel
) -> None:
    """UserError, in one line, for a node with these labels and room for a worker that lacks a plug-in of the documents.

    Every node is asked, but not waited for longer than a minute: workers check it too. Nothing is asked of a cluster
    where no plug-in is used.
    """
    if not identities(*documents):
        return
    nodes = [node for node in living_nodes(labels) if has_room(node, cpus, gpus)]
    task: Any = ray.remote(_fault)
    asked = {
        task.options(
            name="plug-ins",
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=on_node(node["NodeID"]),
        ).remote(documents): node
        for node in nodes
    }
    done, slow = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_SECONDS) if asked else ([], [])
    for reference in slow:
        ray.cancel(reference)
    for reference in done:
        try:
            fault: str | None = ray.get(reference)
        except RayError:
            continue  # the node was lost meanwhile
        if fault is not None:
            raise UserError(f"{fault} (on node {asked[reference]['NodeManagerAddress']})")


def _fault(documents: tuple[BaseModel, ...]) -> str | None:
    """What is missing here, in one line."""
    try:
        require_plugins(*documents)
    except UserError as error:
        return str(error)
    return None
