"""Multistep solvers, of second and third order in the half log signal-to-noise ratio, lambda = log(a / s).

Each evaluates the network once a step and reuses the estimates of the steps before. The first steps have fewer of
those and so a lower order; the last step ends at lambda = inf, where extrapolation has no meaning and the estimate
itself is the answer.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_pipeline.diffusion.sampler_protocol import Denoise, OnStep, as_sampler, estimate_at
from ddpm_pipeline.diffusion.timesteps import SamplingGrid

ORDER = 3


class _Estimate(NamedTuple):
    """An estimate of the image, and lambda of the level where it was made."""

    x0: Tensor
    log_snr: float


def dpm_solver_pp_2m(
    denoise: Denoise, x: Tensor, grid: SamplingGrid, on_step: OnStep | None = None
) -> Tensor:
    """DPM-Solver++(2M), data prediction (Lu et al. 2022, algorithm 2); first and last step are of first
    order.

    h is the increase of lambda, D = x0 extrapolated over half a step from this and the previous estimate.
    """
    previous: Tensor | None = None
    previous_h = 0.0
    for k in range(len(grid)):
        data = x0 = estimate_at(denoise, x, k, grid, on_step).x0
        h = grid.half_log_snr(k + 1) - grid.half_log_snr(k)
        # A schedule of one step has one sigma, however many "karras" asks for: then there is nothing to extrapolate.
        if previous is not None and previous_h > 0 and k + 1 < len(grid):
            # 1 / (2r), r = h_previous / h; zero after a level without signal, whose h is infinite.
            extrapolate = h / (2 * previous_h)
            data = (1 + extrapolate) * x0 - extrapolate * previous
        x = _first_order(x, grid, k + 1, data)
        previous, previous_h = x0, h
    return x


def dpm_solver_pp_3m(
    denoise: Denoise, x: Tensor, grid: SamplingGrid, on_step: OnStep | None = None
) -> Tensor:
    """DPM-Solver++(3M), data prediction: the multistep form of Lu et al. 2022 with the first two differences.

    x: (B, C, H, W) at the grid's first level.
    """
    past: list[_Estimate] = []
    for k in range(len(grid)):
        now = _Estimate(estimate_at(denoise, x, k, grid, on_step).x0, grid.half_log_snr(k))
        h = grid.half_log_snr(k + 1) - now.log_snr
        x = _first_order(x, grid, k + 1, now.x0)
        if past and h > 0 and k + 1 < len(grid):
            x = x + grid.coefficients(k + 1)[0] * _higher_orders(now, past, h)
        past = _remembered(past, now)
    return x


def _higher_orders(now: _Estimate, past: list[_Estimate], h: float) -> Tensor:
    """What the differences of one or more earlier estimates add to a step of first order over h."""
    slope = _slope(now, past[0])
    if len(past) == 1:
        # Lu et al.'s 2M takes half of the first phi function's argument: the same to second order.
        return -math.expm1(-h) * 0.5 * h * slope
    first = h * slope
    r0, r1 = (now.log_snr - past[0].log_snr) / h, (past[0].log_snr - past[1].log_snr) / h
    curve = (first - h * _slope(past[0], past[1])) / (r0 + r1)
    phi_2 = math.expm1(-h) / h + 1
    phi_3 = (math.expm1(-h) + h) / h**2 - 0.5
    return phi_2 * (first + r0 * curve) - phi_3 * curve


def unipc(denoise: Denoise, x: Tensor, grid: SamplingGrid, on_step: OnStep | None = None) -> Tensor:
    """UniPC-3, data prediction, B(h) = exp(h) - 1 (Zhao et al. 2023, algorithms 5 and 6).

    The estimate at a level first corrects the step that led there, then predicts the next one: no evaluation more.
    x: (B, C, H, W) at the grid's first level.
    """
    past: list[_Estimate] = []
    before, order = x, 0
    for k in range(len(grid)):
        now = _Estimate(estimate_at(denoise, x, k, grid, on_step).x0, grid.half_log_snr(k))
        if past:
            x = _uni_step(before, grid, k, past, order, corrected_by=now)
        past = _remembered(past, now)
        order = min(len(past), len(grid) - k)
        before = x
        x = _uni_step(x, grid, k + 1, past, order) if past else _first_order(x, grid, k + 1, now.x0)
    return x


def _uni_step(
    x: Tensor,
    grid: SamplingGrid,
    k: int,
    past: list[_Estimate],
    order: int,
    corrected_by: _Estimate | None = None,
) -> Tensor:
    """From x at level k - 1, the estimates of which `past` begins with, to level k.

    corrected_by: the estimate at level k, where that was predicted already.
    """
    last = past[0]
    first_order = _first_order(x, grid, k, last.x0)
    h = grid.half_log_snr(k) - last.log_snr
    if h == 0:  # "karras" levels of a schedule of one step are all the same
        return first_order
    points = [((one.log_snr - last.log_snr) / h, one.x0 - last.x0) for one in past[1:order]]
    if corrected_by is not None:
        points.append((1.0, corrected_by.x0 - last.x0))
    if not points:
        return first_order
    weights = _uni_weights([r for r, _ in points], h)
    differences = sum(w / r * d for w, (r, d) in zip(weights, points, strict=True))
    return first_order - grid.coefficients(k)[0] * math.expm1(-h) * differences


def _uni_weights(ratios: list[float], h: float) -> list[float]:
    """Weights of the differences at `ratios` of h (Zhao et al. 2023, eq. 5), those of the paper where one is left."""
    if len(ratios) == 1:
        return [0.5]
    phi, factorial, right = math.expm1(-h) / -h - 1, 1, list[float]()
    for power in range(1, len(ratios) + 1):
        right.append(phi * factorial / math.expm1(-h))
        factorial *= power + 1
        phi = phi / -h - 1 / factorial
    powers = torch.tensor(ratios, dtype=torch.float64) ** torch.arange(len(ratios))[:, None]
    return torch.linalg.solve(powers, torch.tensor(right, dtype=torch.float64)).tolist()


def _first_order(x: Tensor, grid: SamplingGrid, k: int, x0: Tensor) -> Tensor:
    """DDIM's step from level k - 1 to level k."""
    (_, s_now), (a_after, s_after) = grid.coefficients(k - 1), grid.coefficients(k)
    h = grid.half_log_snr(k) - grid.half_log_snr(k - 1)
    return (s_after / s_now) * x - a_after * math.expm1(-h) * x0


def _slope(later: _Estimate, earlier: _Estimate) -> Tensor:
    return (later.x0 - earlier.x0) / (later.log_snr - earlier.log_snr)


def _remembered(past: list[_Estimate], now: _Estimate) -> list[_Estimate]:
    """The newest estimates first, each of another level. One without signal has no finite lambda to start from."""
    if not math.isfinite(now.log_snr):
        return past
    others = [one for one in past if one.log_snr != now.log_snr]
    return [now, *others][:ORDER]


run_dpm_solver_pp_2m = as_sampler(dpm_solver_pp_2m)
run_dpm_solver_pp_3m = as_sampler(dpm_solver_pp_3m)
run_unipc = as_sampler(unipc)
