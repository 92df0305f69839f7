"""Settings of distillation: how a model of many steps teaches one of few."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ddpm_pipeline.config.base import Settings, refuse_idle
from ddpm_pipeline.config.diffusion import SamplerConfig
from ddpm_pipeline.config.model_card import PairsInfo

Divisor = Annotated[int, Field(ge=1, le=1_000_000)]


class ConsistencyLossConfig(Settings):
    """The loss: a student's images at two levels t > r of one trajectory should be equal (Song et al. 2023, eq. 7)."""

    follow: Literal["teacher", "noise"] = "teacher"
    """How x_r follows from x_t. "teacher": by a step of the teacher's sampler, guided (consistency distillation).
    "noise": by the same image and noise, without a teacher (Geng et al. 2024, eq. 12, consistency tuning), which learns
    the unguided data."""
    divisors: tuple[Divisor, ...] = Field(default=(4, 8, 16, 32), min_length=1)
    """How far r is from t: this part of the way to the clean image, (t + 1) / divisor, rounded up. The divisors follow
    each other in equal parts of the distillation, coarse to fine (Geng et al. 2024: powers of q)."""
    huber: float = Field(default=0.00054, gt=0)
    """c of the pseudo-Huber distance sqrt(d^2 + c^2 D) - c sqrt(D) of images of D numbers. The value of Song & Dhariwal
    2023, section 3.3."""


class DistillationConfig(Settings):
    """How a teacher, the model that `init_from` names, teaches a model of few steps."""

    sampler: SamplerConfig
    """The teacher's sampler, whose guidance and clipping the student learns."""
    loss: ConsistencyLossConfig = ConsistencyLossConfig()
    pairs: PairsInfo | None = None
    """The generation that the training's images are, if they are one: the noise of each is known."""
    pair_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the images that are learned from their own noise, with the image as the target at every level."""

    @model_validator(mode="after")
    def _only_settings_that_act(self) -> Self:
        if self.pairs is None:
            refuse_idle(self, ("pair_share",), "without pairs")
        return self

    @property
    def method(self) -> str:
        """For people: how the student was taught."""
        consistency = "consistency distillation" if self.loss.follow == "teacher" else "consistency tuning"
        if self.pair_share == 1:
            return "regression on pairs"
        return consistency + (f", {self.pair_share:.0%} regression on pairs" if self.pair_share else "")
