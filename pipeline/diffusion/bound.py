"""The variational bound on the negative log-likelihood, term by term, in bits per dimension.

L = L_T + sum over t of L_{t-1} (DDPM eq. 5): the prior's distance, a Kullback-Leibler divergence between two
Gaussians for each step, and at the clean end the likelihood of the pixel levels themselves.
"""

import math

import torch
from torch import Tensor

from ddpm_pipeline.config.diffusion import Variance
from ddpm_pipeline.devices import divided
from ddpm_pipeline.diffusion.schedule import Gaussian, NoiseSchedule

# Half the distance between neighbouring levels of u / 127.5 - 1.
_HALF_LEVEL = 1.0 / 255.0


def model_distribution(
    schedule: NoiseSchedule,
    variance: Variance,
    x_t: Tensor,
    t: Tensor,
    x0_hat: Tensor,
    fraction: Tensor | None = None,
) -> Gaussian:
    """p(x_{t-1} | x_t): the posterior's mean at the network's image, with a fixed or learned variance.

    x_t, x0_hat: (B, ...); t: (B,). fraction: (B, ...), needed for "learned": the log variance is
    fraction log beta_t + (1 - fraction) log posterior variance (improved DDPM eq. 15).
    """
    mean = schedule.posterior_mean(x0_hat, x_t, t)
    if variance == "learned":
        if fraction is None:
            raise ValueError('fraction is needed for variance "learned"')
        small, large = schedule.log_variance("fixed-small", t, x_t), schedule.log_beta(t, x_t)
        log_variance = fraction * large + (1 - fraction) * small
    else:
        log_variance = schedule.log_variance(variance, t, x_t)
    return Gaussian(mean, log_variance.exp(), log_variance)


def vlb_term(
    schedule: NoiseSchedule,
    variance: Variance,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    x0_hat: Tensor,
    fraction: Tensor | None = None,
) -> Tensor:
    """L_t of the bound for each sample, bits per dimension, (B,).

    For t > 0 the divergence KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); for t = 0 minus the log
    probability of the levels of x0, which are u / 127.5 - 1.
    """
    model = model_distribution(schedule, variance, x_t, t, x0_hat, fraction)
    truth = schedule.posterior(x0, x_t, t)
    # At t = 0 the truth has no variance; that row is replaced below and must not carry an infinity there.
    first = (t == 0).reshape(-1, *[1] * (x0.ndim - 1)).to(x0.device)
    safe_log = torch.where(first, model.log_variance, truth.log_variance)
    divergence = gaussian_kl(truth.mean, safe_log, model.mean, model.log_variance)
    nats = torch.where(first, -level_log_probability(x0, model.mean, model.log_variance), divergence)
    return divided(nats.flatten(1).mean(1), math.log(2))


def prior_term(schedule: NoiseSchedule, x0: Tensor) -> Tensor:
    """L_T: KL(q(x_T | x_0) || N(0, 1)) in bits per dimension, (B,)."""
    last = schedule.T - 1
    mean = schedule.gather(schedule.alpha_bars.sqrt(), last, x0) * x0
    log_variance = schedule.gather((1 - schedule.alpha_bars).log(), last, x0)
    zero = torch.zeros_like(x0)
    return divided(gaussian_kl(mean, log_variance, zero, zero).flatten(1).mean(1), math.log(2))


def gaussian_kl(mean_p: Tensor, log_var_p: Tensor, mean_q: Tensor, log_var_q: Tensor) -> Tensor:
    """KL(N(mean_p, var_p) || N(mean_q, var_q)), elementwise, in nats."""
    difference = log_var_p - log_var_q
    # expm1 keeps the digits of nearly equal variances: (e^d - 1 - d) instead of the difference of large
    # terms.
    return 0.5 * (torch.expm1(difference) - difference + (mean_p - mean_q).square() * torch.exp(-log_var_q))


def level_log_probability(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log probability, in nats, of each pixel's level under N(mean, variance) (DDPM eq. 13).

    A level owns the interval half way to its neighbours; the lowest and highest own the tails. Computed in
    float64 through log cdfs, so that no probability underflows; returned in x0's dtype.
    """
    inverse_std = torch.exp(-0.5 * log_variance.double())
    centred = x0.double() - mean.double()
    upper = (centred + _HALF_LEVEL) * inverse_std
    lower = (centred - _HALF_LEVEL) * inverse_std
    # In the upper tail cdfs are all 1: look at the mirrored interval in the lower tail instead.
    mirror = centred > 0
    high = torch.special.log_ndtr(torch.where(mirror, -lower, upper))
    low = torch.special.log_ndtr(torch.where(mirror, -upper, lower))
    inside = high + torch.log1p(-torch.exp(low - high))
    lowest, highest = x0 < -1 + _HALF_LEVEL, x0 > 1 - _HALF_LEVEL
    outer = torch.special.log_ndtr(torch.where(lowest, upper, -lower))
    return torch.where(lowest | highest, outer, inside).to(x0.dtype)
