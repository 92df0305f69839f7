"""Samplers: one that keeps its promises, and one that does not."""

from typing import Any

import torch
from torch import Tensor

from ddpm_pipeline.diffusion.sampler_protocol import Denoise, NoiseOf, OnStep, estimate_at
from ddpm_pipeline.diffusion.timesteps import SamplingGrid


def second_order(
    denoise: Denoise, x: Tensor, grid: SamplingGrid, noise: NoiseOf, settings: Any, on_step: OnStep | None
) -> Tensor:
    """DDIM whose noise estimate is extrapolated from the last two levels (Adams and Bashforth's second order)."""
    before: Tensor | None = None
    for k in range(len(grid)):
        estimate = estimate_at(denoise, x, k, grid, on_step)
        (a, s), (a_after, s_after) = grid.coefficients(k), grid.coefficients(k + 1)
        eps = estimate.eps if before is None else 1.5 * estimate.eps - 0.5 * before
        x = estimate.x0 if k + 1 == len(grid) else a_after / a * (x - s * eps) + s_after * eps
        before = estimate.eps
    return x


def careless(
    denoise: Denoise, x: Tensor, grid: SamplingGrid, noise: NoiseOf, settings: Any, on_step: OnStep | None
) -> Tensor:
    """Draws from torch's generator, so its images depend on what was drawn before."""
    for k in range(len(grid)):
        x = denoise(x, k).x0 + 0.1 * torch.randn_like(x)
    return x
