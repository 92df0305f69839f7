"""Runs a sampler of another package, and holds it to what its package says: which calls it makes, and no randomness of
its own.
"""

from collections import Counter

import torch
from torch import Tensor

from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.diffusion.sampler_protocol import Denoise, Denoised, NoiseOf, OnStep, Sampler
from ddpm_pipeline.diffusion.timesteps import SamplingGrid
from ddpm_pipeline.errors import UserError


class _Counting:
    """A `Denoise` that remembers at which levels it was called."""

    def __init__(self, denoise: Denoise) -> None:
        self._denoise = denoise
        self.levels: Counter[int] = Counter()

    def __call__(self, x: Tensor, k: int, /) -> Denoised:
        self.levels[k] += 1
        return self._denoise(x, k)


def run_checked(
    run: Sampler,
    denoise: Denoise,
    x: Tensor,
    grid: SamplingGrid,
    noise: NoiseOf,
    sampler: SamplerConfig,
    on_step: OnStep | None,
) -> Tensor:
    """Images (B, C, H, W). UserError for a sampler that breaks a promise of `Sampler` or of its `SamplerPlugin`."""
    counting = _Counting(denoise)
    before = _generator_state(x)
    images = run(counting, x, grid, noise, sampler.options, on_step)
    name = f"sampler {sampler.kind!r} ({sampler.plugin})"
    if counting.levels != Counter(sampler.levels):
        raise UserError(
            f"{name}: its SamplerPlugin says {len(sampler.levels)} calls of the network, and it made "
            f"{counting.levels.total()}, or at other levels; correct `levels`, by which images are priced"
        )
    if images.shape != x.shape:
        raise UserError(
            f"{name}: returned {tuple(images.shape)} for noise of {tuple(x.shape)}; return images like it"
        )
    if not torch.equal(before, _generator_state(x)):
        raise UserError(
            f"{name}: drew from torch's generator, so its images would depend on what was drawn before; use noise(k)"
        )
    return images


def _generator_state(x: Tensor) -> Tensor:
    """Of the generator that random functions of torch use on x's device; nothing while a CUDA graph is captured."""
    if x.device.type != "cuda":
        return torch.get_rng_state()
    return torch.empty(0) if torch.cuda.is_current_stream_capturing() else torch.cuda.get_rng_state(x.device)
