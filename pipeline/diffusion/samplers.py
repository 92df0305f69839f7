"""The reverse process. Each sampler is a function from noise x_T to an image, over a grid of noise levels.

A sampler needs a `Denoise`: given x and the number k of a grid level, what image, what noise? `sample` builds
one around a network and names every random number: x_T is (seed, SAMPLE_NOISE, index, step 0), the noise
added on leaving the k-th visited level (k = 0, 1, ...) is that of step k + 1.
"""

import math

import torch
from torch import Tensor

from ddpm_pipeline.config.diffusion import ObjectiveConfig, SamplerConfig, Variance
from ddpm_pipeline.config.plugins import SAMPLERS, is_own
from ddpm_pipeline.devices import divided
from ddpm_pipeline.diffusion.checked_sampler import run_checked
from ddpm_pipeline.diffusion.guidance import guided_output
from ddpm_pipeline.diffusion.noise import Stream, normal
from ddpm_pipeline.diffusion.objective import Net, split_output
from ddpm_pipeline.diffusion.sampler_protocol import (
    Denoise,
    Denoised,
    NoiseOf,
    OnStep,
    Sampler,
    as_sampler,
    estimate_at,
)
from ddpm_pipeline.diffusion.schedule import NoiseSchedule
from ddpm_pipeline.diffusion.targets import eps_of, x0_of
from ddpm_pipeline.diffusion.timesteps import SamplingGrid, make_grid


def ancestral(
    denoise: Denoise,
    x: Tensor,
    grid: SamplingGrid,
    noise: NoiseOf,
    variance: Variance = "fixed-small",
    on_step: OnStep | None = None,
) -> Tensor:
    """DDPM's chain (Ho et al. 2020, algorithm 2) on any subset of steps (improved DDPM, section 4).

    Beta of a step is 1 - abar_t / abar_s with the levels really left (t) and entered (s), never the table's.
    noise(k): standard normal like x for the step that leaves level k; not called at the last.
    """
    for k in range(len(grid)):
        estimate = estimate_at(denoise, x, k, grid, on_step)
        now, after = grid.alpha_bars[k], grid.alpha_bars[k + 1]
        keep = now / after
        beta = 1 - keep
        of_x0 = math.sqrt(after) * beta / (1 - now)
        of_x = math.sqrt(keep) * (1 - after) / (1 - now)
        x = of_x0 * estimate.x0 + of_x * x
        if k + 1 < len(grid):
            small = beta * (1 - after) / (1 - now)
            x = x + _reverse_std(variance, small, beta, estimate) * noise(k)
    return x


def ddim(
    denoise: Denoise,
    x: Tensor,
    grid: SamplingGrid,
    noise: NoiseOf | None = None,
    eta: float = 0.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12 and 16); eta 0 is deterministic and never calls `noise`."""
    if eta > 0 and noise is None:
        raise ValueError("noise is needed where eta is above 0")
    for k in range(len(grid)):
        estimate = estimate_at(denoise, x, k, grid, on_step)
        now, after = grid.alpha_bars[k], grid.alpha_bars[k + 1]
        std = eta * math.sqrt((1 - after) / (1 - now)) * math.sqrt(1 - now / after)
        # Where all noise is fresh, rounding could leave the rest an ulp below zero.
        rest = math.sqrt(max(0.0, 1 - after - std**2))
        x = math.sqrt(after) * estimate.x0 + rest * estimate.eps
        if noise is not None and std > 0:
            x = x + std * noise(k)
    return x


def heun(denoise: Denoise, x: Tensor, grid: SamplingGrid, on_step: OnStep | None = None) -> Tensor:
    """Heun's second-order method on dx/dsigma = (x - D) / sigma (Karras et al. 2022, algorithm 1 without
    churn).

    Works on x / a, whose noise is sigma = s / a; the last step, to sigma 0, is Euler's.
    Raises: ValueError naming grid if its first sigma is infinite.
    """
    if not math.isfinite(grid.sigma(0)):
        raise ValueError("grid begins without signal, at infinite sigma, where Heun's method cannot start")
    scaled = divided(x, grid.coefficients(0)[0])
    for k in range(len(grid)):
        sigma, sigma_after = grid.sigma(k), grid.sigma(k + 1)
        x0 = estimate_at(denoise, scaled * grid.coefficients(k)[0], k, grid, on_step).x0
        slope = divided(scaled - x0, sigma)
        euler = scaled + (sigma_after - sigma) * slope
        if k + 1 == len(grid):
            return euler
        x0_after = denoise(euler * grid.coefficients(k + 1)[0], k + 1).x0
        slope_after = divided(euler - x0_after, sigma_after)
        scaled = scaled + (sigma_after - sigma) * 0.5 * (slope + slope_after)
    return scaled


def consistency(
    denoise: Denoise, x: Tensor, grid: SamplingGrid, noise: NoiseOf, on_step: OnStep | None = None
) -> Tensor:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): the network's image, noised again to the next
    level, and so on; the last image is the answer.

    noise(k): standard normal like x for the step that leaves level k; not called at the last.
    """
    for k in range(len(grid)):
        x0 = estimate_at(denoise, x, k, grid, on_step).x0
        if k + 1 == len(grid):
            return x0
        a_after, s_after = grid.coefficients(k + 1)
        x = a_after * x0 + s_after * noise(k)
    return x


