"""Bits per dimension on held-out images."""

import torch
from torch import Tensor, nn

from ddpm_pipeline.config.evaluation import LikelihoodConfig
from ddpm_pipeline.config.model_card import ModelCard
from ddpm_pipeline.data.index import Index
from ddpm_pipeline.devices.measuring import measuring_device
from ddpm_pipeline.diffusion import NoiseSchedule, from_uint8
from ddpm_pipeline.diffusion.likelihood import bits_per_dim
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.evaluate.document import Metric
from ddpm_pipeline.evaluate.model_images import ModelImages, first_images
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
    images = first_images("likelihood.data", index, card, config.count)
    bound_of = _BatchBound(net, card, images, seed, workers.gpu)
    count = len(images.pixels)
    parts = torch.arange(count).split(config.batch_size)
    totals: list[torch.Tensor] = []
    for rows, total in zip(parts, workers.map(bound_of, parts), strict=True):
        totals.append(total)
        progress(int(rows[-1]) + 1, count)
    return Metric(value=float(torch.cat(totals).mean()), n=0, n_reference=count)


class _BatchBound:
    """The bound of one batch. Travels to workers with the network and the images."""

    def __init__(
        self,
        net: nn.Module,
        card: ModelCard,
        images: ModelImages,
        seed: int,
        gpu: str | None,
    ) -> None:
        self._net, self._card, self._images, self._seed, self._gpu = net, card, images, seed, gpu

    def __call__(self, rows: Tensor) -> Tensor:
        """Bits per dimension float64 (B,) of the images `rows` int64 (B,)."""
        device, (pixels, labels) = measuring_device(self._gpu), self._images
        bound = bits_per_dim(
            NoiseSchedule.from_config(self._card.schedule),
            self._card.objective,
            self._net.to(device),
            from_uint8(pixels[rows].to(device)),
            rows,
            self._seed,
            class_labels=None if labels is None else labels[rows].to(device),
        )
        return bound.total.double().cpu()
