"""A schedule."""

import torch

from ddpm_pipeline.diffusion import NoiseSchedule
from tiny_dit.doors import ScheduleSettings


def quadratic(num_steps: int, settings: ScheduleSettings) -> NoiseSchedule:
    """Betas that grow with the square of the step."""
    place = (torch.arange(num_steps, dtype=torch.float64) + 1) / num_steps
    return NoiseSchedule.given(settings.last * place.square())
