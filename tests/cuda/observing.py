"""What a check of the simulated device looks at: tensors on the host, and what was logged."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from tests.cuda.simulated_device import SimulatedTensor

import torch  # isort: skip


def on_host(tensor: Any) -> torch.Tensor:
    return tensor.inner if isinstance(tensor, SimulatedTensor) else tensor


@contextlib.contextmanager
def cuda_graph_warnings() -> Iterator[list[str]]:
    """What is logged about CUDA graphs meanwhile."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ddpm_pipeline.devices.cuda_graph")
    logger.addHandler(handler)
    try:
        yield told
    finally:
        logger.removeHandler(handler)
