"""Bits per dimension on held-out images."""

import itertools

import numpy as np
import torch

from pipeline.config.evaluation import LikelihoodConfig
from pipeline.config.model_card import ModelCard
from pipeline.data.index import Index
from pipeline.data.reading.sequential import read_sequential
from pipeline.diffusion import NoiseSchedule, from_uint8
from pipeline.diffusion.likelihood import bits_per_dim
from pipeline.errors import UserError
from pipeline.evaluate.document import Metric
from pipeline.nets import UNet
from pipeline.progress import Progress, no_progress


def held_out_bits(
    net: UNet,
    card: ModelCard,
    index: Index,
    config: LikelihoodConfig,
    seed: int,
    progress: Progress = no_progress,
) -> Metric:
    """Mean bound over the first images of a data set. UserError for the training data, or images of another shape."""
    if index.digest == card.data.digest:
        raise UserError(
            f"likelihood.data: {index.uri} is the training data of the model; set it to held-out data"
        )
    expected = (card.image.channels, card.image.size, card.image.size)
    shape = index.image
    if shape is None or (shape.channels, shape.height, shape.width) != expected:
        raise UserError(f"likelihood.data: {index.uri} has no images of the model's shape {expected}")
    samples = list(itertools.islice(read_sequential(index), config.count))
    pixels = torch.from_numpy(np.stack([sample.pixels for sample in samples]).transpose(0, 3, 1, 2).copy())
    labels = torch.tensor([sample.label for sample in samples]) if card.net.num_classes is not None else None
    if labels is not None and not index.labelled:
        raise UserError(f"likelihood.data: {index.uri} has no labels, which the model needs")
    schedule = NoiseSchedule.from_config(card.schedule)
    totals: list[torch.Tensor] = []
    for rows in torch.arange(len(samples)).split(config.batch_size):
        classes = None if labels is None else labels[rows]
        bound = bits_per_dim(
            schedule, card.objective, net, from_uint8(pixels[rows]), rows, seed, class_labels=classes
        )
        totals.append(bound.total.double())
        progress(int(rows[-1]) + 1, len(samples))
    return Metric(value=float(torch.cat(totals).mean()), n=0, n_reference=len(samples))
