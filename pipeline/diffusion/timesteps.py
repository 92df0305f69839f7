"""Which noise levels a sampler visits, from pure noise to the clean image."""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True)
class SamplingGrid:
    """K noise levels in the order of visit, and the clean image after them.

    timesteps: K decreasing timesteps as the network gets them; fractional between the schedule's levels.
    alpha_bars: K + 1 signal powers, rising; the last is 1, the clean image.
    """

    timesteps: tuple[float, ...]
    alpha_bars: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.timesteps)

    def sigma(self, k: int) -> float:
        """Noise over signal, sqrt((1 - abar) / abar), at level k; 0 at the end, inf where there is no
        signal."""
        signal = self.alpha_bars[k]
        return math.inf if signal == 0 else math.sqrt((1 - signal) / signal)

    def half_log_snr(self, k: int) -> float:
        """lambda = log(a / s) at level k: -inf without signal, inf at the clean image."""
        signal = self.alpha_bars[k]
        if signal in (0.0, 1.0):
            return math.inf if signal else -math.inf
        return 0.5 * (math.log(signal) - math.log1p(-signal))

    def coefficients(self, k: int) -> tuple[float, float]:
        """(a, s) of x = a x0 + s eps at level k: sqrt(abar) and sqrt(1 - abar)."""
        return math.sqrt(self.alpha_bars[k]), math.sqrt(1 - self.alpha_bars[k])


def make_grid(schedule: NoiseSchedule, sampler: SamplerConfig) -> SamplingGrid:
    """The levels that `sampler` visits. Raises: ValueError naming timesteps, num_steps or spacing."""
    if sampler.timesteps is not None:
        return grid_at(schedule, list(sampler.timesteps))
    if sampler.spacing == "karras":
        return karras_grid(schedule, sampler.num_steps, sampler.karras_rho)
    spaced = trailing_timesteps if sampler.spacing == "trailing" else leading_timesteps
    return grid_at(schedule, spaced(schedule.T, sampler.num_steps))


def grid_at(schedule: NoiseSchedule, timesteps: list[int]) -> SamplingGrid:
    """The grid of any falling subset of the schedule's timesteps (improved DDPM section 4, DDIM section
    4.2)."""
    falling = all(a > b for a, b in itertools.pairwise(timesteps))
    if not timesteps or not falling or timesteps[-1] < 0 or timesteps[0] >= schedule.T:
        raise ValueError(f"timesteps must fall strictly within {schedule.T - 1}..0")
    signals: list[float] = schedule.alpha_bars[torch.tensor(timesteps)].tolist()
    return SamplingGrid(timesteps=tuple(timesteps), alpha_bars=(*signals, 1.0))


def trailing_timesteps(T: int, num_steps: int) -> list[int]:
    """T-1 first, then every T/num_steps-th, rounded (Lin et al. 2023, table 2): the first step sees pure
    noise."""
    _check_num_steps(T, num_steps)
    # round half up in integers: (T - i T/n) - 1
    return [(2 * T * (num_steps - i) + num_steps) // (2 * num_steps) - 1 for i in range(num_steps)]


def leading_timesteps(T: int, num_steps: int) -> list[int]:
    """Multiples of T // num_steps, 0 last (DDIM): the list starts below T-1, so x_T is taken for less
    noisy."""
    _check_num_steps(T, num_steps)
    return [i * (T // num_steps) for i in reversed(range(num_steps))]


def karras_grid(schedule: NoiseSchedule, num_steps: int, rho: float = 7.0) -> SamplingGrid:
    """Sigmas spaced evenly in sigma^(1/rho) between the schedule's ends (Karras et al. 2022, eq. 5).

    The network gets the fractional timestep at which its schedule has that sigma, log sigma being linear
    between entries. Raises: ValueError naming spacing for a schedule whose last sigma is infinite.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, not {num_steps}")
    sigmas = ((1 - schedule.alpha_bars) / schedule.alpha_bars).sqrt()
    if not math.isfinite(float(sigmas[-1])):
        raise ValueError(
            'spacing "karras" needs a finite last sigma; zero terminal SNR has none, use "trailing"'
        )
    place = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    ends = sigmas[-1] ** (1 / rho), sigmas[0] ** (1 / rho)
    visited = (ends[0] + place * (ends[1] - ends[0])) ** rho
    timesteps = _timestep_of(visited.log(), sigmas.log())
    signals = 1 / (1 + visited.square())
    return SamplingGrid(timesteps=tuple(timesteps.tolist()), alpha_bars=(*signals.tolist(), 1.0))


def _timestep_of(log_sigma: Tensor, table: Tensor) -> Tensor:
    """Where a rising table (T,) takes these values, between entries linearly, clipped to the ends."""
    if len(table) == 1:
        return torch.zeros_like(log_sigma)
    right = torch.searchsorted(table, log_sigma).clamp(1, len(table) - 1)
    low, high = table[right - 1], table[right]
    return (right - 1 + (log_sigma - low) / (high - low)).clamp(0, len(table) - 1)


def _check_num_steps(T: int, num_steps: int) -> None:
    if not 1 <= num_steps <= T:
        raise ValueError(f"num_steps must lie in 1..{T}, not {num_steps}")
