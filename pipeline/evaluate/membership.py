"""Membership inference: can one tell from a model's losses which images it was trained on?

The loss-threshold attack (Yeom et al. 2018; on diffusion models Carlini et al. 2023): an image with a small loss is
taken for a training image. Its AUC is the probability that a training image has a smaller loss than a held-out one: 0.5
where losses tell nothing, 1 where the model has memorized. Stronger attacks exist, so a low value is no proof of
privacy.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_pipeline.config.evaluation import MembershipConfig
from ddpm_pipeline.config.model_card import ModelCard
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.devices.measuring import measuring_device
from ddpm_pipeline.diffusion import NoiseSchedule, from_uint8
from ddpm_pipeline.diffusion.noise import Stream, normal
from ddpm_pipeline.diffusion.objective import training_loss
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.evaluate.bootstrap import Array, BootstrapEstimate, Statistic, draws
from ddpm_pipeline.evaluate.document import Metric
from ddpm_pipeline.evaluate.model_images import ModelImages, first_images
from ddpm_pipeline.parallel import HERE, MapWorkers
from ddpm_pipeline.progress import Progress, no_progress

CONFIDENCE, RESAMPLES = 0.95, 200
"""Of the interval beside the metric of an evaluation. The gate has settings for both."""


class MembershipLosses(NamedTuple):
    """A model's mean losses, float64."""

    members: Array
    """(N,): of training images."""
    others: Array
    """(M,): of held-out images."""


def membership_losses(
    net: nn.Module,
    card: ModelCard,
    config: MembershipConfig,
    seed: int,
    progress: Progress = no_progress,
    workers: MapWorkers = HERE,
) -> MembershipLosses:
    """Losses of the first images of both data sets. UserError unless one is the training data, and the other is not."""
    members, others = load_index(config.members), load_index(config.held_out)
    if members.digest != card.data.digest:
        raise UserError(f"membership.members: {members.uri} is not the training data of the model; name that")
    if others.digest == card.data.digest:
        raise UserError(
            f"membership.held_out: {others.uri} is the training data of the model; name images that it has not seen"
        )
    losses: list[Array] = []
    first = 0  # names of the images, which with the seed decide their noise
    for field, index in (("members", members), ("held_out", others)):
        images = first_images(f"membership.{field}", index, card, config.count)
        loss_of = _BatchLoss(net, card, images, seed, first, config.num_timesteps, workers.gpu)
        parts = torch.arange(len(images.pixels)).split(config.batch_size)
        found: list[Tensor] = []
        for rows, batch in zip(parts, workers.map(loss_of, parts), strict=True):
            found.append(batch)
            progress(first + int(rows[-1]) + 1, 2 * config.count, "membership")
        losses.append(torch.cat(found).numpy())
        first += len(images.pixels)
    return MembershipLosses(*losses)


def membership_metrics(losses: MembershipLosses, seed: int) -> dict[str, Metric]:
    """The AUC with the ends of its bootstrap interval."""
    weights = list(membership_draws(losses, RESAMPLES, seed))
    estimate = BootstrapEstimate.of(membership_auc(losses), weights)
    low, high = estimate.interval(CONFIDENCE)
    count = len(losses.members) + len(losses.others)
    values = {"": estimate.value, "_low": low, "_high": high}
    return {f"membership_auc{end}": Metric(value=v, n=0, n_reference=count) for end, v in values.items()}


def membership_auc(losses: MembershipLosses) -> Statistic:
    """The AUC under weights (N + M,) of members, then held-out images. Equal losses count one half."""
    _, ranks = np.unique(np.concatenate(losses), return_inverse=True)
    num_members, num_ranks = len(losses.members), int(ranks.max()) + 1

    def statistic(weights: Array) -> float:
        of_members = np.bincount(ranks[:num_members], weights[:num_members], num_ranks)
        of_others = np.bincount(ranks[num_members:], weights[num_members:], num_ranks)
        smaller = np.cumsum(of_members) - 0.5 * of_members
        return float(smaller @ of_others / (of_members.sum() * of_others.sum()))

    return statistic


def membership_draws(losses: MembershipLosses, resamples: int, seed: int) -> Iterator[Array]:
    """Weights of each resampling: members among members, held-out images among held-out images."""
    of_members = draws(len(losses.members), resamples, seed)
    of_others = draws(len(losses.others), resamples, seed + 1)
    return (np.concatenate(pair) for pair in zip(of_members, of_others, strict=True))


def attack_timesteps(num_steps: int, number: int) -> list[int]:
    """Timesteps in the middle of `number` equal parts of the schedule's first half, where the noise leaves an image
    recognizable."""
    return [int((k + 0.5) * num_steps / 2 / number) for k in range(number)]


class _BatchLoss:
    """The mean loss of each image of a batch. Travels to workers with the network and the images."""

    def __init__(
        self,
        net: nn.Module,
        card: ModelCard,
        images: ModelImages,
        seed: int,
        first: int,
        num_timesteps: int,
        gpu: str | None,
    ) -> None:
        self._net, self._card, self._images = net, card, images
        self._seed, self._first, self._gpu = seed, first, gpu
        self._timesteps: Sequence[int] = attack_timesteps(card.schedule.num_steps, num_timesteps)

    @torch.no_grad()
    def __call__(self, rows: Tensor) -> Tensor:
        """Losses float64 (B,) of the images `rows` int64 (B,)."""
        device, (pixels, all_labels) = measuring_device(self._gpu), self._images
        net, schedule = self._net.to(device), NoiseSchedule.from_config(self._card.schedule).to(device)
        x0 = from_uint8(pixels[rows].to(device))
        labels = None if all_labels is None else all_labels[rows].to(device)
        names, total = (rows + self._first).to(device), torch.zeros(len(rows), dtype=torch.float64)
        for step, timestep in enumerate(self._timesteps):
            t = torch.full((len(rows),), timestep, dtype=torch.int64, device=device)
            noise = normal(self._seed, Stream.EVALUATE_NOISE, names, tuple(x0.shape[1:]), step=step)
            terms = training_loss(schedule, self._card.objective, net, x0, t, noise, class_labels=labels)
            total += terms.squared_error.double().cpu()
        return total / len(self._timesteps)
