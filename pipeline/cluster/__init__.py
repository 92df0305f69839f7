"""What jobs ask of a Ray cluster before they place work on it, and how they report Ray's errors.

The names of `__all__` are imported when they are first used, so that an actor that computes nothing loads no torch.
"""

from typing import TYPE_CHECKING

from ddpm_pipeline.lazy_names import lazy_names

if TYPE_CHECKING:
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
    from ddpm_pipeline.cluster.nodes import described, living_nodes
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
    "described",
    "draining_nodes",
    "grows",
    "living_nodes",
    "on_node",
    "reason_line",
    "require_fit_workers",
    "require_plugins_on_nodes",
    "unfit_message",
]

__getattr__ = lazy_names(
    __name__,
    {
        "ddpm_pipeline.cluster.draining": ("draining_nodes",),
        "ddpm_pipeline.cluster.gpus": (
            "GROWS_VARIABLE",
            "TYPE_LABEL",
            "NodeReport",
            "Workers",
            "ask_nodes",
            "check_every_gpu",
            "grows",
            "require_fit_workers",
            "unfit_message",
        ),
        "ddpm_pipeline.cluster.node_plugins": ("require_plugins_on_nodes",),
        "ddpm_pipeline.cluster.nodes": ("described", "living_nodes"),
        "ddpm_pipeline.cluster.placement": ("on_node",),
        "ddpm_pipeline.cluster.ray_errors": ("cause_of", "reason_line"),
    },
)
