"""What a sampler is given and what it promises: the door for samplers of other packages.

docs/extending.md has an example.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ddpm_pipeline.diffusion.timesteps import SamplingGrid


class Denoised(NamedTuple):
    """What a network makes of x at one level. All (B, C, H, W)."""

    x0: Tensor
    eps: Tensor
    fraction: Tensor | None = None
    """Where the variance is learned: the place of the log variance between the posterior's (0) and beta's
    (1)."""


class SamplerStep(NamedTuple):
    """What a callback sees before step k of `num_steps`: x at this level and the image the network sees in
    it."""

    k: int
    num_steps: int
    timestep: float
    alpha_bar: float
    x: Tensor
    x0: Tensor


class Denoise(Protocol):
    """The estimate at x (B, C, H, W) of level k of the grid in use."""

    def __call__(self, x: Tensor, k: int, /) -> Denoised: ...


NoiseOf = Callable[[int], Tensor]
OnStep = Callable[[SamplerStep], None]


class Sampler(Protocol):
    """What a kind of sampler does, ours or another package's: from noise x (B, C, H, W) at the first level of `grid` to
    images of that shape.

    Image i follows from row i of `x`, of `noise` and of what `denoise` returns, and from nothing else: no generator of
    random numbers, no mean over the batch, nothing remembered. So a sample is the same in whatever batch it travels.

    denoise(x, k): the network's estimate at level k of the grid, guidance and clipping included. noise(k): standard
    normal like x, named by seed, sample and k; the same at each call with the same k. settings: of the plug-in's own
    class (of our kinds, the `SamplerConfig`). on_step: to be called before each step, if it is not None.
    """

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        grid: SamplingGrid,
        noise: NoiseOf,
        settings: Any,
        on_step: OnStep | None,
        /,
    ) -> Tensor: ...


class Solver(Protocol):
    """A deterministic sampler without settings of its own; arguments as those of `Sampler`."""

    def __call__(
        self, denoise: Denoise, x: Tensor, grid: SamplingGrid, on_step: OnStep | None = None, /
    ) -> Tensor: ...


def as_sampler(solver: Solver) -> Sampler:
    """A solver as a `Sampler`, which draws no noise."""

    def run(
        denoise: Denoise,
        x: Tensor,
        grid: SamplingGrid,
        noise: NoiseOf,
        settings: Any,
        on_step: OnStep | None,
        /,
    ) -> Tensor:
        return solver(denoise, x, grid, on_step)

    return run


def estimate_at(denoise: Denoise, x: Tensor, k: int, grid: SamplingGrid, on_step: OnStep | None) -> Denoised:
    """The estimate at x of level k, of which `on_step` is told; for the first look at a level."""
    estimate = denoise(x, k)
    if on_step is not None:
        on_step(SamplerStep(k, len(grid), grid.timesteps[k], grid.alpha_bars[k], x, estimate.x0))
    return estimate
