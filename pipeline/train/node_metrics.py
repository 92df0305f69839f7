"""System metrics of a training's nodes: one worker of each reads its load, and nothing of it can fail the training."""

import logging
from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager

from pipeline.config.tracking import TrackConfig
from pipeline.errors import UserError
from pipeline.tracking import Spool, SystemSampler, spool_of

log = logging.getLogger(__name__)
LONGEST_CLOSE_SECONDS = 5.0


@contextmanager
def log_node_metrics(
    tracking_uri: str | None,
    run_id: str | None,
    node: str | None,
    started_seconds: float,
    config: TrackConfig,
) -> Generator[None]:
    """Read this node's load while inside, through a spool of its own, as charts named `system/<node>/…`.

    node: its name, on the one worker that reads; None on the others. started_seconds: Unix time of the run's first
    start, which the charts count from.
    """
    interval = config.system_metrics_seconds
    with ExitStack() as stack:
        if run_id is not None and node is not None and interval is not None:
            try:
                spool = Spool(
                    spool_of(run_id, node),
                    tracking_uri,
                    run_id,
                    send_interval_seconds=interval,
                    heartbeat_seconds=config.heartbeat_seconds,
                )
            except (OSError, UserError) as error:
                log.warning("no system metrics of %s: %s", node, error)
            else:
                stack.callback(spool.close, min(LONGEST_CLOSE_SECONDS, config.close_timeout_seconds))
                sampler = SystemSampler(
                    spool, started_seconds=started_seconds, node=node, interval_seconds=interval
                )
                stack.enter_context(closing(sampler))
        yield
