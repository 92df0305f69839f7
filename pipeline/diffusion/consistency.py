"""Consistency distillation: a network learns to go from any level to the clean image in one evaluation.

f(x_t, t) is the image that a prediction stands for (`x0_of`); for target "v" that is the parametrization of EDM with
sigma_data 1, and of TrigFlow (Lu & Song 2024), so f(x, clean) = x holds by itself. The loss asks that f agrees at two
levels t > r of one trajectory of the teacher's ODE (Song et al. 2023, eq. 7), the later one without gradient. Levels
are the schedule's own: entries 0..T-1, and -1 for the clean image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_pipeline.config.diffusion import ObjectiveConfig, SamplerConfig
from ddpm_pipeline.config.distillation import ConsistencyLossConfig
from ddpm_pipeline.diffusion.guidance import guided_output, guiding_scale
from ddpm_pipeline.diffusion.objective import LossTerms, Net, call_net, split_output
from ddpm_pipeline.diffusion.schedule import NoiseSchedule
from ddpm_pipeline.diffusion.targets import eps_of, x0_of


@dataclass(frozen=True)
class Teacher:
    """The network whose ODE a student learns to follow, with the guidance and clipping of its sampler."""

    net: Net
    objective: ObjectiveConfig
    sampler: SamplerConfig
    null_label: int | None

    @torch.no_grad()
    def step(
        self, schedule: NoiseSchedule, x: Tensor, t: Tensor, r: Tensor, class_labels: Tensor | None
    ) -> Tensor:
        """x_r (B, C, H, W) by one DDIM step (Song et al. 2021, eq. 12 with sigma 0) from x at timesteps t, int64 (B,).

        r: int64 (B,), below t; -1 is the clean image.
        """
        a, s = schedule.coefficients(t, x)
        scale = guiding_scale(self.sampler, s / a) if class_labels is not None else 1.0
        output = guided_output(self.net, x, t, class_labels, self.null_label, scale)
        prediction, _ = split_output(output, x.shape[1], self.objective)
        x0 = x0_of(self.objective.target, prediction, x, a, s)
        if self.sampler.clip_x0:
            x0 = x0.clamp(-1, 1)
        eps = eps_of("x0", x0, x, a, s)
        a_r, s_r = _coefficients(schedule, r, x)
        return a_r * x0 + s_r * eps


def consistency_loss(
    schedule: NoiseSchedule,
    config: ConsistencyLossConfig,
    objective: ObjectiveConfig,
    net: Net,
    teacher: Teacher,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    divisor: Tensor | None,
    class_labels: Tensor | None = None,
    dropout: object | None = None,
) -> LossTerms:
    """Distance between the student's images at timesteps t, int64 (B,), and at r = t - ceil((t + 1) / divisor).

    x0: float (B, C, H, W) in [-1, 1]; noise: like x0; divisor: int64 (B,). Where it is 1, r is the clean image and x0
    the target; None means 1 everywhere, and saves the evaluations that only the target needs. Both evaluations of the
    student share their dropout masks. The squared error is one of v.
    """
    a, s = schedule.coefficients(t, x0)
    x_t = a * x0 + s * noise
    image = _image(objective, net, x_t, t, a, s, class_labels, dropout)
    target = x0
    if divisor is not None:
        with torch.no_grad():
            r = earlier(t, divisor)
            a_r, s_r = _coefficients(schedule, r, x0)
            x_r = a_r * x0 + s_r * noise
            if config.follow == "teacher":
                x_r = torch.where(_rows(r < 0, x0), x0, teacher.step(schedule, x_t, t, r, class_labels))
            target = _image(objective, net, x_r, r.clamp(min=0), a_r, s_r, class_labels, dropout)
            if teacher.sampler.clip_x0:
                target = target.clamp(-1, 1)
    error = ((image - target) / s).square().flatten(1)
    c = config.huber * error.shape[1] ** 0.5
    distance = (error.sum(1) + c**2).sqrt() - c
    # With the 1 / s above, an error of the image has weight 1 / s^2 = 1 + SNR (Geng et al. 2024, for data of variance
    # 1): levels near the image come first, because those above learn from them.
    return LossTerms(distance / s.flatten(), error.mean(1), None)


def earlier(t: Tensor, divisor: Tensor) -> Tensor:
    """The level r below timesteps t, int64 (B,): nearer to the clean image, -1, which it is for divisor 1."""
    return t - (t + divisor) // divisor


def _image(
    objective: ObjectiveConfig,
    net: Net,
    x: Tensor,
    t: Tensor,
    a: Tensor,
    s: Tensor,
    class_labels: Tensor | None,
    dropout: object | None,
) -> Tensor:
    output = call_net(net, x, t, class_labels=class_labels, dropout=dropout)
    prediction, _ = split_output(output, x.shape[1], objective)
    return x0_of(objective.target, prediction, x, a, s)


def _coefficients(schedule: NoiseSchedule, r: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The same as `NoiseSchedule.coefficients`, with 1 and 0 at the clean image, level -1."""
    a, s = schedule.coefficients(r.clamp(min=0), like)
    clean = _rows(r < 0, like)
    return a.masked_fill(clean, 1.0), s.masked_fill(clean, 0.0)


def _rows(flags: Tensor, like: Tensor) -> Tensor:
    """bool (B,), shaped to broadcast over `like` (B, ...)."""
    return flags.reshape(-1, *[1] * (like.ndim - 1))
