"""Which timesteps a training draws, and how often."""

from dataclasses import dataclass
from typing import Self

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
    thresholds: Tensor
    """int64 (T,): 2^31 times the probability of a timestep up to this one."""
    weight: float | None
    """Of every error, with importance: the mean of the objective's. None = the objective's by timestep."""
    global_batch: int

    @classmethod
    def of(
        cls,
        schedule: NoiseSchedule,
        objective: ObjectiveConfig,
        config: TimestepsConfig,
        global_batch: int,
    ) -> Self:
        """For a training by these settings, on the schedule's device."""
        weights = torch.ones(schedule.T, dtype=torch.float64)
        if config.importance:
            weights = loss_weight(schedule.to("cpu"), objective, torch.arange(schedule.T)).double()
        thresholds = (weights.cumsum(0) / weights.sum() * _DRAWS).round().long()
        weight = float(weights.mean()) if config.importance else None
        return cls(config, thresholds.to(schedule.device), weight, global_batch)

    def draw(self, seed: int, positions: Tensor) -> Tensor:
        """The timestep of each position, int64 (B,) on its device, like the positions."""
        if self.config.stratified:
            # u + i / B modulo 1 for the i-th of B samples of a step, which share one u (Kingma et al. 2021, appendix I)
            shared = randint(seed, Stream.TRAIN_TIMESTEP, positions // self.global_batch, _DRAWS)
            own = positions % self.global_batch * _DRAWS // self.global_batch
            return self._timestep_of((shared + own) % _DRAWS)
        if self.config.importance:
            return self._timestep_of(randint(seed, Stream.TRAIN_TIMESTEP, positions, _DRAWS))
        return randint(seed, Stream.TRAIN_TIMESTEP, positions, len(self.thresholds))

    def _timestep_of(self, numbers: Tensor) -> Tensor:
        return torch.searchsorted(self.thresholds, numbers, right=True)
