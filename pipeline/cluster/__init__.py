"""What jobs ask of a Ray cluster before they place work on it, and how they report Ray's errors."""

from ddpm_pipeline.cluster.draining import draining_nodes
from ddpm_pipeline.cluster.gpus import (
    GROWS_VARIABLE,
    TYPE_LABEL,
    NodeReport,
    Workers,
    ask_nodes,
    check_every_gpu,
    grows,
    require_fit_workers,
    unfit_message,
)
from ddpm_pipeline.cluster.node_plugins import require_plugins_on_nodes
from ddpm_pipeline.cluster.placement import on_node
from ddpm_pipeline.cluster.ray_errors import cause_of, reason_line

__all__ = [
    "GROWS_VARIABLE",
    "TYPE_LABEL",
    "NodeReport",
    "Workers",
    "ask_nodes",
    "cause_of",
    "check_every_gpu",
    "draining_nodes",
    "grows",
    "on_node",
    "reason_line",
    "require_fit_workers",
    "require_plugins_on_nodes",
    "unfit_message",
]
