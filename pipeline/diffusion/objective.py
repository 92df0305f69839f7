"""The training loss: the target of the network's prediction at x_t, and the weight of each error."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ddpm_pipeline.config.diffusion import ObjectiveConfig
from ddpm_pipeline.diffusion.bound import vlb_term
from ddpm_pipeline.diffusion.schedule import NoiseSchedule, check_same_shape
from ddpm_pipeline.diffusion.targets import target_of, x0_of


class Net(Protocol):
    """Anything callable as a diffusion network: (B, C, H, W) noisy images and (B,) timesteps to a prediction.

    The prediction has C channels, or 2C where the variance is learned. Labels and dropout keys are passed by
    keyword and only when there are any.
    """

    def __call__(self, x: Tensor, t: Tensor, /, **conditions: object) -> Tensor: ...


class LossTerms(NamedTuple):
    """Losses of a batch, float32, shape (B,) each; means over the batch are left to the caller."""

    per_sample: Tensor
    """What to minimise: the weighted squared error plus, with a learned variance, the weighted bound."""
    squared_error: Tensor
    """Mean squared error of the prediction, unweighted."""
    vlb_bits: Tensor | None
    """This timestep's term of the bound in bits per dimension, times T; None where the variance is fixed."""


def training_loss(
    schedule: NoiseSchedule,
    objective: ObjectiveConfig,
    net: Net,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    class_labels: Tensor | None = None,
    dropout: object | None = None,
    weight: float | None = None,
) -> LossTerms:
    """Loss of a batch at given timesteps and noise (DDPM eq. 14; improved DDPM eq. 16 with a learned
    variance).

    x0: float (B, C, H, W) in [-1, 1]; t: int64 (B,) in 0..T-1; noise: like x0; class_labels: int64 (B,); weight: of
    every error, in place of the objective's by timestep (see `TimestepDraw`).
    Raises: ValueError naming the argument, also for an output of the wrong number of channels.
    """
    if t.shape != x0.shape[:1]:
        raise ValueError(f"t must have shape ({len(x0)},), not {tuple(t.shape)}")
    check_same_shape("noise", noise, x0)
    a, s = schedule.coefficients(t, x0)
    x_t = a * x0 + s * noise  # `add_noise`
    output = call_net(net, x_t, t, class_labels=class_labels, dropout=dropout)
    prediction, fraction = split_output(output, x0.shape[1], objective)
    error = (prediction - target_of(objective.target, x0, noise, a, s)).square().flatten(1).mean(1)
    per_sample = error if weight is None else weight * error
    if weight is None and objective.weighting != "uniform":
        per_sample = loss_weight(schedule, objective, t).to(error.device) * error
    if fraction is None:
        return LossTerms(per_sample, error, None)
    # The bound teaches the variance only; through the mean it would drown L_simple (improved DDPM, section
    # 3.1).
    x0_hat = x0_of(objective.target, prediction.detach(), x_t, a, s)
    vlb_bits = schedule.T * vlb_term(schedule, "learned", x0, x_t, t, x0_hat, fraction)
    return LossTerms(per_sample + objective.vlb_weight * vlb_bits, error, vlb_bits)


def loss_weight(schedule: NoiseSchedule, objective: ObjectiveConfig, t: Tensor) -> Tensor:
    """Weight of the squared error at timesteps t (B,), float32 (B,).

    min-SNR-gamma (Hang et al. 2023, section 3.4) is min(SNR, gamma) on the error of x0; the errors of eps and
    v are SNR and SNR + 1 times as large, so theirs is divided by that.
    """
    if objective.weighting == "uniform":
        return torch.ones(t.shape, dtype=torch.float32, device=t.device)
    snr = schedule.snr(t)
    capped = snr.clamp(max=objective.min_snr_gamma)
    if objective.target == "eps":
        # capped / snr, and its limit 1 where a terminal SNR is exactly 0.
        weight = torch.where(snr > objective.min_snr_gamma, objective.min_snr_gamma / snr, 1.0)
    elif objective.target == "v":
        weight = capped / (snr + 1)
    else:
        weight = capped
    return weight.to(torch.float32)


def call_net(net: Net, x: Tensor, t: Tensor, **conditions: object) -> Tensor:
    """The network's output, (B, C or 2C, H, W), in x's dtype: everything around the network stays in full
    precision."""
    given = {name: value for name, value in conditions.items() if value is not None}
    return net(x, t, **given).to(x.dtype)


def split_output(output: Tensor, channels: int, objective: ObjectiveConfig) -> tuple[Tensor, Tensor | None]:
    """The prediction (B, C, ...) and, where the variance is learned, the log-variance fraction in 0..1 (B, C,
    ...).

    Raises: ValueError naming the output if it has not C (2C where the variance is learned) channels.
    """
    learned = objective.variance == "learned"
    expected = channels * (2 if learned else 1)
    if output.shape[1] != expected:
        raise ValueError(
            f"the network's output has {output.shape[1]} channels, expected {expected} "
            f'for {channels}-channel images and variance "{objective.variance}"'
        )
    if not learned:
        return output, None
    prediction, raw = output.chunk(2, dim=1)
    return prediction, (raw + 1) / 2
