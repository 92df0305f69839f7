"""Pictures of fixed seeds, so that the grids of a run differ by the training only."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.diffusion import sample, to_uint8
from pipeline.train.loop import Trainer
from pipeline.train.state import TrainState

SHORTEST_EDGE = 256
"""Pixels; a smaller grid is enlarged, or the run page would show it as a stamp."""


def draw_grid(trainer: Trainer, state: TrainState) -> np.ndarray[Any, Any]:
    """A grid of images from the averaged weights, uint8 (H, W) or (H, W, 3)."""
    config = trainer.config
    index = torch.arange(config.grid.count, device=trainer.device)
    labels = index % config.net.num_classes if config.net.num_classes is not None else None
    net = state.averaged()
    x0 = sample(
        net,
        trainer.schedule,
        config.grid.sampler,
        index,
        (net.config.in_channels, net.config.image_size, net.config.image_size),
        config.seed,
        class_labels=labels,
        objective=config.objective,
    )
    return tile(to_uint8(x0), columns=config.net.num_classes)


def tile(images: Tensor, columns: int | None = None) -> np.ndarray[Any, Any]:
    """Lay images, uint8 (B, C, H, W), out in rows of `columns` (by default about a square), enlarged by whole
    pixels to a picture with no edge under 256, uint8 (H', W') or (H', W', 3)."""
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    canvas = torch.full(
        (channels, rows * (height + 1) + 1, columns * (width + 1) + 1), 255, dtype=torch.uint8
    )
    for i, image in enumerate(images.cpu()):
        top, left = (i // columns) * (height + 1) + 1, (i % columns) * (width + 1) + 1
        canvas[:, top : top + height, left : left + width] = image
    scale = max(1, -(-SHORTEST_EDGE // min(canvas.shape[1:])))
    canvas = canvas.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    return canvas.squeeze(0).numpy() if channels == 1 else canvas.permute(1, 2, 0).numpy()
