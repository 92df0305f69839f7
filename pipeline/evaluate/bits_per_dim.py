"""Bits per dimension on held-out images."""

import itertools

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_pipeline.config.evaluation import LikelihoodConfig
from ddpm_pipeline.config.model_card import ModelCard
from ddpm_pipeline.data.index import Index
from ddpm_pipeline.data.reading.sequential import read_sequential
from ddpm_pipeline.devices.measuring import measuring_device
from ddpm_pipeline.diffusion import NoiseSchedule, from_uint8
from ddpm_pipeline.diffusion.likelihood import bits_per_dim
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.evaluate.document import Metric
from ddpm_pipeline.parallel import HERE, MapWorkers
from ddpm_pipeline.progress import Progress, no_progress


def held_out_bits(
    net: nn.Module,
    card: ModelCard,
    index: Index,
    config: LikelihoodConfig,
    seed: int,
    progress: Progress = no_progress,
    workers: MapWorkers = HERE,
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
    bound_of = _BatchBound(net, card, pixels, labels, seed, workers.gpu)
    parts = torch.arange(len(samples)).split(config.batch_size)
    totals: list[torch.Tensor] = []
    for rows, total in zip(parts, workers.map(bound_of, parts), strict=True):
        totals.append(total)
        progress(int(rows[-1]) + 1, len(samples))
    return Metric(value=float(torch.cat(totals).mean()), n=0, n_reference=len(samples))


class _BatchBound:
    """The bound of one batch. Travels to workers with the network and the images."""

    def __init__(
        self,
        net: nn.Module,
        card: ModelCard,
        pixels: Tensor,
        labels: Tensor | None,
        seed: int,
        gpu: str | None,
    ) -> None:
        self._net, self._card, self._pixels, self._labels = net, card, pixels, labels
        self._seed, self._gpu = seed, gpu

    def __call__(self, rows: Tensor) -> Tensor:
        """Bits per dimension float64 (B,) of the images `rows` int64 (B,)."""
        device = measuring_device(self._gpu)
        bound = bits_per_dim(
            NoiseSchedule.from_config(self._card.schedule),
            self._card.objective,
            self._net.to(device),
            from_uint8(self._pixels[rows].to(device)),
            rows,
            self._seed,
            class_labels=None if self._labels is None else self._labels[rows].to(device),
        )
        return bound.total.double().cpu()
