"""Whether the nodes of a cluster can do the work of a training."""

import threading

from ddpm_pipeline.cluster import Workers, grows, require_fit_workers, require_plugins_on_nodes
from ddpm_pipeline.config.training import TrainConfig
from ddpm_pipeline.train.fit_machine import GPUS_SETTING

_BUSY_SECONDS = 180.0
"""For a GPU to become free and answer: the training itself then waits for all that it needs, and says so."""
_NEW_NODE_SECONDS = 900.0


def require_fit_cluster(config: TrainConfig, stop: threading.Event) -> None:
    """UserError if some node that workers may be placed on lacks a plug-in, or its GPU cannot do the work."""
    asked = config.workers
    require_plugins_on_nodes(asked.cpus_per_worker, asked.gpus_per_worker, asked.node_labels, config)
    workers = Workers(
        asked.cpus_per_worker,
        asked.gpus_per_worker,
        gpus_setting=GPUS_SETTING,
        nccl=asked.most > 1,
        compile=config.compile,
        labels=asked.node_labels,
    )
    require_fit_workers(workers, stop, _NEW_NODE_SECONDS if grows() else _BUSY_SECONDS)
