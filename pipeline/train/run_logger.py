"""Logging of a training to MLflow through the spool: metrics and images of rank 0, system metrics of each node."""

import io
import logging
from collections.abc import Generator, Mapping
from contextlib import ExitStack, closing, contextmanager
from types import TracebackType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddpm_pipeline.config.tracking import TrackConfig
from ddpm_pipeline.devices.nvml import visible_gpus
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.tracking import Spool, SystemSampler, spool_of

log = logging.getLogger(__name__)
LONGEST_CLOSE_SECONDS = 5.0

UNDELIVERED = "diary/undelivered"
FINAL_GRID = "figures/final.png"


class RunLogger:
    """Writes to the run's spool without waiting for MLflow; does nothing on a rank without a run.

    Each checkpoint carries the points that are not delivered yet, so that they survive this machine; the spool itself
    survives this process.
    """

    def __init__(
        self, tracking_uri: str | None, run_id: str | None, config: TrackConfig, name: str = ""
    ) -> None:
        """`name`: of the run, for its mirrors."""
        self._close_seconds = config.close_timeout_seconds
        self._spool: Spool | None = None
        if run_id is not None:
            self._spool = Spool(
                spool_of(run_id),
                tracking_uri,
                run_id,
                send_interval_seconds=config.send_interval_seconds,
                heartbeat_seconds=config.heartbeat_seconds,
                name=name,
                mirrors=config.mirrors,
            )

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics after `step` finished steps."""
        if self._spool is not None:
            self._spool.metrics(step, values)

    def image(self, key: str, step: int, image: np.ndarray[Any, Any]) -> None:
        """An image, uint8 (H, W) or (H, W, 3), for the run page's step slider."""
        if self._spool is not None:
            self._spool.image(key, step, image)

    def final_image(self, image: np.ndarray[Any, Any]) -> None:
        """The image that the run's description shows."""
        if self._spool is not None:
            out = io.BytesIO()
            Image.fromarray(image).save(out, format="PNG")
            self._spool.artifact(FINAL_GRID, out.getvalue())

    def tags(self, tags: Mapping[str, str]) -> None:
        """Tags of the run; a later value replaces an earlier one."""
        if self._spool is not None:
            self._spool.tags(tags)

    def tensors(self) -> dict[str, Tensor]:
        """For the checkpoint: the undelivered points, as bytes."""
        records = self._spool.undelivered() if self._spool is not None else b""
        return {UNDELIVERED: torch.frombuffer(bytearray(records), dtype=torch.uint8)} if records else {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Deliver the points that a checkpoint carries; those that MLflow has by now are not sent again."""
        if self._spool is not None and UNDELIVERED in tensors:
            self._spool.restore(tensors[UNDELIVERED].reshape(-1).view(torch.uint8).numpy().tobytes())

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._spool is not None:
            self._spool.close(self._close_seconds)


@contextmanager
def log_node_metrics(
    tracking_uri: str | None,
    run_id: str | None,
    node: str | None,
    started_seconds: float,
    config: TrackConfig,
    on_gpus: bool = False,
) -> Generator[None]:
    """Log this node's load while inside, through a spool of its own, as metrics named `system/<node>/…`.

    node: its name, on the one worker that reads it; None on the others. started_seconds: Unix time of the run's first
    start, the origin of the charts. on_gpus: whether the training uses the visible GPUs. A failure here is logged and
    never fails the training.
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
                    spool,
                    started_seconds=started_seconds,
                    node=node,
                    interval_seconds=interval,
                    gpus=visible_gpus() if on_gpus else (),
                )
                stack.enter_context(closing(sampler))
        yield
