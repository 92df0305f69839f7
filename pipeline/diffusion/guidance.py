"""Classifier-free guidance (Ho & Salimans 2022): away from what the same network predicts without a class."""

import torch
from torch import Tensor

from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.diffusion.objective import Net, call_net


def guided_output(
    net: Net, x: Tensor, t: Tensor, class_labels: Tensor | None, null_label: int | None, scale: Tensor | float
) -> Tensor:
    """The network's output (B, C or 2C, H, W) at x (B, C, H, W) and timesteps t (B,), its prediction guided.

    class_labels: int64 (B,); without them, and where scale is the number 1, the network is evaluated once, otherwise
    with and without the class in one batch. scale: w, a number or (B, 1, 1, 1). A learned variance is that of the
    output with class.
    """
    if class_labels is None or (not isinstance(scale, Tensor) and scale == 1):
        return call_net(net, x, t, class_labels=class_labels)
    labels = torch.cat([class_labels, torch.full_like(class_labels, null_label or 0)])
    both = call_net(net, torch.cat([x, x]), torch.cat([t, t]), class_labels=labels)
    with_class, without = both.chunk(2)
    channels = x.shape[1]
    prediction, variance = with_class[:, :channels], with_class[:, channels:]
    base = without[:, :channels]
    # x0, eps and v are affine in one another at a given x_t, so guiding any of them guides eps.
    guided = base + scale * (prediction - base)
    return torch.cat([guided, variance], dim=1) if variance.shape[1] else guided


def guiding_scale(sampler: SamplerConfig, sigma: Tensor) -> Tensor | float:
    """The scale at noise levels sigma (B, 1, 1, 1): the sampler's within its interval, and 1 outside."""
    scale, interval = sampler.guidance_scale, sampler.guidance_interval
    if interval is None:
        return scale
    return torch.where((interval[0] <= sigma) & (sigma <= interval[1]), scale, 1.0)
