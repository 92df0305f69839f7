"""Rank 0's record of a training: points and pictures for MLflow, through the spool, never waited for."""

import io
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.config.tracking import TrackConfig
from pipeline.tracking import Spool, spool_of

TENSOR = "diary/undelivered"
FINAL_GRID = "figures/final.png"


class RunLogger:
    """Writes to the run's spool, or nowhere on a rank that has no run to write to.

    Each checkpoint carries the points that MLflow has not got yet, so that they outlive this machine; the spool
    itself outlives this process.
    """

    def __init__(self, tracking_uri: str | None, run_id: str | None, config: TrackConfig) -> None:
        self._close_seconds = config.close_timeout_seconds
        self._spool: Spool | None = None
        if run_id is not None:
            self._spool = Spool(
                spool_of(run_id),
                tracking_uri,
                run_id,
                send_interval_seconds=config.send_interval_seconds,
                heartbeat_seconds=config.heartbeat_seconds,
            )

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Points of all charts after `step` finished steps."""
        if self._spool is not None:
            self._spool.metrics(step, values)

    def image(self, key: str, step: int, image: np.ndarray[Any, Any]) -> None:
        """A picture, uint8 (H, W) or (H, W, 3), for the run page's slider."""
        if self._spool is not None:
            self._spool.image(key, step, image)

    def final_image(self, image: np.ndarray[Any, Any]) -> None:
        """The picture that the run's description shows."""
        if self._spool is not None:
            out = io.BytesIO()
            Image.fromarray(image).save(out, format="PNG")
            self._spool.artifact(FINAL_GRID, out.getvalue())

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint carries of the diary: the points still under way, as bytes."""
        records = self._spool.undelivered() if self._spool is not None else b""
        return {TENSOR: torch.frombuffer(bytearray(records), dtype=torch.uint8)} if records else {}

    def take_over(self, tensors: Mapping[str, Tensor]) -> None:
        """Deliver the points a checkpoint carries; those MLflow has by now are not sent again."""
        if self._spool is not None and TENSOR in tensors:
            self._spool.absorb(tensors[TENSOR].reshape(-1).view(torch.uint8).numpy().tobytes())

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._spool is not None:
            self._spool.close(self._close_seconds)
