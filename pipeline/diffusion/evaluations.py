"""How often a sampler evaluates the network for an image."""

from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.diffusion.schedule import NoiseSchedule
from ddpm_pipeline.diffusion.timesteps import make_grid


def network_calls(sampler: SamplerConfig) -> int:
    """Calls of the network for a batch. One call evaluates it with and without the class where guidance acts."""
    return len(sampler.levels)


def network_evaluations(schedule: NoiseSchedule, sampler: SamplerConfig) -> int:
    """Evaluations of the network for an image; guidance doubles those at the levels where it acts."""
    levels = sampler.levels
    if sampler.guidance_scale == 1.0:
        return len(levels)
    interval = sampler.guidance_interval
    if interval is None:
        return 2 * len(levels)
    grid = make_grid(schedule, sampler)
    return len(levels) + sum(interval[0] <= grid.sigma(k) <= interval[1] for k in levels)
