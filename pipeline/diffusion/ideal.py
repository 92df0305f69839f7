"""A denoiser whose answer is known: the exact one for data from a mixture of Gaussians.

With it the whole reverse process can be checked against the truth, without training anything.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_pipeline.diffusion.sampler_protocol import Denoise, Denoised
from ddpm_pipeline.diffusion.schedule import NoiseSchedule
from ddpm_pipeline.diffusion.timesteps import SamplingGrid


@dataclass(frozen=True, eq=False)
class Mixture:
    """Isotropic Gaussians: weights (K,) summing to 1, means (K, D), standard deviations (K,), all float64."""

    weights: Tensor
    means: Tensor
    stds: Tensor

    def mean(self) -> Tensor:
        """Mean of the mixture, (D,)."""
        return self.weights @ self.means

    def covariance(self) -> Tensor:
        """Covariance of the mixture, (D, D)."""
        centred = self.means - self.mean()
        between = centred.T @ (self.weights[:, None] * centred)
        within = (self.weights * self.stds.square()).sum()
        return between + within * torch.eye(len(between), dtype=between.dtype)

    def expected_x0(self, x: Tensor, alpha_bar: Tensor | float) -> Tensor:
        """E[x0 | x_t = x], the output of a perfect network. x: (B, ...) with D values a sample.

        Bayes' rule by component: x_t given component k is N(a mu_k, a^2 v_k + s^2), and x0 given both is the
        precision-weighted mean; the components are weighed by how well they explain x.
        """
        signal = torch.as_tensor(alpha_bar, dtype=torch.float64)
        a, s2 = signal.sqrt(), 1 - signal
        flat = x.double().flatten(1)[:, None]
        variance = self.stds.square()
        spread = signal * variance + s2
        away = flat - a * self.means
        log_likelihood = -0.5 * away.square().sum(-1) / spread - 0.5 * flat.shape[-1] * spread.log()
        share = torch.softmax(self.weights.log() + log_likelihood, dim=1)
        each = self.means + (a * variance / spread)[:, None] * away
        return (share[..., None] * each).sum(1).reshape(x.shape).to(x.dtype)

    def denoise(self, grid: SamplingGrid) -> Denoise:
        """The perfect denoiser over the levels of `grid`."""

        def estimate(x: Tensor, k: int) -> Denoised:
            a, s = grid.coefficients(k)
            x0 = self.expected_x0(x, grid.alpha_bars[k])
            return Denoised(x0, (x - a * x0) / s)

        return estimate

    def net(self, schedule: NoiseSchedule) -> Callable[..., Tensor]:
        """The perfect noise prediction network, for whole or fractional timesteps, the same for a whole batch."""
        log_sigmas = 0.5 * ((1 - schedule.alpha_bars) / schedule.alpha_bars).log()

        def predict(x: Tensor, t: Tensor, **_: object) -> Tensor:
            place = float(t[0])
            low = min(int(place), schedule.T - 2) if schedule.T > 1 else 0
            high = min(low + 1, schedule.T - 1)
            log_sigma = float(torch.lerp(log_sigmas[low], log_sigmas[high], place - low))
            signal = 1 / (1 + math.exp(2 * log_sigma))
            return (x - math.sqrt(signal) * self.expected_x0(x, signal)) / math.sqrt(1 - signal)

        return predict


def three_blobs() -> Mixture:
    """A mixture in the plane for tests and figures: three unequal blobs, two of them close."""
    return Mixture(
        weights=torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
        means=torch.tensor([[-0.6, -0.4], [0.5, 0.6], [0.7, 0.1]], dtype=torch.float64),
        stds=torch.tensor([0.15, 0.1, 0.2], dtype=torch.float64),
    )
