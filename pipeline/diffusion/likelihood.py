"""The whole variational bound of a network on given images."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_pipeline.config.diffusion import ObjectiveConfig
from ddpm_pipeline.diffusion.bound import prior_term, vlb_term
from ddpm_pipeline.diffusion.noise import Stream, normal
from ddpm_pipeline.diffusion.objective import Net, call_net, split_output
from ddpm_pipeline.diffusion.schedule import NoiseSchedule
from ddpm_pipeline.diffusion.targets import x0_of


class Bound(NamedTuple):
    """The bound of B images in bits per dimension."""

    total: Tensor
    """float32 (B,): the prior's term and all others; below it lies the images' negative log-likelihood."""
    prior: Tensor
    """float32 (B,): L_T, which no training changes."""
    terms: Tensor
    """float32 (B, T): L_0, the likelihood of the pixel levels, to L_{T-1}."""


@torch.no_grad()
def bits_per_dim(
    schedule: NoiseSchedule,
    objective: ObjectiveConfig,
    net: Net,
    x0: Tensor,
    index: Tensor,
    seed: int,
    class_labels: Tensor | None = None,
    clip_x0: bool = True,
) -> Bound:
    """Every term of the bound, with one network evaluation for each of the T steps (DDPM section 4.3).

    x0: float (B, C, H, W), levels u / 127.5 - 1; index: int64 (B,), the images' names, which with `seed` decide the
    noise; clip_x0: cut the network's image to [-1, 1], as all true ones are. Each term is a Monte Carlo estimate
    from one noise; the mean over images is unbiased.
    """
    schedule = schedule.to(x0.device)
    terms: list[Tensor] = []
    for step in range(schedule.T):
        t = torch.full((len(x0),), step, dtype=torch.int64, device=x0.device)
        noise = normal(seed, Stream.EVALUATE_NOISE, index.to(x0.device), tuple(x0.shape[1:]), step=step)
        x_t = schedule.add_noise(x0, noise, t)
        output = call_net(net, x_t, t, class_labels=class_labels)
        prediction, fraction = split_output(output, x0.shape[1], objective)
        a, s = (
            math.sqrt(float(value)) for value in (schedule.alpha_bars[step], 1 - schedule.alpha_bars[step])
        )
        x0_hat = x0_of(objective.target, prediction, x_t, a, s)
        x0_hat = x0_hat.clamp(-1, 1) if clip_x0 else x0_hat
        terms.append(vlb_term(schedule, objective.variance, x0, x_t, t, x0_hat, fraction))
    prior, stacked = prior_term(schedule, x0), torch.stack(terms, dim=1)
    return Bound(prior + stacked.sum(1), prior, stacked)
