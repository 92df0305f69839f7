"""The three things a network may predict, and the exact way from each to the image and the noise.

Throughout x_t = a x0 + s eps with a = sqrt(abar_t), s = sqrt(1 - abar_t); `a` and `s` are floats or tensors
that broadcast over the batch.
"""

from torch import Tensor

from ddpm_pipeline.config.diffusion import Target
from ddpm_pipeline.devices import divided

Coefficient = Tensor | float


def target_of(target: Target, x0: Tensor, eps: Tensor, a: Coefficient, s: Coefficient) -> Tensor:
    """What a network with this target should have predicted. All (B, ...)."""
    if target == "eps":
        return eps
    if target == "x0":
        return x0
    return a * eps - s * x0


def x0_of(target: Target, prediction: Tensor, x_t: Tensor, a: Coefficient, s: Coefficient) -> Tensor:
    """The image that a prediction at x_t stands for (Salimans & Ho 2022, section 4). All (B, ...)."""
    if target == "eps":
        return divided(x_t - s * prediction, a)
    if target == "x0":
        return prediction
    return a * x_t - s * prediction


def eps_of(target: Target, prediction: Tensor, x_t: Tensor, a: Coefficient, s: Coefficient) -> Tensor:
    """The noise that a prediction at x_t stands for. All (B, ...)."""
    if target == "eps":
        return prediction
    if target == "x0":
        return divided(x_t - a * prediction, s)
    return s * x_t + a * prediction
