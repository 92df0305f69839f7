"""Settings of `ddpm distill`: a few-step model from a trained one."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from ddpm_pipeline.config.data import DataConfig
from ddpm_pipeline.config.diffusion import ObjectiveConfig, SamplerConfig, check_together
from ddpm_pipeline.config.distillation import ConsistencyLossConfig, DistillationConfig
from ddpm_pipeline.config.model_card import ModelCard, PairsInfo
from ddpm_pipeline.config.training import GridConfig, TrainConfig, TrainingSettings

DETERMINISTIC = ("ddim", "dpm++2m", "dpm++3m", "unipc", "heun")


class DistillConfig(TrainingSettings):
    """A distillation: a training whose network, schedule and first weights are the teacher's."""

    teacher: str = Field(min_length=1)
    """The model to learn from: `name@alias`, `name/3`, or a directory. An alias means what it means when the command is
    started; write a version to be able to go on later."""
    sampler: SamplerConfig = SamplerConfig(kind="dpm++2m", num_steps=20)
    """The teacher's sampler. Its guidance and clipping are baked into the student; its images are those that run page
    and eval/loss compare the student with. It must be deterministic."""
    data: DataConfig | None = None
    """The data set to noise. None = the images of `pairs`."""
    pairs: str | None = None
    """Prefix of a finished generation of the teacher by a deterministic sampler: pairs of noise, which is computed from
    the seed, and image. It is verified first. None = images and noise are independent."""
    pair_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """With `pairs`: share of the images that are learned from their own noise, with the image as the target; the others
    are noised anew."""
    loss: ConsistencyLossConfig = ConsistencyLossConfig()
    grid: GridConfig = GridConfig(sampler=SamplerConfig(kind="consistency", num_steps=2))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.data is None) == (self.pairs is None):
            raise ValueError("name the images to learn with: data, or pairs, and not both")
        if self.timesteps.importance:
            raise ValueError("timesteps.importance: all levels of a student have one weight; leave it out")
        if self.sampler.draws_noise:
            raise ValueError(
                f'sampler of kind "{self.sampler.kind}" draws noise, so one noise has many images; use '
                f"{', '.join(DETERMINISTIC)} with eta 0"
            )
        return self

    def training(self, card: ModelCard, data: DataConfig, pairs: PairsInfo | None) -> TrainConfig:
        """The training of the student of the teacher with this card, on these images.

        The student predicts v whatever its teacher predicts: then the image stays determined where hardly any signal is
        left, at the level where sampling begins. Raises UserError for a sampler that the teacher cannot do.
        """
        check_together(card.schedule, card.objective, self.sampler, card.net)
        share = self.pair_share if pairs is not None else 0.0
        shared = {name: getattr(self, name) for name in TrainingSettings.model_fields}
        own = {
            "data": data,
            "net": card.net,
            "schedule": card.schedule,
            "objective": ObjectiveConfig(target="v", variance=card.objective.variance),
            "init_from": self.teacher,
            "distillation": DistillationConfig(
                sampler=self.sampler, loss=self.loss, pairs=pairs, pair_share=share
            ),
        }
        return TrainConfig.model_validate(shared | own)
