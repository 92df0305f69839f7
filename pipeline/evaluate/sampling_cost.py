"""What a model's samples cost while the gate draws them: network evaluations, and images a second of the device."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.config.evaluation import WARM_UP_BATCHES, GateConfig
from ddpm_pipeline.config.model_card import ModelCard
from ddpm_pipeline.diffusion import NoiseSchedule
from ddpm_pipeline.diffusion.evaluations import network_evaluations
from ddpm_pipeline.evaluate.bootstrap import BootstrapEstimate, Statistic, draws


@dataclass
class BatchTimes:
    """Device time of the batches of one model, in the order in which they were sampled."""

    images: list[int] = field(default_factory=list[int])
    seconds: list[float] = field(default_factory=list[float])

    def add(self, images: int, seconds: float) -> None:
        """Add a batch."""
        self.images.append(images)
        self.seconds.append(seconds)

    def steady(self, batch_size: int) -> "BatchTimes":
        """Without the first batches, in which kernels are chosen and captured, and without one that is not full."""
        timed = zip(self.images[WARM_UP_BATCHES:], self.seconds[WARM_UP_BATCHES:], strict=True)
        full = [(images, seconds) for images, seconds in timed if images == batch_size]
        return BatchTimes([images for images, _ in full], [seconds for _, seconds in full])

    def __len__(self) -> int:
        return len(self.images)

    def images_per_second(self) -> Statistic:
        """From weights of the batches to images per device second: all images over all seconds."""
        images, seconds = (np.array(values, dtype=np.float64) for values in (self.images, self.seconds))
        return lambda weights: float(weights @ images / (weights @ seconds))


class SamplingCost(Settings):
    """Cost of one model's samples."""

    sampler: SamplerConfig
    """The sampler that drew them."""
    evaluations_per_image: int
    """Evaluations of the network for an image, exactly."""
    images_per_device_second: float | None = None
    """Measured while the gate sampled; None with too few full batches."""
    images_per_device_second_interval: tuple[float, float] | None = None
    """Its confidence interval, from resampled batches."""


def evaluations_of(card: ModelCard, sampler: SamplerConfig) -> int:
    """Evaluations of the network for an image of the model with this card."""
    return network_evaluations(NoiseSchedule.from_config(card.schedule), sampler)


def sampling_cost(
    sampler: SamplerConfig, evaluations_per_image: int, times: BatchTimes, config: GateConfig
) -> SamplingCost:
    """Cost of samples whose full batches took `times`."""
    if not len(times):
        return SamplingCost(sampler=sampler, evaluations_per_image=evaluations_per_image)
    speed = BootstrapEstimate.of(times.images_per_second(), batch_weights(len(times), config))
    return SamplingCost(
        sampler=sampler,
        evaluations_per_image=evaluations_per_image,
        images_per_device_second=speed.value,
        images_per_device_second_interval=speed.interval(config.confidence),
    )


def batch_weights(count: int, config: GateConfig) -> Sequence[npt.NDArray[np.float64]]:
    """Weights (count,) of the batches in each resampling."""
    return list(draws(count, config.resamples, config.seed))
