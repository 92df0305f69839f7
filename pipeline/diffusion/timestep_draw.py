"""Which timesteps a training draws, and how often."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from ddpm_pipeline.config.diffusion import ObjectiveConfig, TimestepsConfig
from ddpm_pipeline.diffusion.noise import Stream, randint
from ddpm_pipeline.diffusion.objective import loss_weight
from ddpm_pipeline.diffusion.schedule import NoiseSchedule

_DRAWS = 2**31


@dataclass(frozen=True)
class TimestepDraw:
    """Draws a timestep for each position in the global order, on any device the same.

    With importance the probability of a timestep is p(t) = w(t) / sum w, w being its weight in the objective. Then the
    expectation of mean(w) * error over p is that of w(t) * error over equally likely timesteps.
    """

    config: TimestepsConfig
    schedule: NoiseSchedule
    objective: ObjectiveConfig
    global_batch: int

    @cached_property
    def weight(self) -> float | None:
        """Of every error, with importance: the mean of the objective's. None = the objective's by timestep."""
        return sum(self._weights) / self.schedule.T if self.config.importance else None

    @cached_property
    def thresholds(self) -> Tensor:
        """2^31 times the probability of a timestep up to this one, int64 (T,) on the schedule's device."""
        sums = list(accumulate(self._weights))
        found = torch.tensor([round(part / sums[-1] * _DRAWS) for part in sums])
        return found.to(self.schedule.device)

    @property
    def _weights(self) -> list[float]:
        if not self.config.importance:
            return [1.0] * self.schedule.T
        timesteps = torch.arange(self.schedule.T)
        return loss_weight(self.schedule.to("cpu"), self.objective, timesteps).tolist()

    def draw(self, seed: int, positions: Tensor) -> Tensor:
        """The timestep of each position, int64 (B,) on its device, like the positions."""
        if self.config.stratified:
            # u + i / B modulo 1 for the i-th of B samples of a step, which share one u (Kingma et al. 2021, appendix I)
            shared = randint(seed, Stream.TRAIN_TIMESTEP, positions // self.global_batch, _DRAWS)
            own = positions % self.global_batch * _DRAWS // self.global_batch
            return self._timestep_of((shared + own) % _DRAWS)
        if self.config.importance:
            return self._timestep_of(randint(seed, Stream.TRAIN_TIMESTEP, positions, _DRAWS))
        return randint(seed, Stream.TRAIN_TIMESTEP, positions, self.schedule.T)

    def _timestep_of(self, numbers: Tensor) -> Tensor:
        return torch.searchsorted(self.thresholds, numbers, right=True)
