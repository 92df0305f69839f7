"""Images of a data set as a model takes them, to measure it on."""

import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm_pipeline.config.model_card import ModelCard
from ddpm_pipeline.data.index import Index
from ddpm_pipeline.data.reading.sequential import read_sequential
from ddpm_pipeline.errors import UserError


class ModelImages(NamedTuple):
    """Images with what the model is told of them."""

    pixels: Tensor
    """uint8 (N, C, H, W)."""
    labels: Tensor | None
    """int64 (N,); None for a model without classes."""


def first_images(field: str, index: Index, card: ModelCard, count: int) -> ModelImages:
    """The first images of a data set, at most `count`. UserError, naming the setting `field`, for images of another
    shape than the model's, and for images without the labels that it needs.
    """
    expected = (card.image.channels, card.image.size, card.image.size)
    shape = index.image
    if shape is None or (shape.channels, shape.height, shape.width) != expected:
        raise UserError(f"{field}: {index.uri} has no images of the model's shape {expected}")
    if card.net.num_classes is not None and not index.labelled:
        raise UserError(f"{field}: {index.uri} has no labels, which the model needs")
    samples = list(itertools.islice(read_sequential(index), count))
    pixels = torch.from_numpy(np.stack([sample.pixels for sample in samples]).transpose(0, 3, 1, 2).copy())
    labels = torch.tensor([sample.label for sample in samples]) if card.net.num_classes is not None else None
    return ModelImages(pixels, labels)