class NetDenoise:
    """A network as a `Denoise`: its target turned into image and noise, with guidance and clipping."""

    def __init__(
        self,
        net: Net,
        grid: SamplingGrid,
        objective: ObjectiveConfig,
        sampler: SamplerConfig,
        class_labels: Tensor | None = None,
        null_label: int | None = None,
    ) -> None:
        """class_labels: int64 (B,), or None. null_label: the label of "no class", needed for guidance.

        Raises: ValueError naming what the combination lacks.
        """
        if grid.alpha_bars[0] == 0 and objective.target == "eps":
            raise ValueError('target "eps" cannot start at a level without signal; train for "v" or "x0"')
        if sampler.guidance_scale != 1 and (class_labels is None or null_label is None):
            missing = (
                "class_labels" if class_labels is None else 'a network with a "no class" label (null_class)'
            )
            raise ValueError(f"guidance_scale {sampler.guidance_scale} needs {missing}")
        if sampler.variance == "learned" and objective.variance != "learned":
            raise ValueError('variance "learned" needs a network whose objective has it')
        self._net, self._grid, self._objective, self._sampler = net, grid, objective, sampler
        self._labels, self._null_label = class_labels, null_label
        # One dtype for all levels: a compiled network is compiled once.
        whole = all(float(t).is_integer() for t in grid.timesteps)
        self._time_dtype = torch.int64 if whole else torch.float32

    def __call__(self, x: Tensor, k: int) -> Denoised:
        a, s = self._grid.coefficients(k)
        target = self._objective.target
        prediction, fraction = self._predict(x, k)
        x0 = x0_of(target, prediction, x, a, s)
        if not self._sampler.clip_x0:
            return Denoised(x0, eps_of(target, prediction, x, a, s), fraction)
        x0 = x0.clamp(-1, 1)
        # The noise that agrees with the clipped image, else a DDIM step would leave the level it aims at.
        return Denoised(x0, eps_of("x0", x0, x, a, s), fraction)

    def _predict(self, x: Tensor, k: int) -> tuple[Tensor, Tensor | None]:
        t = torch.full((len(x),), self._grid.timesteps[k], dtype=self._time_dtype, device=x.device)
        scale = self._sampler.guidance_scale if self._guided(k) else 1.0
        output = guided_output(self._net, x, t, self._labels, self._null_label, scale)
        return split_output(output, x.shape[1], self._objective)

    def _guided(self, k: int) -> bool:
        interval = self._sampler.guidance_interval
        return interval is None or interval[0] <= self._grid.sigma(k) <= interval[1]


@torch.no_grad()
def sample(
    net: Net,
    schedule: NoiseSchedule,
    sampler: SamplerConfig,
    index: Tensor,
    shape: tuple[int, ...],
    seed: int,
    class_labels: Tensor | None = None,
    objective: ObjectiveConfig | None = None,
    on_step: OnStep | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Images of the given sample indices: float32 (B, *shape), in [-1, 1] where the sampler clips.

    index: int64 (B,), each sample's name, which with `seed` decides all its random numbers; shape: (C, H, W);
    class_labels: int64 (B,); objective: what the network predicts, by default DDPM's; device: where to run,
    by default index's. Guidance takes the "no class" label from the network's `null_label` attribute. Raises:
    ValueError naming the argument.
    """
    index = index if device is None else index.to(device)
    if class_labels is not None and class_labels.shape != index.shape:
        raise ValueError(
            f"class_labels must have shape {tuple(index.shape)}, not {tuple(class_labels.shape)}"
        )
    labels = None if class_labels is None else class_labels.to(index.device)
    grid = make_grid(schedule, sampler)
    null_label = getattr(net, "null_label", None)
    denoise = NetDenoise(net, grid, objective or ObjectiveConfig(), sampler, labels, null_label)

    def noise(k: int) -> Tensor:
        return normal(seed, Stream.SAMPLE_NOISE, index, shape, step=k + 1)

    x = normal(seed, Stream.SAMPLE_NOISE, index, shape, step=0)
    image = _sampled(denoise, x, grid, noise, sampler, on_step)
    # A last step that takes x to the estimate by a difference ("heun") may overshoot it by rounding.
    return image.clamp(-1, 1) if sampler.clip_x0 else image


def _sampled(
    denoise: Denoise,
    x: Tensor,
    grid: SamplingGrid,
    noise: NoiseOf,
    sampler: SamplerConfig,
    on_step: OnStep | None,
) -> Tensor:
    run: Sampler = sampler.definition.load()
    if is_own(SAMPLERS, sampler.kind):
        return run(denoise, x, grid, noise, sampler, on_step)
    return run_checked(run, denoise, x, grid, noise, sampler, on_step)


def run_ancestral(
    denoise: Denoise,
    x: Tensor,
    grid: SamplingGrid,
    noise: NoiseOf,
    settings: SamplerConfig,
    on_step: OnStep | None,
) -> Tensor:
    """`ancestral` as a `Sampler`."""
    return ancestral(denoise, x, grid, noise, settings.variance, on_step)


def run_ddim(
    denoise: Denoise,
    x: Tensor,
    grid: SamplingGrid,
    noise: NoiseOf,
    settings: SamplerConfig,
    on_step: OnStep | None,
) -> Tensor:
    """`ddim` as a `Sampler`."""
    return ddim(denoise, x, grid, noise, settings.eta, on_step)


def run_consistency(
    denoise: Denoise,
    x: Tensor,
    grid: SamplingGrid,
    noise: NoiseOf,
    settings: SamplerConfig,
    on_step: OnStep | None,
) -> Tensor:
    """`consistency` as a `Sampler`."""
    return consistency(denoise, x, grid, noise, on_step)


run_heun = as_sampler(heun)


def _reverse_std(variance: Variance, small: float, beta: float, estimate: Denoised) -> Tensor | float:
    if variance == "fixed-small":
        return math.sqrt(small)
    if variance == "fixed-large":
        return math.sqrt(beta)
    if estimate.fraction is None:
        raise ValueError('variance "learned" needs a network that predicts it')
    return torch.exp(0.5 * (estimate.fraction * math.log(beta) + (1 - estimate.fraction) * math.log(small)))
