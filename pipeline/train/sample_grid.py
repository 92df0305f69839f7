"""Pictures of fixed seeds, so that the grids of a run differ by the training only."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.diffusion import sample, to_uint8
from pipeline.diffusion.image_scaling import tile
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
    columns = config.net.num_classes or math.ceil(math.sqrt(config.grid.count))
    return enlarge(tile(to_uint8(x0), columns).cpu())


def enlarge(picture: Tensor) -> np.ndarray[Any, Any]:
    """A picture, uint8 (C, H, W), by whole pixels until no edge is short: uint8 (H', W') or (H', W', 3)."""
    scale = max(1, -(-SHORTEST_EDGE // min(picture.shape[1:])))
    large = picture.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    return large.squeeze(0).numpy() if len(large) == 1 else large.permute(1, 2, 0).numpy()
